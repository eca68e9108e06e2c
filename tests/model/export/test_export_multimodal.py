"""``python -m llava.model.export --as multimodal``: the model, its processor and its code, without this library.

``benchmarks/export_environments.py`` loads more of them, with the oldest and the newest transformers.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from llava.data.media import decode_media
from llava.model.backbones import find_class
from llava.model.export.__main__ import main
from llava.model.export.multimodal import MODULE, load_exported, write_module
from llava.model.loading import load_model
from llava.serve.generate import Captioner, Request
from llava.types import Media
from tests.model.export.test_export_text import TEXT, randomize, save

ALLOWED = {"torch", "transformers", "numpy", "PIL", *sys.stdlib_module_names}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "llava_gpt2": {"resample_images": True},
    "llava_llama": {"resampler_type": "none", "variant": "alternating"},
    "llava_mixtral": {"resampler_type": "perceiver", "image_aspect_ratio": "pad"},
    "llava_qwen": {
        "resampler_type": "none", "image_aspect_ratio": "anyres_max_2", "patch_merge_type": "spatial_unpad",
    },
    "llava_opt": {"grounding": "lape", "num_temporal_tokens": 5, "num_spatial_tokens": 4},
}  # fmt: skip


def export(loaded: Any, folder: Path) -> Path:
    randomize(loaded.model)
    save(loaded, folder / "checkpoint")
    assert main([str(folder / "checkpoint"), str(folder / "out"), "--as", "multimodal"]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def exported(load_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the tiny GPT-2 beside its checkpoint."""
    return export(load_tiny(), tmp_path_factory.mktemp("multimodal"))


