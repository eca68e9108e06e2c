"""What tells the Italian minimal pairs apart without grammar: lengths, words, and three words or letters in a row.

    python benchmarks/italian_pairs.py CORPUS.txt.gz --out benchmarks/italian_pairs.json

Each baseline's score is that of ``python -m llava.eval.babylm``, with ties as one half. A paradigm that single words
solve, or solve the wrong way round, says little alone; the mean over all should be near 50.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from llava.eval.babylm.tasks import find_tasks, read_items

UNSEEN = 5.0
"""Weight of the next shorter context, in occurrences."""


def split_words(text: str) -> list[str]:
    return re.findall(r"\w+'?|[^\w\s]", text.lower().replace("’", "'"))


def split_letters(text: str) -> list[str]:
    return list(re.sub(r"\s+", " ", text.lower().replace("’", "'")))


class Ngrams:
    """Words or letters and how often they follow each other; a longer context is interpolated with shorter ones."""

    def __init__(self, split: Callable[[str], list[str]], text: str, length: int) -> None:
        self.split, self.length = split, length
        units = split(text)
        self.counts = [Counter(zip(*(units[i:] for i in range(n)), strict=False)) for n in range(1, length + 1)]
        self.total, self.kinds = len(units), len(self.counts[0]) + 1

    def probability(self, context: tuple[str, ...], unit: str) -> float:
        if not context:  # Add one.
            return (self.counts[0][(unit,)] + 1) / (self.total + self.kinds)
        shorter = self.probability(context[1:], unit)
        seen, followed = self.counts[len(context)][(*context, unit)], self.counts[len(context) - 1][context]
        return (seen + UNSEEN * shorter) / (followed + UNSEEN)

    def score(self, sentence: str) -> float:
        units = self.split(f". {sentence}")
        start = len(self.split(". ")) if self.length > 1 else len(self.split("."))
        logs = [
            math.log(self.probability(tuple(units[max(0, i - self.length + 1) : i]), units[i]))
            for i in range(start, len(units))
        ]
        return math.fsum(logs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with gzip.open(args.corpus, "rt", encoding="utf-8") as file:
        text = file.read()
    baselines: dict[str, Callable[[str], float]] = {
        "shorter": lambda sentence: -len(sentence),
        "word_unigrams": Ngrams(split_words, text, 1).score,
        "word_trigrams": Ngrams(split_words, text, 3).score,
        "letter_trigrams": Ngrams(split_letters, text, 3).score,
    }
    right: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item in read_items(find_tasks([], ["italian"]).tasks[0]):
        for name, score in baselines.items():
            good, bad = (score(candidate.text) for candidate in item.choice.candidates)
            right[name][item.uid].append(0.5 if math.isclose(good, bad, rel_tol=1e-12) else float(good > bad))
    groups = {
        name: {uid: round(100 * sum(ones) / len(ones), 1) for uid, ones in uids.items()} for name, uids in right.items()
    }
    means = {name: round(sum(uids.values()) / len(uids), 1) for name, uids in groups.items()}
    result = {"corpus": args.corpus.name, "mean_over_paradigms": means, "paradigms": groups}
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(means, indent=2))


if __name__ == "__main__":
    main()
