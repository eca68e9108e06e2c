"""Interpolation of grids and of time."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize(x: Tensor, size: tuple[int, ...], mode: str) -> Tensor:
    """Interpolate (batch, width, *axes) to (batch, width, *size), in fp32."""
    return F.interpolate(x.float(), size=size, mode=mode, align_corners=False).to(x.dtype)
