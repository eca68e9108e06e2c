"""The metrics of all tasks, in one place.

=======  ==================================  ======================================================
task     scores of each sample               scores of all samples
=======  ==================================  ======================================================
rec      ``score_rec``                       ``bootstrap(rows)``
tvg      ``score_tvg``                       ``bootstrap(rows)``
stvg     ``find_tube``, ``score_stvg``       ``bootstrap(rows)``
svg      ``find_tube``, ``score_svg``        ``bootstrap(rows)``
elc      ``find_tube``, ``score_elc``        ``bootstrap(rows) | bootstrap(CaptionScorer(...))``
caption  ``score_caption``                   ``bootstrap(rows) | bootstrap(CaptionScorer(...))``
=======  ==================================  ======================================================

Every row has ``unparsable``, 0 or 1, whose mean is the share of answers that say nothing of what was asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llava.eval.metrics.captions import CaptionScorer, score_caption, score_elc, split_words
from llava.eval.metrics.grounding import find_tube, parse_tube, score_rec, score_stvg, score_svg, score_tvg

__all__ = [
    "CaptionScorer",
    "bootstrap",
    "find_tube",
    "parse_tube",
    "score_caption",
    "score_elc",
    "score_rec",
    "score_stvg",
    "score_svg",
    "score_tvg",
    "split_words",
]

# How far a score may be off, by resampling its samples (the percentile bootstrap of Efron, 1979).

_MOST_DRAWS = 1 << 22
"""Samples drawn at once: 32 MiB of their numbers."""


class Statistics(Protocol):
    """What scores of any choice of samples are computed from.

    Attributes:
        statistics: (samples, numbers).
    """

    @property
    def statistics(self) -> NDArray[np.float64]: ...

    def scores(self, sums: NDArray[np.float64], num_samples: int) -> dict[str, NDArray[np.float64]]:
        """The scores (...) of ``num_samples`` samples whose statistics sum up to ``sums`` (..., numbers)."""
        ...


class Means:
    """Scores that are means of the samples' own.

    Args:
        rows: one mapping a sample, all of the same names.

    Raises:
        ValueError: the rows differ in their names.
    """

    def __init__(self, rows: Sequence[Mapping[str, float]]) -> None:
        self._names = tuple(rows[0]) if rows else ()
        for number, row in enumerate(rows):
            if row.keys() != rows[0].keys():
                raise ValueError(f"row {number} has the scores {sorted(row)}, but row 0 has {sorted(rows[0])}")
        self.statistics = np.array([[row[name] for name in self._names] for row in rows], dtype=np.float64)

    def scores(self, sums: NDArray[np.float64], num_samples: int) -> dict[str, NDArray[np.float64]]:
        return dict(zip(self._names, np.moveaxis(sums, -1, 0) / num_samples, strict=True))


def bootstrap(
    samples: Statistics | Sequence[Mapping[str, float]],
    seed: int = 0,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> dict[str, dict[str, float]]:
    """The scores of samples, with the intervals in which they fall when the samples are drawn anew.

    Each resample draws as many samples as there are, with replacement. The same seed and number of samples draw
    the same ones, so that the scores of a task's several kinds are of the same resamples.

    Args:
        samples: rows of scores, whose means count, or statistics, such as a ``CaptionScorer``.
        level: the share of resamples that an interval holds; as many lie below it as above.

    Returns:
        For each score ``{"value", "low", "high"}``: of the samples themselves, and the ends of the interval.

    Raises:
        ValueError: there is no sample, rows differ in their names, or an argument is out of its range.
    """
    if num_resamples < 1 or not 0 < level < 1:
        raise ValueError(f"num_resamples is {num_resamples} and level {level}; they must be 1 or more and in (0, 1)")
    source = Means(samples) if isinstance(samples, Sequence) else samples
    statistics = source.statistics
    if not len(statistics):
        raise ValueError("there is no sample to score")
    # Sums are enough: every score is made of them, whichever samples were drawn.
    values = source.scores(statistics.sum(axis=0), len(statistics))
    resampled = source.scores(_resample_sums(statistics, seed, num_resamples), len(statistics))
    edges = ((1 - level) / 2, (1 + level) / 2)
    report = {}
    for name, value in values.items():
        low, high = np.quantile(resampled[name], edges)
        report[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return report


def _resample_sums(statistics: NDArray[np.float64], seed: int, num_resamples: int) -> NDArray[np.float64]:
    """(num_resamples, numbers): the sums of the statistics over each resample."""
    generator = np.random.default_rng(seed)
    size = len(statistics)
    at_once = max(_MOST_DRAWS // size, 1)
    parts = []
    for first in range(0, num_resamples, at_once):
        num_rows = min(at_once, num_resamples - first)
        drawn = generator.integers(size, size=(num_rows, size))  # (resamples, samples)
        # How often each resample has each sample: the sums are then one product of matrices.
        drawn += np.arange(num_rows)[:, np.newaxis] * size
        times = np.bincount(drawn.ravel(), minlength=num_rows * size).reshape(num_rows, size)
        parts.append(times @ statistics)  # (resamples, numbers)
    return np.concatenate(parts)


_LEVEL = 0.95


def find_interval(values: NDArray[np.float64] | Sequence[float]) -> tuple[float, float]:
    """The ends of the interval at 95 % of what resamples came to, (resamples,): as many lie below it as above."""
    low, high = np.quantile(values, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))
    return float(low), float(high)


def resample_means(
    values: NDArray[np.float64] | Sequence[float], generator: np.random.Generator, num_resamples: int
) -> NDArray[np.float64]:
    """Means, (resamples,), of values (items,) that are drawn anew with replacement."""
    # How often each value is drawn is all that a mean needs: one draw of counts in place of one an item.
    distinct, counts = np.unique(values, return_counts=True)
    num_items = counts.sum()
    drawn = generator.multinomial(num_items, counts / num_items, size=num_resamples)  # (resamples, distinct values)
    return np.asarray(drawn @ distinct / num_items)
