"""Pooling of each frame's grid, without parameters.

A stride that does not divide the side leaves no patch out: the side is rounded up, and the last
window of the average and of the maximum is as large as what remains. Where it divides, the result is
that of LLaVA-NeXT's pooling.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llava.model.multimodal_resampler.base import RESAMPLERS, Resampler
from llava.model.multimodal_resampler.interpolation import resize
from llava.types import MediaKind


@RESAMPLERS.register("spatial_pool")
class SpatialPool(Resampler):
    """Makes one token of ``spatial_pool_stride`` x ``spatial_pool_stride`` patches of a frame."""

    def resample(self, features: Tensor, kind: MediaKind) -> Tensor:
        """See ``Resampler.resample``; a token depends on its window's patches alone.

        In bilinear mode these are the neighbours of the window's middle: with strides above two, patches
        farther out take no part.
        """
        side = self.vision.grid_side
        grids = features.flatten(0, 1).transpose(1, 2).unflatten(2, (side, side))
        pooled = self._pool(grids).flatten(2).transpose(1, 2)
        return pooled.unflatten(0, features.shape[:2]).flatten(1, 2)

    def _pool(self, grids: Tensor) -> Tensor:
        """(frames, width, side, side) to (frames, width, pooled side, pooled side)."""
        if self.vision.spatial_pool_mode == "bilinear":
            return resize(grids, (self.vision.pooled_side, self.vision.pooled_side), "bilinear")
        stride = min(self.vision.spatial_pool_stride, self.vision.grid_side)
        pool = F.avg_pool2d if self.vision.spatial_pool_mode == "average" else F.max_pool2d
        return pool(grids, stride, ceil_mode=True)
