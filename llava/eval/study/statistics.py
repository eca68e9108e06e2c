"""Is a variant better than the baseline? Tests over items and seeds, paired in both.

Every model answers the same items, and every variant is trained with the same seeds. So what is tested is the
difference on each item and seed; items and seeds are both drawn from larger populations, and both are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llava.eval.metrics import find_interval

REPLICATES = 2000
Outcomes = Mapping[str, NDArray[np.float64]]
"""For each group of items (a UID) what each item counts: 1 right, 0 wrong, 1/k a tie of k."""


@dataclass(frozen=True)
class Comparison:
    """A variant held against the baseline; all differences are the variant's score less the baseline's.

    Attributes:
        difference: mean over seeds.
        low, high: 95 % interval of the bootstrap.
        p_value: of the bootstrap, two-sided.
        by_seed: the difference of each seed.
        p_seeds: of a paired t test over seeds alone, two-sided; None for fewer than two seeds.
        num_items: of all groups.
    """

    difference: float
    low: float
    high: float
    p_value: float
    by_seed: tuple[float, ...]
    p_seeds: float | None
    num_items: int


def mean_and_spread(scores: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1) over seeds; None for one seed."""
    return float(np.mean(scores)), float(np.std(scores, ddof=1)) if len(scores) > 1 else None


def compare(
    variant: Sequence[Outcomes],
    baseline: Sequence[Outcomes],
    weights: Mapping[str, float] | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Comparison:
    """Compare by a bootstrap over seeds and items, and by a t test over seeds.

    A replicate draws seeds with replacement and, within each group, items: the same items for all seeds, which they
    share. The mean of n resampled seeds varies by (n - 1)/n of what it should (Hesterberg, 2015, "What teachers should
    know about the bootstrap", section 3.2), which matters for three of them: deviations of seeds from their mean are
    scaled by sqrt(n/(n - 1)). With one seed only items are resampled.

    Args:
        variant, baseline: outcomes of each seed, in the same order of seeds, with the same groups and items.
        weights: of the groups in the score; by default all count the same.
        replicates: how many.
        seed: of the draws.

    Raises:
        ValueError: groups or items are not the same.
    """
    if len(variant) != len(baseline) or not variant:
        raise ValueError(f"{len(variant)} and {len(baseline)} seeds; a paired test needs the same ones, at least one")
    rng = np.random.default_rng(seed)
    num_seeds, groups = len(variant), list(baseline[0])
    for told in (*variant, *baseline):
        if list(told) != groups or any(len(told[group]) != len(baseline[0][group]) for group in groups):
            raise ValueError("the models were not scored on the same items; score them with the same settings")
    means = np.zeros((num_seeds, replicates))  # Mean over groups, of resampled items.
    observed = np.zeros(num_seeds)  # (seeds,)
    for group in groups:
        items = np.stack([v[group] - b[group] for v, b in zip(variant, baseline, strict=True)])  # (seeds, items)
        weight = 1 / len(groups) if weights is None else weights[group]
        observed += weight * items.mean(1)
        means += weight * resample_items(items, replicates, rng)  # (seeds, replicates)
    centre = means.mean(0)
    stretch = math.sqrt(num_seeds / (num_seeds - 1)) if num_seeds > 1 else 1.0
    drawn = rng.integers(num_seeds, size=(num_seeds, replicates))
    found = np.take_along_axis(centre + stretch * (means - centre), drawn, 0).mean(0)  # (replicates,)
    low, high = find_interval(found)
    # Both tails with the observed value among the replicates, so that no p is 0.
    below, above = ((1 + np.sum(side)) / (replicates + 1) for side in (found <= 0, found >= 0))
    return Comparison(
        difference=float(observed.mean()),
        low=low,
        high=high,
        p_value=min(1.0, 2 * float(min(below, above))),
        by_seed=tuple(float(value) for value in observed),
        p_seeds=paired_t_test(observed.tolist()),
        num_items=sum(len(baseline[0][group]) for group in groups),
    )


def resample_items(items: NDArray[np.float64], replicates: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means over items drawn with replacement: (seeds, items) -> (seeds, replicates)."""
    num_items = items.shape[1]
    found = np.empty((items.shape[0], replicates))
    block = max(1, 4_000_000 // num_items)  # What is drawn at a time stays within some 30 MB.
    for first in range(0, replicates, block):
        size = min(block, replicates - first)
        drawn = rng.integers(num_items, size=(size, num_items))
        rows = np.repeat(np.arange(size), num_items)
        counts = np.bincount(rows * num_items + drawn.ravel(), minlength=size * num_items)
        found[:, first : first + size] = items @ counts.reshape(size, num_items).T / num_items
    return found


def paired_t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p of Student's t test that the mean is 0; None for fewer than two values, or where all are the same.

    Two seeds that differ by the same number of items are no sign of certainty, which p = 0 would be.
    """
    count = len(differences)
    if count < 2:
        return None
    mean, spread = mean_and_spread(differences)
    assert spread is not None
    if spread == 0:
        return None
    return student_p(mean / (spread / math.sqrt(count)), count - 1)


def student_p(t: float, freedom: int) -> float:
    """Two-sided p of Student's t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if freedom % 2:
        term, total = math.cos(angle), 0.0
        for k in range(1, freedom, 2):  # cos + 2/3 cos^3 + 2*4/(3*5) cos^5 ..., up to cos^(freedom - 2)
            total += term
            term *= square * (k + 1) / (k + 2)
        return max(0.0, 1 - 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0)))
    term, total = 1.0, 0.0
    for k in range(0, freedom, 2):  # 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 ..., up to cos^(freedom - 2)
        total += term
        term *= square * (k + 1) / (k + 2)
    return max(0.0, 1 - sine * total)
