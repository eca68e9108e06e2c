"""Clips of one coloured shape that moves over a background: drawn from a seed, painted, and written as H.264 files."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from llava.demo.sentences import HELD_OUT_PAIRS, MOVEMENTS, SHAPES, Pair, caption

FRAME_SIZE = 64
"""Side of a frame in pixels."""

FRAMES_PER_CLIP = 8
FRAMES_PER_SECOND = 8

RGB = tuple[int, int, int]
Point = tuple[float, float]
"""x and y in pixels."""

_RGB: dict[str, RGB] = {
    "rosso": (214, 38, 38),
    "giallo": (245, 218, 45),
    "bianco": (244, 244, 244),
    "verde": (48, 172, 72),
    "blu": (38, 78, 222),
    "viola": (132, 52, 196),
    "rosa": (250, 142, 192),
    "arancione": (246, 136, 22),
}
_DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}

_RADIUS_RANGE = (11.0, 15.0)
"""Radius of a shape's circumscribed circle, pixels."""
_TRAVEL_RANGE = (16.0, 30.0)
_ORBIT_RANGE = (8.0, 13.0)
_MAX_DRIFT = 2.5
_MAX_TILT = math.radians(6)
_COLOUR_JITTER = 14
_SUPERSAMPLING = 4
_TEXTURE_GRID = 8


@dataclass(frozen=True)
class Background:
    """A gradient between two muted colours along ``angle`` (radians), with a soft texture."""

    first: tuple[float, float, float]
    last: tuple[float, float, float]
    angle: float
    texture_seed: int
    texture_strength: float


@dataclass(frozen=True)
class Scene:
    """One clip: ``centres`` holds the shape's centre in each frame."""

    shape: str
    colour: str
    movement: str
    rgb: RGB
    radius: float
    tilt: float
    centres: tuple[Point, ...]
    background: Background

    @property
    def caption(self) -> str:
        """The Italian sentence that describes the clip."""
        return caption(SHAPES[self.shape], self.colour, self.movement)


def sample_scene(rng: np.random.Generator, pairs: Sequence[Pair]) -> Scene:
    """Draw a scene whose shape and colour are one of ``pairs``."""
    shape, colour = pairs[int(rng.integers(len(pairs)))]
    movement = list(MOVEMENTS)[int(rng.integers(len(MOVEMENTS)))]
    radius = float(rng.uniform(*_RADIUS_RANGE))
    return Scene(
        shape=shape,
        colour=colour,
        movement=movement,
        rgb=sample_rgb(rng, colour),
        radius=radius,
        tilt=sample_tilt(rng),
        centres=_sample_path(rng, movement, radius),
        background=sample_background(rng),
    )


def sample_rgb(rng: np.random.Generator, colour: str) -> RGB:
    """A shade of a named colour."""
    jitter = rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, size=3)
    red, green, blue = (int(v) for v in np.clip(np.array(_RGB[colour]) + jitter, 0, 255))
    return (red, green, blue)


def sample_tilt(rng: np.random.Generator) -> float:
    """By how much a shape leans, radians."""
    return float(rng.uniform(-_MAX_TILT, _MAX_TILT))


def recolour(rng: np.random.Generator, scene: Scene) -> Scene:
    """The same scene in any bright colour, ``colour`` being the name that comes nearest to it.

    A colour that would make a held-out pair is drawn again.
    """
    while True:
        # Bright and not gray: value from 0.6, saturation from 0.2.
        red, green, blue = (int(255 * v) for v in colorsys.hsv_to_rgb(*rng.uniform((0, 0.2, 0.6), (1, 1, 1))))
        name = nearest_colour((red, green, blue))
        if (scene.shape, name) not in HELD_OUT_PAIRS:
            return replace(scene, colour=name, rgb=(red, green, blue))


def nearest_colour(rgb: RGB) -> str:
    """The named colour at the least distance from ``rgb``."""
    return min(_RGB, key=lambda name: math.dist(_RGB[name], rgb))


def _sample_path(rng: np.random.Generator, movement: str, radius: float) -> tuple[Point, ...]:
    """Centres of a path that keeps the whole shape inside the frame."""
    steps = np.linspace(0.0, 1.0, FRAMES_PER_CLIP)
    if movement == "circle":
        # A whole turn would end where it began, and the last frame would repeat the first.
        turn = float(rng.choice([-1.0, 1.0])) * 2 * math.pi * (FRAMES_PER_CLIP - 1) / FRAMES_PER_CLIP
        angles = rng.uniform(0, 2 * math.pi) + turn * steps
        offsets = rng.uniform(*_ORBIT_RANGE) * np.stack([np.cos(angles), np.sin(angles)], axis=1)  # (frames, 2)
    elif movement == "still":
        offsets = np.zeros((FRAMES_PER_CLIP, 2))
    else:
        along = np.array(_DIRECTIONS[movement], dtype=np.float64)
        # A little across the way, so that directions are not told by one coordinate alone.
        drift = rng.uniform(-_MAX_DRIFT, _MAX_DRIFT) * along[::-1]
        offsets = steps[:, None] * (rng.uniform(*_TRAVEL_RANGE) * along + drift)
    margin = radius + 1.0
    # Where the first centre may lie for the whole path to stay inside; the middle where there is no room.
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


# Painting: anti-aliased shapes over textured backgrounds.


