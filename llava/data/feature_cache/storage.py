"""In what form features are kept: in 32, 16 or 8 bits a number, all patches or the means of 2 x 2 of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.data.feature_cache.flags import BF16, FP32, INT8, POOLS, STORAGES

_LEAST_SCALE = 1e-30
"""So that a patch of zeros is divided by something."""


@dataclass(frozen=True)
class Storage:
    """How the features of an image or a clip are kept.

    Attributes:
        kind: of ``STORAGES``; ``int8`` has a scale for each patch, its largest number over 127.
        pool: 2 keeps the mean of each 2 x 2 patches, between which reading interpolates.
    """

    kind: str
    pool: int = 1

    def __post_init__(self) -> None:
        if self.kind not in STORAGES:
            raise ValueError(f"--storage is {self.kind!r}; known: {', '.join(STORAGES)}")
        if self.pool not in POOLS:
            raise ValueError(f"--pool is {self.pool}; known: {', '.join(map(str, POOLS))}")

    @staticmethod
    def exact(dtype: torch.dtype) -> Storage:
        """The smallest that keeps features of a dtype as they are."""
        return Storage(BF16 if dtype == torch.bfloat16 else FP32)

    def __str__(self) -> str:
        return self.kind if self.pool == 1 else f"{self.kind}, {self.pool} x {self.pool} patches pooled"

    def is_exact(self, dtype: torch.dtype) -> bool:
        """Whether features of a dtype come back as they were."""
        return self.pool == 1 and (self.kind == FP32 or (self.kind == BF16 and dtype == torch.bfloat16))

    def encode(self, features: Tensor) -> dict[str, Tensor]:
        """What is kept of (frames, patches, width): ``features``, and ``scale`` (frames, patches, 1) with int8."""
        kept = features if self.pool == 1 else _pool(features.float())
        if self.kind != INT8:
            return {"features": kept.to(torch.float32 if self.kind == FP32 else torch.bfloat16)}
        kept = kept.float()
        scale = (kept.abs().amax(-1, keepdim=True) / 127).clamp(min=_LEAST_SCALE)
        return {"scale": scale, "features": (kept / scale).round().to(torch.int8)}

    def decode(self, kept: Mapping[str, Tensor], dtype: torch.dtype, num_patches: int) -> Tensor:
        """Features of a dtype, (frames, patches, width), of what ``encode`` gave."""
        features = kept["features"]
        if self.kind == INT8:
            features = features.float() * kept["scale"]
        if self.pool != 1:
            features = _unpool(features.float(), num_patches)
        return features.to(dtype)

    def round(self, features: Tensor) -> Tensor:
        """Features as they come back: the same whether they were kept or have just been computed."""
        if self.is_exact(features.dtype):
            return features
        return self.decode(self.encode(features), features.dtype, features.shape[1])

    def num_bytes(self, frames: int, num_patches: int, width: int) -> int:
        """Bytes that the features of so many frames take."""
        side = -(-math.isqrt(num_patches) // self.pool)
        each = width + 4 if self.kind == INT8 else width * (4 if self.kind == FP32 else 2)
        return frames * side**2 * each


def _pool(features: Tensor) -> Tensor:
    """Means of 2 x 2 patches, (frames, patches, width); those at the edge of an odd grid are of fewer."""
    side = math.isqrt(features.shape[1])
    grid = features.transpose(1, 2).unflatten(2, (side, side))  # (frames, width, rows, columns)
    return F.avg_pool2d(grid, 2, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)


def _unpool(features: Tensor, num_patches: int) -> Tensor:
    """The whole grid again, between the means."""
    pooled, side = math.isqrt(features.shape[1]), math.isqrt(num_patches)
    grid = features.transpose(1, 2).unflatten(2, (pooled, pooled))
    # Twice as large, so that patches lie where they were pooled from; an odd grid has no partners in its last row.
    grid = F.interpolate(grid, scale_factor=2, mode="bilinear")[..., :side, :side]
    return grid.flatten(2).transpose(1, 2)
