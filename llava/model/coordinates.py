"""Tables of coordinates: places and times as embeddings that text and pictures share.

For each of time, height and width there is a table of input embeddings (of a coordinate in the text), one a bin, and
one of output embeddings (which the decoder's last states are compared with). The mean of both is also added to visual
features, to tell where they lie: the language-aligned positional embedding of LLaVA-ST (arXiv 2501.08282).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.config import GroundingConfig
from llava.constants import AXES, IGNORE_INDEX, Axis
from llava.grounding.syntax import LOCATIONS

Variables = Sequence[Mapping[str, Sequence[float]] | None]
"""For each sample of a batch its lists of coordinates, as ``Coordinates.to_variables`` gives them, or None."""

COORDINATES = "coordinates"
"""Attribute of a decoder that holds its tables."""


def propagate(table: Tensor) -> Tensor:
    """A table whose embeddings learn from their neighbours' gradients too, (bins, width).

    With R_ij = 2^-|i-j|, W + RW - stopgrad(RW): the value is that of W, bit by bit, the gradient (I + R^T) g.
    """
    bins = torch.arange(len(table), device=table.device, dtype=table.dtype)
    spread = torch.exp2(-(bins[:, None] - bins).abs()) @ table  # (bins, bins) @ (bins, width)
    return table + (spread - spread.detach())


class BinPosition(NamedTuple):
    """Positions on an axis of bins: between ``lower`` and ``upper``, ``fraction`` of the way to the latter."""

    lower: Tensor
    upper: Tensor
    fraction: Tensor

    def shifted(self, first: int) -> BinPosition:
        """The same among the bins of all axes, of which this one's begin at ``first``."""
        return BinPosition(self.lower + first, self.upper + first, self.fraction)


def locate(positions: Tensor, num_bins: int) -> BinPosition:
    """Where positions in [0, 1] lie among bins: of e = p (N - 1) the floor, the ceiling and the rest."""
    exact = positions.clamp(0, 1) * (num_bins - 1)  # (positions,), in bins
    lower = exact.floor()
    return BinPosition(lower.long(), exact.ceil().long(), exact - lower)


@dataclass(frozen=True)
class CoordinateEmbeddings:
    """The tables as they are used in one step, those of time, height and width below one another.

    Attributes:
        grounding: says how many bins each has.
        inputs, outputs: (all bins, width).
    """

    grounding: GroundingConfig
    inputs: Tensor
    outputs: Tensor

    def interpolate(self, table: Tensor, at: BinPosition) -> Tensor:
        """Embeddings between two bins of a table, (positions, width)."""
        return torch.lerp(table[at.lower], table[at.upper], at.fraction.to(table.dtype).unsqueeze(-1))

    def _embed(self, axis: Axis, positions: Tensor) -> Tensor:
        """What is added to visual features at positions on an axis, (positions, width): the mean of both tables."""
        first = self.grounding.first_bin_of(axis) - self.grounding.first_bin_of(AXES[0])  # its row in the joined tables
        at = locate(positions, self.grounding.num_bins(axis)).shifted(first)
        return (self.interpolate(self.inputs, at) + self.interpolate(self.outputs, at)) / 2

    def patch_positions(self, num_frames: int, grid_side: int) -> Tensor:
        """Where and when the patches of an image (one frame, time 0) or of a video are.

        A patch lies at its centre, frame i of n at i / (n - 1).

        Returns:
            (frames, grid_side ** 2, width).
        """
        device = self.inputs.device
        centres = (torch.arange(grid_side, device=device, dtype=torch.float32) + 0.5) / grid_side
        times = torch.linspace(0, 1, num_frames, device=device)
        heights, widths = self._embed("HEIGHT", centres), self._embed("WIDTH", centres)  # (side, width) each
        grid = (heights[:, None] + widths[None]).flatten(0, 1)  # (side * side, width), row by row
        return self._embed("TEMP", times)[:, None] + grid

    def extend_head(self, head: nn.Module) -> Callable[[Tensor], Tensor]:
        """A head whose logits are those of the vocabulary, up to the first bin, and then those of the bins."""

        def logits(hidden: Tensor) -> Tensor:
            words = head(hidden)[..., : self.grounding.first_bin]  # (..., words)
            return torch.cat([words, F.linear(hidden, self.outputs)], dim=-1)  # (..., words + bins)

        return logits


