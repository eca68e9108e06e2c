"""Keeps a fixed share of each frame's patches, without parameters.

LLaVA-NeXT's module of this name drops patches while training only, in one mode a number of them that
varies from step to step. Here the number is always the same: the text, in training and in use, has
one position for every patch that is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.model.multimodal_resampler.base import RESAMPLERS, Resampler
from llava.types import MediaKind


@RESAMPLERS.register("masked_drop")
class MaskedDrop(Resampler):
    """Keeps ``mask_drop_ratio`` of each frame's patches: random ones while training, else evenly spread ones."""

    def resample(self, features: Tensor, kind: MediaKind) -> Tensor:
        """See ``Resampler.resample``; the patches that are kept stay in their order."""
        num_patches, width = features.shape[2:]
        num_kept = self.vision.kept_patches
        if self.training:
            # A draw for every frame: the first places of a random order are a random subset.
            order = torch.rand(features.shape[:3], device=features.device).argsort(dim=-1)
            kept = order[..., :num_kept].sort(dim=-1).values
        else:
            kept = self._spread(num_patches, num_kept, features.device).expand(*features.shape[:2], -1)
        return features.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, width)).flatten(1, 2)

    @staticmethod
    def _spread(num_patches: int, num_kept: int, device: torch.device) -> Tensor:
        """The middle positions of ``num_kept`` equal stretches of a row of patches."""
        return (2 * torch.arange(num_kept, device=device) + 1) * num_patches // (2 * num_kept)
