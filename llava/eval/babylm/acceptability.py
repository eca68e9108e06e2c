"""Sentences with a label, acceptable or not, such as ItaCoLA: how well a model's scores tell the two apart.

There is no pair of which one could win. The area under the ROC curve needs no threshold; Matthews correlation needs
one, which is never chosen on the sentences that it is used for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from llava.eval.choices import Choice, Scorer

_NUM_FOLDS = 10


def check_labels(labels: Sequence[bool | None], last: str) -> None:
    """A ValueError for sentences that all have the same label; ``last`` is where the last one stands."""
    if len(labels) and labels[0] is not None and len(set(labels)) == 1:
        raise ValueError(
            f"{last}: all {len(labels)} sentences up to here have the label {int(labels[0])}; expected some with 0 "
            "(not acceptable) and some with 1"
        )


class SentenceScorer:
    """Scores single sentences: of each the sum of its log-probabilities, and how many tokens that is of.

    Args:
        scorer: of a model.
        count_tokens: of each choice, those that are scored.
    """

    def __init__(self, scorer: Scorer, count_tokens: Callable[[Sequence[Choice]], list[int]]) -> None:
        self._scorer, self._count_tokens = scorer, count_tokens

    def score(
        self, choices: Sequence[Choice], on_scored: Callable[[int], None] | None = None
    ) -> list[tuple[float, ...]]:
        """See ``Scorer``; here the second number is no score."""
        numbers = self._count_tokens(choices)
        scores = self._scorer.score(choices, on_scored)
        return [(total, float(number)) for (total,), number in zip(scores, numbers, strict=True)]


class RocArea:
    """The area under the ROC curve: how often an acceptable sentence scores above an unacceptable one; ties count half.

    Args:
        values: the score of each sentence.
        labels: whether it is acceptable.
        strata: only sentences with the same number here are compared; None compares all.
    """

    def __init__(
        self, values: NDArray[np.float64], labels: NDArray[np.bool_], strata: NDArray[np.float64] | None = None
    ) -> None:
        strata = np.zeros(len(values)) if strata is None else strata
        # Sorted by stratum, then by value: running sums below count what scores lower within a stratum.
        keys, places = np.unique(np.stack([strata, values], axis=1), axis=0, return_inverse=True)
        self._places, self._labels, self.num_items = places.reshape(-1), labels, len(labels)
        # Of each distinct key, the number of its stratum: int64 (keys,).
        self._stratum = np.unique(keys[:, 0], return_inverse=True)[1]

    def __call__(self, weights: NDArray[np.float64] | None = None) -> float | None:
        """The area, with each sentence so many times; None where there is nothing to compare."""
        weights = np.ones(len(self._labels)) if weights is None else weights
        # How many sentences of each label are at each key: float64 (keys,).
        good, bad = (
            np.bincount(self._places, weights * chosen, minlength=len(self._stratum))
            for chosen in (self._labels, ~self._labels)
        )
        num_good, num_bad = (np.bincount(self._stratum, counts) for counts in (good, bad))  # (strata,) each
        before = (np.cumsum(num_bad) - num_bad)[self._stratum]  # in strata that come earlier
        below = np.cumsum(bad) - bad - before
        pairs = float(num_good @ num_bad)
        return float(good @ (below + bad / 2)) / pairs if pairs else None


def matthews(
    labels: NDArray[np.bool_], predicted: NDArray[np.bool_], weights: NDArray[np.float64] | None = None
) -> float:
    """Matthews correlation of labels and predictions; 0 where one of the two is the same everywhere."""
    weights = np.ones(len(labels)) if weights is None else weights
    # In the order of the four cells: true bad, false good, false bad, true good.
    counts = np.bincount(2 * labels + predicted, weights, minlength=4)
    return float(_correlate(counts[0], counts[1], counts[2], counts[3]))


def _correlate(
    true_bad: NDArray[np.float64], false_good: NDArray[np.float64], false_bad: NDArray[np.float64],
    true_good: NDArray[np.float64],
) -> NDArray[np.float64]:  # fmt: skip
    product = (true_bad + false_good) * (true_good + false_bad) * (true_bad + false_bad) * (true_good + false_good)
    determinant = true_good * true_bad - false_good * false_bad
    return np.divide(determinant, np.sqrt(product), out=np.zeros(np.shape(product)), where=np.asarray(product) > 0)


def best_threshold(values: NDArray[np.float64], labels: NDArray[np.bool_]) -> float:
    """Where to cut, so that Matthews correlation is highest; where all labels are the same, beyond all values."""
    distinct, places = np.unique(values, return_inverse=True)  # (values,), (items,)
    good, bad = (np.bincount(places, chosen.astype(np.float64), len(distinct)) for chosen in (labels, ~labels))
    if not good.any() or not bad.any():
        return -np.inf if good.any() else np.inf
    # Cut above each value but the highest: what is at or below it is called unacceptable.
    false_bad, true_bad = (np.cumsum(counts, dtype=np.float64)[:-1] for counts in (good, bad))
    found = _correlate(true_bad, bad.sum() - true_bad, false_bad, good.sum() - false_bad)
    if not len(found):
        return -np.inf
    best = int(np.argmax(found))
    return float((distinct[best] + distinct[best + 1]) / 2)


def predict_held_out(
    values: NDArray[np.float64], labels: NDArray[np.bool_], texts: Sequence[str], seed: int
) -> NDArray[np.bool_]:
    """Which sentences are called acceptable, each by the threshold that is best on the other folds.

    Args:
        values: the score of each.
        labels: whether it is acceptable.
        texts: of the sentences; a sentence that stands there twice is in one fold.
        seed: of the folds.
    """
    # Sorted before they are shuffled: the folds do not depend on the order of the files.
    distinct = sorted(set(texts))
    random.Random(seed).shuffle(distinct)
    fold_of = {text: number % _NUM_FOLDS for number, text in enumerate(distinct)}
    folds = np.array([fold_of[text] for text in texts])
    predicted = np.zeros(len(labels), dtype=np.bool_)
    for fold in range(_NUM_FOLDS):
        held_out = folds == fold
        if not held_out.all():
            predicted[held_out] = values[held_out] > best_threshold(values[~held_out], labels[~held_out])
    return predicted
