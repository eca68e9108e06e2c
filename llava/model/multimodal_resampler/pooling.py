"""Fewer patches of each frame, without parameters: its grid pooled, or a fixed share of it kept.

A stride that does not divide the side leaves no patch out: the side is rounded up, and the last
window of the average and of the maximum is as large as what remains. Where it divides, the result is
that of LLaVA-NeXT's pooling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.model.multimodal_resampler.base import RESAMPLERS, Resampler, resize, transposed
from llava.token_layout import MaskedDropSettings, SpatialPoolSettings
from llava.types import MediaKind


@RESAMPLERS.register("spatial_pool")
class SpatialPool(Resampler):
    """Makes one token of ``spatial_pool_stride`` x ``spatial_pool_stride`` patches of a frame."""

    settings: SpatialPoolSettings

    def resample(self, features: Tensor, kind: MediaKind) -> Tensor:
        """See ``Resampler.resample``; a token depends on its window's patches alone.

        In bilinear mode these are the neighbours of the window's middle: with strides above two, patches
        farther out take no part.
        """
        side = self.vision.grid_side
        grids = features.flatten(0, 1).transpose(1, 2).unflatten(2, (side, side))  # (all frames, width, side, side)
        pooled = self._pool(grids).flatten(2).transpose(1, 2)  # (all frames, cells, width)
        return pooled.unflatten(0, features.shape[:2]).flatten(1, 2)  # (media, frames * cells, width)

    def attribute(self, features: Tensor, kind: MediaKind, weights: Tensor) -> Tensor:
        """See ``Resampler.attribute``; a maximum, of which each channel has its own, counts as an average."""
        side = self.vision.grid_side
        cells = weights.unflatten(0, (features.shape[1], 1, self.settings.pooled_side(side), -1))
        return transposed(self._pool_evenly, (features.shape[1], 1, side, side), cells).flatten(1)  # (frames, patches)

    def _pool_evenly(self, grids: Tensor) -> Tensor:
        if self.settings.spatial_pool_mode == "bilinear":
            return self._pool(grids)
        return F.avg_pool2d(grids, min(self.settings.spatial_pool_stride, self.vision.grid_side), ceil_mode=True)

    def _pool(self, grids: Tensor) -> Tensor:
        """(frames, width, side, side) to (frames, width, pooled side, pooled side)."""
        side = self.vision.grid_side
        if self.settings.spatial_pool_mode == "bilinear":
            pooled_side = self.settings.pooled_side(side)
            return resize(grids, (pooled_side, pooled_side), "bilinear")  # (frames, width, pooled side, pooled side)
        stride = min(self.settings.spatial_pool_stride, side)
        pool = F.avg_pool2d if self.settings.spatial_pool_mode == "average" else F.max_pool2d
        return pool(grids, stride, ceil_mode=True)


@RESAMPLERS.register("masked_drop")
class MaskedDrop(Resampler):
    """Keeps ``mask_drop_ratio`` of each frame's patches: random ones while training, else evenly spread ones."""

    settings: MaskedDropSettings

    def resample(self, features: Tensor, kind: MediaKind) -> Tensor:
        """See ``Resampler.resample``; the patches that are kept stay in their order."""
        num_patches, width = features.shape[2:]
        num_kept = self.settings.frame_tokens(self.vision.grid_side)
        if self.training:
            # A draw for every frame: the first places of a random order are a random subset.
            order = torch.rand(features.shape[:3], device=features.device).argsort(dim=-1)
            kept = order[..., :num_kept].sort(dim=-1).values  # (media, frames, kept)
        else:
            kept = self._spread(num_patches, num_kept, features.device).expand(*features.shape[:2], -1)
        kept = kept.unsqueeze(-1).expand(-1, -1, -1, width)  # (media, frames, kept, width)
        return features.gather(2, kept).flatten(1, 2)  # (media, frames * kept, width)

    def attribute(self, features: Tensor, kind: MediaKind, weights: Tensor) -> Tensor:
        """See ``Resampler.attribute``; of a model that does not train: patches that are left out get nothing."""
        shape = (1, *features.shape[1:3], 1)
        kept = weights[None, :, None]  # (1, tokens, 1)
        return transposed(lambda patches: self.resample(patches, kind), shape, kept)[0, ..., 0]

    @staticmethod
    def _spread(num_patches: int, num_kept: int, device: torch.device) -> Tensor:
        """The middle positions of ``num_kept`` equal stretches of a row of patches."""
        return (2 * torch.arange(num_kept, device=device) + 1) * num_patches // (2 * num_kept)
