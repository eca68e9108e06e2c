"""What is asked about: a picture of several shapes, and a clip of one that moves, rests and moves on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llava.demo.render import composite, cover_pixels, paint_mask, render_background
from llava.demo.scenes import FRAME_SIZE, TRAINING_PAIRS, Background, Pair, sample_background, sample_rgb, sample_tilt
from llava.grounding.syntax import Box, TimeSpan

NUM_FIGURES = 2
"""Shapes of a picture. With more it takes longer to find out that a question tells which is meant."""
NUM_FRAMES = 8

_PICTURE_RADII = (9.0, 13.0)
"""Pixels; smaller than in clips, since several have to fit."""
_CLIP_RADII = (8.5, 10.5)
_GAP = 1.0
"""Pixels between the boxes of two shapes."""
_TRIES = 40

_REST_RANGE = (0.3, 0.6)
_LEAST_MOTION = 0.12
"""Of a clip's length: so long a shape moves at least before it rests, and behind it where it moves on."""
_SHARE_OF_LAST_RESTS = 0.25
_STRIDE_RANGE = (18.0, 24.0)
"""Pixels of its way that a shape covers from one frame to the next."""
_LEAST_STEP = 10.0
"""Pixels between its centres in two frames."""
_ORBIT_RANGE = (14.0, 18.0)


@dataclass(frozen=True)
class Figure:
    """A coloured shape, its centre (x, y) and radius in pixels of the picture."""

    pair: Pair
    rgb: tuple[int, int, int]
    radius: float
    tilt: float
    centre: tuple[float, float]

    @property
    def box(self) -> Box:
        """The smallest box around what is painted, in [0, 1], to a quarter of a pixel."""
        mask = paint_mask(self.pair[0], self.centre, self.radius, self.tilt)
        bounds = mask.getbbox()
        assert bounds is not None
        return Box(*(bound / mask.width for bound in bounds))


@dataclass(frozen=True)
class Picture:
    """Shapes side by side; no two are of the same shape or of the same colour."""

    figures: tuple[Figure, ...]
    background: Background


@dataclass(frozen=True)
class Clip:
    """A shape in each of ``NUM_FRAMES`` frames, evenly spaced in time; it rests during ``rest``."""

    figures: tuple[Figure, ...]
    rest: TimeSpan
    background: Background

    @property
    def pair(self) -> Pair:
        return self.figures[0].pair


def render_picture(figures: Sequence[Figure], background: Background) -> NDArray[np.uint8]:
    """Paint shapes over a background: uint8 (height, width, 3)."""
    pixels = np.clip(render_background(background) + 0.5, 0, 255).astype(np.uint8)
    for figure in figures:
        mask = paint_mask(figure.pair[0], figure.centre, figure.radius, figure.tilt)
        pixels = composite(pixels.astype(np.float32), cover_pixels(mask), figure.rgb)
    return pixels


def render_frames(clip: Clip) -> NDArray[np.uint8]:
    """All frames of a clip: uint8 (num_frames, height, width, 3)."""
    return np.stack([render_picture([figure], clip.background) for figure in clip.figures])


def sample_picture(rng: np.random.Generator, pairs: Sequence[Pair]) -> Picture:
    """Draw a picture whose first shape is one of ``pairs``; the others are pairs of training.

    Args:
        rng: all of it is drawn from here.
        pairs: shapes and colours of the first shape.
    """
    chosen = [_choose(rng, pairs)]
    while len(chosen) < NUM_FIGURES:
        chosen.append(_choose(rng, [pair for pair in TRAINING_PAIRS if not any(_alike(pair, one) for one in chosen)]))
    return Picture(_place(rng, chosen), sample_background(rng))


def _alike(one: Pair, other: Pair) -> bool:
    return one[0] == other[0] or one[1] == other[1]


def _choose(rng: np.random.Generator, pairs: Sequence[Pair]) -> Pair:
    return pairs[int(rng.integers(len(pairs)))]


