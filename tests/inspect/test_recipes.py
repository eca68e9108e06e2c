"""The recipes of the library, with tiny models and data of their kind: nothing is found that would ruin them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ITALIAN, turns
from looking import FLAGS, Look, make_look

from llava.grounding.syntax import box_text
from llava.io import read_yaml
from llava.train.command_line import RECIPES


@pytest.fixture(scope="module")
def data_files(media_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A data file of each kind, beside its media."""
    clips, pictures = ("a.mp4", "b.mp4"), ("a.png", "b.jpg")
    samples: dict[str, list[dict[str, object]]] = {kind: [] for kind in ("text", "video", "image", "boxes")}
    for i, text in enumerate(ITALIAN):
        box = {
            "spatial_width_output_locations": [0.1, 0.1 * i + 0.3],
            "spatial_height_output_locations": [0.2, 0.1 * i + 0.4],
        }
        asked = turns("<image> dov'è?", f"{text} {box_text()}")
        samples["text"].append({"conversations": turns("", text)})
        samples["video"].append({"video": clips[i % 2], "conversations": turns("<video>", text)})
        samples["image"].append({"image": pictures[i % 2], "conversations": turns("<image>", text)})
        samples["boxes"].append({"image": pictures[i % 2], "conversations": asked, "variables": box})
    paths = {}
    for kind, of_kind in samples.items():
        paths[kind] = media_dir / f"recipe_{kind}.json"
        paths[kind].write_text(json.dumps([{"id": f"{kind}-{i}", **sample} for i, sample in enumerate(of_kind)]))
    return paths


KINDS = {
    "baby_llama_ti": "image", "baby_llama_tim": "boxes", "demo_grounding": "boxes", "demo_video": "video",
    "italian_video": "video", "start": "video",
}  # fmt: skip
"""Kinds of data by the recipe; of the others it is text."""
SMALLER = {name: FLAGS[name] for name in FLAGS if name.startswith("mm_perceiver") or name.startswith("mm_resampler_w")}


@pytest.fixture
def look(gpt2_dir, tower_dir, mixed_data, tmp_path, capsys) -> Look:
    return make_look(gpt2_dir, tower_dir, mixed_data, tmp_path, capsys)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda recipe: recipe.stem)
def test_recipes_pass(look, data_files, tower_dir, tmp_path, recipe: Path) -> None:
    kind = KINDS.get(recipe.stem, "text")
    # Of the test's own flags those alone that a tiny tower needs; all else is the recipe's.
    flags: dict[str, object] = dict.fromkeys((*FLAGS, "vision_tower")) | {"score_tasks": "none"}
    if kind != "text":
        flags |= {"vision_tower": tower_dir}
    if read_yaml(recipe, "recipe").get("mm_resampler_type") == "fast_slow_resampler":
        flags |= SMALLER
    if recipe.stem == "start":
        flags |= {"feature_cache": tmp_path / "features"}
    if recipe.stem == "demo_grounding":  # The demo's own tokenizer has a chat template.
        flags |= {"version": "v1"}
    status, text = look(config=recipe, data_path=data_files[kind], **flags)
    assert status == 0, text
    assert "error: " not in text
    assert "  gradient of mm_language_model: norm " in text
    assert ("the whole" in text) == (kind != "text")
    assert ("  gradient of mm_coordinates: norm " in text) == (kind == "boxes")