class CoordinateTables(nn.Module):
    """The six tables.

    Args:
        grounding: how many bins.
        width: of token embeddings.
    """

    def __init__(self, grounding: GroundingConfig, width: int) -> None:
        super().__init__()
        self.grounding = grounding
        # The names are those of checkpoints.
        for name, axis in zip(("temporal", "height", "width"), AXES, strict=True):
            for direction in ("input", "output"):
                table = nn.Parameter(torch.empty(grounding.num_bins(axis), width))
                self.register_parameter(f"{name}_{direction}", table)

    def forward(self) -> CoordinateEmbeddings:
        """All tables for one step; every gradient is shared with neighbours."""
        # Below one another in the order of AXES, which is also that of the bins' ids.
        inputs = [propagate(self.get_parameter(f"{name}_input")) for name in ("temporal", "height", "width")]
        outputs = [propagate(self.get_parameter(f"{name}_output")) for name in ("temporal", "height", "width")]
        return CoordinateEmbeddings(self.grounding, torch.cat(inputs), torch.cat(outputs))


class CoordinateTokens(NamedTuple):
    """The tokens of a batch that stand for coordinates.

    Attributes:
        positions: int64 (tokens,), in the flattened batch.
        at: their bins, among those of all axes.
    """

    positions: Tensor
    at: BinPosition


def find_coordinate_tokens(
    input_ids: Tensor, grounding: GroundingConfig, variables: Variables | None
) -> CoordinateTokens:
    """Find the placeholders and bins of a batch, and the embeddings that they stand for.

    Args:
        input_ids: int64 (batch, length).
        grounding: with tables.
        variables: the coordinates of each sample, in the order of its placeholders.

    Raises:
        ValueError: a sample has more placeholders than coordinates; names its row in the batch and the list.
    """
    assert grounding.first_bin is not None
    given = [None] * len(input_ids) if variables is None else variables
    if len(given) != len(input_ids):
        raise ValueError(f"variables has {len(given)} entries for a batch of {len(input_ids)}; pass one for each row")
    kinds = torch.tensor([grounding.token_ids[placeholder] for placeholder in LOCATIONS], device=input_ids.device)
    matches = input_ids == kinds[:, None, None]  # (kinds of placeholders, batch, length)
    counts = matches.sum(-1).tolist()  # The one wait for the device.
    flat, is_bin = input_ids.flatten(), (input_ids >= grounding.first_bin).flatten()
    positions = [is_bin.nonzero().squeeze(1)]
    bins = flat[positions[0]] - grounding.first_bin  # a bin lies exactly on itself
    places = [BinPosition(bins, bins, torch.zeros(len(bins), device=bins.device))]
    for (placeholder, name), by_sample, match in zip(LOCATIONS.items(), counts, matches, strict=True):
        if not any(by_sample):
            continue
        numbers: list[float] = []
        for row, count in enumerate(by_sample):
            own = list((given[row] or {}).get(name) or ())
            if len(own) < count:
                raise ValueError(
                    f"row {row} of the batch has {count} {placeholder}, but its variables have {len(own)} {name}; "
                    "pass one number for each"
                )
            numbers += own[:count]
        axis = next(axis for axis in AXES if axis == placeholder[1:].split("-")[0])
        at = locate(torch.tensor(numbers, dtype=torch.float32, device=input_ids.device), grounding.num_bins(axis))
        positions.append(match.flatten().nonzero().squeeze(1))
        places.append(at.shifted(grounding.first_bin_of(axis) - grounding.first_bin))
    return CoordinateTokens(torch.cat(positions), BinPosition(*map(torch.cat, zip(*places, strict=True))))


def embed_tokens(input_ids: Tensor, embed: nn.Module, tables: CoordinateEmbeddings, tokens: CoordinateTokens) -> Tensor:
    """Token embeddings of a batch, those of coordinates from the tables.

    Without a coordinate the tables are still part of the graph, with gradients of zero: ranks wait for each other's.

    Returns:
        (batch, length, width).
    """
    assert tables.grounding.first_bin is not None
    # Bins lie behind the vocabulary: looked up as word 0, and overwritten.
    words = input_ids.masked_fill(input_ids >= tables.grounding.first_bin, 0)
    embeddings = embed(words)  # (batch, length, width)
    own = tables.interpolate(tables.inputs, tokens.at).to(embeddings.dtype)  # (tokens, width)
    return embeddings.flatten(0, 1).index_copy(0, tokens.positions, own).view_as(embeddings)


class TwoHot(NamedTuple):
    """Targets between two entries of the logits; (batch, length) each, -100 in both where nothing is predicted."""

    lower: Tensor
    upper: Tensor
    fraction: Tensor


