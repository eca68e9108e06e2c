"""The captioning command: what it prints, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.serve.cli import main


@pytest.fixture(scope="module")
def checkpoint(load_tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    loaded = load_tiny()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


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
