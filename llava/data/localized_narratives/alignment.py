"""Where in a caption the utterances stand of which it was written down.

The two may differ in case, punctuation and spelling, and either may have words that the other lacks. Their order
is the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from itertools import takewhile

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_APOSTROPHE = re.compile("['’]")

LEAST_LIKENESS = 0.5
"""Share of the letters of two words, in order, that must be the same ones for a misspelling of each other."""


def find_ends(caption: str, utterances: Sequence[str]) -> list[int | None]:
    """How many characters of the caption lead up to the end of each utterance; None for one that is not in it.

    Words are compared without case, punctuation and apostrophes, and all utterances are aligned with the caption
    at once, so that a word which returns is found where it was said. Between words that agree, two that are spelt
    alike (``LEAST_LIKENESS``) stand for each other; others are aligned with nothing.

    An utterance ends behind the last of its words that is aligned, and behind the punctuation that the caption has
    there if the utterance has it, too. Ends of later utterances are further on.
    """
    written = list(_WORD.finditer(caption))
    spoken = [(owner, word) for owner, utterance in enumerate(utterances) for word in _WORD.finditer(utterance)]
    ends: list[int | None] = [None] * len(utterances)
    owners = [owner for owner, _ in spoken]
    for i, j in _align([_fold(word) for _, word in spoken], [_fold(word) for word in written]):
        owner, word = spoken[i]
        is_last = i + 1 == len(spoken) or owners[i + 1] != owner
        behind = utterances[owner][word.end() :].strip() if is_last else ""
        end = written[j].end()
        ends[owner] = end + _count_common(caption[end:], behind)
    return ends


def _align(spoken: Sequence[str], written: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of words, by their numbers, that stand for each other, in order."""
    for kind, i, i_end, j, j_end in SequenceMatcher(None, spoken, written, autojunk=False).get_opcodes():
        if kind == "equal":
            yield from zip(range(i, i_end), range(j, j_end), strict=True)
        elif kind == "replace":
            for behind_i, behind_j in _pair_alike(spoken[i:i_end], written[j:j_end]):
                yield i + behind_i, j + behind_j


def _pair_alike(spoken: Sequence[str], written: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of words that are spelt alike, in order, with the largest sum of likenesses."""
    likeness = [[_compare(a, b) for b in written] for a in spoken]
    # The largest sum that the words from i on, and from j on, can have.
    best = [[0.0] * (len(written) + 1) for _ in range(len(spoken) + 1)]
    for i in reversed(range(len(spoken))):
        for j in reversed(range(len(written))):
            best[i][j] = max(best[i + 1][j], best[i][j + 1], best[i + 1][j + 1] + likeness[i][j])
    i = j = 0
    while best[i][j]:
        if best[i][j] == best[i + 1][j]:
            i += 1
        elif best[i][j] == best[i][j + 1]:
            j += 1
        else:
            yield i, j
            i, j = i + 1, j + 1


def _compare(first: str, second: str) -> float:
    """The share of letters that two words have in common, 0 if it is too small to mean anything."""
    likeness = SequenceMatcher(None, first, second, autojunk=False).ratio()
    return likeness if likeness >= LEAST_LIKENESS else 0.0


def _count_common(first: str, second: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _fold(word: re.Match[str]) -> str:
    return _APOSTROPHE.sub("", word.group()).casefold()
