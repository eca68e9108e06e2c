"""What a clip shows: a coloured shape, its path and its background, all drawn from a seed."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llava.demo.captions import COLOURS, MOVEMENTS, SHAPES, caption

FRAME_SIZE = 64
"""Side of a frame in pixels."""

FRAMES_PER_CLIP = 8

Pair = tuple[str, str]
"""A shape and a colour."""

HELD_OUT_PAIRS: tuple[Pair, ...] = (
    ("stella", "giallo"),
    ("cerchio", "blu"),
    ("quadrato", "rosso"),
    ("triangolo", "viola"),
    ("croce", "verde"),
    ("luna", "bianco"),
)
"""Pairs that occur in no training clip, no training text and no frame that trained the tower.

No shape and no colour is in more than one of them.
"""

NEW_TO_TOWER: tuple[Pair, ...] = (*HELD_OUT_PAIRS, ("stella", "rosa"), ("quadrato", "arancione"))
"""Pairs that occur in no frame that trained the tower: those held out, and two more.

The shipped tower was trained without all eight; two that are not held out appear in training clips.
"""

TOWER_PAIRS: tuple[Pair, ...] = tuple(
    (shape, colour) for shape in SHAPES for colour in COLOURS if (shape, colour) not in NEW_TO_TOWER
)

TRAINING_PAIRS: tuple[Pair, ...] = tuple(
    (shape, colour) for shape in SHAPES for colour in COLOURS if (shape, colour) not in HELD_OUT_PAIRS
)

_RGB: dict[str, tuple[int, int, int]] = {
    "rosso": (214, 38, 38),
    "giallo": (245, 218, 45),
    "bianco": (244, 244, 244),
    "verde": (48, 172, 72),
    "blu": (38, 78, 222),
    "viola": (132, 52, 196),
    "rosa": (250, 142, 192),
    "arancione": (246, 136, 22),
}

_DIRECTIONS: dict[str, tuple[int, int]] = {
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
}

RADIUS_RANGE = (11.0, 15.0)
"""Radius of a shape's circumscribed circle, pixels."""

_TRAVEL_RANGE = (16.0, 30.0)
_ORBIT_RANGE = (8.0, 13.0)
_MAX_DRIFT = 2.5
_MAX_TILT = math.radians(6)
_COLOUR_JITTER = 14


@dataclass(frozen=True)
class Background:
    """A gradient between two muted colours along `angle` (radians), with a soft texture."""

    first: tuple[float, float, float]
    last: tuple[float, float, float]
    angle: float
    texture_seed: int
    texture_strength: float


@dataclass(frozen=True)
class Scene:
    """One clip: `centres` holds the shape's centre (x, y) in pixels, one for each frame."""

    shape: str
    colour: str
    movement: str
    rgb: tuple[int, int, int]
    radius: float
    tilt: float
    centres: tuple[tuple[float, float], ...]
    background: Background

    @property
    def caption(self) -> str:
        """The Italian sentence that describes the clip."""
        return caption(SHAPES[self.shape], self.colour, self.movement)


def sample_scene(rng: np.random.Generator, pairs: Sequence[Pair], num_frames: int = FRAMES_PER_CLIP) -> Scene:
    """Draw a scene whose shape and colour are one of `pairs`."""
    shape, colour = pairs[int(rng.integers(len(pairs)))]
    movement = list(MOVEMENTS)[int(rng.integers(len(MOVEMENTS)))]
    radius = float(rng.uniform(*RADIUS_RANGE))
    return Scene(
        shape=shape,
        colour=colour,
        movement=movement,
        rgb=sample_rgb(rng, colour),
        radius=radius,
        tilt=sample_tilt(rng),
        centres=_sample_path(rng, movement, radius, num_frames),
        background=sample_background(rng),
    )


def sample_rgb(rng: np.random.Generator, colour: str) -> tuple[int, int, int]:
    """A shade of a named colour."""
    jitter = rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, size=3)
    red, green, blue = (int(v) for v in np.clip(np.array(_RGB[colour]) + jitter, 0, 255))
    return (red, green, blue)


def sample_tilt(rng: np.random.Generator) -> float:
    """By how much a shape leans, radians."""
    return float(rng.uniform(-_MAX_TILT, _MAX_TILT))


def recolour(rng: np.random.Generator, scene: Scene) -> Scene:
    """The same scene in any bright colour, `colour` being the name that comes nearest to it.

    A colour that would make a held-out pair is drawn again.
    """
    while True:
        red, green, blue = (int(255 * v) for v in colorsys.hsv_to_rgb(*rng.uniform((0, 0.2, 0.6), (1, 1, 1))))
        name = nearest_colour((red, green, blue))
        if (scene.shape, name) not in HELD_OUT_PAIRS:
            return replace(scene, colour=name, rgb=(red, green, blue))


def nearest_colour(rgb: tuple[int, int, int]) -> str:
    """The named colour at the least distance from `rgb`."""
    return min(_RGB, key=lambda name: math.dist(_RGB[name], rgb))


def _sample_path(
    rng: np.random.Generator, movement: str, radius: float, num_frames: int
) -> tuple[tuple[float, float], ...]:
    """Centres of a path that keeps the whole shape inside the frame, pixels."""
    steps = np.linspace(0.0, 1.0, num_frames)
    if movement == "circle":
        turn = float(rng.choice([-1.0, 1.0])) * 2 * math.pi * (num_frames - 1) / num_frames
        angles = rng.uniform(0, 2 * math.pi) + turn * steps
        offsets = rng.uniform(*_ORBIT_RANGE) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    elif movement == "still":
        offsets = np.zeros((num_frames, 2))
    else:
        along = np.array(_DIRECTIONS[movement], dtype=np.float64)
        drift = rng.uniform(-_MAX_DRIFT, _MAX_DRIFT) * along[::-1]
        offsets = steps[:, None] * (rng.uniform(*_TRAVEL_RANGE) * along + drift)
    margin = radius + 1.0
    lowest = margin - offsets.min(axis=0)
    highest = FRAME_SIZE - margin - offsets.max(axis=0)
    middle = (lowest + highest) / 2
    start = rng.uniform(np.minimum(lowest, middle), np.maximum(highest, middle))
    return tuple((float(x), float(y)) for x, y in start + offsets)


def sample_background(rng: np.random.Generator) -> Background:
    """Two muted, rather dark colours, so that every shape stands out."""
    first, last = (_muted_colour(rng) for _ in range(2))
    return Background(
        first=first,
        last=last,
        angle=float(rng.uniform(0, 2 * math.pi)),
        texture_seed=int(rng.integers(2**31)),
        texture_strength=float(rng.uniform(0, 14)),
    )


def _muted_colour(rng: np.random.Generator) -> tuple[float, float, float]:
    level = rng.uniform(25, 130)
    red, green, blue = level * (1 + rng.uniform(-0.15, 0.15, size=3))
    return (float(red), float(green), float(blue))
