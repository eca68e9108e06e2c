"""What the scores of a task's items come to: official and tie-adjusted scores, ties, groups, intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava.eval.babylm.acceptability import RocArea, matthews, predict_held_out
from llava.eval.babylm.tasks import Item, TaskData
from llava.eval.blind import BlindCheck, check_blindness
from llava.eval.metrics import find_interval, resample_means

UID = "UID"
ACCURACY, CORRELATION, AREA = "accuracy, %", "Spearman's rho, x 100", "area under the ROC curve, x 100"
"""What a score is. All are shown times 100, as the leaderboard has them."""
MATTHEWS = "Matthews correlation, x 100"
MEASURE = "measure"
"""The kind of the rows that say something else than the score about the same sentences."""
_NUM_RESAMPLES = 1000
_SPLITS = ("regular", "ambiref", "move_contents")
"""Kinds of items of entity tracking, whose means over the number of operations are averaged."""


@dataclass(frozen=True)
class GroupResult:
    """The scores of a group of items.

    Attributes:
        kind: ``UID``, or what else the groups are told apart by, such as ``field``.
        name: of the group.
        score: the official one.
        adjusted: where k candidates tie, an item counts 1/k if the right one is among them.
        ties: items whose best score several candidates have.
        num_items: all of them.
        low, high: the interval of ``score`` at 95 %, where it is told.
        metric: what ``score`` is, where that is not the task's.
    """

    kind: str
    name: str
    score: float
    adjusted: float
    ties: int
    num_items: int
    low: float | None = None
    high: float | None = None
    metric: str | None = None


@dataclass(frozen=True)
class TaskResult:
    """The scores of a task.

    Attributes:
        task: its name.
        metric: what the scores are: ``ACCURACY``, ``CORRELATION`` or ``AREA``.
        official: as the official pipeline counts: the first of several equal candidates is taken, and groups are
            averaged. None where there is none: a correlation with what is the same for every item.
        adjusted: the same with ties at 1/k each.
        low, high: the interval of ``official`` at 95 %, by drawing items within their groups anew.
        ties, num_items: counts of items.
        chance: what scores drawn by lot come to.
        rows: of all groups, those of ``UID`` first.
    """

    task: str
    metric: str
    official: float | None
    adjusted: float | None
    low: float | None
    high: float | None
    ties: int
    num_items: int
    chance: float
    rows: tuple[GroupResult, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TaskResult:
        """From what ``to_json`` gave."""
        return cls(**{**values, "rows": tuple(GroupResult(**row) for row in values["rows"])})


def best_candidates(scores: Sequence[float]) -> list[int]:
    """The indices of the candidates that have the highest score."""
    highest = max(scores)
    return [index for index, score in enumerate(scores) if score == highest]


def summarize(data: TaskData, items: Sequence[Item], scores: Sequence[Sequence[float]], seed: int = 0) -> TaskResult:
    """What scores come to.

    Args:
        data: the task.
        items: that were scored.
        scores: of the candidates of each.
        seed: of the resamples of the interval.

    Raises:
        ValueError: there is no item.
    """
    if not items:
        raise ValueError(f"{data.name}: there is no item to score")
    if items[0].acceptable is not None:
        return _summarize_labels(data, items, scores, seed)
    best = [best_candidates(told) for told in scores]
    ties = np.array([len(indices) > 1 for indices in best])
    if items[0].ratio is not None:
        return _summarize_ratios(data, items, scores, int(ties.sum()), seed)
    # The official pipeline takes the first of the best, which is the right one where it is among them.
    official = np.array([float(found[0] == item.gold) for item, found in zip(items, best, strict=True)])
    adjusted = np.array([(item.gold in found) / len(found) for item, found in zip(items, best, strict=True)])
    rows = [
        row
        for kind in [UID, *dict.fromkeys(kind for item in items for kind in item.fields)]
        for row in _group_rows(kind, items, official, adjusted, ties)
    ]
    of_uids = {row.name: row for row in rows if row.kind == UID}
    if data.name == "entity_tracking":
        rows += _split_rows(of_uids)
    low, high = _interval(data.name, items, official, seed)
    return TaskResult(
        data.name,
        ACCURACY,
        float(average_groups(data.name, {uid: row.score for uid, row in of_uids.items()})),
        float(average_groups(data.name, {uid: row.adjusted for uid, row in of_uids.items()})),
        low,
        high,
        int(ties.sum()),
        len(items),
        100 * float(np.mean([1 / len(item.choice.candidates) for item in items])),
        tuple(rows),
    )


def check_pictures(own: Sequence[Sequence[float]], other: Sequence[Sequence[float]], seed: int = 0) -> BlindCheck:
    """The blind check of a task: the scores of its candidates with their own pictures and with other items'."""
    outcomes = [
        np.array([100 * (0 in best) / len(best) for best in map(best_candidates, scores)]) for scores in (own, other)
    ]
    return check_blindness(outcomes[0], outcomes[1], seed)


