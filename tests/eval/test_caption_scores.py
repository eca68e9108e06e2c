"""BLEU, ROUGE-L and CIDEr: cases computed by hand, and the figures of pycocoevalcap on random captions.

``golden/pycocoevalcap.json`` holds these figures, so that the package is not needed; where it is installed,
``python tests/eval/test_caption_scores.py`` writes the file anew.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from llava.eval.metrics import CaptionScorer, score_caption, score_elc, score_stvg, split_words
from llava.eval.metrics.captions import count_common_subsequence, rouge_l
from llava.geometry import Box, TimeSpan, Tube

GOLDEN = Path(__file__).parent / "golden" / "pycocoevalcap.json"
NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")
SENTENCE = "una stella gialla si muove verso destra poi resta ferma sopra il cerchio blu e la luna"
WORDS = SENTENCE.split()
CORPORA = {"one reference": 1, "several references": 5}


def make_captions(most_references: int, num_samples: int = 100) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Random references, and captions that are one of them with words changed, left out and put in."""
    choose = random.Random(most_references)
    captions, references = [], []
    for _ in range(num_samples):
        its_references = [
            choose.choices(WORDS, k=choose.randint(1, 14)) for _ in range(choose.randint(1, most_references))
        ]
        share = choose.choice([0.0, 0.1, 0.4])
        caption = []
        for word in choose.choice(its_references):
            change = choose.random()
            caption += [choose.choice([*WORDS, "altrove"]), word] if change < share else [word] * (change > share * 1.5)
        captions.append(caption)
        references.append(its_references)
    captions[7] = []
    return captions, references


