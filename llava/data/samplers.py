"""The order in which samples are trained on, and each rank's share of it.

The order of an epoch is defined for the whole run first: a sequence of steps (updates of the weights), each a
piece of one array of indices. Only then is a step dealt to ranks and micro-batches. So the samples of a step
do not depend on how many ranks there are, and a position in the data is two numbers: an epoch and a step.

What a step counts and ranks are dealt are samples, or units of several samples that stay together: packs, or batches by
tokens (``batch_plan.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import repeat
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import Sampler

from llava.data.batch_plan import BatchPlan, plan_in_order, plan_packs, plan_token_batches, take_units

RANDOM = "random"
SEQUENTIAL = "sequential"
BY_LENGTH = "group_by_length"
BY_MODALITY = "group_by_modality_length"
STRATEGIES = (RANDOM, SEQUENTIAL, BY_LENGTH, BY_MODALITY)
GROUPED = (BY_LENGTH, BY_MODALITY)
"""The strategies that need lengths: their steps hold samples of similar length."""

# So many steps' worth of random samples are sorted by length together: little is left to pad, and yet other samples
# meet in a step in every epoch.
_STEPS_SORTED_TOGETHER = 50
_MOST_IDS_HASHED = 1000

Piece = TypeVar("Piece")


class DataOrder:
    """Which samples each step of each epoch trains on; a pure function of the arguments.

    Every sample comes once an epoch. A step has ``step_size`` samples, but for incomplete ones, which hold
    what is left over:

    - ``random``: all samples, shuffled by ``torch.randperm`` from ``seed + epoch``.
    - ``sequential``: the samples as they stand in the data.
    - ``group_by_length``: steps of samples of similar length, longest first. The step with the longest sample of
      all comes first, so that a batch too large for the memory shows at once; the others are shuffled.
    - ``group_by_modality_length``: the same, and no step has both samples with media and samples without.
      Each of the two may leave an incomplete step.

    With packs or batches by tokens, a step has ``step_size`` of these. The samples of a batch are of similar length
    under every strategy but ``sequential``, which puts neighbours together.

    Args:
        num_samples: of the data set.
        step_size: samples (or packs, or batches) of a step, over all ranks and micro-batches.
        strategy: one of ``STRATEGIES``.
        seed: of the shuffling.
        lengths: (num_samples,), tokens of each sample, for the strategies that group and for packs and batches by
            tokens; for ``group_by_modality_length`` negative where a sample has no media.
        drop_last: leave the samples of incomplete steps out.
        pack_length: tokens of a pack; 0 packs nothing.
        max_tokens: most positions of a batch, padding included; 0 counts samples.

    Raises:
        ValueError: there is nothing to train on.
    """

    def __init__(
        self,
        num_samples: int,
        step_size: int,
        strategy: str = RANDOM,
        seed: int = 0,
        lengths: Sequence[int] | np.ndarray | None = None,
        drop_last: bool = False,
        pack_length: int = 0,
        max_tokens: int = 0,
    ) -> None:
        assert strategy in STRATEGIES, strategy
        self.num_samples = num_samples
        self.step_size = step_size
        self.strategy = strategy
        self.seed = seed
        self.lengths = np.asarray([] if lengths is None else lengths, np.int32)
        self.drop_last = drop_last
        self.pack_length, self.max_tokens = pack_length, max_tokens
        self._newest: tuple[int, np.ndarray, np.ndarray | None] | None = None
        assert not self.has_lengths or len(self.lengths) == num_samples
        assert not (pack_length and max_tokens)
        # A sampler of nothing would train zero steps and save an untrained model as if it were one.
        if num_samples == 0:
            raise ValueError("there is not a single sample to train on; see --data_path")
        if self.num_steps == 0:
            raise ValueError(
                f"--dataloader_drop_last leaves nothing to train on: {num_samples} samples do not fill a step of "
                f"{step_size}; leave the flag out, or lower the batch size"
            )

    @property
    def has_units(self) -> bool:
        """Whether samples come in packs, or in batches by tokens."""
        return bool(self.pack_length or self.max_tokens)

    @property
    def has_lengths(self) -> bool:
        """Whether the order is made from the samples' lengths."""
        return self.strategy in GROUPED or self.has_units

    @property
    def num_steps(self) -> int:
        """Steps of an epoch, incomplete ones included."""
        return len(self.bounds) - 1

    @cached_property
    def bounds(self) -> np.ndarray:
        """int64 (steps + 1,): step ``s`` has the samples, or the units, from ``bounds[s]`` to ``bounds[s + 1]``."""
        sizes = [len(plan) for plan in self._plans] if self.has_units else [len(group) for group in self._groups]
        # Step sizes are the same in every epoch, though the samples in the steps are not.
        complete = [self.step_size] * sum(size // self.step_size for size in sizes)
        steps = [size for size in self._arrange(complete, [size % self.step_size for size in sizes]) if size]
        return np.concatenate(([0], np.cumsum(steps, dtype=np.int64)))

    def order(self, epoch: int) -> np.ndarray:
        """int32 or int64: the indices of an epoch's samples, step after step. The newest is kept."""
        return self._order_and_units(epoch)[0]

    def step_bounds(self, epoch: int) -> np.ndarray:
        """int64 (steps + 1,): step ``s`` is from ``bounds[s]`` to ``bounds[s + 1]`` in the order of an epoch."""
        units = self._order_and_units(epoch)[1]
        return self.bounds if units is None else units[self.bounds]

    def take(self, epoch: int, first: int, behind: int) -> list[int]:
        """The samples from one place to another in an epoch, places counted as ``bounds`` does."""
        order, units = self._order_and_units(epoch)
        return (order[first:behind] if units is None else order[units[first] : units[behind]]).tolist()

    def _order_and_units(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The samples of an epoch and, where they come in units, where each of these begins."""
        if self._newest is None or self._newest[0] != epoch:
            # A generator of its own: nothing else that draws numbers can change the order.
            generator = torch.Generator().manual_seed(self.seed + epoch)
            made = self._fill_units(generator) if self.has_units else (self._make_order(generator), None)
            self._newest = (epoch, *made)
        return self._newest[1:]

    def describe_units(self) -> str:
        """How samples come together, and how little of it is padding; "" where a step counts samples."""
        if not self.has_units:
            return ""
        count = sum(map(len, self._plans))
        tokens = int(np.abs(self.lengths).sum())
        if self.pack_length:
            full = tokens / (count * self.pack_length)
            return f"{self.num_samples:,} samples in {count:,} packs of {self.pack_length} tokens, {full:.1%} full"
        longest = [np.maximum.reduceat(plan.lengths, plan.bounds[:-1]) for plan in self._plans]
        positions = sum(
            int((most * np.diff(plan.bounds)).sum()) for most, plan in zip(longest, self._plans, strict=True)
        )
        return (
            f"{self.num_samples:,} samples in {count:,} batches of at most {self.max_tokens} positions, "
            f"{self.num_samples / count:.1f} samples in each, {1 - tokens / positions:.1%} padding"
        )

    @cached_property
    def _plans(self) -> list[BatchPlan]:
        """What the samples of each group come in."""
        lengths = [np.abs(self.lengths[group]) for group in self._groups]
        if self.strategy == SEQUENTIAL:
            most = self.pack_length or self.max_tokens
            return [plan_in_order(of_group, most, padded=not self.pack_length) for of_group in lengths]
        if self.pack_length:
            return [plan_packs(of_group, self.pack_length) for of_group in lengths]
        return [plan_token_batches(of_group, self.max_tokens) for of_group in lengths]

    def _fill_units(self, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The samples of an epoch in units, and where each begins."""
        filled = [
            plan.fill(group, np.abs(self.lengths[group]), generator)
            for plan, group in zip(self._plans, self._groups, strict=True)
        ]
        samples = np.concatenate([of_group for of_group, _ in filled])
        sizes = np.concatenate([np.diff(bounds) for _, bounds in filled])
        bounds = np.concatenate(([0], np.cumsum(sizes)))
        # Units by their numbers: each group's complete steps, all of them shuffled, then the groups' rests.
        numbers = np.split(np.arange(len(sizes)), np.cumsum([len(plan) for plan in self._plans])[:-1])
        ends = [len(of_group) - len(of_group) % self.step_size for of_group in numbers]
        steps = np.concatenate([of_group[:end] for of_group, end in zip(numbers, ends, strict=True)])
        steps = steps.reshape(-1, self.step_size)
        if len(numbers) > 1:
            steps = steps[shuffled(len(steps), generator)]
        rests = [of_group[end:] for of_group, end in zip(numbers, ends, strict=True)]
        return take_units(samples, bounds, np.concatenate(self._arrange([steps.ravel()], rests)))

    def _make_order(self, generator: torch.Generator) -> np.ndarray:
        if self.strategy in GROUPED:
            return self._similar_lengths(generator)
        order = self._groups[0]
        if self.strategy == RANDOM:
            order = order[shuffled(len(order), generator)]
        return order[: self.bounds[-1]]

    def _similar_lengths(self, generator: torch.Generator) -> np.ndarray:
        """An epoch in steps of similar length, the largest first."""
        lengths = np.abs(self.lengths)  # (num_samples,); the sign tells samples without media.
        parts = [cut_by_length(group, lengths, self.step_size, generator) for group in self._groups]
        steps = np.concatenate([complete for complete, _ in parts])  # (complete steps, step_size)
        if len(steps):
            # The largest step leads: what does not fit the memory fails at once, not in the middle of the run.
            largest = int(lengths[steps[:, 0]].argmax())  # The first sample of a step is its longest.
            others = np.delete(np.arange(len(steps)), largest)
            steps = steps[[largest, *others[shuffled(len(others), generator)]]]
        return np.concatenate(self._arrange([steps.ravel()], [rest for _, rest in parts]))

    @cached_property
    def _groups(self) -> list[np.ndarray]:
        """Indices of the samples that may meet in a step; first the group of the longest sample."""
        # int32 halves the memory that an order of some hundred million samples takes.
        everything = np.arange(self.num_samples, dtype=np.int32 if self.num_samples < 2**31 else np.int64)
        if self.strategy != BY_MODALITY:
            return [everything]
        halves = [everything[self.lengths >= 0], everything[self.lengths < 0]]
        groups = [half for half in halves if len(half)]
        return sorted(groups, key=lambda group: -int(np.abs(self.lengths[group]).max()))

    def _arrange(self, complete: list[Piece], rests: list[Piece]) -> list[Piece]:
        """Pieces of an epoch, or their sizes, in order: complete steps, then each group's rest.

        Where the longest sample's group does not fill a step, its rest leads: the largest batch comes first.
        """
        if self.drop_last:
            return complete
        leading = len(rests) > 1 and len(self._plans[0] if self.has_units else self._groups[0]) < self.step_size
        return [*rests[:leading], *complete, *rests[leading:]]

    def fingerprint(self, id_of: Callable[[int], str]) -> dict[str, str | int | None]:
        """What the order was made from: a position means the same wherever this is the same.

        Args:
            id_of: gives the id of the sample at an index; asked at 1,000 evenly spaced ones at most.
        """
        # Of a million ids a thousand tell whether it is the same file: reading all would take minutes at each start.
        places = np.linspace(0, self.num_samples - 1, min(self.num_samples, _MOST_IDS_HASHED)).astype(int)
        ids = "\n".join(id_of(place) for place in places.tolist())
        return {
            "samples": self.num_samples,
            "ids": hashlib.sha256(ids.encode("utf-8", "surrogatepass")).hexdigest(),
            "lengths": hashlib.sha256(self.lengths.tobytes()).hexdigest() if self.has_lengths else None,
            "strategy": self.strategy,
            "seed": None if self.strategy == SEQUENTIAL else self.seed,
            "step_size": self.step_size,
            "drop_last": self.drop_last,
            "pack_length": self.pack_length,
            "max_tokens": self.max_tokens,
        }


def shuffled(number: int, generator: torch.Generator) -> np.ndarray:
    """int64 (number,): 0 to number - 1 in random order."""
    return torch.randperm(number, generator=generator).numpy()


def cut_by_length(
    group: np.ndarray, lengths: np.ndarray, step_size: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a group of samples into steps of similar length; which samples meet is random.

    Args:
        group: indices of the samples.
        lengths: of all samples, not only of these.
        step_size: samples of a step.
        generator: of the shuffling.

    Returns:
        The complete steps, (steps, step_size), each from its longest sample to its shortest, and the rest, random
        samples too few for a step, longest first. The longest of all is in a complete step, if there is one.
    """
    group = group[shuffled(len(group), generator)]
    # The longest sample first, so that it falls into a complete step whatever is left over.
    longest = int(lengths[group].argmax())
    group[[0, longest]] = group[[longest, 0]]
    end = len(group) - len(group) % step_size
    # Sorted within blocks of steps, not as a whole: else the same samples would meet in every epoch.
    sorted_together = np.arange(end) // (step_size * _STEPS_SORTED_TOGETHER)
    complete = group[:end][np.lexsort((-lengths[group[:end]], sorted_together))]
    rest = group[end:]
    return complete.reshape(-1, step_size), rest[np.argsort(-lengths[rest], kind="stable")]


class RankBatchSampler(Sampler[list[int]]):
    """The batches of one rank: lists of indices, micro-batch after micro-batch.

    What is said of samples here holds for packs and batches by tokens, where samples come in these. Every rank gets as
    many. Of the samples of a micro-batch over all ranks, at most ``batch_size * num_ranks``,
    each rank gets the same number, or one fewer; where there are fewer samples than ranks, some ranks get an
    empty list. In groups of similar length, which are sorted, rank ``r`` gets samples r, r + ranks, ...: the ranks'
    sums of tokens then differ by no more than the longest sample and the shortest do. Otherwise it gets
    neighbours.

    Args:
        order: of the whole run.
        batch_size: of one rank's micro-batch.
        accumulation: micro-batches of a step; batch_size * accumulation * num_ranks is ``order.step_size``.
        num_ranks: how many there are.
        rank: whose batches these are.
    """

    def __init__(
        self, order: DataOrder, batch_size: int, accumulation: int = 1, num_ranks: int = 1, rank: int = 0
    ) -> None:
        assert batch_size * accumulation * num_ranks == order.step_size
        assert 0 <= rank < num_ranks
        self.order = order
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.num_ranks = num_ranks
        self.rank = rank
        self.epoch = self.start = 0

    def __len__(self) -> int:
        """Micro-batches of an epoch: ``accumulation`` a step, but as few as it takes in the last."""
        # Only the last step of an epoch may be so small that later micro-batches of it would be empty on all ranks.
        last = int(self.order.bounds[-1] - self.order.bounds[-2])
        together = self.batch_size * self.num_ranks
        return (self.order.num_steps - 1) * self.accumulation + -(-last // together)

    def seek(self, epoch: int, start: int = 0) -> None:
        """Let iteration be over that epoch; its first ``start`` micro-batches are then empty lists.

        The resuming trainer skips as many batches; no sample of them is read.
        """
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = self.epoch, self.start
        yield from repeat([], start)
        for number in range(start, len(self)):
            yield self._deal(epoch, number)

    def _deal(self, epoch: int, number: int) -> list[int]:
        """This rank's share of an epoch's micro-batch."""
        step, micro = divmod(number, self.accumulation)
        begin, end = self.order.bounds[step : step + 2].tolist()
        together = self.batch_size * self.num_ranks
        begin += micro * together
        count = min(end - begin, together)
        if count <= 0:
            return []  # An incomplete step before the last keeps its micro-batches: all ranks step together.
        # Sorted by length: taking turns evens out the ranks' sums of tokens. Packs and batches have even sums as it is.
        if self.order.strategy in GROUPED and not self.order.has_units:
            return self.order.take(epoch, begin, begin + count)[self.rank :: self.num_ranks]
        # Neighbours, so that a file that is read in order is read in order by each rank too.
        first, behind = (begin + count * rank // self.num_ranks for rank in (self.rank, self.rank + 1))
        return self.order.take(epoch, first, behind)
