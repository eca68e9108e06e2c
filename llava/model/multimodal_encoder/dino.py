"""The DINO family: DINOv2 with and without registers, and the vision transformers of DINOv3."""

from __future__ import annotations

from llava.model.multimodal_encoder.base import TOWERS
from llava.model.multimodal_encoder.hf_tower import HuggingFaceTower


@TOWERS.register("dinov2")
@TOWERS.register("dinov2_with_registers")
class DinoV2Tower(HuggingFaceTower):
    """The mask token stands in for patches that pretraining hides."""

    final_norm = "layernorm"
    num_class_tokens = 1
    unused_parameters = ("mask_token",)


@TOWERS.register("dinov3_vit")
class DinoV3Tower(DinoV2Tower):
    """In training its rotary positions are scaled at random, as its configuration says."""

    final_norm = "norm"
