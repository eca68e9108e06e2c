"""The order of the data: every sample once, the same for any number of ranks, and found again in one look."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from llava.data.samplers import BY_LENGTH, BY_MODALITY, GROUPED, RANDOM, SEQUENTIAL, STRATEGIES, DataOrder
from llava.data.samplers import RankBatchSampler as Sampler

Steps = list[list[list[int]]]
"""Of each micro-batch, of each rank, the indices."""


def make_lengths(number: int, text_share: float = 0.4, seed: int = 0) -> np.ndarray:
    """Lengths from 5 to 400, negative for text."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 400, number)
    return np.where(rng.random(number) < text_share, -lengths, lengths)


def make_order(number: int, step_size: int, strategy: str, lengths: np.ndarray | None = None, **options) -> DataOrder:
    lengths = make_lengths(number) if lengths is None else lengths
    return DataOrder(
        number, step_size, strategy, lengths=lengths if strategy == BY_MODALITY else abs(lengths), **options
    )


def run_epoch(order: DataOrder, batch: int, accumulation: int, ranks: int, epoch: int = 0, start: int = 0) -> Steps:
    samplers = [Sampler(order, batch, accumulation, ranks, rank) for rank in range(ranks)]
    for sampler in samplers:
        sampler.seek(epoch, start)
    rows = [list(sampler) for sampler in samplers]
    assert {len(row) for row in rows} == {len(samplers[0])}
    return [list(micro) for micro in zip(*rows, strict=True)]


def flat(steps: Steps) -> list[int]:
    return [index for micro in steps for rank in micro for index in rank]


NUMBERS = (1, 2, 7, 24, 61, 200)
SHAPES = tuple(itertools.product((1, 3, 4), (1, 2, 3), (1, 2, 3, 8)))
"""Batch size, accumulation, ranks."""


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("number", NUMBERS)
def test_every_sample_once_for_any_batch_and_ranks(strategy: str, number: int) -> None:
    for (batch, accumulation, ranks), epoch in itertools.product(SHAPES, (0, 3)):
        order = make_order(number, batch * accumulation * ranks, strategy)
        steps = run_epoch(order, batch, accumulation, ranks, epoch)
        assert sorted(flat(steps)) == list(range(number))
        for micro in steps:
            sizes = [len(rank) for rank in micro]
            assert max(sizes) <= batch
            assert max(sizes) - min(sizes) <= 1
        assert any(steps[-1]), "an epoch does not end on a micro-batch of nothing"
        # As many updates as transformers counts in so many micro-batches.
        assert -(-len(steps) // accumulation) == order.num_steps
        if strategy != BY_MODALITY:
            assert len(steps) == -(-number // (batch * ranks))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_has_the_same_samples_for_any_number_of_ranks(strategy: str) -> None:
    def updates(batch: int, accumulation: int, ranks: int) -> list[list[int]]:
        steps = run_epoch(make_order(101, 24, strategy), batch, accumulation, ranks, epoch=1)
        return [sorted(flat(steps[i : i + accumulation])) for i in range(0, len(steps), accumulation)]

    alone = updates(24, 1, 1)
    for shape in ((3, 8, 1), (12, 1, 2), (3, 4, 2), (1, 6, 4), (1, 1, 24)):
        assert updates(*shape) == alone


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_order_is_a_function_of_seed_and_epoch(strategy: str) -> None:
    def orders(seed: int, epochs: tuple[int, ...]) -> dict[int, list[int]]:
        order = make_order(90, 8, strategy, seed=seed)
        return {epoch: order.order(epoch).tolist() for epoch in epochs}

    assert orders(1, (0, 1, 2)) == orders(1, (2, 1, 0))
    shuffles = strategy != SEQUENTIAL
    assert (orders(1, (0,))[0] != orders(1, (1,))[1]) == shuffles
    assert (orders(1, (0,)) != orders(9, (0,))) == shuffles


def test_random_order_is_that_of_transformers_trainer() -> None:
    """accelerate seeds torch's RandomSampler with seed + epoch."""
    order = DataOrder(50, 4, RANDOM, seed=42)
    for epoch in (0, 1, 5):
        expected = torch.randperm(50, generator=torch.Generator().manual_seed(42 + epoch))
        assert order.order(epoch).tolist() == expected.tolist()


def test_sequential_ranks_take_neighbours() -> None:
    assert run_epoch(DataOrder(10, 4, SEQUENTIAL), 2, 1, 2) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8], [9]]]
    assert run_epoch(DataOrder(5, 4, SEQUENTIAL), 2, 1, 2) == [[[0, 1], [2, 3]], [[], [4]]]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 3, 2), (1, 2, 4)])
def test_a_position_is_the_rest_of_the_epoch(strategy: str, shape: tuple[int, int, int]) -> None:
    order = make_order(47, int(np.prod(shape)), strategy)
    whole = run_epoch(order, *shape, epoch=2)
    for start in range(len(whole) + 1):
        rest = run_epoch(order, *shape, epoch=2, start=start)
        assert not any(itertools.chain(*rest[:start]))
        assert rest[start:] == whole[start:]


def test_what_was_skipped_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(DataOrder(1_000_000, 1), 1)
    dealt = []
    monkeypatch.setattr(Sampler, "_deal", lambda self, order, number: dealt.append(number) or [])
    sampler.seek(0, start=999_990)
    assert len(list(sampler)) == 1_000_000
    assert dealt == list(range(999_990, 1_000_000))


def test_a_million_samples_are_held_as_an_array() -> None:
    order = DataOrder(1_000_000, 256).order(0)
    assert order.dtype == np.int32
    assert order.nbytes <= 8_000_000


