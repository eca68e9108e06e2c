"""The captioning command: what it prints and draws, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from llava.serve.cli import main


def save(loaded, folder: Path) -> str:
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(load_tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(load_tiny(), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def grounded(load_tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that answers a prompt with an open bracket by a box or a span."""
    return save(load_tiny(grounding="lape", image_aspect_ratio="pad"), tmp_path_factory.mktemp("grounded"))


@pytest.mark.parametrize(
    "words",
    [
        ["--video", "a.mp4"],
        ["--image", "a.png", "--prompt", "Un uomo"],
        ["--image", "a.png", "--image", "b.jpg", "--video", "b.mp4"],
        ["--prompt", "Un uomo", "--temperature", "0.8", "--seed", "3"],
        ["--video", "a.mp4", "--num_beams", "2", "--max_new_tokens", "3"],
    ],
)
def test_prints_one_answer(checkpoint: str, media_dir: Path, capsys, words: list[str]) -> None:
    words = [str(media_dir / word) if "." in word and "/" not in word and word[0].isalpha() else word for word in words]
    assert main(["--model_path", checkpoint, *words, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_sampling_repeats_with_its_seed(checkpoint: str, capsys) -> None:
    words = ["--model_path", checkpoint, "--prompt", "Un uomo", "--temperature", "1.0", "--device", "cpu"]
    answers = []
    for seed in ("5", "5", "6"):
        assert main([*words, "--seed", seed]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to describe or to continue"),
        (["--video", "/nowhere/x.mp4"], "/nowhere/x.mp4: no such file"),
        (["--image", "/nowhere/x.png"], "/nowhere/x.png: no such file"),
        (["--video", __file__], "cannot be decoded as a video"),
    ],
)
def test_mistakes_are_one_line_and_status_2(checkpoint: str, capsys, words: list[str], message: str) -> None:
    assert main(["--model_path", checkpoint, *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_missing_checkpoint_is_named(capsys) -> None:
    assert main(["--model_path", "/nowhere/model", "--prompt", "x"]) == 2
    assert "'/nowhere/model' is no folder" in capsys.readouterr().err


def test_boxes_are_printed_as_numbers(grounded: str, media_dir: Path, capsys) -> None:
    words = ["--model_path", grounded, "--image", str(media_dir / "a.png"), "--max_new_tokens", "5", "--device", "cpu"]
    prompt = ["--prompt", "una stella [<WIDTH-099>"]
    assert main([*words, *prompt]) == 0
    printed = capsys.readouterr().out
    numbers = re.match(r"\[1.00 (\d\.\d\d) (\d\.\d\d) (\d\.\d\d)\]", printed)
    assert numbers is not None
    assert main([*words, *prompt, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"text", "boxes", "spans"}
    assert answer["text"].startswith("[<WIDTH-099><HEIGHT-")
    assert [f"{number:.2f}" for number in answer["boxes"][0][1:]] == list(numbers.groups())
    assert main([*words, *prompt, "--json", "--sub_bin"]) == 0
    finer = json.loads(capsys.readouterr().out)
    assert finer["text"] == answer["text"]
    assert finer["boxes"] != answer["boxes"]


def test_boxes_are_drawn(grounded: str, media_dir: Path, tmp_path: Path, capsys) -> None:
    picture = tmp_path / "answer.png"
    words = ["--model_path", grounded, "--prompt", "una stella [", "--max_new_tokens", "5", "--device", "cpu"]
    assert main([*words, "--image", str(media_dir / "a.png"), "--draw", str(picture)]) == 0
    with Image.open(picture) as drawn, Image.open(media_dir / "a.png") as original:
        assert drawn.format == "PNG"
        assert drawn.size == original.size
        assert list(drawn.convert("RGB").tobytes()) != list(original.convert("RGB").tobytes())
    assert capsys.readouterr().out.startswith("[")


def test_what_cannot_be_drawn_is_said(grounded: str, media_dir: Path, capsys) -> None:
    words = ["--model_path", grounded, "--prompt", "x", "--max_new_tokens", "1", "--device", "cpu"]
    assert main([*words, "--draw", "x.png"]) == 2
    assert "--draw has nothing to draw on" in capsys.readouterr().err
    assert main([*words, "--image", str(media_dir / "a.png"), "--draw", "/nowhere/x.png"]) == 2
    assert "error: --draw '/nowhere/x.png' cannot be written: No such file" in capsys.readouterr().err