@pytest.mark.parametrize("name", COMBINATIONS)
@torch.no_grad()
def test_pictures_and_clips_are_answered_as_by_the_checkpoint(
    name: str, load_tiny: Any, tmp_path: Path, media_dir: Path
) -> None:
    out = export(load_tiny(name, **COMBINATIONS[name]), tmp_path)
    captioner = Captioner(load_model(str(tmp_path / "checkpoint")))
    assert captioner.vision is not None
    model, processor = load_exported(out, type(captioner.model))
    picture, clip = Media("image", str(media_dir / "b.jpg")), Media("video", str(media_dir / "a.mp4"))
    frames = decode_media(clip, captioner.vision.num_frames, 0.0, 32).frames  # at their own size
    shown: dict[str, Any] = {
        "image": (picture, {"images": Image.open(picture.path)}),
        "video": (clip, {"videos": list(frames)}),
    }
    for kind, (medium, given) in shown.items():
        prompt = captioner.prompts.write(Request([medium], "Un uomo"))
        inputs = processor(text=f"<{kind}> Un uomo", **given, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == prompt.ids, kind
        ours = captioner.collate([prompt], len(prompt.ids))
        torch.testing.assert_close(model(**inputs).logits, captioner.model(**ours).logits, atol=0, rtol=0)
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        expected = captioner.model.generate(**ours, **options)
        assert model.generate(**inputs, **options).tolist() == expected.tolist(), kind


def test_the_pipeline_of_babylm_scores_with_it(
    exported: Path, media_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the pipeline of 2025 calls it: a picture that the text does not mention stands before it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    classes: dict[str, Any] = {
        auto: dynamic_module_utils.get_class_from_dynamic_module(name, exported)
        for auto, name in json.loads((exported / "config.json").read_text())["auto_map"].items()
    }
    processor = classes["AutoProcessor"].from_pretrained(exported, padding_side="right", trust_remote_code=True)
    model = classes["AutoModelForCausalLM"].from_pretrained(exported).eval()
    assert type(model).__module__.startswith("transformers_modules")
    assert type(model.config) is classes["AutoConfig"]
    assert classes["AutoModelForImageTextToText"] is type(model)
    assert processor.tokenizer.image_token == "<image>"
    found = processor(text=TEXT, images=Image.open(media_dir / "a.png"), return_offsets_mapping=True)
    ids, offsets = found["input_ids"][0], found["offset_mapping"][0]
    captioner = Captioner(load_model(str(exported.parent / "checkpoint")))
    prompt = captioner.prompts.write(Request([Media("image", str(media_dir / "a.png"))], TEXT))
    assert ids == prompt.ids
    # What it takes for the sentence: as many of the last tokens as it has alone.
    start = len(ids) - len(processor(text=TEXT, return_offsets_mapping=True)["input_ids"][0])
    assert (offsets[start][0], offsets[-1][1]) == (0, len(TEXT))
    mask, pixels = torch.LongTensor(found["attention_mask"]), torch.FloatTensor(found["pixel_values"])
    with torch.no_grad():
        theirs = model(input_ids=torch.LongTensor([ids]), attention_mask=mask, pixel_values=pixels)["logits"]
        ours = captioner.model(**captioner.collate([prompt], len(prompt.ids))).logits
    torch.testing.assert_close(theirs, ours, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["LlavaMptAlternatingForCausalLM", "LlavaQwenMoeForCausalLM"])
def test_the_module_imports_nothing_but_what_is_said(name: str, load_tiny: Any) -> None:
    model_class = find_class(name)
    vision = load_tiny().vision
    source = write_module(model_class, vision)
    assert source == write_module(model_class, vision), "it is made anew, and is the same"
    imported = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= ALLOWED


def test_this_library_loads_it_too(exported: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    ours, theirs = (load_model(str(folder)).model for folder in (exported.parent / "checkpoint", exported))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_weights_that_are_missing_are_an_error(exported: Path, tmp_path: Path) -> None:
    """A tower whose weights are not found would be random, and a line of the log would be all that says so."""
    for file in exported.glob("*.*"):  # Python leaves a folder of its own beside the model's code.
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("attention.query", "attention.q"): tensor for name, tensor in weights.items()}
    assert set(renamed) != set(weights)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights of .* do not fit its code"):
        load_exported(tmp_path, find_class("LlavaGPT2ForCausalLM"))


def test_a_plug_in_is_named(load_tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llava.model.multimodal_projector.projectors import PROJECTORS

    PROJECTORS.register("of_a_test")(make_projector)
    try:
        save(load_tiny(projector_type="of_a_test"), tmp_path / "checkpoint")
        assert main([str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--as", "multimodal"]) == 2
    finally:
        del PROJECTORS._parts["of_a_test"]
    assert "the projector 'of_a_test' is a plug-in's (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def make_projector(vision: Any, hidden_size: int) -> torch.nn.Module:
    return torch.nn.Linear(vision.hidden_size, hidden_size)


def test_a_model_of_text_alone_is_told_so(gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(gpt2_dir), str(tmp_path / "out"), "--as", "multimodal"]) == 2
    assert "does not see; export it with --as text" in capsys.readouterr().err


def test_where_the_tower_lay_is_not_told(exported: Path) -> None:
    assert json.loads((exported / "config.json").read_text())["mm_vision_tower"] == "tower0"
    assert f"{MODULE}.LlavaGPT2Config" in (exported / "config.json").read_text()


def test_what_does_not_go_together_is_an_error(exported: Path) -> None:
    _, processor = load_exported(exported, find_class("LlavaGPT2ForCausalLM"))
    picture = torch.zeros(3, 20, 20)
    for given, message in (
        ({"text": "<image> e <image>", "images": picture}, "shows .*'image', 'image'.* but .*'image'.* were given"),
        ({"text": "<image>"}, "were given"),
        ({"text": ["a", "b", "c"], "images": [picture, picture]}, "3 texts show 3 <image> in all, but 2 were given"),
        ({"text": "", "images": picture + 3}, r"must be in \[0, 1\]"),
        ({"text": "", "images": torch.zeros(20, 20)}, "expected RGB"),
        ({"images": picture}, "needs a text"),
        ({"text": "a", "truncation": True}, "truncation"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(**given)


def test_texts_of_different_lengths_are_padded_with_their_media_in_order(exported: Path) -> None:
    _, processor = load_exported(exported, find_class("LlavaGPT2ForCausalLM"))
    white, black = torch.ones(3, 20, 20), Image.new("L", (30, 20))
    batch = processor(text=["<image>", "il gatto <image> e <image>"], images=[white, black, white], return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() == [16, batch["input_ids"].shape[1]]
    assert batch["pixel_values"].shape == (3, 3, 56, 56)
    assert (batch["pixel_values"].mean((1, 2, 3)) > 0).tolist() == [True, False, True]
    nested = processor(text=["<image>", "<image> <image>"], images=[[white], [black, white]])
    assert torch.equal(nested["pixel_values"], batch["pixel_values"])
    literal = processor(text="\\<image> è una parola")
    assert literal["input_ids"] == processor(text="<image> è una parola".replace("<image>", "\\<image>"))["input_ids"]
    assert "<image> è" in processor.decode(literal["input_ids"][0])