def _place(rng: np.random.Generator, pairs: Sequence[Pair]) -> tuple[Figure, ...]:
    """Give shapes places where their boxes do not meet; all of them again where one finds none."""
    while True:
        figures: list[Figure] = []
        for pair in pairs:
            for _ in range(_TRIES):
                figure = _sample_figure(rng, pair)
                if all(_are_apart(figure, other) for other in figures):
                    figures.append(figure)
                    break
        if len(figures) == len(pairs):
            return tuple(figures)


def _sample_figure(rng: np.random.Generator, pair: Pair) -> Figure:
    radius = float(rng.uniform(*_PICTURE_RADII))
    margin = radius + 1.0
    x, y = (float(value) for value in rng.uniform(margin, FRAME_SIZE - margin, size=2))
    return Figure(pair, sample_rgb(rng, pair[1]), radius, sample_tilt(rng), (x, y))


def _are_apart(one: Figure, other: Figure) -> bool:
    """Whether the squares around two shapes have a gap between them."""
    distance = max(abs(a - b) for a, b in zip(one.centre, other.centre, strict=True))
    return distance >= one.radius + other.radius + _GAP


def sample_clip(rng: np.random.Generator, pairs: Sequence[Pair]) -> Clip:
    """Draw a clip of one of ``pairs``."""
    pair = _choose(rng, pairs)
    rest = _sample_rest(rng)
    radius, rgb, tilt = float(rng.uniform(*_CLIP_RADII)), sample_rgb(rng, pair[1]), sample_tilt(rng)
    centres = _sample_path(rng, rest, radius)
    figures = tuple(Figure(pair, rgb, radius, tilt, centre) for centre in centres)
    return Clip(figures, rest, sample_background(rng))


def _sample_rest(rng: np.random.Generator) -> TimeSpan:
    """When it rests: sometimes to the end, else it moves on."""
    length = float(rng.uniform(*_REST_RANGE))
    if rng.random() < _SHARE_OF_LAST_RESTS:
        return TimeSpan(1.0 - length, 1.0)
    start = float(rng.uniform(_LEAST_MOTION, 1.0 - _LEAST_MOTION - length))
    return TimeSpan(start, start + length)


def _sample_path(rng: np.random.Generator, rest: TimeSpan, radius: float) -> list[tuple[float, float]]:
    """Centres along a line that the sides throw back, or around a circle, at a steady speed but for the rest."""
    moved = (NUM_FRAMES - 1) * time_moved(np.linspace(0.0, 1.0, NUM_FRAMES), rest)
    lowest, highest = radius + 1.0, FRAME_SIZE - radius - 1.0
    while True:
        way, angle = rng.uniform(*_STRIDE_RANGE) * moved, rng.uniform(0, 2 * math.pi)
        if rng.random() < 0.5:
            line = way[:, None] * np.array([math.cos(angle), math.sin(angle)])
            centres = reflect(rng.uniform(lowest, highest, size=2) + line, lowest, highest)
        else:
            orbit = rng.uniform(*_ORBIT_RANGE)
            angles = angle + rng.choice([-1.0, 1.0]) * way / orbit
            centre = rng.uniform(lowest + orbit, highest - orbit, size=2)
            centres = centre + orbit * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        # Thrown back straight into its own way it would seem to rest.
        steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
        if (steps >= _LEAST_STEP * np.diff(moved)).all():
            return [(float(x), float(y)) for x, y in centres]


def reflect(positions: NDArray[np.float64], lowest: float, highest: float) -> NDArray[np.float64]:
    """Where something at ``positions`` is if walls at ``lowest`` and ``highest`` throw it back."""
    width = highest - lowest
    return lowest + width - np.abs((positions - lowest) % (2 * width) - width)


def time_moved(times: NDArray[np.float64], rest: TimeSpan) -> NDArray[np.float64]:
    """For how long a shape has moved at times in [0, 1]: it stands still during its rest."""
    return np.minimum(times, rest.start) + np.maximum(times - rest.end, 0.0)
