"""Batches of rows of tokens: padded, or as trees in which every beginning that rows share is read once.

Two rows ``A B C x`` and ``A B D y`` of which all but the first tokens are scored, as a tree and padded (the last token
of a row is only predicted, and so not read)::

    position     0  1  2  3             row 0    A  B  C
    keys         A  B  C  D             row 1    A  B  D
    depths       0  1  2  2
    ends         4  4  3  4
    wanted at    0 (B), 1 (C and D), 2 (x), 3 (y)

Position j is part of the beginning of position i if j <= i < ends[j]: that is the tree's attention mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.eval.token_rows import TokenRow

_SORTED_TREES = 64
"""Trees of which those of like lengths become batches."""


@dataclass(frozen=True)
class Batch:
    """Rows that the model reads together.

    Attributes:
        keys: int64 (sequences, length), padded with 0; see ``TokenRow`` for negative ones.
        lengths: of each sequence without padding: int64 (sequences,).
        depths: which position of its row a token has: int64 (sequences, length).
        ends: int64 (sequences, length), see above; None where each sequence is one row.
        positions: where logits are wanted: int64 (wanted,), in order, in the flattened sequences.
        targets: int64 (targets,), ids whose log-probabilities are wanted.
        places: int64 (targets,), which of ``positions`` predicts each, in order.
        entries: of each row, in order, which of the targets are summed.
    """

    keys: Tensor
    lengths: Tensor
    depths: Tensor
    ends: Tensor | None
    positions: Tensor
    targets: Tensor
    places: Tensor
    entries: list[list[int]]

    @property
    def padding_mask(self) -> Tensor:
        """Bool (sequences, length), false for padding."""
        return torch.arange(self.keys.shape[1]) < self.lengths[:, None]

    def tree_mask(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """What is added to scores of attention: (sequences, 1, length, length), 0 for what a token is shown."""
        assert self.ends is not None, "a batch without trees"
        ends = self.ends.to(device)[:, None, :]  # (sequences, 1, keys)
        place = torch.arange(ends.shape[2], device=device)  # (length,), of queries and of keys
        seen = (place <= place[:, None]) & (place[:, None] < ends)  # (sequences, queries, keys)
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


@dataclass
class Branches:
    """A sequence of a batch while it grows: its positions, and what is wanted at them.

    Attributes:
        targets: the ids that are wanted at each position, by position, each with its number among all of them.
        rows: for each row, the numbers of its targets.
    """

    keys: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    targets: dict[tuple[int, int], int] = field(default_factory=dict)
    rows: list[list[int]] = field(default_factory=list)
    path: list[int] = field(default_factory=list)  # positions of the last row

    def add(self, row: TokenRow, shared: int) -> None:
        """Add a row whose first ``shared`` inputs are those of the row before it."""
        inputs, start = row.inputs, len(self.keys)
        for position in self.path[shared:]:
            self.ends[position] = start
        new = range(start, start + len(inputs) - shared)
        self.keys += inputs[shared:]
        self.depths += range(shared, len(inputs))
        self.ends += [0] * len(new)  # Open: set when a row that leaves it comes, or at the end.
        self.path[shared:] = new
        self.rows.append(
            [
                self.targets.setdefault((self.path[scored - 1], row.keys[scored]), len(self.targets))
                for scored in row.scored
            ]
        )

    def close(self) -> None:
        for position in self.path:
            self.ends[position] = len(self.keys)
        self.path = []


def build_batch(sequences: Sequence[Branches], as_trees: bool) -> Batch:
    """Put closed sequences into one batch."""
    lengths = torch.tensor([len(sequence.keys) for sequence in sequences])  # (sequences,)
    length = int(lengths.max())

    def pad(values: Sequence[int], fill: Sequence[int]) -> list[int]:
        return [*values, *fill[len(values) :]]

    zeros, own_ends = [0] * length, list(range(1, length + 1))  # Padding sees itself alone.
    wanted: list[tuple[int, int, int]] = []  # place in the flattened sequences, id, number
    entries: list[list[int]] = []
    for number, sequence in enumerate(sequences):
        base = len(wanted)
        wanted += [(number * length + at, target, base + i) for (at, target), i in sequence.targets.items()]
        entries += [[base + i for i in of_row] for of_row in sequence.rows]
    # By position: a chunk of positions then has its targets in one piece.
    wanted.sort()
    renumbered = {number: new for new, (_, _, number) in enumerate(wanted)}
    # Logits are made once where several rows want different tokens behind the same beginning.
    positions, places = torch.unique_consecutive(torch.tensor([at for at, _, _ in wanted]), return_inverse=True)
    return Batch(
        torch.tensor([pad(sequence.keys, zeros) for sequence in sequences]),
        lengths,
        torch.tensor([pad(sequence.depths, zeros) for sequence in sequences]),
        torch.tensor([pad(sequence.ends, own_ends) for sequence in sequences]) if as_trees else None,
        positions,
        torch.tensor([target for _, target, _ in wanted]),
        places,
        [[renumbered[number] for number in of_row] for of_row in entries],
    )


def pad_rows(rows: Sequence[TokenRow], batch_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of one sequence for each row, of like lengths, with the numbers of their rows.

    Args:
        rows: in any order.
        batch_tokens: the most tokens of a batch with padding; a longer row is a batch of its own.
    """
    # Longest first: the first of a group says how long its sequences become, and what is too large shows at once.
    order = sorted(range(len(rows)), key=lambda number: (-len(rows[number].inputs), rows[number].keys))
    group: list[int] = []
    for number in [*order, None]:
        if group and (number is None or len(rows[group[0]].inputs) * (len(group) + 1) > batch_tokens):
            sequences = [Branches() for _ in group]
            for sequence, member in zip(sequences, group, strict=True):
                sequence.add(rows[member], 0)
                sequence.close()
            yield group, build_batch(sequences, as_trees=False)
            group = []
        if number is not None:
            group.append(number)


