"""The fast and slow TokenPacker, and the local windows that it attends in, cut as adaptive pooling cuts them.

Cell ``i`` of ``n`` on an axis of length ``m`` looks at positions from ``floor(i m / n)`` up to, not
including, ``ceil((i + 1) m / n)``. Where ``n`` divides ``m`` the windows tile the axis; elsewhere
they overlap by at most one position and differ in length by at most one, so they are padded to the
longest and masked.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from llava.config import VisionConfig
from llava.model.multimodal_resampler.base import RESAMPLERS, Resampler, resize
from llava.token_layout import FastSlowSettings
from llava.types import MediaKind


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


# The fast/slow TokenPacker.


def _gelu_mlp(input_size: int, output_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(input_size, output_size), nn.GELU(), nn.Linear(output_size, output_size))


class WindowAttention(nn.Module):
    """Each query attends to the keys of its own window only.

    Args:
        width: width of the features.
        inner_width: width of queries, keys and values over all heads.
        num_heads: attention heads.
    """

    def __init__(self, width: int, inner_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = _gelu_mlp(width, inner_width)
        self.to_k = _gelu_mlp(width, inner_width)
        self.to_v = _gelu_mlp(width, inner_width)
        self.ln_q = nn.LayerNorm(inner_width)
        self.ln_k = nn.LayerNorm(inner_width)
        self.ln_v = nn.LayerNorm(inner_width)
        self.q_proj = nn.Linear(inner_width, inner_width)
        self.k_proj = nn.Linear(inner_width, inner_width)
        self.v_proj = nn.Linear(inner_width, inner_width)
        self.o_proj = nn.Linear(inner_width, inner_width)
        self.to_out = nn.Linear(inner_width, width, bias=False)

    def forward(self, queries: Tensor, keys: Tensor, windows: tuple[tuple[int, ...], ...]) -> Tensor:
        """Attend from each query to its window of the keys.

        Args:
            queries: (rows, windows, width), one query a window.
            keys: (rows, positions, width), the axis that the windows are cut from.
            windows: the positions of each window.

        Returns:
            (rows, windows, width), the queries with what they gathered added to them.
        """
        index, mask = window_index(windows, keys.device)  # (windows, longest) each
        # Keys and values are computed once a position, then gathered: windows may overlap.
        values = self._gather(self.v_proj(self.ln_v(self.to_v(keys))), index)  # (rows, windows, longest, heads, ...)
        if index.shape[1] > 1:
            gathered = (self._weigh(queries, keys, index, mask).unsqueeze(-1) * values).sum(2)
        else:
            # The only position of a window gets all of the weight, whatever query and key are. They
            # run on no rows, so that their parameters have gradients of exactly zero, not none.
            none = self._weigh(queries[:0], keys[:0], index, mask).unsqueeze(-1) * values[:0]
            gathered = torch.cat([values, none]).squeeze(2)
        return queries + self.to_out(self.o_proj(gathered.flatten(2)))

    def attribute(self, queries: Tensor, keys: Tensor, windows: tuple[tuple[int, ...], ...], weights: Tensor) -> Tensor:
        """Hand weights of the queries, (rows, windows), on to the keys of their windows, (rows, positions).

        Each gives its own away by its attention, the mean over the heads.
        """
        index, mask = window_index(windows, keys.device)  # (windows, longest) each
        shares = self._weigh(queries, keys, index, mask).float().mean(-1) * weights[..., None]
        given = torch.zeros(keys.shape[:2], dtype=shares.dtype, device=keys.device)  # (rows, positions)
        return given.index_add(1, index.flatten(), shares.flatten(1))

    def _weigh(self, queries: Tensor, keys: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
        """Attention weights (rows, windows, longest, heads)."""
        q = self.q_proj(self.ln_q(self.to_q(queries))).unflatten(-1, (self.num_heads, -1))
        k = self._gather(self.k_proj(self.ln_k(self.to_k(keys))), index)  # (rows, windows, longest, heads, width)
        # One query against a handful of keys: two products and a softmax are cheaper here than a
        # fused kernel, which is made for long sequences.
        scores = (q.unsqueeze(2) * k).sum(-1) * q.shape[-1] ** -0.5  # (rows, windows, longest, heads)
        if mask is not None:
            scores = scores.masked_fill(~mask[None, :, :, None], float("-inf"))
        return scores.float().softmax(dim=2).to(k.dtype)

    def _gather(self, x: Tensor, index: Tensor) -> Tensor:
        """(rows, positions, inner width) to (rows, windows, longest, heads, width of a head)."""
        # The backward pass of index_select is a plain addition, in bf16 twice as fast as that of x[:, index].
        return x.index_select(1, index.flatten()).unflatten(1, index.shape).unflatten(-1, (self.num_heads, -1))


@RESAMPLERS.register("fast_slow_resampler")
class TokenPacker(Resampler):
    """Compresses videos into a fast span (many frames, few cells) and a slow one (few, many)."""

    structure = ("resampler_width", "resampler_heads")
    settings: FastSlowSettings

    def __init__(self, vision: VisionConfig, hidden_size: int) -> None:
        super().__init__(vision, hidden_size)
        block = (hidden_size, self.settings.resampler_width, self.settings.resampler_heads)
        self.main = WindowAttention(*block)
        self.slow = WindowAttention(*block)
        self.fast = WindowAttention(*block)

    def resample(self, features: Tensor, kind: MediaKind) -> Tensor:
        """See ``Resampler.resample``; a video's tokens are its fast span, then its slow span."""
        frames, side = features.shape[1], self.vision.grid_side
        slow_side = math.isqrt(self.settings.perceiver_latents)
        fast_side = math.isqrt(self.settings.perceiver_latents_fast)
        cells = pool_space(self.main, features.flatten(0, 1), side, slow_side)  # (all frames, slow cells, width)
        cells = cells.unflatten(0, (-1, frames))  # (media, frames, slow cells, width)
        slow = pool_time(self.slow, cells, self.settings.num_slow(frames)).flatten(1, 2)
        if kind == "image":
            return slow
        fast = pool_space(self.fast, cells.flatten(0, 1), slow_side, fast_side)  # (all frames, fast cells, width)
        return torch.cat([fast.unflatten(0, (-1, frames)).flatten(1, 2), slow], dim=1)

    def attribute(self, features: Tensor, kind: MediaKind, weights: Tensor) -> Tensor:
        """See ``Resampler.attribute``; by the attention of its blocks within their windows, one behind the other."""
        frames, side, settings = features.shape[1], self.vision.grid_side, self.settings
        slow_side = math.isqrt(settings.perceiver_latents)
        fast_side = math.isqrt(settings.perceiver_latents_fast)
        num_slow = settings.num_slow(frames) * settings.perceiver_latents
        fast, slow = weights[: len(weights) - num_slow], weights[len(weights) - num_slow :]
        grid = features[0]  # (frames, patches, width)
        cells = pool_space(self.main, grid, side, slow_side)  # (frames, slow cells, width)
        by_cell = cells.transpose(0, 1)  # (slow cells, frames, width)
        length = settings.num_slow(frames)
        of_cells = self.slow.attribute(
            _steps_of(by_cell, length), by_cell, axis_windows(frames, length), slow.unflatten(0, (length, -1)).T
        ).T  # (frames, slow cells)
        if len(fast):
            queries, windows = _cells_of(cells, slow_side, fast_side), grid_windows(slow_side, fast_side)
            of_cells = of_cells + self.fast.attribute(queries, cells, windows, fast.unflatten(0, (frames, -1)))
        return self.main.attribute(_cells_of(grid, side, slow_side), grid, grid_windows(side, slow_side), of_cells)


