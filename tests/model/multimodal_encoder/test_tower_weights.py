"""Towers: the selected layer, frozen weights, and their source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from llava.model.loading import load_model
from llava.model.multimodal_encoder.base import describe_tower


@pytest.mark.parametrize("layer", [-1, -2, -3, 1, 2, 3])
def test_selected_layer_equals_the_hidden_state(load_tiny, tower_dir: Path, layer: int) -> None:
    tower = load_tiny(vision_select_layer=layer).model.get_vision_tower()
    full = AutoModel.from_pretrained(tower_dir).eval()
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        hidden = full(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
        assert torch.equal(tower(pixels), hidden[:, 1:])


def test_layers_behind_the_selected_one_are_not_built(load_tiny) -> None:
    assert len(load_tiny().model.get_vision_tower().vision_tower.encoder.layer) == 2


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_layer_that_does_not_exist_is_an_error(load_tiny, layer: int) -> None:
    with pytest.raises(ValueError, match="--mm_vision_select_layer"):
        load_tiny(vision_select_layer=layer)


def test_uint8_is_normalised_by_the_towers_statistics(load_tiny) -> None:
    tower = load_tiny().model.get_vision_tower()
    frames = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(tower.normalize(frames).flatten(), torch.tensor(expected))


def test_processor_gives_side_crop_and_grid(tower_dir: Path) -> None:
    described = describe_tower(str(tower_dir))
    assert (described.image_size, described.image_resize_size, described.patches_per_side) == (56, 64, 4)


def test_a_folder_without_processor_uses_the_models_own_side(tower_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tower_dir / name).read_bytes())
    described = describe_tower(str(tmp_path))
    assert (described.image_size, described.image_resize_size) == (56, None)


def test_a_side_that_is_no_multiple_of_the_patch_is_an_error(tower_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tower_dir / "config.json").read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 60, "width": 60}}))
    with pytest.raises(ValueError, match="60 x 60 pixels in patches of 14"):
        describe_tower(str(tmp_path))


def copy_tower(tower_dir: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in tower_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_frozen_tower_is_stored_as_source_and_hash(load_tiny, tmp_path: Path) -> None:
    loaded = load_tiny()
    loaded.model.save_pretrained(tmp_path)
    assert not any("vision_tower" in key for key in load_file(tmp_path / "model.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mm_vision_tower"] == loaded.vision.vision_tower
    assert len(config["mm_vision_tower_hash"]) == 64


def test_a_source_that_is_gone_or_changed_is_an_error(load_tiny, tower_dir: Path, tmp_path: Path) -> None:
    source = copy_tower(tower_dir, tmp_path / "source")
    loaded = load_tiny(vision_tower=str(source))
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")

    weights = load_file(source / "model.safetensors")
    weights["encoder.layer.0.norm1.bias"] += 1
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not the one this model was trained with"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")

    source.rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"source' is no folder. Give the folder that has its weights with --vision_tower"
    ):
        load_model(str(tmp_path / "model"))
    moved = load_model(str(tmp_path / "model"), vision_tower=str(tower_dir))
    assert moved.vision.vision_tower == str(tower_dir)


def test_a_source_that_lacks_weights_is_an_error(load_tiny, tower_dir: Path, tmp_path: Path) -> None:
    source = copy_tower(tower_dir, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    del weights["encoder.layer.0.norm1.bias"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights"):
        load_tiny(vision_tower=str(source))


def test_a_saved_tower_needs_no_source(load_tiny, tower_dir: Path, tmp_path: Path) -> None:
    source = copy_tower(tower_dir, tmp_path / "source")
    loaded = load_tiny(vision_tower=str(source), save_vision_tower=True)
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    source.rename(tmp_path / "elsewhere")
    expected = loaded.model.get_vision_tower().state_dict()
    # Loaded and saved again, without the flag: what the first folder says goes on.
    for number in range(3):
        again = load_model(str(tmp_path / "model"))
        assert again.vision.save_vision_tower
        for key, tensor in expected.items():
            assert torch.equal(again.model.get_vision_tower().state_dict()[key], tensor), (number, key)
        shutil.rmtree(tmp_path / "model")
        again.model.save_pretrained(tmp_path / "model")
        again.tokenizer.save_pretrained(tmp_path / "model")


def test_a_trained_tower_is_saved_from_then_on(load_tiny, tmp_path: Path) -> None:
    """A tower that training changed stands in no other place, whoever loads and saves it next."""
    loaded = load_tiny()
    loaded.model.keep_trained_tower()
    with torch.no_grad():
        next(loaded.model.get_vision_tower().parameters()).add_(1)
    expected = next(loaded.model.get_vision_tower().parameters()).clone()
    model = loaded.model
    for _ in range(2):
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(next(model.get_vision_tower().parameters()), expected)
