"""Coordinates of samples, moved from their picture to the square that the tower sees: llava.grounding.samples."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llava.grounding.samples import move_to_square
from llava.grounding.syntax import box_text
from llava.types import Coordinates, Turn

LYING, STANDING, SQUARE = (30, 60), (80, 20), (50, 50)


@pytest.fixture(scope="module")
def padded(tiny_vision):
    return replace(tiny_vision, image_aspect_ratio="pad")


def move(turns: list[tuple[str, str]], vision, sizes, **numbers) -> dict[str, list[float]]:
    coordinates = Coordinates.from_variables(numbers)
    return move_to_square([Turn(*turn) for turn in turns], coordinates, sizes, vision).to_variables()


@pytest.mark.parametrize("order", [(LYING, STANDING), (STANDING, LYING), (SQUARE, LYING), (LYING, SQUARE)])
def test_places_are_those_of_the_picture_before_them(padded, order) -> None:
    """Of two pictures of different shapes, each box moves as its own picture lies in the square, worked out by hand."""
    text = f"<image> {box_text('INPUT')} <image> {box_text('INPUT')}"
    numbers = {
        "spatial_width_input_locations": [0.0, 1.0, 0.25, 0.5],
        "spatial_height_input_locations": [0.0, 1.0, 0.25, 0.5],
    }
    moved = move([("user", text)], padded, order, **numbers)
    # On 56 pixels: 30 x 60 becomes 28 x 56 below 14, 80 x 20 becomes 56 x 14 behind 21.
    places = {LYING: (lambda x: x, lambda y: 0.25 + y / 2), SQUARE: (lambda x: x, lambda y: y),
              STANDING: (lambda x: 0.375 + x / 4, lambda y: y)}  # fmt: skip
    for axis, name in enumerate(numbers):
        expected = [places[order[0]][axis](n) for n in (0.0, 1.0)] + [places[order[1]][axis](n) for n in (0.25, 0.5)]
        assert moved[name] == pytest.approx(expected), name


def test_places_before_all_pictures_are_those_of_the_first(padded) -> None:
    moved = move(
        [("user", "<HEIGHT-INPUT> <image>"), ("assistant", "<image> <HEIGHT-OUTPUT>")], padded, [LYING, STANDING],
        spatial_height_input_locations=[0.0], spatial_height_output_locations=[0.0],
    )  # fmt: skip
    assert moved["spatial_height_input_locations"] == [pytest.approx(0.25)]
    assert moved["spatial_height_output_locations"] == [0.0]


def test_times_stay_as_they_are(padded) -> None:
    moved = move([("user", "<video> <TEMP-INPUT>")], padded, [LYING], temporal_input_locations=[0.3])
    assert moved["temporal_input_locations"] == [0.3]
