"""Local windows over a grid or over time, cut as adaptive pooling cuts them.

Cell ``i`` of ``n`` on an axis of length ``m`` looks at positions from ``floor(i m / n)`` up to, not
including, ``ceil((i + 1) m / n)``. Where ``n`` divides ``m`` the windows tile the axis; elsewhere
they overlap by at most one position and differ in length by at most one, so they are padded to the
longest and masked.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def axis_windows(length: int, num_windows: int) -> tuple[tuple[int, ...], ...]:
    """Positions of each of ``num_windows`` windows over an axis of ``length`` positions."""
    return tuple(
        tuple(range(i * length // num_windows, -(-(i + 1) * length // num_windows))) for i in range(num_windows)
    )


@lru_cache(maxsize=64)
def grid_windows(side: int, num_windows: int) -> tuple[tuple[int, ...], ...]:
    """Flat positions, row by row, of the windows of a square grid, row by row."""
    axis = axis_windows(side, num_windows)
    return tuple(tuple(y * side + x for y in rows for x in columns) for rows in axis for columns in axis)


def window_index(windows: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Gather index and mask of padded windows.

    Returns:
        An int64 index (windows, longest) that repeats a window's first position as padding, and a
        bool mask of the same shape, true where a position is real, or None where nothing is padded.
    """
    longest = max(map(len, windows))
    index = [list(window) + [window[0]] * (longest - len(window)) for window in windows]
    if all(len(window) == longest for window in windows):
        return torch.tensor(index, device=device), None
    mask = [[j < len(window) for j in range(longest)] for window in windows]
    return torch.tensor(index, device=device), torch.tensor(mask, device=device)