def _group_rows(
    kind: str,
    items: Sequence[Item],
    official: NDArray[np.float64],
    adjusted: NDArray[np.float64],
    ties: NDArray[np.bool_],
) -> list[GroupResult]:
    places: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        name = item.uid if kind == UID else item.fields.get(kind)
        if name is not None:
            places.setdefault(name, []).append(index)
    return [
        GroupResult(
            kind, name, 100 * float(official[p].mean()), 100 * float(adjusted[p].mean()), int(ties[p].sum()), len(p)
        )
        for name, p in sorted(places.items())
    ]


def _split_of(uid: str) -> str:
    return next((split for split in _SPLITS if uid.startswith(split)), uid)


def _split_rows(of_uids: Mapping[str, GroupResult]) -> list[GroupResult]:
    """Of entity tracking: means over the numbers of operations."""
    rows = []
    for split in dict.fromkeys(_split_of(uid) for uid in of_uids):
        own = [row for uid, row in of_uids.items() if _split_of(uid) == split]
        rows.append(
            GroupResult(
                "split",
                split,
                float(np.mean([row.score for row in own])),
                float(np.mean([row.adjusted for row in own])),
                sum(row.ties for row in own),
                sum(row.num_items for row in own),
            )
        )
    return rows


def average_groups(task: str, values: Mapping[str, Any]) -> Any:
    """The mean over the groups of a task, of numbers or arrays; of entity tracking first within its splits."""
    # The leaderboard averages entity tracking over its kinds, whose numbers of operations differ.
    parts: dict[str, list[Any]] = {}
    for uid, value in values.items():
        parts.setdefault(_split_of(uid) if task == "entity_tracking" else "", []).append(value)
    return np.mean([np.mean(own, axis=0) for own in parts.values()], axis=0)


