"""Training and captioning with pictures cut into tiles, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_training import flags, losses, write_json

from llava.serve.cli import main as serve
from llava.train.train import main

CAPTIONS = {"wide.png": "una stella gialla si muove verso destra", "high.png": "Il gatto dorme sul divano."}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A wide picture, black with a white end, and a high one, with their captions; and a text."""
    for name, size, corner in (("wide.png", (120, 40), (80, 0)), ("high.png", (40, 120), (0, 80))):
        image = Image.new("RGB", size)
        image.paste((255, 255, 255), (*corner, *size))
        image.save(tmp_path / name)
    samples = [
        {"id": name, "image": name, "conversations": [{"from": "human", "value": "<image>"},
                                                      {"from": "gpt", "value": caption}]}
        for name, caption in CAPTIONS.items()
    ]  # fmt: skip
    text = {"id": "text", "conversations": [{"from": "gpt", "value": "un testo senza immagine"}]}
    return write_json(tmp_path / "pictures.json", [*samples, text])


ANYRES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}


def test_learns_wide_and_high_pictures_and_captions_them(
    gpt2_dir, tower_dir, pictures: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "out"
    trainer = main(flags(gpt2_dir, tower_dir, pictures, output, **ANYRES, max_steps=160, learning_rate=5e-3,
                         per_device_train_batch_size=3, train_sampling_strategy="group_by_length"))  # fmt: skip
    assert losses(output)[-1] < 0.05
    printed = capsys.readouterr().out
    # 2 x 2 tiles are 8 x 8 patches and 8 newlines, behind 16 patches of the whole picture.
    assert "largest image, of 5 views: 88 tokens (86 patches and 2 markers), leaves 424 for the rest" in printed
    newline = load_file(output / "model.safetensors")["transformer.image_newline"]
    assert torch.equal(newline, trainer.model.get_model().image_newline)
    assert json.loads((output / "config.json").read_text())["mm_patch_merge_type"] == "spatial_unpad"
    for name, caption in CAPTIONS.items():
        assert serve(["--model_path", str(output), "--image", str(tmp_path / name), "--device", "cpu"]) == 0
        assert capsys.readouterr().out.strip() == caption


def test_flat_views_train_through_the_resampler(gpt2_dir, tower_dir, pictures: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    main(flags(gpt2_dir, tower_dir, pictures, output, image_aspect_ratio="anyres", mm_resample_images="true",
               mm_image_grid_pinpoints="(1x1),...,(3x3)", max_steps=3))  # fmt: skip
    assert losses(output)[-1] < losses(output)[0]
    assert "largest image, of 10 views: 90 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_max_length": 80}, "image, of 5 views, takes 88 tokens, but a sample may have 80; .*pinpoints"),
        ({"image_grid_pinpoints": "2x2"}, "--image_grid_pinpoints is '2x2'"),
        ({"image_aspect_ratio": "pad"}, "--mm_patch_merge_type spatial_unpad needs --image_aspect_ratio anyres"),
    ],
)  # fmt: skip
def test_mistakes_end_the_run_before_training(
    gpt2_dir, tower_dir, pictures: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        main(flags(gpt2_dir, tower_dir, pictures, tmp_path / "out", **{**ANYRES, **changes}))
