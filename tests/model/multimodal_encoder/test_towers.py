"""What every registered tower promises: the selected layer, the grid, gradients, and its weights' source."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_towers import (
    GRID,
    LAYERS,
    ROTARY_TIMM,
    SIDE,
    TINY_TOWERS,
    TWO_TOWERS,
    WIDTH,
    need_timm,
    read_hidden_states,
    write_tower,
)

from llava.config import VisionConfig
from llava.model.grad_sync import encode_in_step
from llava.model.loading import load_model
from llava.model.multimodal_encoder.base import TOWERS, VisionTower, build_tower, describe_tower
from llava.model.multimodal_encoder.hf import cut_patches, hash_weights

WriteTower = Callable[[str], Path]


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory: pytest.TempPathFactory) -> WriteTower:
    """A function that writes the tiny model of a kind, once."""
    settings = {name: (name, TINY_TOWERS[name]) for name in TOWERS.names()}
    settings |= {name: (name, pair) for name, pair in TWO_TOWERS.items()}
    settings["timm with rotary positions"] = ("timm_wrapper", ROTARY_TIMM)
    written: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in written:
            written[name] = write_tower(tmp_path_factory.mktemp("tower"), *settings[name])
        return written[name]

    return write


def build(folder: Path, layer: int = -2) -> VisionTower:
    """The tower of a folder with its weights, in evaluation mode as ``load_model`` leaves it."""
    description = vars(describe_tower(str(folder)))
    tower = build_tower(VisionConfig(vision_tower=str(folder), **description, vision_select_layer=layer))
    tower.requires_grad_(False)
    tower.load_weights(str(folder))
    return tower.eval()


def draw_pixels(frames: int = 2, side: int = SIDE) -> torch.Tensor:
    return torch.randn(frames, 3, side, side, generator=torch.Generator().manual_seed(0))


every_tower = pytest.mark.parametrize("name", TOWERS.names())
every_source = pytest.mark.parametrize("name", [*TOWERS.names(), *TWO_TOWERS, "timm with rotary positions"])


@every_source
def test_selected_layer_equals_the_whole_models_hidden_state(tower_folder: WriteTower, name: str) -> None:
    folder, pixels = tower_folder(name), draw_pixels()
    hidden = read_hidden_states(folder, pixels)
    assert len(hidden) == LAYERS + 1
    for layer in (1, LAYERS, -1, -2, -LAYERS):
        expected = hidden[layer][:, -GRID * GRID :]
        torch.testing.assert_close(build(folder, layer)(pixels), expected, rtol=0, atol=1e-6)


@every_source
def test_grid_and_width_come_from_the_tower(tower_folder: WriteTower, name: str) -> None:
    described = describe_tower(str(tower_folder(name)))
    assert (described.image_size, described.patches_per_side, described.hidden_size) == (SIDE, GRID, WIDTH)
    assert described.vision_config["model_type"] in TOWERS
    json.dumps(described.vision_config)


@every_source
def test_only_the_layers_up_to_the_selected_one_are_built(tower_folder: WriteTower, name: str) -> None:
    names = [name for name, _ in build(tower_folder(name), layer=1).named_parameters()]
    assert {i for name in names for i in re.findall(r"\b(?:layer|layers|blocks)\.(\d+)\.", name)} == {"0"}
    assert not [name for name in names if "text_model" in name]


@every_tower
def test_half_precision_is_finite(tower_folder: WriteTower, name: str) -> None:
    features = build(tower_folder(name)).to(torch.bfloat16)(draw_pixels())
    assert features.dtype == torch.bfloat16
    assert features.isfinite().all()


@every_tower
def test_a_frozen_tower_has_no_gradients_and_stays_in_evaluation_mode(tower_folder: WriteTower, name: str) -> None:
    tower = build(tower_folder(name)).train()
    assert not any(module.training for module in tower.modules())
    assert not tower(draw_pixels()).requires_grad


@every_source
def test_every_parameter_of_a_trained_tower_gets_a_gradient(tower_folder: WriteTower, name: str) -> None:
    tower = build(tower_folder(name)).requires_grad_(True).train()
    tower.freeze_unused()
    features = tower(draw_pixels())
    assert features.shape == (2, GRID * GRID, WIDTH)
    features.square().sum().backward()
    trained = {name: parameter for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    # A key's bias moves all scores of a query alike, so that its gradient is rounding at most.
    zero = [name for name, parameter in trained.items() if not parameter.grad.any()]
    assert [name for name in zero if not re.search(r"k_proj\.bias", name)] == []


@every_tower
def test_a_trained_tower_gets_its_gradients_in_step_with_other_ranks(
    tower_folder: WriteTower, gpt2_dir: Path, name: str
) -> None:
    decoder = load_model(str(gpt2_dir), vision_tower=str(tower_folder(name))).model.get_model().train()
    tower = decoder.vision_tower.requires_grad_(True).train()
    tower.freeze_unused()
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    images = list(draw_pixels())
    torch.manual_seed(0)  # DINOv3 shifts its positions at random while it trains.
    torch.cat(decoder.encode_media(images)).square().sum().backward()
    expected = [parameter.grad for parameter in trained]
    for media in ((images,), None):
        decoder.zero_grad()
        torch.manual_seed(0)
        encoded = encode_in_step(decoder, media)
        torch.cat(encoded).square().sum().backward()
        for parameter, gradient in zip(trained, expected, strict=True):
            assert torch.equal(parameter.grad, gradient if media else torch.zeros_like(gradient))


@every_source
def test_a_model_saves_and_reloads_with_it(tower_folder: WriteTower, gpt2_dir: Path, tmp_path: Path, name: str) -> None:
    folder, pixels = tower_folder(name), draw_pixels()
    loaded = load_model(str(gpt2_dir), vision_tower=str(folder))
    tower = loaded.model.get_vision_tower()
    expected = read_hidden_states(folder, pixels)[-2][:, -GRID * GRID :]
    torch.testing.assert_close(tower(pixels), expected, rtol=0, atol=1e-6)

    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    assert not any("vision_tower" in key for key in load_file(tmp_path / "model.safetensors"))
    again = load_model(str(tmp_path))
    assert again.vision == loaded.vision
    assert torch.equal(again.model.get_vision_tower()(pixels), tower(pixels))
    features = again.model.get_model().encode_media(pixels, ["image", "image"])
    assert features[0].shape == (GRID * GRID, 32)


@every_source
def test_a_saved_tower_needs_no_source(tower_folder: WriteTower, gpt2_dir: Path, tmp_path: Path, name: str) -> None:
    loaded = load_model(str(gpt2_dir), vision_tower=str(tower_folder(name)), save_vision_tower=True)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(tmp_path / "gone")}))
    again = load_model(str(tmp_path)).model.get_vision_tower()
    assert torch.equal(again(draw_pixels()), loaded.model.get_vision_tower()(draw_pixels()))


@every_tower
def test_changed_weights_are_an_error(tower_folder: WriteTower, tmp_path: Path, name: str) -> None:
    source = tower_folder(name)
    config = VisionConfig(vision_tower=str(source), **vars(describe_tower(str(source))))
    found = build_tower(config).load_weights(str(source))
    same = dataclasses.replace(config, vision_tower_hash=found)
    assert build_tower(same).load_weights(str(source)) == found
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = load_file(source / "model.safetensors")
    changed = next(name for name in sorted(weights) if re.search(r"(layers?|blocks)\.0\.", name))
    save_file(weights | {changed: weights[changed] + 1}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not the one this model was trained with"):
        build_tower(same).load_weights(str(tmp_path))


def test_the_hash_is_of_the_weights_and_not_of_their_names() -> None:
    weights = {"query": torch.arange(4.0), "key": torch.ones(2, 2)}
    same = {"q_proj": torch.arange(4.0), "k_proj": torch.ones(2, 2)}
    assert hash_weights(weights) == hash_weights(same)
    others = ({"query": torch.arange(4.0) + 1}, {"key": torch.ones(4)}, {"key": torch.ones(2, 2).half()})
    assert len({hash_weights(weights), *(hash_weights(weights | other) for other in others)}) == 4


@every_tower
def test_another_towers_weights_are_an_error(tower_folder: WriteTower, tower_dir: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"lacks weights .*--vision_tower"):
        build(tower_folder(name)).load_weights(str(tower_dir))


def test_the_towers_dtype_is_the_models_not_its_configurations(
    tower_folder: WriteTower, gpt2_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(tower_folder("dinov2"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_model(str(gpt2_dir), vision_tower=str(tmp_path), dtype=torch.float32)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["dinov2", "dinov2_with_registers", "dinov3_vit", "clip_vision_model",
                                  "siglip_vision_model", "siglip2_vision_model"])  # fmt: skip
def test_the_processors_side_may_differ_from_the_models(tmp_path: Path, name: str) -> None:
    processor = {"size": {"height": 2 * SIDE, "width": 2 * SIDE}, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    folder = write_tower(tmp_path, name, TINY_TOWERS[name], processor)
    described = describe_tower(str(folder))
    assert (described.image_size, described.patches_per_side, described.image_mean) == (64, 8, (0.1,) * 3)
    assert build(folder)(draw_pixels(side=64)).shape == (2, 64, WIDTH)


@pytest.mark.parametrize("name", ["siglip_vision_model", "clip_vision_model"])
def test_pixels_that_the_model_itself_leaves_out_are_no_error(tmp_path: Path, name: str) -> None:
    folder = write_tower(tmp_path, name, TINY_TOWERS[name] | {"image_size": 30})
    assert describe_tower(str(folder)).patches_per_side == 3
    assert build(folder)(draw_pixels(side=30)).shape == (2, 9, WIDTH)


def test_a_processor_of_variable_grids_means_its_largest_square(tmp_path: Path) -> None:
    folder = write_tower(tmp_path, "siglip2_vision_model", TINY_TOWERS["siglip2_vision_model"], {"max_num_patches": 40})
    described = describe_tower(str(folder))
    assert (described.image_size, described.patches_per_side) == (48, 6)
    assert build(folder)(draw_pixels(side=48)).shape == (2, 36, WIDTH)


def test_patches_are_cut_row_by_row_with_channels_last() -> None:
    pixels = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    patch = cut_patches(pixels, side=2)[1, 2]
    assert torch.equal(patch, pixels[1, :, 2:, :2].permute(1, 2, 0).flatten())


@pytest.mark.parametrize(
    ("name", "mean"),
    [("dinov3_vit", 0.485), ("clip_vision_model", 0.48145466), ("siglip_vision_model", 0.5)],
)
def test_without_a_processor_the_familys_statistics_hold(tower_folder: WriteTower, name: str, mean: float) -> None:
    assert describe_tower(str(tower_folder(name))).image_mean[0] == mean


@pytest.mark.parametrize(
    ("processor", "side", "resize"),
    [
        ({"size": 40, "crop_size": 32, "do_center_crop": True}, 32, 40),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}, 32, 40),
        ({"size": {"shortest_edge": 40}, "crop_size": 32, "do_center_crop": False}, 40, None),
        ({"size": {"height": 32, "width": 32}, "crop_size": 24}, 32, None),
        ({"size": None, "do_normalize": True}, 32, None),
    ],
)
def test_sizes_as_processors_write_them(tmp_path: Path, processor: dict, side: int, resize: int | None) -> None:
    described = describe_tower(
        str(write_tower(tmp_path, "siglip_vision_model", TINY_TOWERS["siglip_vision_model"], processor))
    )
    assert (described.image_size, described.image_resize_size) == (side, resize)


@pytest.mark.parametrize(
    ("settings", "processor", "message"),
    [
        ({}, {"size": {"height": 32, "width": 48}}, r"images of 32 x 48 pixels.*preprocessor_config.json"),
        ({}, {"size": {"longest_edge": 48}}, "only squares"),
        ({"image_size": [32, 48]}, None, "image_size 32 x 48"),
        ({"patch_size": [8, 16]}, None, "patch_size 8 x 16"),
        ({}, {"size": {"height": 36, "width": 36}}, "36 x 36 pixels in patches of 8"),
    ],
)
def test_what_is_not_square_is_an_error(tmp_path: Path, settings: dict, processor: dict | None, message: str) -> None:
    folder = write_tower(tmp_path, "dinov2", TINY_TOWERS["dinov2"] | settings, processor)
    with pytest.raises(ValueError, match=message) as error:
        describe_tower(str(folder))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("model_type", "settings"), [("dinov3_convnext", {"hidden_sizes": [8, 8, 8, 8]}), ("gpt2", {"n_embd": 8})]
)
def test_an_unknown_tower_is_an_error_that_lists_the_known(tmp_path: Path, model_type: str, settings: dict) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **settings}))
    with pytest.raises(ValueError, match=f"'{model_type}'; known: {', '.join(TOWERS.names())}"):
        describe_tower(str(tmp_path))


def test_without_timm_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}))
    with pytest.raises(ValueError, match=re.escape("pip install 'llava-babylm[timm]'")):
        describe_tower(str(tmp_path))


def test_a_folder_that_timm_wrote_is_read(tower_folder: WriteTower, tmp_path: Path) -> None:
    """timm's own folders name no model_type, and their weights lack the wrapper's prefix."""
    source = tower_folder("timm_wrapper")
    weights = {name.removeprefix("timm_model."): t for name, t in load_file(source / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    pretrained = {
        "input_size": [3, SIDE, SIDE],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "crop_pct": 0.8,
        "crop_mode": "center",
    }
    (tmp_path / "config.json").write_text(
        json.dumps(TINY_TOWERS["timm_wrapper"] | {"num_classes": 0, "pretrained_cfg": pretrained})
    )
    described = describe_tower(str(tmp_path))
    assert (described.image_size, described.image_resize_size, described.patches_per_side) == (SIDE, 40, GRID)
    assert (described.image_mean, described.image_std) == ((0.5,) * 3, (0.25,) * 3)
    assert torch.equal(build(tmp_path)(draw_pixels()), build(source)(draw_pixels()))


@pytest.mark.parametrize(
    ("architecture", "model_args", "size", "message"),
    [
        ("resnet18", {}, [3, 64, 64], "resnet18, whose layers differ in width or grid"),
        ("vit_tiny_patch16_224", {}, [3, 32, 32], "for 224 x 224 pixels, but its pretrained_cfg says 32 x 32"),
        ("vit_tiny_patch16_224", {"img_size": [32, 64]}, None, "input_size 32 x 64"),
        ("vit_of_nowhere", {}, [3, 32, 32], "vit_of_nowhere, which timm .* cannot build"),
    ],
)
def test_timm_models_that_cannot_be_towers_are_errors(
    tmp_path: Path, architecture: str, model_args: dict, size: list[int] | None, message: str
) -> None:
    need_timm()
    config = {
        "architecture": architecture,
        "model_args": model_args,
        "num_classes": 0,
        "pretrained_cfg": {"input_size": size} if size else {},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        describe_tower(str(tmp_path))


def test_a_frozen_tower_takes_few_frames_at_a_time(tower_folder: WriteTower) -> None:
    tower = build(tower_folder("dinov2"))
    frames = torch.randint(0, 255, (9, 3, SIDE, SIDE), dtype=torch.uint8)
    seen: list[int] = []
    tower.vision_tower.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    features = tower(frames)
    assert seen == [4, 4, 1]
    torch.testing.assert_close(features, tower.encode(tower.prepare(frames)), rtol=1e-5, atol=1e-6)
    # One that trains keeps what its backward pass needs of all frames anyway.
    tower.requires_grad_(True)
    seen.clear()
    assert tower(frames).requires_grad
    assert seen == [9]