@pytest.mark.parametrize("strategy", GROUPED)
@pytest.mark.parametrize("number", [64, 333])
def test_the_largest_batch_comes_first(strategy: str, number: int) -> None:
    for seed in range(10):
        lengths = make_lengths(number, seed=seed)
        order = make_order(number, 12, strategy, lengths, seed=seed)
        for epoch in range(3):
            first, *others = run_epoch(order, 3, 2, 2, epoch)
            assert abs(lengths[flat([first])]).max() == abs(lengths).max()
            assert all(len(rank) <= max(map(len, first)) for micro in others for rank in micro)


def test_few_long_samples_lead_even_where_they_fill_no_step() -> None:
    lengths = np.array([-10] * 40 + [500] * 3)
    first, *others = run_epoch(DataOrder(43, 8, BY_MODALITY, lengths=lengths), 2, 2, 2)
    assert sorted(flat([first])) == [40, 41, 42]
    assert sorted(flat(others)) == list(range(40))


@pytest.mark.parametrize("strategy", GROUPED)
def test_ranks_have_equal_work(strategy: str) -> None:
    lengths = make_lengths(999)
    order = make_order(999, 4 * 2 * 4, strategy, lengths)
    for micro in run_epoch(order, 4, 2, 4):
        tokens = [abs(lengths[rank]) for rank in micro]
        if min(map(len, tokens)) < 4:
            continue
        sums, together = [rank.sum() for rank in tokens], np.concatenate(tokens)
        assert max(sums) - min(sums) <= together.max() - together.min()


@pytest.mark.parametrize("strategy", GROUPED)
def test_grouping_leaves_little_to_pad(strategy: str) -> None:
    lengths = make_lengths(2000)

    def padding(steps: Steps) -> float:
        batches = [abs(lengths[rank]) for micro in steps for rank in micro if rank]
        return 1 - sum(map(np.sum, batches)) / sum(len(batch) * batch.max() for batch in batches)

    assert padding(run_epoch(DataOrder(2000, 32), 4, 2, 4)) > 0.3
    assert padding(run_epoch(make_order(2000, 32, strategy, lengths), 4, 2, 4)) < 0.05


def test_all_but_the_first_step_are_shuffled_by_length_too() -> None:
    lengths = abs(make_lengths(1000))
    order = DataOrder(1000, 10, BY_LENGTH, lengths=lengths)
    longest = lengths[order.order(0).reshape(-1, 10)[:, 0]]
    assert abs(np.corrcoef(longest, np.arange(100))[0, 1]) < 0.3


@pytest.mark.parametrize("number", [9, 61, 200])
def test_no_step_mixes_text_and_media(number: int) -> None:
    lengths = make_lengths(number)
    for batch, accumulation, ranks in SHAPES:
        order = DataOrder(number, batch * accumulation * ranks, BY_MODALITY, lengths=lengths)
        steps = run_epoch(order, batch, accumulation, ranks)
        for i in range(0, len(steps), accumulation):
            signs = np.sign(lengths[flat(steps[i : i + accumulation])])
            assert len(set(signs)) == 1


def test_one_modality_alone_is_grouped_by_length() -> None:
    for sign in (-1, 1):
        lengths = sign * abs(make_lengths(50))
        one, other = DataOrder(50, 8, BY_MODALITY, lengths=lengths), DataOrder(50, 8, BY_LENGTH, lengths=abs(lengths))
        assert one.order(0).tolist() == other.order(0).tolist()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_drop_last_leaves_incomplete_steps_out(strategy: str) -> None:
    order = make_order(61, 8, strategy, drop_last=True)
    steps = run_epoch(order, 2, 2, 2)
    trained = flat(steps)
    assert len(trained) == len(set(trained)) == 8 * order.num_steps
    assert all(len(rank) == 2 for micro in steps for rank in micro)
    assert 61 - len(trained) < (16 if strategy == BY_MODALITY else 8)
    with pytest.raises(ValueError, match="--dataloader_drop_last leaves nothing to train on: 3 samples do not"):
        make_order(3, 8, strategy, drop_last=True)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a single sample"):
        DataOrder(0, 8)


def test_fingerprint_tells_orders_apart() -> None:
    ids = [f"sample-{i}" for i in range(5000)]

    def fingerprint(strategy: str = BY_LENGTH, names: list[str] = ids, **changes) -> dict:
        options = {"step_size": 8, "seed": 1, "lengths": abs(make_lengths(len(names))), **changes}
        return DataOrder(len(names), strategy=strategy, **options).fingerprint(names.__getitem__)

    same = fingerprint()
    assert fingerprint() == same
    other_length = abs(make_lengths(5000))
    other_length[17] += 1
    different = {
        "samples": fingerprint(names=ids[:-1]), "ids": fingerprint(names=ids[::-1]), "seed": fingerprint(seed=2),
        "step_size": fingerprint(step_size=4), "drop_last": fingerprint(drop_last=True),
        "lengths": fingerprint(lengths=other_length), "strategy": fingerprint(RANDOM),
    }  # fmt: skip
    for name, changed in different.items():
        assert changed[name] != same[name]
    # What does not move the order does not count.
    assert fingerprint(RANDOM) == fingerprint(RANDOM, lengths=other_length)
    assert fingerprint(SEQUENTIAL) == fingerprint(SEQUENTIAL, seed=3)


def test_few_ids_are_read() -> None:
    read = []
    DataOrder(100_000, 8).fingerprint(lambda index: read.append(index) or "")
    assert len(read) == 1000
    assert (read[0], read[-1]) == (0, 99_999)
