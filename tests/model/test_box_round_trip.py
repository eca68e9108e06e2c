"""A box of a picture, as text, as tokens, and back: at most half a bin away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from grounded_tokenizers import add_coordinates, build_tokenizer, write_bins

from llava.geometry import Box, Letterbox, TimeSpan
from llava.grounding.syntax import BOX_AXES, box_text, parse_boxes, parse_spans, span_text
from llava.types import Coordinates

NUM_BOXES = 10_000
MANNERS = {
    "pad": {"image_aspect_ratio": "pad"},
    "stretch": {"image_resize_size": None},
    "crop": {"image_resize_size": 64},
}


def draw_boxes(rng: np.random.Generator) -> list[Box]:
    x, y = np.sort(rng.random((2, NUM_BOXES, 2)))
    return [Box(*numbers) for numbers in np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1).tolist()]


def draw_letterboxes(vision, rng: np.random.Generator) -> list[Letterbox]:
    """Of pictures lying, standing and, each third, square."""
    sizes = rng.integers(8, 1000, (NUM_BOXES, 2))
    sizes[::3, 0] = sizes[::3, 1]
    return [vision.letterbox((height, width)) for height, width in sizes.tolist()]


def write_box(box: Box, letterbox: Letterbox) -> Coordinates:
    (x1, y1), (x2, y2) = letterbox.to_square(*box[:2]), letterbox.to_square(*box[2:])
    return Coordinates(spatial_width_output_locations=(x1, x2), spatial_height_output_locations=(y1, y2))


def visible(number: float, offset: int, length: int, side: int) -> float:
    """A number of a picture, moved to the nearest that the square shows."""
    return min(max(number, -offset / length), (side - offset) / length)


@pytest.mark.parametrize("manner", MANNERS)
def test_a_box_survives_within_half_a_bin(tiny_vision, tokenizer_dir: Path, manner: str) -> None:
    rng = np.random.default_rng(7)
    vision = replace(tiny_vision, **MANNERS[manner])
    boxes, letterboxes = draw_boxes(rng), draw_letterboxes(vision, rng)
    tokenizer = build_tokenizer("pieces" if manner == "stretch" else "byte-level", tokenizer_dir)
    grounding = add_coordinates(tokenizer, 100, 100)
    text = f"una stella {box_text()} gialla"
    texts = [write_bins(text, write_box(*row), grounding) for row in zip(boxes, letterboxes, strict=True)]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert all(sum(i >= grounding.first_bin for i in row) == len(BOX_AXES) for row in ids)
    half = 0.5 / 99
    for box, letterbox, written in zip(boxes, letterboxes, tokenizer.batch_decode(ids), strict=True):
        (told,) = parse_boxes(written, grounding)
        corners = [*letterbox.from_square(*told[:2]), *letterbox.from_square(*told[2:])]
        for number, back, axis in zip(box, corners, BOX_AXES, strict=True):
            offset, length = (letterbox.left, letterbox.width) if axis == "WIDTH" else (letterbox.top, letterbox.height)
            shown = visible(number, offset, length, letterbox.side)
            assert abs(back - shown) <= half * letterbox.side / length + 1e-9
            assert manner == "crop" or shown == number


def test_a_span_survives_within_half_a_bin(tokenizer_dir: Path) -> None:
    tokenizer = build_tokenizer("byte-level", tokenizer_dir)
    grounding = add_coordinates(tokenizer, 40, 100)
    spans = np.sort(np.random.default_rng(3).random((500, 2))).tolist()
    texts = [write_bins(span_text(), Coordinates(temporal_output_locations=tuple(span)), grounding) for span in spans]
    for span, text in zip(spans, tokenizer.batch_decode(tokenizer(texts)["input_ids"]), strict=True):
        (told,) = parse_spans(text, grounding)
        assert isinstance(told, TimeSpan)
        assert np.abs(np.subtract(span, told)).max() <= 0.5 / 39 + 1e-9
