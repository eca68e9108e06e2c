"""`python -m llava.demo --quick` from data to picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from llava.demo.__main__ import main


def test_quick_demo_runs_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "caption with the right video" in printed
    assert "elapsed:" in printed
    captions = json.loads((tmp_path / "captions.json").read_text(encoding="utf-8"))
    assert set(captions["exact_match"]) == {"right_video", "other_video"}
    assert len(captions["clips"]) == 12
    assert all(clip["video"] != clip["other_video"] for clip in captions["clips"])
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()
    with Image.open(tmp_path / "captions.png") as picture:
        assert picture.width > 500


def test_too_few_clips_are_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--num_train_clips", "0"]) == 2
    assert "--num_train_clips" in capsys.readouterr().err
