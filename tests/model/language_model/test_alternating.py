"""Contract of alternating attention, for every backbone, variant and attention function."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, TINY_VISION, TinyBackbones

from llava.model import AVAILABLE_MODELS, BACKBONES, VARIANTS, split_type, variant_type
from llava.model.language_model.alternating import forbidden_keys, is_restricted
from llava.model.loading import LoadedModel, load_model

NUM_LAYERS = 4  # layer 1 is restricted; layer 3 is odd, but the last one
ALTERNATING = [variant for variant in VARIANTS if variant != "base"]
COMBINATIONS = [
    # MPT of transformers has no attention but its own, which is eager.
    (name, variant, "eager" if name == "llava_mpt" or (place + turn) % 2 else "sdpa")
    for place, name in enumerate(FAMILIES)
    for turn, variant in enumerate(ALTERNATING)
]
"""Each family with both variants and, once each, both attention functions; each variant with both."""


@pytest.fixture(scope="module")
def deep_dirs(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> TinyBackbones:
    return TinyBackbones(tmp_path_factory.mktemp("deep"), tokenizer_dir, NUM_LAYERS)


@pytest.fixture(scope="module")
def load(deep_dirs: TinyBackbones, tower_dir: Path):
    def load_variant(name: str, variant: str, attention: str | None = None) -> LoadedModel:
        torch.manual_seed(3)
        loaded = load_model(
            str(deep_dirs[name]), vision_tower=str(tower_dir), variant=variant, attn_implementation=attention,
            **TINY_VISION,
        )  # fmt: skip
        with torch.no_grad():
            for key, parameter in loaded.model.named_parameters():
                # Random weights of 0.02 would hide differences behind rounding.
                parameter.mul_(3 if parameter.ndim > 1 and ".vision_tower." not in key else 1)
        loaded.model.eval()
        return loaded

    return load_variant


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def loaded(request: pytest.FixtureRequest, load) -> LoadedModel:
    return load(*request.param)


@pytest.fixture(scope="module")
def make_batch(make_batch):
    def make(loaded: LoadedModel, rows: list[int]):
        batch = make_batch(loaded, rows)
        del batch["labels"]
        return batch

    return make


def modality_ids(loaded: LoadedModel, input_ids: torch.Tensor) -> torch.Tensor:
    return torch.isin(input_ids, torch.tensor(loaded.vision.visual_token_ids))


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    # Experts multiply the tokens that came to them as one matrix, whose size changes the rounding.
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


# Of the rows of mixed.json, 0 is a video with text, 4 a video, text, an image and text, 6 text alone.


@torch.no_grad()
def test_no_position_looks_ahead(loaded: LoadedModel, make_batch) -> None:
    batch = make_batch(loaded, [4])
    before = loaded.model(**batch).logits
    visual = modality_ids(loaded, batch["input_ids"])[0]
    texts = (~visual).nonzero().squeeze(1)
    for place in texts[[1, len(texts) // 2, -1]].tolist():
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, place] = (changed["input_ids"][0, place] + 1) % 300
        after = loaded.model(**changed).logits
        assert_same(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])
    second = int(visual.nonzero()[loaded.vision.layout.num_tokens("video", 3)])
    changed = {**batch, "images": [batch["images"][0], 255 - batch["images"][1]]}
    after = loaded.model(**changed).logits
    assert_same(after[:, :second], before[:, :second])
    assert not torch.equal(after[:, second], before[:, second])


@torch.no_grad()
def test_a_medium_that_comes_later_changes_nothing_before(loaded: LoadedModel, make_batch) -> None:
    ids = torch.tensor([loaded.tokenizer("Un gatto dorme sul divano.")["input_ids"]])
    alone = loaded.model(input_ids=ids).logits
    batch = make_batch(loaded, [2])
    behind = {**batch, "input_ids": torch.cat([ids, batch["input_ids"]], dim=1)}
    del behind["attention_mask"]
    assert_same(loaded.model(**behind).logits[:, : ids.shape[1]], alone)


@torch.no_grad()
def test_text_alone_equals_the_causal_model(loaded: LoadedModel, load, make_batch) -> None:
    name, _ = split_type(loaded.model.config.model_type)
    attention = loaded.model.config._attn_implementation.removeprefix("alternating_")
    causal = load(name, "base", attention)
    batch = make_batch(loaded, [5, 6])
    assert torch.equal(loaded.model(**batch).logits, causal.model(**batch).logits)
    batch = make_batch(loaded, [0])
    assert not torch.allclose(loaded.model(**batch).logits, causal.model(**batch).logits, atol=1e-4)


def generate(loaded: LoadedModel, batch, **options) -> torch.Tensor:
    kept = {key: batch[key] for key in ("input_ids", "attention_mask", "images", "modalities") if key in batch}
    return loaded.model.generate(
        **kept, max_new_tokens=8, min_new_tokens=8, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def test_cached_generation_equals_uncached(loaded: LoadedModel, make_batch) -> None:
    batch = make_batch(loaded, [4])
    cached, uncached = generate(loaded, batch), generate(loaded, batch, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_step_by_hand_equals_the_whole(loaded: LoadedModel, make_batch) -> None:
    batch = make_batch(loaded, [0])
    whole = loaded.model(**batch).logits
    cut = batch["input_ids"].shape[1] - 5
    first = {**batch, "input_ids": batch["input_ids"][:, :cut], "attention_mask": batch["attention_mask"][:, :cut]}
    outputs = loaded.model(**first, use_cache=True)
    pieces = [outputs.logits]
    for place in range(cut, cut + 5):
        outputs = loaded.model(
            input_ids=batch["input_ids"][:, place : place + 1],
            past_key_values=outputs.past_key_values,
            attention_mask=batch["attention_mask"][:, : place + 1],
            use_cache=True,
        )
        pieces.append(outputs.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padded_batches_agree_with_single_samples(loaded: LoadedModel, make_batch) -> None:
    rows = [0, 2, 4, 6]
    together = loaded.model(**make_batch(loaded, rows)).logits
    for logits, row in zip(together, rows, strict=True):
        alone = loaded.model(**make_batch(loaded, [row])).logits[0]
        torch.testing.assert_close(logits[: len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_left_padded_prompts_agree_with_single_ones(loaded: LoadedModel, make_batch) -> None:
    batch = make_batch(loaded, [0, 4])
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        shift = batch["input_ids"].shape[1] - length
        for key in ("input_ids", "attention_mask"):
            batch[key][row] = batch[key][row].roll(shift)
    together = generate(loaded, batch)
    for row, source in enumerate([0, 4]):
        alone = generate(loaded, make_batch(loaded, [source]))
        torch.testing.assert_close(
            torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0], atol=1e-3, rtol=1e-3
        )


def test_gradient_checkpointing_agrees(loaded: LoadedModel, make_batch) -> None:
    batch = make_batch(loaded, [0, 4, 6])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    plain, twin = copy.deepcopy(loaded.model).train(), copy.deepcopy(loaded.model).train()
    twin.gradient_checkpointing_enable()
    plain(**batch, labels=labels).loss.backward()
    twin(**batch, labels=labels).loss.backward()
    for (key, one), other in zip(plain.named_parameters(), twin.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, msg=key)


@pytest.mark.parametrize("variant", ALTERNATING)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_weights_are_zero_exactly_where_the_mask_forbids(name: str, variant: str, load, make_batch) -> None:
    loaded = load(name, variant, "eager")
    batch = make_batch(loaded, [4, 6])
    attentions = loaded.model(**batch, output_attentions=True).attentions
    length = batch["input_ids"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril() & batch["attention_mask"][:, None, None].bool()
    hidden = forbidden_keys(variant, modality_ids(loaded, batch["input_ids"]), length)
    assert len(attentions) == NUM_LAYERS
    for layer, weights in enumerate(attentions):
        seen = causal & ~hidden if is_restricted(layer, NUM_LAYERS) else causal
        assert torch.equal(weights > 0, seen.expand_as(weights)), layer


@pytest.mark.parametrize("name", FAMILIES)
def test_save_and_reload_keep_the_variant(name: str, load, make_batch, tmp_path: Path) -> None:
    loaded = load(name, "alternating_cross", "eager")
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), attn_implementation="eager")
    assert type(again.model) is type(loaded.model)
    assert again.model.config.model_type == f"{name}_with_alternating_cross_attn"
    batch = make_batch(loaded, [0, 6])
    with torch.no_grad():
        assert torch.equal(again.model.eval()(**batch).logits, loaded.model(**batch).logits)


def test_beams_keep_their_own_media(load, make_batch) -> None:
    loaded = load("llava_llama", "alternating")
    batch = make_batch(loaded, [0, 4])
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for key in ("input_ids", "attention_mask"):
            batch[key][row] = batch[key][row].roll(batch["input_ids"].shape[1] - length)
    cached, uncached = (generate(loaded, batch, num_beams=3, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)


def test_layers_that_are_restricted() -> None:
    assert [layer for layer in range(6) if is_restricted(layer, 6)] == [1, 3]
    assert [layer for layer in range(5) if is_restricted(layer, 5)] == [1, 3]


def test_forbidden_keys_by_hand() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    own = forbidden_keys("alternating", ids, 6)[0, 0]
    assert own.int().tolist() == [
        [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1],
        [1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0],
    ]  # fmt: skip
    cross = forbidden_keys("alternating_cross", ids, 6)[0, 0]
    assert cross.int().tolist() == [
        [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0],
        [0, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1], [1, 1, 0, 0, 1, 0],
    ]  # fmt: skip
    assert torch.equal(forbidden_keys("alternating_cross", ids, 2)[0, 0], cross[4:])


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_other_attention_functions_are_refused(attention: str, load) -> None:
    with pytest.raises(ValueError, match=f"--attn_implementation is '{attention}', which takes no mask of single"):
        load("llava_llama", "alternating", attention)


def test_modality_ids_that_leave_out_the_cache(load, make_batch) -> None:
    loaded = load("llava_llama", "alternating")
    ids = make_batch(loaded, [6])["input_ids"]
    cache = loaded.model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"cover 2 tokens, but \d+ are in the cache and 1 come now"):
        loaded.model(input_ids=ids[:, :1], past_key_values=cache, modality_ids=torch.zeros(1, 2, dtype=torch.bool))


def test_every_backbone_has_both_variants() -> None:
    assert {variant_type(name, variant) for name in BACKBONES for variant in VARIANTS} <= set(AVAILABLE_MODELS)
