"""The DINO family: DINOv2 with and without registers, and the vision transformers of DINOv3."""

from __future__ import annotations

from llava.model.multimodal_encoder.base import TOWERS
from llava.model.multimodal_encoder.hf_tower import HuggingFaceTower


@TOWERS.register("dinov2")
@TOWERS.register("dinov2_with_registers")
class DinoV2Tower(HuggingFaceTower):
    """DINOv2, with and without registers. Its mask token, for patches that pretraining hides, is not used."""

    final_norm = "layernorm"
    num_class_tokens = 1
    unused_parameters = ("mask_token",)


@TOWERS.register("dinov3_vit")
class DinoV3Tower(DinoV2Tower):
    """DINOv3's vision transformers. Training scales their rotary positions at random, as the configuration says."""

    final_norm = "norm"
