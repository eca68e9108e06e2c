"""What of an epoch's samples comes together: packs for ``--packing``, batches by tokens for ``--max_tokens_per_batch``.

Each is planned once, on the lengths of the samples alone. An epoch then puts random samples of the lengths that were
planned into it, so that all epochs have as many packs or batches, other samples meet in each of them, and which ones is
a function of seed, epoch and position.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class BatchPlan:
    """Units, packs or batches, by the lengths of the samples in each.

    Attributes:
        lengths: int64 (samples,), of the samples of one unit after the other.
        bounds: int64 (units + 1,): unit ``u`` has the lengths from ``bounds[u]`` to ``bounds[u + 1]``.
        keeps_order: whether a unit has the very samples that it was planned for, in every epoch.
    """

    lengths: NDArray[np.int64]
    bounds: NDArray[np.int64]
    keeps_order: bool = False

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def fill(
        self, samples: NDArray[np.integer], lengths: NDArray[np.integer], generator: torch.Generator
    ) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """Put samples into the units, and these into random order.

        Args:
            samples: indices of all that were planned for.
            lengths: of the samples, (samples,), as they were planned with.
            generator: of the shuffling.

        Returns:
            The samples of one unit after the other, and where in them each unit begins, (units + 1,).
        """
        if self.keeps_order:
            return samples, self.bounds
        shuffled = torch.randperm(len(samples), generator=generator).numpy()
        # The samples of each length in random order, and the places of that length in theirs.
        by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
        placed = np.empty_like(samples)
        placed[np.argsort(self.lengths, kind="stable")] = samples[by_length]
        return take_units(placed, self.bounds, torch.randperm(len(self), generator=generator).numpy())


def take_units(
    samples: NDArray[np.integer], bounds: NDArray[np.int64], units: NDArray[np.int64]
) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Some units in an order: their samples, and where in them each unit begins.

    Args:
        samples: of one unit after the other.
        bounds: where each begins, (all units + 1,).
        units: numbers of those to take.
    """
    sizes = np.diff(bounds)[units]
    taken = np.concatenate(([0], np.cumsum(sizes)))
    # A sample lies as far behind the beginning of its unit as before.
    places = np.arange(taken[-1]) + np.repeat(bounds[units] - taken[:-1], sizes)
    return samples[places], taken


def plan_packs(lengths: NDArray[np.integer], capacity: int) -> BatchPlan:
    """Packs of at most ``capacity`` tokens, nearly full, each with long and short samples.

    Longest samples first, each into the pack with most room (worst fit decreasing): packs come out alike. All samples
    of a length are placed at once, as packing by histograms does (Krell et al., arXiv 2107.02027).

    Args:
        lengths: (samples,), 1 to ``capacity``.
        capacity: tokens of a pack.
    """
    with_room: dict[int, list[NDArray[np.int64]]] = defaultdict(list)  # the packs that have so much room
    num_packs, most = 0, 0
    placed_lengths, placed_packs = [], []
    values, counts = np.unique(lengths, return_counts=True)
    left = int((values * counts).sum())  # tokens that are not placed yet
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            while most >= length and not with_room.get(most):
                most -= 1
            if most < length:
                # As many as the tokens fill; where they do not suffice, more are opened for those that are left.
                opened = min(max(-(-left // capacity), 1), count)
                with_room[capacity].append(np.arange(num_packs, num_packs + opened))
                num_packs, most = num_packs + opened, capacity
            packs = with_room[most].pop()
            if len(packs) > count:
                with_room[most].append(packs[count:])
                packs = packs[:count]
            with_room[most - length].append(packs)
            placed_packs.append(packs)
            placed_lengths.append(np.full(len(packs), length))
            count -= len(packs)
            left -= length * len(packs)
    packs = np.concatenate(placed_packs)
    order = np.argsort(packs, kind="stable")
    sizes = np.bincount(packs, minlength=num_packs)
    return BatchPlan(np.concatenate(placed_lengths)[order], np.concatenate(([0], np.cumsum(sizes))))


def plan_token_batches(lengths: NDArray[np.integer], most_tokens: int) -> BatchPlan:
    """Batches of samples of similar length, as many in each as fit ``most_tokens``, padding included; longest first.

    Args:
        lengths: (samples,), 1 to ``most_tokens``.
    """
    descending = np.sort(lengths)[::-1].astype(np.int64)
    bounds = [0]
    while bounds[-1] < len(descending):
        bounds.append(min(bounds[-1] + most_tokens // int(descending[bounds[-1]]), len(descending)))
    return BatchPlan(descending, np.array(bounds))


def plan_in_order(lengths: NDArray[np.integer], most_tokens: int, *, padded: bool) -> BatchPlan:
    """Units of neighbours, in the order of the data.

    Args:
        lengths: (samples,), 1 to ``most_tokens``.
        padded: whether a unit is a batch whose samples are padded to its longest, or a pack.
    """
    bounds, longest, total = [0], 0, 0
    for i, length in enumerate(lengths.tolist()):
        longest, total = max(longest, length), total + length
        if (longest * (i + 1 - bounds[-1]) if padded else total) > most_tokens:
            bounds.append(i)
            longest = total = length
    return BatchPlan(np.asarray(lengths, np.int64), np.array([*bounds, len(lengths)]), keeps_order=True)
