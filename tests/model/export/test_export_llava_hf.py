"""``python -m llava.model.export --as llava_hf``: transformers' own class where the parts allow it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from llava.constants import IMAGE_END, IMAGE_PATCH, IMAGE_START
from llava.eval.likelihood import Candidate, Choice, LikelihoodScorer
from llava.model.export.__main__ import main
from llava.model.loading import load_model
from llava.serve.generate import Captioner, Request
from llava.types import Media
from tests.conftest import TINY_VISION
from tests.model.export.test_export_text import randomize, save
from tests.model.multimodal_encoder.tiny_towers import SIDE, TINY_TOWERS, write_tower

RESIZED = {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}}


@pytest.mark.parametrize(
    ("backbone", "tower", "processor", "settings"),
    [
        ("llava_gpt2", "clip_vision_model", RESIZED, {"resampler_type": "none"}),
        ("llava_llama", "siglip_vision_model", None, {"resampler_type": "none", "vision_select_layer": -1}),
        ("llava_mixtral", "dinov2", None, {}),
    ],
)
@torch.no_grad()
def test_it_answers_as_the_checkpoint(
    backbone: str,
    tower: str,
    processor: dict | None,
    settings: dict,
    backbone_dirs: Any,
    media_dir: Path,
    tmp_path: Path,
) -> None:
    source = write_tower(tmp_path / "tower", tower, TINY_TOWERS[tower], processor)
    loaded = load_model(str(backbone_dirs[backbone]), vision_tower=str(source), **{**TINY_VISION, **settings})
    randomize(loaded.model)
    save(loaded, tmp_path / "checkpoint")
    assert main([str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--as", "llava_hf"]) == 0
    native = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert type(native) is LlavaForConditionalGeneration
    theirs = AutoProcessor.from_pretrained(tmp_path / "out")
    picture = str(media_dir / "b.jpg")
    inputs = theirs(images=Image.open(picture), text="<image> Un uomo", return_tensors="pt")
    captioner = Captioner(loaded)
    prompt = captioner.prompts.write(Request([Media("image", picture)], "Un uomo"))
    patch = loaded.model.vision.token_ids[IMAGE_PATCH]
    ends = [loaded.model.vision.token_ids[token] for token in (IMAGE_START, IMAGE_END)]
    assert inputs["input_ids"][0].tolist() == [patch if i in ends else i for i in prompt.ids]
    ours = captioner.collate([prompt], len(prompt.ids))
    expected = captioner.model(**ours).logits
    pixels = loaded.model.get_vision_tower().normalize(ours["images"][0])
    exact = native(**{**inputs, "pixel_values": pixels}).logits
    torch.testing.assert_close(exact, expected, atol=1e-5, rtol=1e-5)
    # Its own image processor resizes and rounds otherwise: a few of 255 levels.
    assert (inputs["pixel_values"] - pixels).abs().max() < 5 / 255 / 0.22
    answer = native.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert not set(answer[0, len(prompt.ids) :].tolist()) & set(loaded.model.vision.visual_token_ids)
    # Loaded as the checkpoint that somebody else has: the same pixels and logits, and the same scores of texts.
    back = Captioner(load_model(str(tmp_path / "out")))
    again = back.collate([back.prompts.write(Request([Media("image", picture)], "Un uomo"))], len(prompt.ids))
    assert torch.equal(again["images"][0], ours["images"][0])
    words = min(*back.model.vision.visual_token_ids, *loaded.model.vision.visual_token_ids)
    torch.testing.assert_close(back.model(**again).logits[..., :words], expected[..., :words], atol=1e-4, rtol=1e-4)
    choice = Choice("a", (Candidate("Un uomo dorme."), Candidate("Il gatto e il cane.")))
    scores = [LikelihoodScorer.from_folder(str(tmp_path / name)).score([choice])[0] for name in ("checkpoint", "out")]
    # Rows of visual tokens are others, and the softmax is over these too.
    assert scores[1] == pytest.approx(scores[0], abs=0.1)


def test_parts_that_it_has_not_are_named(load_tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"projector_type": "linear", "resample_images": True, "image_aspect_ratio": "pad"}
    save(load_tiny("llava_opt", variant="alternating", grounding="lape", **settings), tmp_path / "checkpoint")
    assert main([str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--as", "llava_hf"]) == 2
    said = capsys.readouterr().err
    for part in (
        "alternating attention", "the projector linear", "the resampler fast_slow_resampler", "image_aspect_ratio pad",
        "tables of coordinates", "embeddings that are narrower", "export with --as multimodal",
    ):  # fmt: skip
        assert part in said
    assert not (tmp_path / "out").exists()
