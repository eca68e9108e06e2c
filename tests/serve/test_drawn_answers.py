"""Pictures of answers: boxes where and when they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from llava.geometry import Box, TimeSpan
from llava.serve.cli import draw_answer
from llava.serve.explain import BOX_COLOURS
from llava.serve.generate import Answer
from llava.types import Media

FIRST, SECOND, THIRD = (ImageColor.getrgb(colour) for colour in BOX_COLOURS[:3])


def edges_of(picture: Image.Image, colour: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """Left, upper, right and lower edge of what has a colour."""
    rows, columns = np.nonzero((np.array(picture) == colour).all(-1))
    return (columns.min(), rows.min(), columns.max(), rows.max()) if len(rows) else None


@pytest.fixture
def plain(tmp_path: Path) -> Media:
    path = tmp_path / "plain.png"
    Image.new("RGB", (201, 101), (30, 60, 90)).save(path)
    return Media("image", str(path))


def test_boxes_of_an_image_lie_where_they_are(plain: Media, tiny_vision) -> None:
    answer = Answer("", [Box(0.1, 0.2, 0.5, 0.8), Box(1.0, 0.9, 0.6, 0.0)])
    picture = draw_answer(answer, plain, tiny_vision)
    assert picture.size == (201, 101)
    assert edges_of(picture, FIRST) == (20, 20, 100, 80)
    assert edges_of(picture, SECOND) == (120, 0, 200, 90)
    assert picture.getpixel((60, 50)) == (30, 60, 90)


@pytest.mark.parametrize(
    "changes",
    [{"image_aspect_ratio": "pad"}, {"image_resize_size": None}, {"image_resize_size": 64}],
    ids=["padded", "stretched", "cut"],
)
def test_frames_have_their_shape_again(media_dir: Path, tiny_vision, changes: dict) -> None:
    vision = replace(tiny_vision, **changes)
    strip = draw_answer(Answer(""), Media("video", str(media_dir / "a.mp4")), vision)
    assert strip.size == (3 * 64, 48)
    frame = np.array(strip).reshape(48, 3, 64, 3)[:, 1].astype(int)
    assert np.abs(frame[6:42, 16] - frame[24, 16]).max() < 10
    line = frame[24]
    # The bar, of an inverted colour, stands in the middle of the sixth or seventh of 12 frames.
    bar = np.nonzero(np.abs(line - line[16]).sum(-1)[14:50] > 60)[0] + 14
    assert 5 / 12 * 64 - 2 <= bar.min() <= bar.max() <= 7 / 12 * 64 + 2
    is_cut = vision.image_resize_size is not None and "image_aspect_ratio" not in changes
    assert (line[[0, 1, 62, 63]] == 0).all() == is_cut


def test_boxes_of_a_video_are_drawn_when_they_are(media_dir: Path, tiny_vision) -> None:
    vision = replace(tiny_vision, num_frames=5, image_aspect_ratio="pad")
    clip = Media("video", str(media_dir / "a.mp4"))
    boxes = [Box(0, 0, 0.4, 1), Box(0.2, 0, 0.7, 1), Box(0.5, 0, 1, 1)]

    def frames_with(answer: Answer) -> list[int | None]:
        picture = draw_answer(answer, clip, vision)
        return [None if (edges := edges_of(picture, c)) is None else edges[0] // 64 for c in (FIRST, SECOND, THIRD)]

    assert frames_with(Answer("", boxes)) == [0, 2, 4]
    assert frames_with(Answer("", boxes, [TimeSpan(0.25, 0.75)])) == [1, 2, 3]
    assert frames_with(Answer("", boxes[:1], [TimeSpan(0.5, 1.0)])) == [2, None, None]
    assert frames_with(Answer("", [], [TimeSpan(0.5, 1.0)])) == [None, None, None]