def score_with_coco(captions: list[list[str]], references: list[list[list[str]]]) -> dict[str, dict[str, list[float]]]:
    """Of each score the corpus's and the samples'."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    wanted = {i: [" ".join(words) for words in its_references] for i, its_references in enumerate(references)}
    given = {i: [" ".join(words)] for i, words in enumerate(captions)}
    corpus, single = Bleu(4).compute_score(wanted, given, verbose=0)
    for metric in (Rouge(), Cider()):
        of_corpus, of_samples = metric.compute_score(wanted, given)
        corpus, single = [*corpus, of_corpus], [*single, of_samples]
    return {
        name: {"corpus": float(of_corpus), "samples": [float(score) for score in of_samples]}
        for name, of_corpus, of_samples in zip(NAMES, corpus, single, strict=True)
    }


def check_against(expected: dict[str, dict[str, list[float]]], scorer: CaptionScorer) -> None:
    corpus, rows = score_corpus(scorer), scorer.rows
    assert tuple(corpus) == NAMES
    for name in NAMES:
        assert corpus[name] == pytest.approx(expected[name]["corpus"], rel=1e-9, abs=1e-12), name
        np.testing.assert_allclose(
            [row[name] for row in rows], expected[name]["samples"], rtol=1e-9, atol=1e-12, err_msg=name
        )


def score_corpus(scorer: CaptionScorer) -> dict[str, float]:
    return {name: float(x) for name, x in scorer.scores(scorer.statistics.sum(axis=0), len(scorer)).items()}


def score_texts(*pairs: tuple[str, ...]) -> dict[str, float]:
    """Of captions, each with its references."""
    return score_corpus(CaptionScorer.from_texts([pair[0] for pair in pairs], [pair[1:] for pair in pairs]))


@pytest.mark.parametrize("name", CORPORA)
def test_scores_equal_the_figures_of_pycocoevalcap(name) -> None:
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    assert 0.1 < expected["BLEU-4"]["corpus"] < 0.9, "captions that are all right or all wrong would tell little"
    check_against(expected, CaptionScorer(*make_captions(CORPORA[name])))


@pytest.mark.parametrize("name", CORPORA)
def test_scores_equal_those_of_pycocoevalcap(name) -> None:
    pytest.importorskip("pycocoevalcap")
    captions, references = make_captions(CORPORA[name])
    check_against(score_with_coco(captions, references), CaptionScorer(captions, references))


def test_bleu_by_hand() -> None:
    # Words: the (3, but 2 there), cat (2, but 1 there), on, mat: 5 of 7. Pairs: the cat (2, but 1 there), on the,
    # the mat: 3 of 6. Threes: on the mat: 1 of 5. Fours: none of 4. It is longer than its reference.
    scores = score_texts(("the cat the cat on the mat", "the cat sat on the mat"))
    assert scores["BLEU-1"] == pytest.approx(5 / 7)
    assert scores["BLEU-2"] == pytest.approx((5 / 7 * 3 / 6) ** (1 / 2))
    assert scores["BLEU-3"] == pytest.approx((5 / 7 * 3 / 6 * 1 / 5) ** (1 / 3))
    assert scores["BLEU-4"] == pytest.approx(0.0, abs=1e-3)


def test_bleu_sums_up_before_it_divides_and_scales_down_what_is_short() -> None:
    # 2 + 1 of 2 + 4 words are right, for references of 6 + 3 words: 3/6 exp(1 - 9/6).
    scores = score_texts(("the cat", "the cat sat on the mat"), ("a b c d", "a x y"))
    assert scores["BLEU-1"] == pytest.approx(0.5 * math.exp(-0.5))


@pytest.mark.parametrize(
    ("references", "length"),
    [
        (("a b c d e f g", "a b c"), 3),  # 4 is nearer to 3 than to 7,
        (("a b c d e", "a b c"), 3),  # as near to 3 as to 5,
        (("a b c d e", "a b"), 5),  # and nearer to 5 than to 2.
    ],
)
def test_bleu_takes_the_reference_of_the_closest_length(references, length) -> None:
    assert score_texts(("a b c d", *references))["BLEU-1"] == pytest.approx(math.exp(min(1 - length / 4, 0)))


def test_rouge_by_hand() -> None:
    # a, c and e are in order: precision 3/3, recall 3/5, (1 + 1.44) * 1 * 0.6 / (0.6 + 1.44 * 1).
    assert rouge_l(["a", "c", "e"], [["a", "b", "c", "d", "e"]]) == pytest.approx(2.44 * 0.6 / 2.04)
    # The best precision is that of the second reference (2/2), the best recall that of the first (1/1).
    assert rouge_l(["a", "b"], [["a"], ["a", "b", "c", "d"]]) == pytest.approx(1.0)
    assert rouge_l(["a", "b"], [["b", "a"]]) == pytest.approx(0.5)
    assert rouge_l(["a"], [["b"]]) == rouge_l([], [["b"]]) == rouge_l(["a"], [[]]) == rouge_l([], [[]]) == 0.0


def test_common_subsequences_are_those_of_the_dynamic_program() -> None:
    choose = random.Random(0)
    for _ in range(100):
        words, others = (choose.choices("abcde", k=choose.randint(0, 90)) for _ in range(2))
        row = [0] * (len(others) + 1)
        for word in words:
            above = row
            row = [0]
            for place, other in enumerate(others):
                row.append(above[place] + 1 if word == other else max(above[place + 1], row[place]))
        assert count_common_subsequence(words, others) == row[-1] == count_common_subsequence(others, words)


def test_cider_by_hand() -> None:
    # Two samples and no run in both: every run weighs log 2, which falls out of a cosine.
    # The first is right, but has no runs of 3 and 4: (1 + 1 + 0 + 0) / 4 * 10. Of the second's words one of two
    # is right: 1 / (sqrt 2 sqrt 2) for single words, nothing for the pair.
    scorer = CaptionScorer.from_texts(["a b", "c x"], [["a b"], ["c d"]])
    assert [row["CIDEr"] for row in scorer.rows] == pytest.approx([5.0, 1.25])
    assert score_corpus(scorer)["CIDEr"] == pytest.approx(3.125)


def test_cider_clips_counts_and_weighs_differences_in_length() -> None:
    # "a a b" is (2, 1) against (1, 1), of which (1, 1) counts: 2 / (sqrt 5 sqrt 2). Of its pairs "a a" and "a b"
    # the latter is right: 1 / sqrt 2. It is one word longer: exp(-1 / 72).
    scores = CaptionScorer.from_texts(["a a b", "c"], [["a b"], ["d"]]).rows
    assert scores[0]["CIDEr"] == pytest.approx(10 / 4 * (2 / math.sqrt(10) + 1 / math.sqrt(2)) * math.exp(-1 / 72))


def test_cider_weighs_rare_words_and_means_references() -> None:
    # "a" is in both samples' references and weighs 0; "b" and "c" are in one. Against the first reference the
    # single words are equal, and the pair; against the second nothing is that weighs.
    scores = CaptionScorer.from_texts(["a b", "a c"], [["a b", "a e"], ["a c"]]).rows
    assert scores[0]["CIDEr"] == pytest.approx((5.0 + 0.0) / 2)
    assert scores[1]["CIDEr"] == pytest.approx(5.0)


def test_cider_of_a_single_sample_is_0() -> None:
    assert score_texts(("a b c d e", "a b c d e"))["CIDEr"] == 0.0


def test_captions_that_are_their_references_score_the_most_and_empty_ones_0() -> None:
    references = [words for (words,) in make_captions(1)[1] if len(words) >= 4]
    best = score_corpus(CaptionScorer(references, [[words] for words in references]))
    assert best == pytest.approx({**dict.fromkeys(NAMES, 1.0), "CIDEr": 10.0})
    worst = score_corpus(CaptionScorer([[] for _ in references], [[words] for words in references]))
    assert worst == pytest.approx(dict.fromkeys(NAMES, 0.0), abs=1e-12)


def test_references_without_a_word_are_no_error() -> None:
    assert score_corpus(CaptionScorer([[], ["a"]], [[[]], [[]]])) == pytest.approx(dict.fromkeys(NAMES, 0.0), abs=1e-3)


def test_order_of_samples_and_of_references_does_not_matter() -> None:
    captions, references = make_captions(5)
    there = score_corpus(CaptionScorer(captions, references))
    back = score_corpus(CaptionScorer(captions[::-1], [its_references[::-1] for its_references in references[::-1]]))
    assert back == pytest.approx(there)


def test_captions_without_their_references_are_refused() -> None:
    with pytest.raises(ValueError, match="2 captions, but references of 1"):
        CaptionScorer([["a"], ["b"]], [[["a"]]])
    with pytest.raises(ValueError, match="sample 1 has no reference"):
        CaptionScorer([["a"], ["b"]], [[["a"]], []])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Una stella, gialla!", "una stella gialla"),
        ("L'uomo all’aperto", "l uomo all aperto"),
        ("A man's T-shirt; don't.", "a man s t shirt don t"),
        ("Perché è così: più, città", "perché è così più città"),
        ("perche\u0301", "perché"),  # an accent of its own
        ("2 cani_neri  (3)", "2 cani neri 3"),
        ("the star [<WIDTH-010><HEIGHT-020><WIDTH-030><HEIGHT-040>], {<TEMP-001><TEMP-002>}", "the star"),
        ("... !", ""),
        ("", ""),
    ],
)
def test_words_of_a_caption(text, words) -> None:
    assert split_words(text) == words.split()


def test_unparsable_captions() -> None:
    tube = Tube(TimeSpan(0.0, 1.0), (Box(0.0, 0.0, 1.0, 1.0),))
    assert score_caption(["a"]) == {"unparsable": 0.0}
    assert score_caption([]) == {"unparsable": 1.0}
    assert score_elc(tube, ["a"], tube) == score_stvg(tube, tube)
    assert score_elc(tube, [], tube) == {**score_stvg(tube, tube), "unparsable": 1.0}
    assert score_elc(None, ["a"], tube) == score_stvg(None, tube)


if __name__ == "__main__":
    figures = {name: score_with_coco(*make_captions(most)) for name, most in CORPORA.items()}
    GOLDEN.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
