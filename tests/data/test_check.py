"""``python -m llava.data.check``: what it reports, and its exit status."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from conftest import turns

from llava.data.check import _generalize, main


def write_data(path: Path, media: dict[str, str]) -> Path:
    """A sample for each file name, of the kind that goes with it."""
    samples = [{"id": name, kind: name, "conversations": turns(f"<{kind}>", "ciao")} for name, kind in media.items()]
    path.write_text(json.dumps([*samples, {"id": "text", "conversations": turns("", "ciao")}]))
    return path


@pytest.fixture
def data(media_dir: Path, tmp_path: Path) -> Path:
    """Two good clips, a good image, three bad files and a text."""
    for name in ("a.mp4", "b.mp4", "a.png"):
        (tmp_path / name).write_bytes((media_dir / name).read_bytes())
    (tmp_path / "text.mp4").write_text("questo non è un video")
    (tmp_path / "text.png").write_text("questa non è un'immagine")
    kinds = {"a.mp4": "video", "b.mp4": "video", "text.mp4": "video", "none.mp4": "video",
             "a.png": "image", "text.png": "image"}  # fmt: skip
    return write_data(tmp_path / "data.json", kinds)


@pytest.mark.parametrize("workers", [0, 2])
def test_report(data: Path, tmp_path: Path, capsys, workers: int) -> None:
    report = tmp_path / "report.jsonl"
    assert main([str(data), "--workers", str(workers), "--report", str(report)]) == 1
    *rows, last = map(json.loads, report.read_text().splitlines())
    assert sorted(row["id"] for row in rows) == ["none.mp4", "text.mp4", "text.png"]
    for row in rows:
        assert set(row) == {"id", "source", "file", "reason"}
        assert row["file"] == str(tmp_path / row["id"])
        assert row["source"].startswith("data.json, sample ")
    summary = last["summary"]
    assert summary.pop("seconds") > 0
    reasons = {row["id"]: row["reason"] for row in rows}
    assert reasons["none.mp4"] == "no such file"
    assert summary == {
        "samples": 7, "media": {"image": 2, "video": 4}, "workers": workers,
        "bad": {re.sub(r"\d+", "N", reason): 1 for reason in reasons.values()},
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.startswith("7 samples (2 images, 4 videos) in ")
    assert "3 bad\n" in printed


def test_without_a_report_bad_samples_are_printed(data: Path, tmp_path: Path, capsys) -> None:
    assert main([str(data), "--workers", "0"]) == 1
    assert (
        f"sample 'none.mp4' (data.json, sample 4): {tmp_path / 'none.mp4'}: no such file\n" in capsys.readouterr().out
    )


def test_a_reason_is_counted_whatever_file_it_names() -> None:
    outside = "its video '/data/clips/{}' lies outside the folder /work; give it"
    assert {_generalize(outside.format(name)) for name in ("a.mp4", "b/7.mkv", "c d.mp4")} == {
        "its video FILE lies outside the folder /work; give it"
    }
    assert _generalize("turn 12: unknown role 'bot'") == "turn N: unknown role 'bot'"


def test_all_good(media_dir: Path, tmp_path: Path, capsys) -> None:
    data = write_data(tmp_path / "data.json", {"a.mp4": "video", "b.mp4": "video"})
    assert main([str(data), "--workers", "0", "--video_folder", str(media_dir)]) == 0
    assert capsys.readouterr().out.endswith("\n0 bad\n")


def test_lines_that_are_no_samples_are_rows_too(tmp_path: Path, capsys) -> None:
    good = {"id": "a", "conversations": turns("", "ciao")}
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(["no JSON", json.dumps(good), json.dumps(good | {"id": "b", "conversations": 3})]))
    assert main([str(data), "--workers", "0"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("sample '' (data.jsonl, line 1): ")
    assert "not JSON" in printed[0]
    assert printed[1].startswith("sample 'b' (data.jsonl, line 3): needs \"conversations\"")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.json"], "nothing.json: no such file"),
        (["data.json", "--num_frames", "0"], "--num_frames is 0; it must be at least 1"),
        (["data.json", "--frames", "4"], "unknown flag --frames; did you mean --num_frames"),
        ([], "DATA"),
        (["data.json", "--report", "nowhere/report.jsonl"], "nowhere/report.jsonl"),
    ],
)
def test_wrong_usage(data: Path, monkeypatch, capsys, words: list[str], message: str) -> None:
    monkeypatch.chdir(data.parent)
    try:
        status = main(words)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_real_clips(real_videos: Path, tmp_path: Path, warm_python: str) -> None:
    report = tmp_path / "report.jsonl"
    command = [
        warm_python,
        "-m",
        "llava.data.check",
        str(real_videos),
        "--report",
        str(report),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert (ended.returncode, ended.stderr) == (0, "")
    number = len(json.loads(real_videos.read_text(encoding="utf-8")))
    assert ended.stdout.startswith(f"{number} samples ({number} videos) in ")
    assert json.loads(report.read_text())["summary"]["bad"] == {}
