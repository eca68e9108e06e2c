"""Packs equal a batch with a sample a row, and none of their samples sees another, for every backbone and attention."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY_BACKBONES, TINY_VISION, TinyBackbones
from transformers import AttentionInterface, AttentionMaskInterface

from llava.compat import set_attention
from llava.model import packing
from llava.model.loading import LoadedModel, load_model
from llava.model.packing import PackLayout

CAPACITY = 100  # Two videos of 39 positions do not fit with a text of 20.
EAGER = ("llava_mpt", "llava_gemma2")
"""Which have no other attention."""
WAYS = ("llava_gpt2", "llava_mpt", "llava_stablelm", "llava_phi3")
"""Families whose ways to an attention function differ. The function that alternates, and eager attention, are one each
for all."""
COMBINATIONS = [
    *((name, "base", "eager" if name in EAGER else "sdpa") for name in TINY_BACKBONES),
    *((name, "base", "eager") for name in (*WAYS, "llava_mixtral", "llava_gemma3") if name not in EAGER),
    *(
        (name, variant, "eager" if name in EAGER or (place + turn) % 2 else "sdpa")
        for place, name in enumerate(WAYS)
        for turn, variant in enumerate(("alternating", "alternating_cross"))
    ),
]
SAMPLES = [0, 5, 2, 4, 6, 1, 3]  # two videos, two images, both in one, and two texts


@pytest.fixture(scope="module")
def deep_dirs(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir) -> TinyBackbones:
    return TinyBackbones(tmp_path_factory.mktemp("deep"), tokenizer_dir, num_layers=4)


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def loaded(request: pytest.FixtureRequest, deep_dirs, tower_dir) -> LoadedModel:
    name, variant, attention = request.param
    torch.manual_seed(3)
    loaded = load_model(
        str(deep_dirs[name]), vision_tower=str(tower_dir), variant=variant, attn_implementation=attention, **TINY_VISION
    )
    with torch.no_grad():
        for key, parameter in loaded.model.named_parameters():
            # Random weights of 0.02 would hide differences behind rounding.
            parameter.mul_(3 if parameter.ndim > 1 and ".vision_tower." not in key else 1)
    loaded.model.eval()
    return loaded


def by_sample(packed: torch.Tensor, lengths: list[list[int]]) -> list[torch.Tensor]:
    """What packs hold of each sample, each (length, ...)."""
    return [part for row, own in zip(packed, lengths, strict=True) for part in row[: sum(own)].split(own)]


def run(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), output.loss.detach(), gradients


def test_packs_equal_padded_batches(loaded: LoadedModel, make_batch) -> None:
    padded, packed = make_batch(loaded, SAMPLES), make_batch(loaded, SAMPLES, CAPACITY)
    assert 1 < len(packed["pack_lengths"]) < len(SAMPLES)
    assert max(map(len, packed["pack_lengths"])) > 1
    del packed["attention_mask"]  # pack_lengths say all of it.
    logits, loss, gradients = run(loaded.model, padded)
    packed_logits, packed_loss, packed_gradients = run(loaded.model, packed)
    for row, own in zip(logits, by_sample(packed_logits, packed["pack_lengths"]), strict=True):
        torch.testing.assert_close(own, row[: len(own)], atol=2e-5, rtol=1e-5)
    if "experts" not in str(list(gradients)):  # Which balance their load over all positions, padding left out.
        torch.testing.assert_close(packed_loss, loss, atol=1e-6, rtol=1e-6)
    assert gradients.keys() == packed_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=2e-5, rtol=1e-3, msg=name)


@torch.no_grad()
def test_no_sample_sees_another(loaded: LoadedModel, make_batch) -> None:
    packed = make_batch(loaded, SAMPLES, CAPACITY)
    lengths = packed["pack_lengths"]
    before = by_sample(loaded.model(**packed).logits, lengths)
    experts = any("experts" in name for name, _ in loaded.model.named_modules())
    begin = 0
    for number, row in enumerate(lengths):
        for place, length in enumerate(row):
            ids = packed["input_ids"].clone()
            at = sum(row[:place]) + length - 3  # a token of its text
            ids[number, at] = (ids[number, at] + 1) % 300
            after = by_sample(loaded.model(**{**packed, "input_ids": ids}).logits, lengths)
            check_others(before, after, begin + place, experts)
        begin += len(row)
    images = packed["images"]
    owners = [i for i in SAMPLES if i < 5 for _ in range(2 if i == 4 else 1)]
    for i, owner in enumerate(owners):
        changed = {**packed, "images": [*images[:i], 255 - images[i], *images[i + 1 :]]}
        after = by_sample(loaded.model(**changed).logits, lengths)
        check_others(before, after, SAMPLES.index(owner), experts)


def check_others(before, after, changed: int, experts: bool) -> None:
    for i, (one, other) in enumerate(zip(before, after, strict=True)):
        if i == changed:
            assert not torch.equal(one, other)
        elif experts:  # They multiply the tokens that came to them as one matrix, whose size changes the rounding.
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        else:
            assert torch.equal(one, other), i


def test_where_samples_lie() -> None:
    layout = PackLayout([[3, 20], [40], [2, 2, 1]], 40, torch.device("cpu"))
    assert layout.position_ids[0, :26].tolist() == [*range(3), *range(20), 0, 0, 0]
    assert layout.groups.shapes == [(1, 40), (1, 20), (4, 3)]
    states = torch.rand(3, 40, 2, 5, dtype=torch.float64, requires_grad=True)
    groups = layout.split(states)
    assert torch.equal(groups[2][0], states[0, :3])
    assert groups[2][3].count_nonzero() == 10
    joined = layout.join(groups)
    assert torch.equal(joined[0, :23], states[0, :23])
    assert joined[0, 23:].count_nonzero() == joined[2, 5:].count_nonzero() == 0
    ends, longest = layout.sequence_ends
    assert (ends.tolist(), longest) == ([0, 3, 23, 40, 80, 82, 84, 85, 120], 40)
    small = PackLayout([[2, 3], [4]], 6, torch.device("cpu"))
    rows = torch.rand(2, 6, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: [part.sin() for part in small.split(x)], rows)
    assert torch.autograd.gradcheck(lambda x: small.join([part.cos() for part in small.split(x)]), rows)
    with pytest.raises(ValueError, match="add up to 41 tokens in a row of 40"):
        PackLayout([[40, 1]], 40, torch.device("cpu"))


def attend_by_ends(module, query, key, value, attention_mask, cu_seq_lens_q=None, scaling=None, **kwargs):
    """What flash attention computes of sequences in one row, from their ends or, where no layer hands these down, from
    the positions that begin anew."""
    assert attention_mask is None
    assert len(query) == 1
    if cu_seq_lens_q is None:
        begins = (kwargs["position_ids"][0] == 0).nonzero().squeeze(1)
        cu_seq_lens_q = torch.cat([begins, torch.tensor([query.shape[2]])])
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for begin, end in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist(), strict=True):
        own = [states[:, :, begin:end] for states in (query, *(s.repeat_interleave(groups, 1) for s in (key, value)))]
        outputs.append(torch.nn.functional.scaled_dot_product_attention(*own, is_causal=True, scale=scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("name", ["llava_gpt2", "llava_llama", "llava_qwen_moe", "llava_stablelm"])
def test_flash_attention_is_told_where_samples_end(name: str, load_tiny, make_batch, monkeypatch) -> None:
    loaded = load_tiny(name)
    loaded.model.eval()
    batch = make_batch(loaded, SAMPLES, CAPACITY)
    expected = by_sample(loaded.model(**batch).logits, batch["pack_lengths"])
    AttentionInterface.register("by_ends", attend_by_ends)
    AttentionMaskInterface.register("by_ends", lambda **kwargs: kwargs["attention_mask"])
    set_attention(loaded.model.config, "by_ends")
    monkeypatch.setattr(packing, "attention_of", lambda config: "flash_attention_2")
    found = by_sample(loaded.model(**batch).logits, batch["pack_lengths"])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_attention_that_does_not_know_packs_is_refused(load_tiny, make_batch) -> None:
    loaded = load_tiny("llava_llama")
    AttentionInterface.register("someones_own", packing.sdpa_attention_forward)
    AttentionMaskInterface.register("someones_own", packing.sdpa_mask)
    set_attention(loaded.model.config, "someones_own")
    with pytest.raises(ValueError, match=r"LlavaLlamaModel \(someones_own\) would let the samples of a pack see each"):
        loaded.model(**make_batch(loaded, SAMPLES, CAPACITY))
