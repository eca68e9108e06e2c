"""How well captions say what their references say: BLEU-1 to BLEU-4, ROUGE-L and CIDEr."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llava.eval.bleu import NUM_STATISTICS, bleu_scores, bleu_statistics
from llava.eval.cider import cider_scores
from llava.eval.ngrams import MAX_ORDER, Words, count_ngrams, split_words
from llava.eval.rouge import rouge_l
from llava.eval.tubes import Tube, score_stvg

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
