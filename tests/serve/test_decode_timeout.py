"""A clip that a model is asked about is decoded within a time limit, for an answer and for its drawing."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.data import decoding
from llava.data.media_files import MediaError
from llava.serve import generate
from llava.serve.cli import draw_answer
from llava.serve.generate import Answer, Captioner, Request
from llava.types import Media


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time limits that clips were decoded within."""
    asked: list[float] = []

    def take_too_long(request: decoding.FrameRequest, timeout: float) -> decoding.Frames:
        asked.append(timeout)
        raise MediaError(f"{request.path}: decoding it takes longer than --decode_timeout {timeout:g} s")

    monkeypatch.setattr("llava.data.media.decode_within", take_too_long)
    return asked


def test_answers_and_drawings(load_tiny, media_dir: Path, limits: list[float]) -> None:
    loaded = load_tiny()
    clip = Media("video", str(media_dir / "a.mp4"))
    with pytest.raises(MediaError, match="takes longer"):
        Captioner(loaded).answer([Request((clip,), "<video>")])
    with pytest.raises(MediaError, match="takes longer"):
        draw_answer(Answer(""), clip, loaded.vision)
    assert limits == [generate.DECODE_TIMEOUT] * 2
