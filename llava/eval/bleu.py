"""BLEU-1 to BLEU-4 (Papineni et al., 2002) of a corpus, from sums over its captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llava.eval.ngrams import MAX_ORDER, NgramCounts

NUM_STATISTICS = 2 * MAX_ORDER + 2

_ALMOST_NOTHING, _LITTLE = 1e-15, 1e-9
"""Added to counts and to divisors, as the COCO evaluation does: nothing is divided by 0, and no match is almost 0."""


def bleu_statistics(candidate: NgramCounts, references: Sequence[NgramCounts]) -> list[int]:
    """What BLEU sums up over the captions of a corpus.

    Returns:
        For runs of 1 to 4 words, how many of the candidate's are in a reference (each as often as the reference
        that has it most often); how many the candidate has; its words; and the words of the reference whose
        length is closest to it, of two equally close the shorter.
    """
    lengths = [ngrams[0].total() for ngrams in (candidate, *references)]
    closest = min(lengths[1:], key=lambda length: (abs(length - lengths[0]), length))
    matches = []
    for order, ngrams in enumerate(candidate):
        most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            most |= reference[order]
        matches.append((ngrams & most).total())
    return [*matches, *(ngrams.total() for ngrams in candidate), lengths[0], closest]


def bleu_scores(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """From (..., 10) sums of ``bleu_statistics`` to (..., 4): BLEU-1 to BLEU-4.

    BLEU-n is the geometric mean of the shares of matching runs of 1 to n words; a corpus with fewer words than its
    references is scaled down by exp(1 - reference words / words).
    """
    matches, totals = sums[..., :MAX_ORDER], sums[..., MAX_ORDER:-2]
    logarithms = np.log((matches + _ALMOST_NOTHING) / (totals + _LITTLE))
    means = np.exp(np.cumsum(logarithms, axis=-1) / np.arange(1, MAX_ORDER + 1))
    ratio = (sums[..., -2] + _ALMOST_NOTHING) / (sums[..., -1] + _LITTLE)
    return means * np.exp(np.minimum(1 - 1 / ratio, 0.0))[..., np.newaxis]
