"""Where a picture lies in the tower's square: coordinates and pixels say the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llava.data.media import fit_frames
from llava.geometry import frame_picture


@pytest.mark.parametrize("manner", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("size", [(120, 200), (200, 120), (160, 160), (57, 300)])
def test_a_mark_lies_where_its_coordinates_say(manner: str, size: tuple[int, int], tiny_vision) -> None:
    vision = replace(
        tiny_vision,
        image_aspect_ratio="pad" if manner == "pad" else "square",
        image_resize_size=64 if manner == "crop" else None,
        image_mean=(0.0, 0.0, 0.0),
    )
    height, width = size
    # A mark in the middle third, a little above and left of the centre: no crop cuts it off.
    top, left, tall, wide = int(height * 0.4), int(width * 0.42), max(height // 10, 8), max(width // 10, 8)
    picture = torch.zeros(height, width, 3, dtype=torch.uint8)
    picture[top : top + tall, left : left + wide] = 255
    square = fit_frames(picture[None], vision)[0].float().mean(0)
    mass = square / square.sum()
    side = vision.image_size
    centres = (torch.arange(side) + 0.5) / side
    found = float((mass.sum(0) * centres).sum()), float((mass.sum(1) * centres).sum())

    framing = frame_picture(size, vision)
    point = (left + wide / 2) / width, (top + tall / 2) / height
    assert framing.to_square(*point) == pytest.approx(found, abs=0.75 / side)
    assert framing.from_square(*framing.to_square(*point)) == pytest.approx(point)


def test_what_is_cut_off_goes_to_the_edge(tiny_vision) -> None:
    framing = frame_picture((100, 300), replace(tiny_vision, image_resize_size=64))
    assert framing.left < 0
    assert framing.to_square(0.0, 0.5)[0] == 0.0
    assert framing.to_square(1.0, 0.5)[0] == 1.0
    padded = frame_picture((100, 300), replace(tiny_vision, image_aspect_ratio="pad"))
    assert padded.from_square(0.5, 0.0) == (0.5, 0.0)
    assert padded.from_square(0.5, 1.0) == (0.5, 1.0)
