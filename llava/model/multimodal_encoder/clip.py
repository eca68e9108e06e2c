"""The vision half of CLIP."""

from __future__ import annotations

from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from llava.model.multimodal_encoder.base import TOWERS
from llava.model.multimodal_encoder.hf_tower import HuggingFaceTower


@TOWERS.register("clip_vision_model")
class ClipTower(HuggingFaceTower):
    """The vision half of CLIP. Its norm before the first layer belongs to the embeddings and stays."""

    final_norm = "post_layernorm"
    num_class_tokens = 1
    asks_to_interpolate = True
    image_mean = tuple(OPENAI_CLIP_MEAN)
    image_std = tuple(OPENAI_CLIP_STD)
