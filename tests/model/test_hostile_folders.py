"""A model's folder of somebody else's: whatever its files say, loading works, or is one line that names the folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_VISION

from llava.config import VisionConfig
from llava.model.loading import load_model

NAN, INFINITY = float("nan"), float("inf")

ENTRIES: list[dict[str, Any]] = [
    {"n_layer": 10_000_000},
    {"n_layer": INFINITY},
    {"n_embd": 0},
    {"n_embd": -3},
    {"n_embd": 10**9},
    {"n_head": 0},
    {"n_head": -1},
    {"n_positions": -1},
    {"vocab_size": 10**10},
    {"model_type": []},
    {"layer_norm_epsilon": INFINITY},
    {"num_labels": 10**8},
    {"id2label": {"x": "y"}},
    {"mm_vision_config": 7},
    {"mm_vision_config": {"model_type": "dinov2", "hidden_size": -1}},
    {"mm_vision_config": {"model_type": "dinov2", "num_hidden_layers": 10**7}},
    {"mm_vision_config": {"model_type": "dinov2", "image_size": 10**8, "patch_size": 1}},
    {"mm_hidden_size": 10**9},
    {"mm_hidden_size": 16},
    {"mm_image_size": "x"},
    {"mm_image_size": 0},
    {"mm_patches_per_side": 5},
    {"mm_patches_per_side": 4.0},
    {"mm_save_vision_tower": "x"},
    {"mm_vision_select_layer": 1.5},
    {"mm_image_mean": [0, 0]},
    {"mm_image_mean": "abc"},
    {"mm_image_std": [0, 0, 0]},
    {"mm_image_std": [NAN, 1, 1]},
    {"mm_image_std": [1]},
    {"mm_projector_type": "mlp100000x_gelu"},
    {"mm_projector_type": "mlp99999999999999999999x_gelu"},
    {"mm_projector_type": "mlp2x_res100000x_gelu"},
    {"mm_projector_width": -1},
    {"mm_projector_width": 10**9},
    {"mm_resampler_width": 10**9},
    {"mm_perceiver_depth": 10**9},
    {"mm_num_frames": 10**9},
    {"mm_num_frames": NAN},
    {"mm_num_frames": 2.5},
    {"mm_video_fps": NAN},
    {"mm_video_fps": 1e300},
    {"mm_frames_upbound": 10**9},
    {"mm_add_time_instruction": "x"},
    {"mm_token_ids": 7},
    {"mm_image_resize_size": -1},
    {"num_temporal_tokens": "x", "grounding": "lape"},
    {"first_coordinate_bin": "x", "grounding": "lape", "coordinate_token_ids": {}},
]


@pytest.fixture(scope="module")
def source(load_tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal checkpoint whose files are changed for one test and put back."""
    folder = tmp_path_factory.mktemp("model")
    loaded = load_tiny()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def change(source: Path) -> Iterator[Callable[[str, bytes | Callable[[Path], object]], None]]:
    kept: dict[Path, bytes] = {}

    def put(name: str, content: bytes | Callable[[Path], object]) -> None:
        path = source / name
        kept[path] = path.read_bytes()
        path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)

    yield put
    for path, content in kept.items():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(content)


def error_of(source: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_model(str(source))
    message = str(caught.value)
    assert len(message) < 1200
    assert "Traceback" not in message
    assert "--" in message or str(source) in message
    return message


@pytest.mark.parametrize("entries", ENTRIES, ids=lambda entries: json.dumps(entries)[:60])
def test_an_entry_of_config_json_that_cannot_be(source: Path, change, entries: dict[str, Any]) -> None:
    config = json.loads((source / "config.json").read_text())
    change("config.json", json.dumps(config | entries).encode())
    error_of(source)


BRACKETS = b"[" * 200_000
DAMAGES: dict[str, tuple[str, bytes | Callable[[Path], object]]] = {
    "settings of brackets": ("config.json", b'{"a":' + BRACKETS),
    "settings that are a list": ("config.json", b"[1]"),
    "a number of 5,000 digits": ("config.json", b'{"model_type": "llava_gpt2", "n_layer": 1' + b"0" * 5000 + b"}"),
    "weights that are empty": ("model.safetensors", b""),
    "weights with a header of 100 MB": ("model.safetensors", (10**8).to_bytes(8, "little") + b"{}"),
    "weights whose header is brackets": ("model.safetensors", (200_000).to_bytes(8, "little") + BRACKETS),
    "weights that are a folder": ("model.safetensors", Path.mkdir),
    "weights that lead nowhere": ("model.safetensors", lambda path: path.symlink_to("/nowhere")),
    "weights that are a pipe": ("model.safetensors", os.mkfifo),
    "settings that are a pipe": ("config.json", os.mkfifo),
    "a tokenizer that is a pipe": ("tokenizer.json", os.mkfifo),
    "a tokenizer of brackets": ("tokenizer.json", BRACKETS),
    "a tokenizer that is a list": ("tokenizer.json", b"[]"),
    "settings of a tokenizer that are half": ("tokenizer_config.json", b'{"a": '),
    "settings of a tokenizer in brackets": ("tokenizer_config.json", BRACKETS),
    "settings of answers in brackets": ("generation_config.json", BRACKETS),
    "settings of answers that are a number": ("generation_config.json", b"7"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_another(source: Path, change, damage: str) -> None:
    name, content = DAMAGES[damage]
    if content is os.mkfifo and not hasattr(os, "mkfifo"):
        pytest.skip("there are no pipes with names here")
    change(name, content)
    message = error_of(source)
    if "pipe" in damage:
        assert f"{name}' is a pipe or a device, not a file" in message


def test_what_was_changed_is_put_back_and_loads(source: Path) -> None:
    assert load_model(str(source)).vision is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 10**9}, r"--num_frames is 1000000000; it must be 1 to 100,000"),
        ({"num_frames": True}, r"--num_frames is True; expected a whole number"),
        ({"video_fps": NAN}, r"--video_fps is nan; expected a number"),
        ({"image_std": (1.0, 0.0, 1.0)}, r"mm_image_std is \(1.0, 0.0, 1.0\); it must be 0.0001 to 1,000"),
        ({"projector_width": 2**20}, r"mm_projector_width is 1048576; it must be 1 to 65,536"),
        ({"image_resize_size": "x" * 10**6}, r"mm_image_resize_size is 'x.{1,200}; expected a whole number or null"),
    ],
)
def test_settings_have_kinds_and_ranges(changes: dict[str, Any], message: str) -> None:
    settings = {"hidden_size": 32, "image_size": 56, "patches_per_side": 4, **TINY_VISION}
    with pytest.raises(ValueError, match=message):
        VisionConfig("tower", {"model_type": "dinov2"}, **settings | changes)
