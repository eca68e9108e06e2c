"""``--compare A B``: are two models that were scored on the same items different, and by how much?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llava.eval.babylm.acceptability import RocArea
from llava.eval.babylm.model_scores import ITEM_SCORES, read_item_scores, read_labels, read_ratios
from llava.eval.babylm.results import average_groups, best_candidates, first_shares, spearman, token_means
from llava.eval.metrics import find_interval, resample_means

_NUM_RESAMPLES = 10_000
_NUM_RANK_RESAMPLES = 2_000

Statistic = Callable[[NDArray[np.int64]], float | None]
"""Of items by their indices, some of them drawn several times; None where they have none."""


@dataclass(frozen=True)
class Comparison:
    """Two models on a task.

    Attributes:
        task: its folder of results.
        first, second: their scores: right items in %, ties at 1/k, averaged over groups; of the wug tasks Spearman's
            rho times 100, None where a model has none; of sentences with a label the area under the ROC curve,
            times 100.
        difference: second less first.
        low, high: its interval at 95 %, of items drawn anew within their groups, the same for both models.
        only_first, only_second: items that one alone has right; None of a correlation.
        p_value: of McNemar's exact test of these two numbers: how likely they, or less equal ones, are by chance; None
            of a correlation and an area, whose items are not right or wrong.
        num_items: that both were scored on.
    """

    task: str
    first: float | None
    second: float | None
    difference: float | None
    low: float | None
    high: float | None
    only_first: int | None
    only_second: int | None
    p_value: float | None
    num_items: int

    def describe(self) -> str:
        """A row of a Markdown table."""
        scores = ["none" if one is None else f"{one:.2f}" for one in (self.first, self.second)]
        difference = "" if self.difference is None else f"{self.difference:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"
        only = "" if self.only_first is None else f"{self.only_first} / {self.only_second}"
        p_value = "" if self.p_value is None else f"{self.p_value:.2g}"
        return f"| {' | '.join([self.task, *scores, difference, only, p_value, str(self.num_items)])} |"


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


def describe_uncompared(first: Path, second: Path) -> list[str]:
    """The tasks that one of two folders alone has, a line for each folder that has such."""
    tasks = [_find_scores(folder) for folder in (first, second)]
    alone = [[name for name in own if name not in other] for own, other in (tasks, tasks[::-1])]
    return [
        f"not compared, only in {folder}: {', '.join(names)}"
        for folder, names in zip((first, second), alone, strict=True)
        if names
    ]


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
    # People chose both forms, so there is no right one to count: what is compared is the correlation.
    if task.startswith("wug_"):
        # Either folder will do: both were scored on the same items.
        ratios = read_ratios(first) or read_ratios(second)
        if ratios.keys() != set(ids):
            raise ValueError(f"--compare: {first} does not have people's ratios; score it again with --overwrite")
        people = np.array([ratios[name] for name in ids])
        shares = [first_shares([told[name] for name in ids]) for told in (one, two)]
        rhos = [partial(_spearman_of, values, people) for values in shares]
        return compare_statistics(task, rhos[0], rhos[1], len(ids), seed)
    if labels := read_labels(first):
        acceptable = np.array([labels[name] for name in ids])
        areas = [RocArea(token_means([told[name] for name in ids]), acceptable) for told in (one, two)]
        return compare_statistics(task, partial(_area_of, areas[0]), partial(_area_of, areas[1]), len(ids), seed)
    return compare_outcomes(task, ids, _outcomes(one, ids), _outcomes(two, ids), seed)


def _spearman_of(shares: NDArray[np.float64], people: NDArray[np.float64], drawn: NDArray[np.int64]) -> float | None:
    return spearman(shares[drawn], people[drawn])


def _area_of(area: RocArea, drawn: NDArray[np.int64]) -> float | None:
    return area(np.bincount(drawn, minlength=area.num_items).astype(np.float64))


def compare_statistics(task: str, first: Statistic, second: Statistic, num_items: int, seed: int = 0) -> Comparison:
    """Compare two models by a number that all items make together; the same items are drawn for both."""
    found = [statistic(np.arange(num_items)) for statistic in (first, second)]
    scores = [None if one is None else 100 * one for one in found]
    if scores[0] is None or scores[1] is None:
        return Comparison(task, scores[0], scores[1], None, None, None, None, None, None, num_items)
    generator = np.random.default_rng(seed)
    differences = []
    for _ in range(_NUM_RANK_RESAMPLES):
        drawn = generator.integers(num_items, size=num_items)  # int64 (items,)
        one, two = first(drawn), second(drawn)
        if one is not None and two is not None:
            differences.append(100 * (two - one))
    low, high = find_interval(differences)
    return Comparison(task, scores[0], scores[1], scores[1] - scores[0], low, high, None, None, None, num_items)


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
        drawn[uid] = resample_means(pair[1] - pair[0], generator, _NUM_RESAMPLES)
    low, high = find_interval(100 * average_groups(kind, drawn))
    scores = [100 * float(average_groups(kind, table)) for table in means]
    # A tie is not right here: McNemar counts items that one model alone has right.
    only_first = int(((first == 1) & (second < 1)).sum())
    only_second = int(((second == 1) & (first < 1)).sum())
    return Comparison(
        task, scores[0], scores[1], scores[1] - scores[0], low, high, only_first, only_second,
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