def pool_space(attention: WindowAttention, grid: Tensor, side: int, new_side: int) -> Tensor:
    """Pool (frames, side^2, width) to (frames, new_side^2, width), window by window."""
    return attention(_cells_of(grid, side, new_side), grid, grid_windows(side, new_side))


def _cells_of(grid: Tensor, side: int, new_side: int) -> Tensor:
    """The queries of a coarser grid: (frames, side^2, width) to (frames, new_side^2, width)."""
    image = grid.transpose(1, 2).unflatten(2, (side, side))  # (frames, width, side, side)
    return resize(image, (new_side, new_side), "bilinear").flatten(2).transpose(1, 2)


def pool_time(attention: WindowAttention, cells: Tensor, length: int) -> Tensor:
    """Pool (media, frames, cells, width) to (media, length, cells, width), cell by cell.

    A single frame has no time to pool: its queries are the frame itself and the window holds it alone.
    """
    frames, num_cells = cells.shape[1:3]
    keys = cells.transpose(1, 2).flatten(0, 1)  # (media * cells, frames, width)
    queries = _steps_of(keys, length)
    return attention(queries, keys, axis_windows(frames, length)).unflatten(0, (-1, num_cells)).transpose(1, 2)


def _steps_of(keys: Tensor, length: int) -> Tensor:
    """The queries of fewer steps of time: (rows, frames, width) to (rows, length, width)."""
    # Where every frame keeps a place of its own there is nothing to interpolate.
    return keys if length == keys.shape[1] else resize(keys.transpose(1, 2), (length,), "linear").transpose(1, 2)
