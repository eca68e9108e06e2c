"""Draws scenes as frames: anti-aliased shapes over textured backgrounds."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from llava.demo.scenes import FRAME_SIZE, Background, Scene

_SUPERSAMPLING = 4
_TEXTURE_GRID = 8

Point = tuple[float, float]
Painter = Callable[[ImageDraw.ImageDraw, Point, float, float], None]
"""Paints a shape into a mask: the drawing, the centre, the radius and the tilt in radians."""


def render_clip(scene: Scene) -> NDArray[np.uint8]:
    """All frames of a scene: uint8 (num_frames, height, width, 3)."""
    background = render_background(scene.background)
    frames = [composite(background, render_coverage(scene, frame), scene.rgb) for frame in range(len(scene.centres))]
    return np.stack(frames)


def composite(
    background: NDArray[np.float32], coverage: NDArray[np.float32], rgb: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Lay the shape over the background: uint8 (height, width, 3)."""
    alpha = coverage[..., None]
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
    _PAINTERS[shape](ImageDraw.Draw(mask), fine_centre, radius * _SUPERSAMPLING, tilt)
    return mask


def cover_pixels(mask: Image.Image) -> NDArray[np.float32]:
    """Share of each pixel of a frame that a mask covers: float (height, width) in [0, 1]."""
    return np.asarray(mask.reduce(_SUPERSAMPLING), dtype=np.float32) / np.float32(255)


def render_background(background: Background) -> NDArray[np.float32]:
    """The empty scene: float (height, width, 3) in [0, 255]."""
    axis = (np.arange(FRAME_SIZE, dtype=np.float32) + 0.5) / FRAME_SIZE - 0.5
    along = math.cos(background.angle) * axis[None, :] + math.sin(background.angle) * axis[:, None]
    blend = np.clip(along + 0.5, 0, 1)[..., None].astype(np.float32)
    first = np.asarray(background.first, dtype=np.float32)
    last = np.asarray(background.last, dtype=np.float32)
    return first * (1 - blend) + last * blend + _render_texture(background)[..., None]


def _render_texture(background: Background) -> NDArray[np.float32]:
    """Smooth noise around zero: float (height, width)."""
    rng = np.random.default_rng(background.texture_seed)
    coarse = rng.normal(0, background.texture_strength, (_TEXTURE_GRID, _TEXTURE_GRID))
    image = Image.fromarray(coarse.astype(np.float32))
    smooth = image.resize((FRAME_SIZE, FRAME_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32)


def _paint_circle(draw: ImageDraw.ImageDraw, centre: Point, radius: float, tilt: float) -> None:
    draw.ellipse(_box(centre, 0.9 * radius), fill=255)


def _paint_moon(draw: ImageDraw.ImageDraw, centre: Point, radius: float, tilt: float) -> None:
    draw.ellipse(_box(centre, radius), fill=255)
    x, y = _polar(centre, 0.55 * radius, tilt - math.pi / 6)
    draw.ellipse(_box((x, y), 0.78 * radius), fill=0)


def _paint_square(draw: ImageDraw.ImageDraw, centre: Point, radius: float, tilt: float) -> None:
    draw.polygon(_ring(centre, [radius], 4, tilt + math.pi / 4), fill=255)


def _paint_triangle(draw: ImageDraw.ImageDraw, centre: Point, radius: float, tilt: float) -> None:
    draw.polygon(_ring(centre, [radius], 3, tilt - math.pi / 2), fill=255)


def _paint_star(draw: ImageDraw.ImageDraw, centre: Point, radius: float, tilt: float) -> None:
    draw.polygon(_ring(centre, [radius, 0.42 * radius], 10, tilt - math.pi / 2), fill=255)


def _paint_cross(draw: ImageDraw.ImageDraw, centre: Point, radius: float, tilt: float) -> None:
    half_width = math.atan2(0.28, 0.95)
    for quarter in range(2):
        angle = tilt + quarter * math.pi / 2
        corners = (angle - half_width, angle + half_width)
        ends = [_polar(centre, radius, corner + turn) for turn in (0, math.pi) for corner in corners]
        draw.polygon(ends, fill=255)


_PAINTERS: dict[str, Painter] = {
    "cerchio": _paint_circle,
    "quadrato": _paint_square,
    "triangolo": _paint_triangle,
    "stella": _paint_star,
    "croce": _paint_cross,
    "luna": _paint_moon,
}


def _box(centre: Point, radius: float) -> tuple[float, float, float, float]:
    return (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)


def _ring(centre: Point, radii: list[float], num_points: int, start: float) -> list[Point]:
    """Points at equal angles around the centre, cycling through `radii`."""
    return [_polar(centre, radii[i % len(radii)], start + 2 * math.pi * i / num_points) for i in range(num_points)]


def _polar(centre: Point, radius: float, angle: float) -> Point:
    return (centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle))
