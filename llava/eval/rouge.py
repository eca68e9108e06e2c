"""ROUGE-L (Lin, 2004) of a caption."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from llava.eval.ngrams import Words

_BETA = 1.2
"""How much more recall weighs than precision, as in the COCO evaluation."""


def rouge_l(candidate: Words, references: Sequence[Words]) -> float:
    """The F-measure of the words that candidate and reference have in the same order, in [0, 1].

    Precision and recall are each the best over the references, not necessarily of the same one. Without a word
    on either side it is 0.
    """
    if not candidate:
        return 0.0
    shared = [count_common_subsequence(candidate, reference) for reference in references]
    precision = max(shared) / len(candidate)
    recall = max(common / max(len(words), 1) for common, words in zip(shared, references, strict=True))
    if not precision:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def count_common_subsequence(words: Words, others: Words) -> int:
    """The length of the longest sequence that both contain in order, though perhaps with gaps.

    It is the bit-parallel form of the dynamic program (Hyyro, 2004): bit i of ``row`` is 0 where the program's row
    grows by one from column i to i + 1, so that one addition of integers moves on by a row.
    """
    places: dict[str, int] = defaultdict(int)
    for place, word in enumerate(words):
        places[word] |= 1 << place
    all_places = (1 << len(words)) - 1
    row = all_places
    for word in others:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & all_places
    return len(words) - row.bit_count()