def read_alone(row: TokenRow) -> Batch:
    """A batch of all of one row, the last token too: what a model reads that is given a text."""
    count = len(row.scored)
    return Batch(
        torch.tensor([row.keys]),
        torch.tensor([len(row.keys)]),
        torch.arange(len(row.keys))[None],
        None,
        # The logits at a position predict the token behind it.
        torch.tensor(row.scored) - 1,
        torch.tensor([row.keys[position] for position in row.scored]),
        torch.arange(count),
        [list(range(count))],
    )


@dataclass(frozen=True)
class Sizes:
    """How much is read together.

    Attributes:
        batch_tokens: the most tokens of a batch with padding; a longer sequence is a batch of its own.
        tree_tokens: the positions of a tree up to which it grows by any row.
        width: of the model.
        window: behind how many positions some layer of the model forgets; it may count those of other branches, so no
            tree is longer. None for no limit.
    """

    batch_tokens: int
    tree_tokens: int
    width: int
    window: int | None = None

    def most_in_tree(self, shared: int) -> int:
        """The positions up to which a tree grows by a row that shares so many with the one before.

        Attention compares all positions of a tree: in time, four positions of a tree for each of its positions are
        about one position more per unit of ``width``. A tree of n positions that is cut loses ``shared`` and wins
        n * n / (4 * width), counted in positions.
        """
        most = max(self.tree_tokens, math.isqrt(4 * self.width * shared))
        return most if self.window is None else min(most, self.window)


def share_beginnings(rows: Sequence[TokenRow], sizes: Sizes) -> Iterator[tuple[list[int], Batch]]:
    """Batches of trees of rows, with the numbers of their rows."""
    # Sorted by their tokens, rows with the same beginning stand together.
    order = sorted(range(len(rows)), key=lambda number: rows[number].inputs)
    trees: list[tuple[list[int], Branches]] = []
    before: tuple[int, ...] = ()
    for number in order:
        inputs = rows[number].inputs
        shared = count_shared(before, inputs)
        if not trees or len(trees[-1][1].keys) + len(inputs) - shared > sizes.most_in_tree(shared):
            if len(trees) == _SORTED_TREES:
                yield from _batch_trees(trees, sizes.batch_tokens)
                trees = []
            trees.append(([], Branches()))
            shared = 0
        members, tree = trees[-1]
        members.append(number)
        tree.add(rows[number], shared)
        before = inputs
    yield from _batch_trees(trees, sizes.batch_tokens)


def _batch_trees(trees: list[tuple[list[int], Branches]], batch_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of trees of like lengths."""
    group: list[tuple[list[int], Branches]] = []
    for entry in [*sorted(trees, key=lambda entry: -len(entry[1].keys)), None]:
        if group and (entry is None or len(group[0][1].keys) * (len(group) + 1) > batch_tokens):
            for _, tree in group:
                tree.close()
            members = [number for numbers, _ in group for number in numbers]
            yield members, build_batch([tree for _, tree in group], as_trees=True)
            group = []
        if entry is not None:
            group.append(entry)


def count_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many keys two rows have in common before they differ."""
    limit = min(len(one), len(other))
    if one[:limit] == other[:limit]:
        return limit
    return next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def count_positions(rows: Sequence[TokenRow]) -> tuple[int, int]:
    """Tokens that the model reads of rows, one by one and with every beginning read once."""
    shared = 0
    before: tuple[int, ...] = ()
    for inputs in sorted(row.inputs for row in rows):
        shared += count_shared(before, inputs)
        before = inputs
    total = sum(len(row.inputs) for row in rows)
    return total, total - shared