def render_clip(scene: Scene) -> NDArray[np.uint8]:
    """All frames of a scene: uint8 (num_frames, height, width, 3)."""
    background = render_background(scene.background)
    frames = [composite(background, render_coverage(scene, frame), scene.rgb) for frame in range(len(scene.centres))]
    return np.stack(frames)


def composite(background: NDArray[np.float32], coverage: NDArray[np.float32], rgb: RGB) -> NDArray[np.uint8]:
    """Lay the shape over the background: uint8 (height, width, 3)."""
    alpha = coverage[..., None]  # (height, width, 1)
    pixels = background * (1 - alpha) + np.asarray(rgb, dtype=np.float32) * alpha
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def render_coverage(scene: Scene, frame: int) -> NDArray[np.float32]:
    """Share of each pixel that the shape covers in one frame: float (height, width) in [0, 1]."""
    return cover_pixels(paint_mask(scene.shape, scene.centres[frame], scene.radius, scene.tilt))


def paint_mask(shape: str, centre: Point, radius: float, tilt: float) -> Image.Image:
    """What a shape covers, white on black, in finer pixels than a frame's; centre and radius are in a frame's."""
    side = FRAME_SIZE * _SUPERSAMPLING
    mask = Image.new("L", (side, side), 0)
    fine_centre = (centre[0] * _SUPERSAMPLING, centre[1] * _SUPERSAMPLING)
    _paint_shape(ImageDraw.Draw(mask), shape, fine_centre, radius * _SUPERSAMPLING, tilt)
    return mask


def cover_pixels(mask: Image.Image) -> NDArray[np.float32]:
    """Share of each pixel of a frame that a mask covers: float (height, width) in [0, 1]."""
    # The mean of 4 x 4 fine pixels is the share that is covered: edges without steps.
    return np.asarray(mask.reduce(_SUPERSAMPLING), dtype=np.float32) / np.float32(255)


def render_background(background: Background) -> NDArray[np.float32]:
    """The empty scene: float (height, width, 3) in [0, 255]."""
    axis = (np.arange(FRAME_SIZE, dtype=np.float32) + 0.5) / FRAME_SIZE - 0.5
    along = math.cos(background.angle) * axis[None, :] + math.sin(background.angle) * axis[:, None]
    blend = np.clip(along + 0.5, 0, 1)[..., None].astype(np.float32)  # (height, width, 1)
    first = np.asarray(background.first, dtype=np.float32)
    last = np.asarray(background.last, dtype=np.float32)
    return first * (1 - blend) + last * blend + _render_texture(background)[..., None]


def _render_texture(background: Background) -> NDArray[np.float32]:
    """Smooth noise around zero: float (height, width)."""
    rng = np.random.default_rng(background.texture_seed)
    coarse = rng.normal(0, background.texture_strength, (_TEXTURE_GRID, _TEXTURE_GRID))
    image = Image.fromarray(coarse.astype(np.float32))
    # Coarse noise enlarged is smooth noise.
    smooth = image.resize((FRAME_SIZE, FRAME_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32)


_POLYGONS: dict[str, tuple[tuple[float, ...], int, float]] = {
    "quadrato": ((1.0,), 4, math.pi / 4),
    "triangolo": ((1.0,), 3, -math.pi / 2),
    "stella": ((1.0, 0.42), 10, -math.pi / 2),
}
"""Corners at equal angles: their distances from the centre in turn, in radii; how many; and the first angle."""


def _paint_shape(draw: ImageDraw.ImageDraw, shape: str, centre: Point, radius: float, tilt: float) -> None:
    """Paint a shape that leans by ``tilt`` radians into a mask."""
    if shape == "cerchio":
        draw.ellipse(_square_around(centre, 0.9 * radius), fill=255)
    elif shape == "luna":
        draw.ellipse(_square_around(centre, radius), fill=255)
        # A crescent: a disc with a smaller one taken out of its side.
        bite = _polar(centre, 0.55 * radius, tilt - math.pi / 6)
        draw.ellipse(_square_around(bite, 0.78 * radius), fill=0)
    elif shape == "croce":
        # Half an arm as an angle, so that all its corners lie on the circle.
        half_width = math.atan2(0.28, 0.95)
        for angle in (tilt, tilt + math.pi / 2):
            corners = (angle - half_width, angle + half_width)
            draw.polygon(
                [_polar(centre, radius, corner + turn) for turn in (0, math.pi) for corner in corners], fill=255
            )
    else:
        shares, number, first = _POLYGONS[shape]
        draw.polygon(
            [
                _polar(centre, shares[i % len(shares)] * radius, tilt + first + 2 * math.pi * i / number)
                for i in range(number)
            ],
            fill=255,
        )


def _square_around(centre: Point, radius: float) -> tuple[float, float, float, float]:
    return (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)


def _polar(centre: Point, radius: float, angle: float) -> Point:
    return (centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle))


def write_clip(path: Path, frames: NDArray[np.uint8]) -> None:
    """Encode frames (num_frames, height, width, 3) as an MP4 file in yuv420p."""
    import av  # Here alone: stills need no PyAV.

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Threads would make other bytes of the same frames.
        stream.thread_count = 1
        # Good enough that colours survive, and small: a training set has 24,000 clips.
        stream.options = {"crf": "20", "preset": "veryfast"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            # Left to the encoder, the conversion is not the same from one call to the next.
            container.mux(stream.encode(picture.reformat(format="yuv420p")))
        container.mux(stream.encode(None))
