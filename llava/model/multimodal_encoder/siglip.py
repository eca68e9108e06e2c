"""The vision halves of SigLIP and of SigLIP2's models of variable grids (NaFlex).

SigLIP2's models of one fixed resolution are published as models of SigLIP.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from llava.model.multimodal_encoder.base import TOWERS
from llava.model.multimodal_encoder.hf_tower import HuggingFaceTower
from llava.model.multimodal_encoder.image_format import ImageFormat, square_side


@TOWERS.register("siglip_vision_model")
class SiglipTower(HuggingFaceTower):
    """The vision half of SigLIP. It has no class token: its head pools the patches, and is not built."""

    final_norm = "post_layernorm"
    asks_to_interpolate = True
    image_mean = tuple(IMAGENET_STANDARD_MEAN)
    image_std = tuple(IMAGENET_STANDARD_STD)

    def build_model(self, config: PretrainedConfig) -> PreTrainedModel:
        config.vision_use_head = False
        return super().build_model(config)


@TOWERS.register("siglip2_vision_model")
class Siglip2Tower(SiglipTower):
    """The vision half of SigLIP2 with variable grids (NaFlex), used with one square grid: no patch is padding."""

    @classmethod
    def own_side(cls, source: str, config: PretrainedConfig, images: ImageFormat) -> int:
        """Side of the largest square within the processor's patches, or else the position table's."""
        patch = square_side(config.patch_size, source, "patch_size")
        return math.isqrt(images.max_num_patches or config.num_patches) * patch

    def encode(self, pixels: Tensor) -> Tensor:
        side = self.vision.patches_per_side
        # On the CPU: transformers reads the shapes one by one.
        shapes = torch.tensor([[side, side]]).expand(len(pixels), -1)
        return self.vision_tower(
            pixel_values=cut_patches(pixels, side), pixel_attention_mask=None, spatial_shapes=shapes
        ).last_hidden_state


def cut_patches(pixels: Tensor, side: int) -> Tensor:
    """Flatten (frames, 3, height, width) to (frames, side * side, patch * patch * 3), row by row, channels last."""
    patches = pixels.unflatten(3, (side, -1)).unflatten(2, (side, -1))
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
