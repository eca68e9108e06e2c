"""Resamplers: from patch features of frames to the tokens of an image or a video."""

from llava.model.multimodal_resampler import perceiver, pooling, qformer, token_packer
from llava.model.multimodal_resampler.base import RESAMPLERS, Resampler, build_resampler

__all__ = [
    "RESAMPLERS",
    "Resampler",
    "build_resampler",
    "perceiver",
    "pooling",
    "qformer",
    "token_packer",
]
