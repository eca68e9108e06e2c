"""Positions between bins: expectations over neighbours, of greedy search and of beams."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llava.config import GroundingConfig
from llava.constants import AXES
from llava.model.coordinates import expected_positions

GROUNDING = GroundingConfig(num_temporal=7, num_spatial=5, first_bin=10)
SIZE = GROUNDING.first_bin + GROUNDING.total_bins


def scores_of(token: int, **others: float) -> torch.Tensor:
    """Logits of one step: ``before``, ``at`` and ``after`` the token, and very much for everything else."""
    scores = torch.full((1, SIZE), 50.0)
    for name, place in (("before", token - 1), ("at", token), ("after", token + 1)):
        if name in others:
            scores[0, place] = math.log(others[name])
    return scores


def test_the_expectation_is_over_three_bins() -> None:
    width = GROUNDING.first_bin_of("WIDTH")
    steps = [scores_of(width + 2, before=1, at=6, after=3), scores_of(4), scores_of(width + 1, before=2, at=1, after=1)]
    positions = expected_positions(torch.tensor([[width + 2, 4, width + 1]]), steps, GROUNDING)
    assert positions.shape == (1, 3)
    assert positions[0, 1].isnan()
    torch.testing.assert_close(positions[0, ::2], torch.tensor([(2 + 0.2) / 4, (1 - 0.25) / 4]))


@pytest.mark.parametrize("axis", AXES)
def test_the_first_and_the_last_bin_have_one_neighbour(axis) -> None:
    first, last = GROUNDING.first_bin_of(axis), GROUNDING.num_bins(axis) - 1
    steps = [scores_of(first, at=3, after=1), scores_of(first + last, before=1, at=3)]
    positions = expected_positions(torch.tensor([[first, first + last]]), steps, GROUNDING)
    torch.testing.assert_close(positions, torch.tensor([[0.25 / last, 1 - 0.25 / last]]))


def test_a_model_that_learned_its_targets_tells_the_exact_position() -> None:
    exact = torch.rand(200, generator=torch.Generator().manual_seed(0))
    for axis in AXES:
        first, last = GROUNDING.first_bin_of(axis), GROUNDING.num_bins(axis) - 1
        place = exact * last
        shares = torch.zeros(200, SIZE)
        shares.scatter_(1, (first + place.ceil()).long()[:, None], (place - place.floor())[:, None])
        shares.scatter_(1, (first + place.floor()).long()[:, None], (1 - place + place.floor())[:, None])
        tokens = shares.argmax(1, keepdim=True)
        positions = expected_positions(tokens, [shares.log()], GROUNDING)[:, 0]
        torch.testing.assert_close(positions, exact)
        assert ((positions * last - (tokens[:, 0] - first)).abs() <= 0.5 + 1e-5).all()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_they_are_read_from_the_step_that_made_the_token(options: dict) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=SIZE, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=9)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    prompts = torch.randint(0, 9, (4, 3))
    made = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, pad_token_id=9, do_sample=False,
        return_dict_in_generate=True, output_logits=True, min_new_tokens=4, **options,
    )  # fmt: skip
    new = made.sequences[:, 3:]
    positions = expected_positions(new, made.logits, GROUNDING, made.get("beam_indices"))
    with torch.no_grad():
        again = model(made.sequences).logits[:, 2:-1].unbind(1)
    torch.testing.assert_close(positions, expected_positions(new, again, GROUNDING), equal_nan=True)
    assert torch.equal(positions.isfinite(), new >= GROUNDING.first_bin)
    assert positions.isfinite().sum() > 10


def test_beams_without_their_indices_are_refused() -> None:
    with pytest.raises(ValueError, match="pass beam_indices"):
        expected_positions(torch.tensor([[10]]), [torch.zeros(3, SIZE)], GROUNDING)


def test_nothing_generated_has_no_positions() -> None:
    assert expected_positions(torch.zeros(2, 0, dtype=torch.long), [], GROUNDING).shape == (2, 0)
