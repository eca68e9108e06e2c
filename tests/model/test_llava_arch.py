"""Contract of every backbone, by its name in FAMILIES."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llava.constants import VISUAL_TOKENS
from llava.model.loading import LoadedModel, load_model
from tests.conftest import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def shared(name: str, load_tiny) -> LoadedModel:
    return load_tiny(name)


@pytest.fixture
def loaded(shared: LoadedModel) -> Iterator[LoadedModel]:
    """A model of the family that its tests share: none of them changes a weight."""
    before = {key: tensor.clone() for key, tensor in shared.model.state_dict().items()}
    shared.model.eval()
    shared.model.zero_grad()
    yield shared
    assert all(torch.equal(tensor, before[key]) for key, tensor in shared.model.state_dict().items())


def text_ids(loaded, batch: int = 2, length: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(1, min(loaded.vision.token_ids.values()), (batch, length), generator=generator)


def test_registered_with_auto_classes(name: str, loaded: LoadedModel) -> None:
    assert loaded.model.config.model_type == name
    assert type(AutoConfig.for_model(name)) is type(loaded.model.config)
    assert AutoModelForCausalLM._model_mapping[type(loaded.model.config)] is type(loaded.model)


def test_text_logits_equal_the_plain_class(name: str, loaded: LoadedModel, backbone_dirs: dict[str, Path]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(backbone_dirs[name]).eval()
    text_only = load_model(str(backbone_dirs[name])).model.eval()
    ids = text_ids(loaded)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(text_only(input_ids=ids, attention_mask=mask).logits, expected)
        grown = loaded.model.eval()(input_ids=ids, attention_mask=mask).logits
    assert (grown[..., : expected.shape[-1]] - expected).abs().max() == 0


def test_plain_checkpoint_reports_only_vision_modules_as_new(loaded: LoadedModel) -> None:
    new = loaded.new_parameters
    assert new
    assert all(".mm_projector." in key or ".vision_resampler." in key for key in new)


def test_new_rows_are_the_mean_and_heads_stay_tied(
    name: str, loaded: LoadedModel, backbone_dirs: dict[str, Path]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(backbone_dirs[name])
    old, new = plain.get_input_embeddings().weight, loaded.model.get_input_embeddings().weight
    assert torch.equal(new[: len(old)], old)
    torch.testing.assert_close(new[len(old) :], old.mean(0).expand(len(VISUAL_TOKENS), -1))
    tied = loaded.model.get_output_embeddings().weight is new
    assert tied == loaded.model.config.tie_word_embeddings
    if not tied:
        head = plain.get_output_embeddings().weight
        grown = loaded.model.get_output_embeddings().weight
        torch.testing.assert_close(grown[len(head) :], head.mean(0).expand(len(VISUAL_TOKENS), -1))


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_grows_with_tied_and_with_untied_heads(name, tied: bool, backbone_dirs, tower_dir, tmp_path) -> None:
    config = AutoConfig.from_pretrained(backbone_dirs[name])
    config.tie_word_embeddings = tied
    torch.manual_seed(9)
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.save_pretrained(tmp_path)
    for file in backbone_dirs[name].glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    loaded = load_model(str(tmp_path), vision_tower=str(tower_dir))
    ids = text_ids(loaded)
    with torch.no_grad():
        grown = loaded.model.eval()(input_ids=ids).logits
        assert torch.equal(grown[..., : config.vocab_size], plain(input_ids=ids).logits)
    assert grown.shape[-1] == config.vocab_size + len(VISUAL_TOKENS)
    loaded.model.save_pretrained(tmp_path / "again")
    loaded.tokenizer.save_pretrained(tmp_path / "again")
    for model in (loaded.model, load_model(str(tmp_path / "again")).model):
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
        with torch.no_grad():
            assert torch.equal(model.eval()(input_ids=ids).logits, grown)


def test_spare_rows_serve_visual_tokens(name: str, backbone_dirs, tower_dir, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(backbone_dirs[name])
    size = plain.config.vocab_size
    plain.resize_token_embeddings(size + 20)
    plain.save_pretrained(tmp_path)
    for file in backbone_dirs[name].glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    loaded = load_model(str(tmp_path), vision_tower=str(tower_dir))
    weight = loaded.model.get_input_embeddings().weight
    assert len(weight) == size + 20
    assert min(loaded.vision.token_ids.values()) == size
    torch.testing.assert_close(weight[size], plain.get_input_embeddings().weight[:size].mean(0))


def test_save_and_reload_are_exact(loaded: LoadedModel, make_batch, tmp_path: Path) -> None:
    batch = make_batch(loaded, [0, 2, 4, 5])
    loaded.model.eval().save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = loaded.model(**batch, return_logits=True)
        again = load_model(str(tmp_path))
        auto = AutoModelForCausalLM.from_pretrained(tmp_path)
        for model in (again.model, auto):
            output = model.eval()(**batch, return_logits=True)
            assert torch.equal(output.logits, expected.logits)
            assert torch.equal(output.loss, expected.loss)
    assert again.new_parameters == []
    assert again.vision == loaded.vision
    assert again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (again.model, auto)]
    assert tied == [loaded.model.config.tie_word_embeddings] * 2


def test_every_trainable_parameter_gets_a_gradient(name: str, load_tiny, make_batch) -> None:
    # Two slow frames of three: with as many slow frames as frames, a window of one key has nothing to choose.
    loaded = load_tiny(name, slow_frames=2)
    loaded.model.train()(**make_batch(loaded, [0, 1, 2, 4, 5])).loss.backward()
    for key, parameter in loaded.model.named_parameters():
        if ".vision_tower." in key:
            assert parameter.grad is None, key
        else:
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0 or key.endswith("k_proj.bias"), key


def test_rows_of_visual_tokens_get_gradients_through_the_head(loaded: LoadedModel, make_batch) -> None:
    loaded.model.train()(**make_batch(loaded, [0])).loss.backward()
    rows = loaded.model.get_output_embeddings().weight.grad[loaded.vision.visual_token_ids]
    assert (rows.abs().sum(1) > 0).all()


def test_supervised_positions_equal_the_full_computation(loaded: LoadedModel, make_batch) -> None:
    batch = make_batch(loaded, list(range(7)))
    twin = copy.deepcopy(loaded.model)
    loss = loaded.model(**batch).loss
    loss.backward()
    logits = twin(**{k: v for k, v in batch.items() if k != "labels"}).logits
    full = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    full.backward()
    torch.testing.assert_close(loss, full, atol=5e-6, rtol=0)
    for (key, one), other in zip(loaded.model.named_parameters(), twin.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=5e-6, rtol=0, msg=key)


def test_logits_as_in_transformers_unless_they_are_declined(loaded: LoadedModel, make_batch) -> None:
    batch = make_batch(loaded, [0, 5])
    shape = (*batch["input_ids"].shape, loaded.model.config.vocab_size)
    assert loaded.model(**batch).logits.shape == shape
    declined = loaded.model(**batch, return_logits=False)
    assert declined.logits is None
    assert torch.equal(declined.loss, loaded.model(**batch).loss)
    unlabelled = {key: value for key, value in batch.items() if key != "labels"}
    assert loaded.model(**unlabelled).logits.shape == shape
    assert loaded.model(**unlabelled, logits_to_keep=1).logits.shape == (2, 1, shape[-1])


def test_batch_equals_single_samples(loaded: LoadedModel, make_batch) -> None:
    loaded.model.eval()
    rows = [0, 2, 4, 6]
    with torch.no_grad():
        together = make_batch(loaded, rows)
        logits = loaded.model(**together, return_logits=True).logits
        for i, row in enumerate(rows):
            alone = loaded.model(**make_batch(loaded, [row]), return_logits=True).logits[0]
            torch.testing.assert_close(logits[i, : len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_pixel_values_is_another_name_of_images(loaded: LoadedModel, make_batch) -> None:
    batch = make_batch(loaded, [0, 2])
    renamed = {**batch, "pixel_values": batch["images"]}
    del renamed["images"]
    assert torch.equal(loaded.model(**batch).loss, loaded.model(**renamed).loss)


def test_normalised_floats_equal_uint8(loaded: LoadedModel, make_batch) -> None:
    batch = make_batch(loaded, [0, 2])
    tower = loaded.model.get_vision_tower()
    floats = {**batch, "images": [tower.normalize(image) for image in batch["images"]]}
    assert torch.equal(loaded.model(**batch).loss, loaded.model(**floats).loss)


def test_variables_are_refused(loaded: LoadedModel, make_batch) -> None:
    with pytest.raises(ValueError, match="no coordinate tables"):
        loaded.model(**make_batch(loaded, [0]), variables=[{"temporal_input_locations": [0.5]}])


def test_gradient_checkpointing_agrees(loaded: LoadedModel, make_batch) -> None:
    batch = make_batch(loaded, [0, 2, 5])
    twin = copy.deepcopy(loaded.model).train()
    twin.gradient_checkpointing_enable()
    loaded.model.train()(**batch).loss.backward()
    twin(**batch).loss.backward()
    for one, other in zip(loaded.model.parameters(), twin.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_eager_attention_agrees(name: str, loaded: LoadedModel, load_tiny, make_batch) -> None:
    eager = load_tiny(name, attn_implementation="eager")
    eager.model.load_state_dict(loaded.model.state_dict())
    batch = make_batch(loaded, [0, 2, 5])
    torch.testing.assert_close(
        loaded.model.eval()(**batch).loss, eager.model.eval()(**batch).loss, atol=1e-5, rtol=1e-5
    )


def test_folder_name_changes_nothing(name: str, backbone_dirs, tmp_path: Path) -> None:
    for folder in ("qwen-gpt2-llama", "x"):
        copied = tmp_path / folder
        copied.mkdir()
        for file in backbone_dirs[name].iterdir():
            (copied / file.name).write_bytes(file.read_bytes())
        assert load_model(str(copied)).model.config.model_type == name


def test_config_is_written_with_its_visual_settings(name: str, loaded: LoadedModel, tmp_path: Path) -> None:
    loaded.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == name
    assert config["mm_resampler_type"] == "fast_slow_resampler"
    assert config["mm_image_mean"] == [0.485, 0.456, 0.406]