def two_hot_targets(labels: Tensor, grounding: GroundingConfig, tokens: CoordinateTokens) -> TwoHot:
    """Labels with those of coordinates between two bins: 1 - r of the floor and r of the ceiling.

    Args:
        labels: int64 (batch, length), the ids of the same batch or -100.
        tokens: of the batch's ids.
    """
    assert grounding.first_bin is not None
    flat = labels.flatten()  # (batch * length,)
    learned = flat[tokens.positions] != IGNORE_INDEX  # coordinates of a prompt are not
    positions = tokens.positions[learned]
    lower = flat.index_copy(0, positions, tokens.at.lower[learned] + grounding.first_bin)
    upper = flat.index_copy(0, positions, tokens.at.upper[learned] + grounding.first_bin)
    fraction = torch.zeros(len(flat), device=labels.device)
    fraction = fraction.index_copy(0, positions, tokens.at.fraction[learned])
    return TwoHot(lower.view_as(labels), upper.view_as(labels), fraction.view_as(labels))


def two_hot_cross_entropy(logits: Tensor, lower: Tensor, upper: Tensor, fraction: Tensor) -> Tensor:
    """The sum of the cross entropies of targets that share their weight among two entries.

    Args:
        logits: fp32 (tokens, entries).
        lower, upper: int64 (tokens,); ``upper`` has the weight ``fraction``, ``lower`` the rest.
        fraction: (tokens,).
    """
    chosen = logits.gather(1, torch.stack([lower, upper], dim=1))  # (tokens, 2)
    # The cross entropy is linear in the targets: log sum exp(z) - ((1 - r) z_lower + r z_upper).
    return (logits.logsumexp(1) - torch.lerp(chosen[:, 0], chosen[:, 1], fraction)).sum()


# Positions that are finer than bins, read from what the model thinks of a bin's neighbours.


def expected_positions(
    tokens: Tensor, logits: Sequence[Tensor], grounding: GroundingConfig, beam_indices: Tensor | None = None
) -> Tensor:
    """The expected position of each generated bin, over the bin and its two neighbours.

    A position between two bins is learned as a share of each (two-hot targets), so the shares that a model gives
    tell where between them it is: at most half a bin from a bin that is likelier than its neighbours, as greedy search
    takes it, and at most a bin from any other.

    Args:
        tokens: int64 (texts, steps), what was generated.
        logits: of each step, (texts, vocabulary), as the model gave them, before any constraint or temperature.
        beam_indices: (texts, steps), for beam search: the row of ``logits`` that each token was chosen from.

    Returns:
        float32 (texts, steps), in [0, 1], and NaN where a token is no bin.

    Raises:
        ValueError: the logits are of other texts than the tokens, and no beam indices say which.
    """
    first_bin = grounding.first_bin
    assert first_bin is not None
    result = torch.full(tokens.shape, float("nan"), device=tokens.device)
    if not tokens.numel():
        return result
    if beam_indices is None:
        if len(logits[0]) != len(tokens):
            raise ValueError(
                f"{len(tokens)} texts of tokens, but {len(logits[0])} of logits; after beam search pass beam_indices"
            )
        beam_indices = torch.arange(len(tokens), device=tokens.device).unsqueeze(1).expand_as(tokens)
    # Behind the end of a text beam indices are -1; no bin stands there.
    chosen = beam_indices.clamp(min=0).unbind(1)
    # (texts, steps, bins): of each step the logits of the beam that the token was chosen from.
    scores = torch.stack([step[beams, first_bin:].float() for step, beams in zip(logits, chosen, strict=False)], dim=1)
    for axis in AXES:
        start, num_bins = grounding.first_bin_of(axis), grounding.num_bins(axis)
        of_axis = scores[..., start - first_bin : start - first_bin + num_bins]
        bins = tokens - start  # (texts, steps), of this axis where in its range
        on_axis = (bins >= 0) & (bins < num_bins)
        # (texts, steps): of the steps on another axis the bin is a stand-in, and its position is not taken.
        result = torch.where(on_axis, _expectation(bins.clamp(0, num_bins - 1), of_axis), result)
    return result


def _expectation(bins: Tensor, scores: Tensor) -> Tensor:
    """The expected position (...) over ``bins`` (...) and their neighbours, by scores (..., bins of the axis)."""
    last = scores.shape[-1] - 1
    near = bins.unsqueeze(-1) + torch.tensor([-1, 0, 1], device=bins.device)  # (..., 3)
    # The first and the last bin have one neighbour.
    inside = (near >= 0) & (near <= last)
    near_scores = scores.gather(-1, near.clamp(0, last)).masked_fill(~inside, float("-inf"))
    return (near_scores.softmax(-1) * near).sum(-1) / last
