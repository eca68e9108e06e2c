"""Words of captions, and runs of them."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from llava.coordinates import strip_coordinates

MAX_ORDER = 4
"""BLEU and CIDEr look at runs of one to four words."""

Words = Sequence[str]
NgramCounts = list[Counter[tuple[str, ...]]]

_WORD = re.compile(r"[^\W_]+")


def split_words(text: str) -> list[str]:
    """The words of a caption: lower case, each a run of letters and digits; what stands between them is dropped.

    So an apostrophe parts two words, in Italian ("l'uomo" is l, uomo) as in English ("a man's" is a, man, s), and
    so does a hyphen. Accents stay, written in one way (NFC). Boxes, spans and bins are no words.

    It stands in for the Penn Treebank tokenizer that published scores of COCO use, which is made for English and
    needs Java: scores under the two differ a little.
    """
    return _WORD.findall(unicodedata.normalize("NFC", strip_coordinates(text)).lower())


def count_ngrams(words: Words) -> NgramCounts:
    """How often each run of words stands in a caption, one counter for each length from 1 to 4."""
    words = tuple(words)
    return [
        Counter(words[start : start + order] for start in range(len(words) - order + 1))
        for order in range(1, MAX_ORDER + 1)
    ]
