"""``--compare A B``: are two models that were scored on the same items different, and by how much?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llava.eval.babylm.model_scores import ITEM_SCORES, read_item_scores
from llava.eval.babylm.results import average_groups, best_candidates

_NUM_RESAMPLES = 10_000
_LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """Two models on a task.

    Attributes:
        task: its folder of results.
        first, second: their scores: right items in %, ties at 1/k, averaged over groups.
        difference: second less first.
        low, high: its interval at 95 %, of items drawn anew within their groups, the same for both models.
        only_first, only_second: items that one alone has right.
        p_value: of McNemar's exact test of these two numbers: how likely they, or less equal ones, are by chance.
        num_items: that both were scored on.
    """

    task: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float
    num_items: int

    def describe(self) -> str:
        """A row of a Markdown table."""
        return (
            f"| {self.task} | {self.first:.2f} | {self.second:.2f} | {self.difference:+.2f} "
            f"[{self.low:+.2f}, {self.high:+.2f}] | {self.only_first} / {self.only_second} | {self.p_value:.2g} | "
            f"{self.num_items} |"
        )


HEAD = (
    "| task | A | B | B - A (95 %) | only A / only B right | p (McNemar, exact) | items |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def compare_folders(first: Path, second: Path, seed: int = 0) -> list[Comparison]:
    """Compare the results of two models, task by task.

    Args:
        first, second: folders of a model and its revision, such as ``results/my_model/main``.
        seed: of the resamples.

    Raises:
        ValueError: they have no task in common, or were scored on other items.
    """
    tasks = [_find_scores(folder) for folder in (first, second)]
    common = [name for name in tasks[0] if name in tasks[1]]
    if not common:
        raise ValueError(
            f"--compare: {first} has {', '.join(tasks[0]) or 'no scores'}, {second} {', '.join(tasks[1]) or 'none'}; "
            "they have no task in common"
        )
    return [compare_scores(name, tasks[0][name], tasks[1][name], seed) for name in common]


def _find_scores(folder: Path) -> dict[str, Path]:
    """The folders of scores by their names, such as ``blimp/blimp_filtered``."""
    root = folder / "zero_shot" / "causal"
    if not root.is_dir():
        raise ValueError(
            f"--compare {folder}: has no zero_shot/causal; give a model's folder, such as results/NAME/main"
        )
    return {path.parent.relative_to(root).as_posix(): path.parent for path in sorted(root.rglob(ITEM_SCORES))}


def compare_scores(task: str, first: Path, second: Path, seed: int) -> Comparison:
    """Compare the scores of two folders of one task."""
    told = [read_item_scores(folder) for folder in (first, second)]
    assert told[0] is not None, f"{first} has no scores"
    assert told[1] is not None, f"{second} has no scores"
    (settings, one), (others, two) = told[0], told[1]
    if settings["items"] != others["items"]:
        raise ValueError(f"--compare: {first} and {second} were scored on other items; score both on the same data")
    ids = [name for name in one if name in two]
    if len(ids) < max(len(one), len(two)):
        raise ValueError(f"--compare: {first if len(one) < len(two) else second} is not wholly scored; finish it first")
    return compare_outcomes(task, ids, _outcomes(one, ids), _outcomes(two, ids), seed)


def _outcomes(scores: Mapping[str, tuple[float, ...]], ids: Sequence[str]) -> NDArray[np.float64]:
    """(items,): 1 where the first candidate, the right one, is the best; 1/k where it is one of k."""
    best = [best_candidates(scores[name]) for name in ids]
    return np.array([(0 in found) / len(found) for found in best])


def compare_outcomes(
    task: str, ids: Sequence[str], first: NDArray[np.float64], second: NDArray[np.float64], seed: int = 0
) -> Comparison:
    """Compare two models by what their items count; the group of an item is its id without the number at its end."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(ids):
        groups.setdefault(name.rpartition("_")[0], []).append(index)
    generator = np.random.default_rng(seed)
    kind = "entity_tracking" if task.startswith("entity_tracking") else ""
    means: list[dict[str, float]] = [{}, {}]
    drawn = {}
    for uid, own in sorted(groups.items()):
        pair = first[own], second[own]
        for table, values in zip(means, pair, strict=True):
            table[uid] = float(values.mean())
        values, counts = np.unique(pair[1] - pair[0], return_counts=True)
        drawn[uid] = generator.multinomial(len(own), counts / len(own), size=_NUM_RESAMPLES) @ values / len(own)
    low, high = np.quantile(100 * average_groups(kind, drawn), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    scores = [100 * float(average_groups(kind, table)) for table in means]
    only_first = int(((first == 1) & (second < 1)).sum())
    only_second = int(((second == 1) & (first < 1)).sum())
    return Comparison(
        task, scores[0], scores[1], scores[1] - scores[0], float(low), float(high), only_first, only_second,
        mcnemar(only_first, only_second), len(ids),
    )  # fmt: skip


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test: a fair coin for each item that one model alone has right."""
    total, least = only_first + only_second, min(only_first, only_second)
    if total == 0:
        return 1.0
    # Binomial tail at one half, in logarithms: the coefficients of thousands of items do not fit a float.
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(least + 1)]
    largest = max(logs)
    tail = math.exp(largest - total * math.log(2)) * math.fsum(math.exp(one - largest) for one in logs)
    return min(1.0, 2 * tail)