def _interval(task: str, items: Sequence[Item], outcomes: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """The percentile bootstrap (Efron, 1979) of the mean over groups, in each of which items are drawn anew."""
    generator = np.random.default_rng(seed)
    groups: dict[str, list[float]] = {}
    for item, outcome in zip(items, outcomes.tolist(), strict=True):
        groups.setdefault(item.uid, []).append(outcome)
    means = {uid: resample_means(own, generator, _NUM_RESAMPLES) for uid, own in sorted(groups.items())}
    return find_interval(100 * average_groups(task, means))


# Tasks whose items have a share of people who chose the first candidate.


def first_shares(scores: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """The probability of the first candidate among all of its item, by the softmax of their scores."""
    # float64 (items, candidates). Less the largest of each item: exp of sums of log-probabilities would be 0.
    table = np.array([list(told) for told in scores], dtype=np.float64)
    table = np.exp(table - table.max(axis=1, keepdims=True))
    return np.asarray(table[:, 0] / table.sum(axis=1))


def _summarize_ratios(
    data: TaskData, items: Sequence[Item], scores: Sequence[Sequence[float]], ties: int, seed: int
) -> TaskResult:
    model, people = first_shares(scores), np.array([item.ratio for item in items], dtype=np.float64)
    rho = spearman(model, people)
    low = high = None
    if rho is not None:
        # Pairs of shares are drawn together: an item is the model's share and people's.
        generator = np.random.default_rng(seed)
        drawn = [generator.integers(len(items), size=len(items)) for _ in range(_NUM_RESAMPLES)]
        resampled = [value for p in drawn if (value := spearman(model[p], people[p])) is not None]
        low, high = (100 * end for end in find_interval(resampled))
    score = None if rho is None else 100 * rho
    # Equal shares have the mean of their ranks, so that ties are adjusted for already.
    rows = () if score is None else (GroupResult(UID, data.name, score, score, ties, len(items)),)
    return TaskResult(data.name, CORRELATION, score, score, low, high, ties, len(items), 0.0, rows)


def spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float | None:
    """Spearman's rank correlation; None where one of the two is the same everywhere."""
    ranks = _ranks(first), _ranks(second)
    if any(np.ptp(one) == 0 for one in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; equal values have the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    # Rank behind the last of each distinct value, from which the middle of its equal ones follows.
    last = np.cumsum(counts)
    return np.asarray((last - (counts + 1) / 2)[inverse])


# Sentences with a label, whose scores are a sum and the number of tokens that it is of.


def token_means(scores: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """The mean log-probability of a token of each sentence, float64 (items,), to what float32 can tell.

    The same sentence in another batch has another score in its last digits, and would be above itself.
    """
    table = np.array([list(told) for told in scores], dtype=np.float64)
    return np.asarray(np.round(table[:, 0] / table[:, 1], 5))


def _summarize_labels(
    data: TaskData, items: Sequence[Item], scores: Sequence[Sequence[float]], seed: int
) -> TaskResult:
    labels = np.array([bool(item.acceptable) for item in items])
    means, table = token_means(scores), np.array([list(told) for told in scores], dtype=np.float64)
    sums, lengths = np.round(table[:, 0], 4), table[:, 1]
    texts = [item.choice.candidates[0].text for item in items]
    statistics: dict[str, Callable[[NDArray[np.float64] | None], float | None]] = {
        "area, mean of a token": RocArea(means, labels),
        "area, sum": RocArea(sums, labels),
        "area, sentences of one length": RocArea(sums, labels, lengths),
        "area, the shorter sentence": RocArea(-lengths, labels),
    }
    areas = set(statistics)
    for name, values in (("mean of a token", means), ("sum", sums)):
        predicted = predict_held_out(values, labels, texts, seed)
        statistics[f"Matthews correlation, {name}"] = partial(matthews, labels, predicted)
    rows = [
        GroupResult(MEASURE, name, score, score, 0, len(items), low, high, None if name in areas else MATTHEWS)
        for name, statistic in statistics.items()
        for score, low, high in [_measure(statistic, len(items), seed)]
        if score is not None
    ]
    counts = np.unique(means, return_counts=True)[1]
    for kind in dict.fromkeys(kind for item in items for kind in item.fields):
        for name in sorted({item.fields[kind] for item in items}):
            own = np.array([item.fields[kind] == name for item in items])
            score, low, high = _measure(RocArea(means[own], labels[own]), int(own.sum()), seed)
            if score is not None:  # Of one where all labels are the same there is none.
                rows.append(GroupResult(kind, name, score, score, 0, int(own.sum()), low, high))
    area = rows[0]
    # Sentences with the same mean count one half against each other, so that ties are adjusted for already.
    return TaskResult(
        data.name,
        AREA,
        area.score,
        area.score,
        area.low,
        area.high,
        int(counts[counts > 1].sum()),
        len(items),
        50.0,
        tuple(rows),
    )


def _measure(
    statistic: Callable[[NDArray[np.float64] | None], float | None], num_items: int, seed: int
) -> tuple[float | None, float | None, float | None]:
    """A statistic of sentences times 100, and its interval by drawing them anew."""
    score = statistic(None)
    if score is None:
        return None, None, None
    generator = np.random.default_rng(seed)
    drawn = (
        statistic(np.bincount(generator.integers(num_items, size=num_items), minlength=num_items).astype(np.float64))
        for _ in range(_NUM_RESAMPLES)
    )
    low, high = find_interval([one for one in drawn if one is not None])
    return 100 * score, 100 * low, 100 * high
