"""Likelihood scores equal those of a plain model that reads one sentence at a time."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava.eval.likelihood import Candidate, Choice, LikelihoodScorer
from tests.conftest import ITALIAN, TINY_BACKBONES


def plain_scores(folder: Path, choices: list[Choice]) -> list[tuple[float, ...]]:
    """Each candidate alone, in float64, by transformers' own class."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def score(candidate: Candidate) -> float:
        encoded = tokenizer(candidate.text, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        by_token = log_probs.gather(1, ids[0, 1:, None])[:, 0].tolist()
        return math.fsum(
            value
            for value, (_, end) in zip(by_token, encoded["offset_mapping"][1:], strict=True)
            if end > candidate.start
        )

    return [tuple(map(score, choice.candidates)) for choice in choices]


CHOICES = [
    *(
        Choice(f"pair-{i}", (Candidate(text), Candidate(text.replace(" e ", " o "), 4), Candidate(text + " Sì")))
        for i, text in enumerate(ITALIAN)
    ),
    Choice("same", (Candidate(ITALIAN[0]), Candidate(ITALIAN[0]))),
    Choice("end", (Candidate("una stella gialla", 11), Candidate("una stella muove", 11))),
]


@pytest.mark.parametrize("name", TINY_BACKBONES)
def test_scores_equal_those_of_one_sentence_at_a_time(backbone_dirs, name: str) -> None:
    folder = backbone_dirs[name]
    scored: list[int] = []
    found = LikelihoodScorer.from_folder(str(folder), device="cpu").score(CHOICES, scored.append)
    expected = plain_scores(folder, CHOICES)
    assert sum(scored) == len(CHOICES)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=2e-4)
    assert found[5][0] == found[5][1]
