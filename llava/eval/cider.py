"""CIDEr (Vedantam et al., 2015) of captions, in the form of the COCO evaluation: clipped counts, sigma 6."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from llava.eval.ngrams import MAX_ORDER, NgramCounts

_SIGMA = 6.0
_SCALE = 10.0

Vector = dict[tuple[str, ...], float]


def cider_scores(candidates: Sequence[NgramCounts], references: Sequence[Sequence[NgramCounts]]) -> list[float]:
    """The score of each candidate of a corpus, in [0, 10]; the corpus's score is their mean.

    A caption is, for each length of runs of words, the vector of their counts, each weighted with the logarithm of
    (samples / samples in whose references the run stands). Candidate and reference score the mean over the lengths
    of the vectors' cosine, where the candidate's entries count up to the reference's, times exp(-d^2 / 72) where
    they differ by d in length. Of several references the mean counts.

    In a corpus of one sample every weight is 0, and so is the score. A caption of less than four words has no run
    of four, and stays below 10 even against itself.
    """
    weights = _Weights(references)
    scores = []
    for candidate, its_references in zip(candidates, references, strict=True):
        vectors = weights.vectors(candidate)
        similarities = [
            _similarity(vectors, weights.vectors(reference)) * _length_penalty(candidate, reference)
            for reference in its_references
        ]
        scores.append(_SCALE * sum(similarities) / len(similarities))
    return scores


class _Weights:
    """How much a run of words tells of a caption, by the samples whose references have it."""

    def __init__(self, references: Sequence[Sequence[NgramCounts]]) -> None:
        self._num_samples = len(references)
        self._frequencies: Counter[tuple[str, ...]] = Counter()
        for of_sample in references:
            self._frequencies.update({run for reference in of_sample for ngrams in reference for run in ngrams})

    def vectors(self, caption: NgramCounts) -> list[Vector]:
        """One vector for each length of runs; a run that no reference has weighs as one that a single sample has."""
        return [
            {run: count * math.log(self._num_samples / max(self._frequencies[run], 1)) for run, count in ngrams.items()}
            for ngrams in caption
        ]


def _similarity(candidate: Sequence[Vector], reference: Sequence[Vector]) -> float:
    """The mean of the clipped cosines; 0 for a length of which either has no run of any weight."""
    cosines = 0.0
    for vector, other in zip(candidate, reference, strict=True):
        norms = math.hypot(*vector.values()) * math.hypot(*other.values())
        if norms:
            cosines += sum(min(vector[run], other[run]) * other[run] for run in vector.keys() & other.keys()) / norms
    return cosines / MAX_ORDER


def _length_penalty(candidate: NgramCounts, reference: NgramCounts) -> float:
    difference = candidate[0].total() - reference[0].total()
    return math.exp(-(difference**2) / (2 * _SIGMA**2))
