"""Positions that are finer than bins, read from what the model thinks of a bin's neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.coordinates import AXES, GroundingConfig


def expected_positions(
    tokens: Tensor, logits: Sequence[Tensor], grounding: GroundingConfig, beam_indices: Tensor | None = None
) -> Tensor:
    """The expected position of each generated bin, over the bin and its two neighbours.

    A position between two bins is learned as a share of each (two-hot targets), so the shares that a model gives
    tell where between them it is. Of a bin that is likelier than its neighbours, as greedy search takes it,
    the expected position is at most half a bin away; of any other at most a bin.

    Args:
        tokens: int64 (rows, steps), what was generated.
        logits: of each step, (rows, vocabulary), as the model gave them, before any constraint or temperature.
        grounding: of the model, with tables of bins.
        beam_indices: (rows, steps), for beam search: the row of ``logits`` that each token was chosen from.

    Returns:
        float32 (rows, steps), in [0, 1], and NaN where a token is no bin.

    Raises:
        ValueError: the logits are of other rows than the tokens, and no beam indices say which.
    """
    first_bin = grounding.first_bin
    assert first_bin is not None
    result = torch.full(tokens.shape, float("nan"), device=tokens.device)
    if not tokens.numel():
        return result
    if beam_indices is None:
        if len(logits[0]) != len(tokens):
            raise ValueError(
                f"{len(tokens)} rows of tokens, but {len(logits[0])} of logits; after beam search pass beam_indices"
            )
        beam_indices = torch.arange(len(tokens), device=tokens.device).unsqueeze(1).expand_as(tokens)
    # Behind the end of a text beam indices are -1; no bin stands there.
    chosen = beam_indices.clamp(min=0).unbind(1)
    scores = torch.stack([step[rows, first_bin:].float() for step, rows in zip(logits, chosen, strict=False)], dim=1)
    for axis in AXES:
        start, num_bins = grounding.first_bin_of(axis), grounding.num_bins(axis)
        of_axis = scores[..., start - first_bin : start - first_bin + num_bins]
        bins = tokens - start
        on_axis = (bins >= 0) & (bins < num_bins)
        result = torch.where(on_axis, _expectation(bins.clamp(0, num_bins - 1), of_axis), result)
    return result


def _expectation(bins: Tensor, scores: Tensor) -> Tensor:
    """The expected position (...) over ``bins`` (...) and their neighbours, by scores (..., bins of the axis)."""
    last = scores.shape[-1] - 1
    near = bins.unsqueeze(-1) + torch.tensor([-1, 0, 1], device=bins.device)
    inside = (near >= 0) & (near <= last)
    near_scores = scores.gather(-1, near.clamp(0, last)).masked_fill(~inside, float("-inf"))
    return (near_scores.softmax(-1) * near).sum(-1) / last
