"""Text stays text: vision modules leave no trace on batches without media."""

from __future__ import annotations

import copy

import pytest
import torch

from llava.data.collator import SupervisedCollator, model_inputs
from llava.types import Example

BACKBONES = ["llava_gpt2", "llava_llama"]


@pytest.mark.parametrize("name", BACKBONES)
def test_loss_and_gradients_are_bit_identical_without_vision(name: str, load_tiny, monkeypatch) -> None:
    with_vision = load_tiny(name)
    plain = copy.deepcopy(with_vision.model)
    decoder = plain.get_model()
    del decoder.vision_tower, decoder.mm_projector, decoder.vision_resampler
    decoder.vision = None

    def refuse(*args, **kwargs):
        raise AssertionError("the vision tower was called for text")

    monkeypatch.setattr(with_vision.model.get_vision_tower(), "forward", refuse)
    ids = with_vision.tokenizer("Il gatto dorme sul divano.")["input_ids"] + [with_vision.tokenizer.eos_token_id]
    batch = model_inputs(SupervisedCollator(0)([Example("a", ids, ids), Example("b", ids[:4], ids[:4])]))
    for model in (with_vision.model, plain):
        torch.manual_seed(11)
        model.train()(**batch).loss.backward()
    own = {k: p.grad for k, p in with_vision.model.named_parameters() if p.grad is not None}
    other = {k: p.grad for k, p in plain.named_parameters() if p.grad is not None}
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)


def test_frozen_tower_stays_in_evaluation_mode(load_tiny) -> None:
    model = load_tiny().model
    assert not model.train().get_vision_tower().training
    model.get_vision_tower().requires_grad_(True)
    assert model.train().get_vision_tower().training
