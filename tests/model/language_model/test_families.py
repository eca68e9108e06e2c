"""The contract of backbones, in short, for the families of ``ROWS``: windows, caps, scaled embeddings.

What all families have in common, the tests beside this one and above it hold for ``FAMILIES``.
"""

from __future__ import annotations

import copy
import json
import shutil
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ITALIAN, ROWS, TINY_VISION, WINDOW, TinyBackbones
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from llava.constants import VISUAL_TOKENS
from llava.eval.likelihood import Candidate, Choice, LikelihoodScorer
from llava.eval.logprobs import ModelRunner
from llava.model import split_type
from llava.model.export.__main__ import main as export
from llava.model.language_model.alternating import forbidden_keys, is_restricted
from llava.model.loading import LoadedModel, load_model
from llava.model.quantization import find_linear_layers
from tests.eval.test_likelihood import CHOICES, plain_scores

LAYERS = 4  # Layer 1 is restricted in the variants; Gemma 2's and 3's layers are local in turn.
CLASSIFIERS = (AutoModelForSequenceClassification, AutoModelForTokenClassification)


@pytest.fixture(scope="module")
def plain_dirs(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> TinyBackbones:
    """Plain checkpoints, with weights that make windows and caps matter."""

    class Sharp(TinyBackbones):
        def __missing__(self, name: str) -> Path:
            folder = super().__missing__(name)
            model = AutoModelForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(5 if parameter.ndim > 1 else 1)
            model.save_pretrained(folder)
            return folder

    return Sharp(tmp_path_factory.mktemp("rows"), tokenizer_dir, LAYERS)


@pytest.fixture(scope="module")
def load(plain_dirs: TinyBackbones, tower_dir: Path):
    def load_variant(name: str, variant: str = "base", **options: Any) -> LoadedModel:
        torch.manual_seed(3)
        return load_model(
            str(plain_dirs[name]), vision_tower=str(tower_dir), variant=variant, **{**TINY_VISION, **options}
        )

    return load_variant


@pytest.fixture(scope="module", params=ROWS)
def loaded(request: pytest.FixtureRequest, load) -> LoadedModel:
    found = load(request.param)
    found.model.eval()
    return found


@pytest.fixture(scope="module", params=zip(ROWS, cycle(("alternating", "alternating_cross"))))
def varied(request: pytest.FixtureRequest, load) -> LoadedModel:
    found = load(*request.param, attn_implementation="eager")
    found.model.eval()
    return found


@pytest.fixture(scope="module")
def plain(loaded: LoadedModel, plain_dirs: TinyBackbones) -> Any:
    # Eager where a cap asks for it: sdpa of some releases passes over it.
    attention = loaded.model.config._attn_implementation
    folder = plain_dirs[loaded.model.config.model_type]
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def make_batch(make_batch):
    """Rows of mixed.json: 0 is a video with text, 4 a video, text, an image and text, 6 text alone."""

    def make(loaded: LoadedModel, rows: list[int], labels: bool = False) -> dict[str, Any]:
        batch = make_batch(loaded, rows)
        return batch if labels else {key: value for key, value in batch.items() if key != "labels"}

    return make


def text_ids(batch: int = 2, length: int = 2 * WINDOW) -> torch.Tensor:
    return torch.randint(1, 300, (batch, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def test_text_is_answered_as_by_the_plain_class(loaded: LoadedModel, plain: Any) -> None:
    assert loaded.new_parameters
    assert all(".mm_projector." in key or ".vision_resampler." in key for key in loaded.new_parameters)
    ids = text_ids()
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    expected = plain(input_ids=ids, attention_mask=mask).logits
    found = loaded.model(input_ids=ids, attention_mask=mask).logits[..., : expected.shape[-1]]
    assert torch.equal(found, expected)
    assert float(expected.std()) > 0.1
    # New rows: the mean of the old ones, and the same in a tied head.
    size = plain.config.vocab_size
    weight, head = loaded.model.get_input_embeddings().weight, loaded.model.get_output_embeddings().weight
    assert len(weight) == size + len(VISUAL_TOKENS)
    assert (head is weight) == plain.config.tie_word_embeddings
    for grown in (weight, head):
        torch.testing.assert_close(grown[size:], grown[:size].mean(0).expand(len(VISUAL_TOKENS), -1))
    # Lengths beyond the window, packed texts: positions begin anew.
    positions = torch.arange(WINDOW).repeat(2)[None]
    one, other = (model(input_ids=ids[:1], position_ids=positions).logits for model in (loaded.model, plain))
    assert torch.equal(one[..., :size], other)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(loaded.model.generate(ids, **options), plain.generate(ids, **options))


def test_the_loss_is_that_of_the_plain_class(loaded: LoadedModel, plain_dirs: TinyBackbones, plain: Any) -> None:
    ids = text_ids()
    own = load_model(str(plain_dirs[loaded.model.config.model_type])).model.train()
    twin = copy.deepcopy(plain).train()
    own.gradient_checkpointing_enable()
    one, other = own(input_ids=ids, labels=ids, return_logits=False).loss, twin(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(one, other)
    one.backward(), other.backward()
    for (key, ours), theirs in zip(own.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=key)


@torch.no_grad()
def test_features_stand_among_embeddings_as_the_layers_see_them(loaded: LoadedModel, make_batch) -> None:
    """Gemma multiplies embeddings by the root of their width: within the embedding module, and features never."""
    batch = make_batch(loaded, [0])
    ids, model = batch["input_ids"], loaded.model
    embeddings = model.embed_multimodal(ids, batch["images"], batch["modalities"])
    visual = torch.isin(ids, torch.tensor(loaded.vision.visual_token_ids))
    features = model.get_model().encode_media(batch["images"], batch["modalities"])
    assert torch.equal(embeddings[visual], torch.cat(features))
    scale = 32**0.5 if "gemma" in model.config.model_type else 1
    torch.testing.assert_close(embeddings[~visual], model.get_input_embeddings().weight[ids[~visual]] * scale)
    assert torch.equal(model(**batch).logits, model(inputs_embeds=embeddings).logits)


def generate(loaded: LoadedModel, batch: dict[str, Any], **options: Any) -> torch.Tensor:
    output = loaded.model.generate(
        **batch, max_new_tokens=WINDOW + 4, min_new_tokens=WINDOW + 4, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip
    return torch.stack(output.logits)


def pad_left(batch: dict[str, Any]) -> dict[str, Any]:
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for key in ("input_ids", "attention_mask"):
            batch[key][row] = batch[key][row].roll(batch["input_ids"].shape[1] - length)
    return batch


def check_generation(loaded: LoadedModel, make_batch: Any) -> None:
    """With the cache as without, and among prompts of other lengths as alone."""
    batch = pad_left(make_batch(loaded, [0, 6]))
    cached = generate(loaded, batch)
    torch.testing.assert_close(cached, generate(loaded, batch, use_cache=False), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(cached[:, :1], generate(loaded, make_batch(loaded, [0])), atol=1e-3, rtol=1e-3)


def test_cached_generation_equals_uncached(loaded: LoadedModel, make_batch) -> None:
    check_generation(loaded, make_batch)


@torch.no_grad()
def test_what_is_saved_is_what_was_there(loaded: LoadedModel, make_batch, tmp_path: Path) -> None:
    """The checkpoint, its classifiers, its text and the whole of it as exports."""
    loaded.model.save_pretrained(tmp_path / "own")
    loaded.tokenizer.save_pretrained(tmp_path / "own")
    batch = make_batch(loaded, [0, 4], labels=True)
    expected = loaded.model(**batch)
    again = load_model(str(tmp_path / "own"))
    assert again.new_parameters == []
    assert torch.equal(again.model.eval()(**batch).logits, expected.logits)
    tied = again.model.get_input_embeddings().weight is again.model.get_output_embeddings().weight
    assert tied == loaded.model.config.tie_word_embeddings
    hidden = loaded.model.get_model()(input_ids=text_ids()).last_hidden_state
    for auto in CLASSIFIERS:
        classifier = auto.from_pretrained(tmp_path / "own", num_labels=3).eval()
        assert torch.equal(classifier.model(input_ids=text_ids()).last_hidden_state, hidden)
        assert classifier(input_ids=text_ids()).logits.shape[-1] == 3
    # Both exports compare logits themselves, and are errors where these differ.
    assert export([str(tmp_path / "own"), str(tmp_path / "text"), "--as", "text"]) == 0
    text = AutoModelForCausalLM.from_pretrained(
        tmp_path / "text", attn_implementation=loaded.model.config._attn_implementation
    )
    assert getattr(transformers, type(text).__name__) is type(text)
    words = text(input_ids=text_ids()).logits
    assert torch.equal(words, loaded.model(input_ids=text_ids()).logits[..., : words.shape[-1]])
    assert export([str(tmp_path / "own"), str(tmp_path / "whole"), "--as", "multimodal"]) == 0


LONG = Choice("long", tuple(Candidate(" ".join(texts)) for texts in (ITALIAN, ITALIAN[::-1])))


def test_likelihoods_are_those_of_one_sentence_at_a_time(
    loaded: LoadedModel, plain_dirs: TinyBackbones, tmp_path: Path
) -> None:
    """Trees of shared beginnings that are longer than a window, of texts that are not, and a text that is."""
    folder = Path(shutil.copytree(plain_dirs[loaded.model.config.model_type], tmp_path / "wide"))
    config = json.loads((folder / "config.json").read_text())
    if config.get("sliding_window"):
        (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 32}))
    scorer = LikelihoodScorer.from_folder(str(folder), device="cpu")
    found, expected = scorer.score([*CHOICES, LONG]), plain_scores(folder, [*CHOICES, LONG])
    assert scorer._runner.find_ways().trees
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=2e-3)


def test_adapters_find_the_layers(loaded: LoadedModel) -> None:
    names = find_linear_layers(loaded.model)
    weights = [key for key, tensor in loaded.model.get_model().layers.named_parameters() if tensor.ndim == 2]
    assert len(names) == len(weights) > 4 * LAYERS - 1


# Alternating attention.


@torch.no_grad()
def test_weights_are_zero_exactly_where_window_and_modality_forbid(varied: LoadedModel, make_batch) -> None:
    batch = make_batch(varied, [4, 6])
    config = varied.model.config
    attentions = varied.model(**batch, output_attentions=True).attentions
    length = batch["input_ids"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril() & batch["attention_mask"][:, None, None].bool()
    near = torch.ones(length, length, dtype=torch.bool).triu(1 - WINDOW)
    visual = torch.isin(batch["input_ids"], torch.tensor(varied.vision.visual_token_ids))
    hidden = forbidden_keys(split_type(config.model_type)[1], visual, length)
    local = getattr(config, "layer_types", None) or ["full_attention"] * LAYERS
    if "phi3" in config.model_type:
        local = ["sliding_attention"] * LAYERS
    for layer, weights in enumerate(attentions):
        seen = causal & near if local[layer] == "sliding_attention" else causal
        seen = seen & ~hidden if is_restricted(layer, LAYERS) else seen
        real = batch["attention_mask"][:, None, :, None].bool()
        assert torch.equal((weights > 0) & real, (seen & real).expand_as(weights)), layer


@torch.no_grad()
def test_no_position_looks_ahead(varied: LoadedModel, make_batch) -> None:
    batch = make_batch(varied, [4])
    before = varied.model(**batch).logits
    visual = torch.isin(batch["input_ids"], torch.tensor(varied.vision.visual_token_ids))[0]
    for place in (~visual).nonzero().squeeze(1)[[1, -2]].tolist():
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, place] = (changed["input_ids"][0, place] + 1) % 300
        after = varied.model(**changed).logits
        torch.testing.assert_close(after[:, :place], before[:, :place], atol=1e-5, rtol=0)
        assert not torch.equal(after[:, place], before[:, place])


def test_variants_generate_alike_cached_or_not(varied: LoadedModel, make_batch) -> None:
    check_generation(varied, make_batch)


@torch.no_grad()
def test_both_attention_functions_agree(varied: LoadedModel, load, make_batch) -> None:
    name, variant = split_type(varied.model.config.model_type)
    if name == "llava_gemma2":
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            load(name, variant, attn_implementation="sdpa")
        return
    sdpa = load(name, variant, attn_implementation="sdpa").model.eval()
    batch = make_batch(varied, [4, 6])
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(sdpa(**batch).logits[real], varied.model(**batch).logits[real], atol=1e-3, rtol=1e-3)


# What is particular.


@torch.no_grad()
def test_layers_that_keep_the_mask_to_themselves_are_told_of(load, make_batch, monkeypatch) -> None:
    """A plug-in whose author does not know: its variants would be causal."""
    from llava.model.language_model.llava_stablelm import LlavaStableLmModel

    monkeypatch.setattr(LlavaStableLmModel, "layers_hand_down", True)
    loaded = load("llava_stablelm", "alternating")
    loaded.model(input_ids=text_ids())
    with pytest.raises(ValueError, match=r"keep keyword arguments to themselves, .*layers_hand_down = False"):
        loaded.model(**make_batch(loaded, [0]))


def test_capped_heads_are_not_run_alone(plain_dirs: TinyBackbones) -> None:
    """The trial of likelihood scores has small logits, on which a cap does nothing."""
    model = AutoModelForCausalLM.from_pretrained(plain_dirs["llava_gemma2"])
    model.config.final_logit_softcapping = 1e4
    runner = ModelRunner(model)
    with runner.running():
        assert not runner.find_ways().head


def test_rotary_settings_are_written_as_transformers_4_reads_them(plain_dirs: TinyBackbones, tmp_path: Path) -> None:
    """Gemma 3 has two bases; Phi-4-mini's context grows by factors, of which three entries are taken and no more."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    name = "llava_phi3"
    model = AutoModelForCausalLM.from_pretrained(plain_dirs[name])
    model.config.original_max_position_embeddings = 32
    model.config.rope_parameters |= {"rope_type": "longrope", "original_max_position_embeddings": 32, **factors}
    model.save_pretrained(tmp_path / name)
    for file in plain_dirs[name].glob("tokenizer*"):
        (tmp_path / name / file.name).write_bytes(file.read_bytes())
    for folder in (tmp_path / name, plain_dirs["llava_gemma3"]):
        assert export([str(folder), str(tmp_path / "out" / folder.name), "--as", "text"]) == 0
    phi, gemma = (json.loads((tmp_path / "out" / one / "config.json").read_text()) for one in (name, "llava_gemma3"))
    assert phi["rope_scaling"] == {"type": "longrope", **factors}
    assert (phi["rope_theta"], phi["original_max_position_embeddings"]) == (10000, 32)
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1e6, 1e4)
    assert "rope_scaling" not in gemma
    # Beyond the first context, where the factors change within an answer, and so must keys in the cache.
    own = load_model(str(tmp_path / name)).model.eval()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached, uncached = (own.generate(text_ids(1, 28), use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(cached, uncached)


def test_an_encoder_is_refused(plain_dirs: TinyBackbones, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain_dirs["llava_gemma3"])
    model.config.use_bidirectional_attention = True
    model.save_pretrained(tmp_path)
    for file in plain_dirs["llava_gemma3"].glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"use_bidirectional_attention is true in its config\.json: it is an encoder"):
        load_model(str(tmp_path))
