"""How well captions say what their references say: BLEU-1 to BLEU-4, ROUGE-L and CIDEr, as the COCO evaluation counts.

They are computed here because no library gives what bootstrap needs of them, the sums of each sample, from which the
score of any resample is one division: sacrebleu smooths and tokenises BLEU otherwise than COCO and keeps its statistics
to itself, rouge-score has no recall-weighted ROUGE-L of several references, and pycocoevalcap, whose numbers the tests
hold, needs Java and has no sums either.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llava.eval.metrics.grounding import score_stvg
from llava.geometry import Tube
from llava.grounding.syntax import strip_coordinates

MAX_ORDER = 4
"""BLEU and CIDEr look at runs of one to four words."""

Words = Sequence[str]
Ngram = tuple[str, ...]
NgramCounts = list[Counter[Ngram]]

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


# BLEU-1 to BLEU-4 (Papineni et al., 2002) of a corpus, from sums over its captions.

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
        most: Counter[Ngram] = Counter()
        for reference in references:
            # The union of counters keeps the larger count: clipping by the most generous reference.
            most |= reference[order]
        matches.append((ngrams & most).total())
    return [*matches, *(ngrams.total() for ngrams in candidate), lengths[0], closest]


def bleu_scores(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """From (..., 10) sums of ``bleu_statistics`` to (..., 4): BLEU-1 to BLEU-4.

    BLEU-n is the geometric mean of the shares of matching runs of 1 to n words; a corpus with fewer words than its
    references is scaled down by exp(1 - reference words / words).
    """
    matches, totals = sums[..., :MAX_ORDER], sums[..., MAX_ORDER:-2]  # (..., 4) each
    logarithms = np.log((matches + _ALMOST_NOTHING) / (totals + _LITTLE))  # (..., 4)
    # The geometric mean of the modified precisions, for each n at once: Papineni et al., section 2.3.
    means = np.exp(np.cumsum(logarithms, axis=-1) / np.arange(1, MAX_ORDER + 1))
    ratio = (sums[..., -2] + _ALMOST_NOTHING) / (sums[..., -1] + _LITTLE)
    return means * np.exp(np.minimum(1 - 1 / ratio, 0.0))[..., np.newaxis]


# ROUGE-L (Lin, 2004) of a caption.

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
    # Lin's F-measure of the longest common subsequence, as the COCO evaluation has it.
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


# CIDEr (Vedantam et al., 2015) of captions, in the form of the COCO evaluation: clipped counts, sigma 6.

_SIGMA = 6.0
_SCALE = 10.0


def cider_scores(candidates: Sequence[NgramCounts], references: Sequence[Sequence[NgramCounts]]) -> list[float]:
    """The score of each candidate of a corpus, in [0, 10]; the corpus's score is their mean.

    A caption is, for each length of runs of words, the vector of their counts, each weighted with the logarithm of
    (samples / samples in whose references the run stands). Candidate and reference score the mean over the lengths
    of the vectors' cosine, where the candidate's entries count up to the reference's, times exp(-d^2 / 72) where
    they differ by d in length. Of several references the mean counts.

    In a corpus of one sample every weight is 0, and so is the score. A caption of less than four words has no run
    of four, and stays below 10 even against itself.
    """
    frequencies: Counter[Ngram] = Counter()
    for of_sample in references:
        # A set: a run counts once for a sample, however many of its references have it.
        frequencies.update({run for reference in of_sample for ngrams in reference for run in ngrams})

    def weigh(caption: NgramCounts) -> list[dict[Ngram, float]]:
        """One vector for each length of runs; a run that no reference has weighs as one that a single sample has."""
        return [
            {run: count * math.log(len(references) / max(frequencies[run], 1)) for run, count in ngrams.items()}
            for ngrams in caption
        ]

    scores = []
    for candidate, its_references in zip(candidates, references, strict=True):
        vectors = weigh(candidate)
        similarities = [
            _similarity(vectors, weigh(reference)) * _length_penalty(candidate, reference)
            for reference in its_references
        ]
        scores.append(_SCALE * sum(similarities) / len(similarities))
    return scores


def _similarity(candidate: Sequence[dict[Ngram, float]], reference: Sequence[dict[Ngram, float]]) -> float:
    """The mean of the clipped cosines; 0 for a length of which either has no run of any weight."""
    cosines = 0.0
    for vector, other in zip(candidate, reference, strict=True):
        # min() clips the candidate, so that repeating a word is of no use (CIDEr-D).
        norms = math.hypot(*vector.values()) * math.hypot(*other.values())
        if norms:
            cosines += sum(min(vector[run], other[run]) * other[run] for run in vector.keys() & other.keys()) / norms
    return cosines / MAX_ORDER


def _length_penalty(candidate: NgramCounts, reference: NgramCounts) -> float:
    difference = candidate[0].total() - reference[0].total()
    # CIDEr-D's penalty: a Gaussian over the difference in length.
    return math.exp(-(difference**2) / (2 * _SIGMA**2))


# All of them, of a corpus.

_BLEU_NAMES = tuple(f"BLEU-{order}" for order in range(1, MAX_ORDER + 1))


class CaptionScorer:
    """The captions of a corpus with their references, counted once: their scores, and those of resamples of them.

    The scores equal those of the COCO evaluation (pycocoevalcap) on the same words. Of a corpus, BLEU comes from
    sums over its captions, ROUGE-L and CIDEr are means. In resamples CIDEr keeps the weights of runs of words
    that the whole corpus gives them.

    Args:
        captions: the words of each sample's caption; none, for an empty one, scores 0.
        references: the words of each sample's references, one or more.

    Raises:
        ValueError: a sample has no reference, or there are not as many samples here as there.

    Attributes:
        statistics: (samples, 12), whose sums over any of the samples ``scores`` takes.
        rows: the scores of each sample alone, under the names of ``scores``. They rank single captions; a corpus's
            BLEU is not the mean of theirs.
    """

    def __init__(self, captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
        if len(captions) != len(references):
            raise ValueError(f"there are {len(captions)} captions, but references of {len(references)} samples")
        for sample, its_references in enumerate(references):
            if not its_references:
                raise ValueError(f"sample {sample} has no reference caption; captions are scored against one or more")
        counts = [count_ngrams(caption) for caption in captions]
        reference_counts = [[count_ngrams(words) for words in its_references] for its_references in references]
        self.statistics = np.zeros((len(captions), NUM_STATISTICS + 2))
        for row, (caption, its_references) in enumerate(zip(captions, references, strict=True)):
            self.statistics[row, :NUM_STATISTICS] = bleu_statistics(counts[row], reference_counts[row])
            self.statistics[row, -2] = rouge_l(caption, its_references)
        self.statistics[:, -1] = cider_scores(counts, reference_counts)

    @classmethod
    def from_texts(cls, captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScorer:
        """Of answers and references as text; ``split_words`` says what their words are."""
        return cls([split_words(text) for text in captions], [[split_words(text) for text in of] for of in references])

    def __len__(self) -> int:
        return len(self.statistics)

    def scores(self, sums: NDArray[np.float64], num_samples: int) -> dict[str, NDArray[np.float64]]:
        """The scores of as many samples, whose ``statistics`` sum up to ``sums``, (..., 12): each score is (...)."""
        bleu = dict(zip(_BLEU_NAMES, np.moveaxis(bleu_scores(sums[..., :-2]), -1, 0), strict=True))
        return {**bleu, "ROUGE-L": sums[..., -2] / num_samples, "CIDEr": sums[..., -1] / num_samples}

    @property
    def rows(self) -> list[dict[str, float]]:
        columns = self.scores(self.statistics, 1)
        return [dict(zip(columns, row, strict=True)) for row in np.stack([*columns.values()], axis=-1).tolist()]


def score_caption(caption: Words) -> dict[str, float]:
    """Whether a caption is unparsable, which is to say without a word; ``CaptionScorer`` has its scores."""
    return {"unparsable": float(not caption)}


def score_elc(tube: Tube | None, caption: Words, reference: Tube) -> dict[str, float]:
    """Score an answer that says what happens, where and when: ``score_stvg``; ``CaptionScorer`` scores the caption.

    Without a tube, or without a word, it is unparsable; the part that it has is scored all the same.
    """
    return {**score_stvg(tube, reference), "unparsable": float(tube is None or not caption)}
