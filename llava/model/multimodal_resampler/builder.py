"""Chooses a resampler by name."""

from __future__ import annotations

from llava.config import VisionConfig
from llava.model.multimodal_resampler import (  # noqa: F401  (they register themselves)
    perceiver,
    pooling,
    qformer,
    token_packer,
)
from llava.model.multimodal_resampler.base import RESAMPLERS, Resampler


def build_resampler(vision: VisionConfig, hidden_size: int) -> Resampler | None:
    """Build the resampler that ``vision.resampler_type`` names, or None when it names none.

    Args:
        vision: type, latents, grid and inner width.
        hidden_size: width of the features that come in and go out.
    """
    if vision.resampler_type is None:
        return None
    return RESAMPLERS.get(vision.resampler_type)(vision, hidden_size)


def structural_settings(vision: VisionConfig) -> tuple[str, ...]:
    """The settings that decide which parameters the resampler of ``vision`` has."""
    return () if vision.resampler_type is None else RESAMPLERS.get(vision.resampler_type).structure
