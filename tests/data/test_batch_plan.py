"""Packs and batches by tokens: every sample once an epoch, as many steps in each, none too full, little padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from llava.data.batch_plan import BatchPlan, plan_in_order, plan_packs, plan_token_batches
from llava.data.samplers import BY_MODALITY, RANDOM, SEQUENTIAL, DataOrder, RankBatchSampler

RNG = np.random.default_rng(0)
LENGTHS = {
    "one": np.array([5]),
    "captions": RNG.integers(5, 61, 3000),
    "videos": np.full(7, 380),
    "mixed": RNG.permutation(np.concatenate([np.full(40, 380), RNG.integers(5, 60, 900)])),
    "documents": RNG.integers(1, 1025, 500),
    "full": np.full(9, 1024),
}


def sums(plan: BatchPlan) -> np.ndarray:
    return np.add.reduceat(plan.lengths, plan.bounds[:-1])


@pytest.mark.parametrize("name", LENGTHS)
def test_packs_hold_all_samples_and_are_nearly_full(name: str) -> None:
    lengths = LENGTHS[name]
    plan = plan_packs(lengths, 1024)
    assert sorted(plan.lengths) == sorted(lengths)
    assert np.diff(plan.bounds).min() > 0
    assert sums(plan).max() <= 1024
    fewest = -(-int(lengths.sum()) // 1024)
    if name == "videos":  # Two in each: a third does not fit.
        assert len(plan) == 4
    else:
        assert len(plan) <= fewest + max(1, fewest // 50)


def test_long_and_short_samples_share_packs() -> None:
    plan = plan_packs(LENGTHS["mixed"], 1024)
    with_video = [plan.lengths[a:b].max() == 380 for a, b in itertools.pairwise(plan.bounds)]
    assert np.mean(with_video) > 0.9


@pytest.mark.parametrize("name", LENGTHS)
def test_batches_by_tokens_count_padding(name: str) -> None:
    lengths = LENGTHS[name]
    for plan in (plan_token_batches(lengths, 2048), plan_in_order(lengths, 2048, padded=True)):
        parts = [plan.lengths[a:b] for a, b in itertools.pairwise(plan.bounds)]
        assert sorted(np.concatenate(parts)) == sorted(lengths)
        assert all(len(part) * part.max() <= 2048 for part in parts)
    by_length = plan_token_batches(lengths, 2048)
    parts = [by_length.lengths[a:b] for a, b in itertools.pairwise(by_length.bounds)]
    padded = sum(len(part) * part.max() for part in parts)
    assert padded <= 1.05 * lengths.sum() or name == "documents"


def test_an_epoch_puts_other_samples_of_the_same_lengths_together() -> None:
    lengths = LENGTHS["captions"]
    plan, everything = plan_packs(lengths, 256), np.arange(len(lengths))
    epochs = [plan.fill(everything, lengths, torch.Generator().manual_seed(seed)) for seed in (1, 2, 1)]
    assert all(np.array_equal(one, other) for one, other in zip(epochs[0], epochs[2], strict=True))
    for samples, bounds in epochs:
        assert sorted(samples) == everything.tolist()
        assert np.add.reduceat(lengths[samples], bounds[:-1]).max() <= 256
        assert len(bounds) == len(plan.bounds)
    assert not np.array_equal(epochs[0][1], epochs[1][1]), "the packs themselves come in another order"
    together = [{frozenset(s[a:b].tolist()) for a, b in itertools.pairwise(bounds)} for s, bounds in epochs[:2]]
    assert not together[0] & together[1]


@pytest.mark.parametrize("units", [{"pack_length": 300}, {"max_tokens": 900}], ids=["packs", "tokens"])
@pytest.mark.parametrize("strategy", [RANDOM, SEQUENTIAL, BY_MODALITY])
def test_every_sample_once_for_any_batch_and_ranks(strategy: str, units: dict[str, int]) -> None:
    for number, batch, accumulation, ranks in itertools.product((1, 7, 61, 400), (1, 3), (1, 2), (1, 3)):
        lengths = np.random.default_rng(number).integers(5, 250, number)
        signed = np.where(np.arange(number) % 3 == 0, -lengths, lengths)
        batch = 1 if "max_tokens" in units else batch
        order = DataOrder(number, batch * accumulation * ranks, strategy, 5, signed, **units)
        assert order.describe_units().startswith(f"{number} samples in ")
        previous = None
        for epoch in range(2):
            rows = []
            for rank in range(ranks):
                sampler = RankBatchSampler(order, batch, accumulation, ranks, rank)
                sampler.seek(epoch)
                rows.append(list(sampler))
                assert len(rows[-1]) == len(sampler)
            assert sorted(i for row in rows for micro in row for i in micro) == list(range(number))
            for micro in (micro for row in rows for micro in row if micro):
                if "max_tokens" in units:
                    assert lengths[micro].max() * len(micro) <= 900
                else:
                    assert lengths[micro].sum() <= 300 * batch
                if strategy == BY_MODALITY and batch == ranks == accumulation == 1:
                    assert len({i % 3 == 0 for i in micro}) == 1
            steps = [order.order(epoch)[a:b].tolist() for a, b in itertools.pairwise(order.step_bounds(epoch))]
            dealt = [
                sorted(i for row in rows for micro in row[s * accumulation : (s + 1) * accumulation] for i in micro)
                for s in range(len(steps))
            ]
            assert dealt == [sorted(step) for step in steps]
            assert previous is None or strategy == SEQUENTIAL or number < 61 or steps != previous
            previous = steps


def test_modalities_are_apart_in_every_step() -> None:
    lengths = np.random.default_rng(3).integers(5, 100, 500)
    signed = np.where(np.arange(500) % 3 == 0, -lengths, lengths)
    order = DataOrder(500, 4, BY_MODALITY, 5, signed, pack_length=200)
    for a, b in itertools.pairwise(order.step_bounds(1)):
        assert len({bool(i % 3 == 0) for i in order.order(1)[a:b]}) == 1
