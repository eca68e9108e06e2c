"""Pictures of two shapes and clips of one that moves, rests and moves on: drawn from a seed, and asked about."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llava.demo.common import Sample, run_on_all_cores, turns, write_samples
from llava.demo.scenes import (
    FRAME_SIZE,
    RGB,
    Background,
    Point,
    composite,
    cover_pixels,
    paint_mask,
    render_background,
    sample_background,
    sample_rgb,
    sample_tilt,
    write_clip,
)
from llava.demo.sentences import (
    ASK_WHERE_IN_EACH_FRAME,
    HELD_OUT_PAIRS,
    TRAINING_PAIRS,
    Pair,
    ask_when,
    ask_where,
)
from llava.geometry import Box, TimeSpan
from llava.grounding.syntax import box_text, span_text
from llava.types import Coordinates

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
    rgb: RGB
    radius: float
    tilt: float
    centre: Point

    @property
    def box(self) -> Box:
        """The smallest box around what is painted, in [0, 1], to a quarter of a pixel."""
        mask = paint_mask(self.pair[0], self.centre, self.radius, self.tilt)
        bounds = mask.getbbox()
        assert bounds is not None
        # Of what is painted, not of the circle around it: a star's box is smaller.
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
        # One figure over the other; they never meet.
        pixels = composite(pixels.astype(np.float32), cover_pixels(mask), figure.rgb)
    return pixels


def render_frames(clip: Clip) -> NDArray[np.uint8]:
    """All frames of a clip: uint8 (num_frames, height, width, 3)."""
    return np.stack([render_picture([figure], clip.background) for figure in clip.figures])


def sample_picture(rng: np.random.Generator, pairs: Sequence[Pair]) -> Picture:
    """Draw a picture whose first shape is one of ``pairs``; the others are pairs of training."""
    chosen = [_choose(rng, pairs)]
    while len(chosen) < NUM_FIGURES:
        # Neither a shape nor a colour twice: the question must fit one figure only.
        taken = set(chain.from_iterable(chosen))
        chosen.append(_choose(rng, [pair for pair in TRAINING_PAIRS if not taken & {*pair}]))
    return Picture(_place(rng, chosen), sample_background(rng))


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
    # The order of the draws is part of the data: another order is another data set.
    radius = float(rng.uniform(*_PICTURE_RADII))
    margin = radius + 1.0
    x, y = (float(value) for value in rng.uniform(margin, FRAME_SIZE - margin, size=2))
    return Figure(pair, sample_rgb(rng, pair[1]), radius, sample_tilt(rng), (x, y))


def _are_apart(one: Figure, other: Figure) -> bool:
    """Whether the squares around two shapes have a gap between them."""
    # Chebyshev's distance: squares, as boxes are, are apart if they are on one axis.
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
    # Movement before and behind it has to be seen, in two frames at least.
    start = float(rng.uniform(_LEAST_MOTION, 1.0 - _LEAST_MOTION - length))
    return TimeSpan(start, start + length)


def _sample_path(rng: np.random.Generator, rest: TimeSpan, radius: float) -> list[Point]:
    """Centres along a line that the sides throw back, or around a circle, at a steady speed but for the rest."""
    moved = (NUM_FRAMES - 1) * time_moved(np.linspace(0.0, 1.0, NUM_FRAMES), rest)
    lowest, highest = radius + 1.0, FRAME_SIZE - radius - 1.0
    while True:
        # Drawn again until each step is seen.
        way, angle = rng.uniform(*_STRIDE_RANGE) * moved, rng.uniform(0, 2 * math.pi)
        if rng.random() < 0.5:
            line = way[:, None] * np.array([math.cos(angle), math.sin(angle)])  # (frames, 2)
            centres = reflect(rng.uniform(lowest, highest, size=2) + line, lowest, highest)
        else:
            orbit = rng.uniform(*_ORBIT_RANGE)
            # An arc as long as the way: the speed is that of a line.
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
    # A triangle wave of period 2 * width.
    return lowest + width - np.abs((positions - lowest) % (2 * width) - width)


def time_moved(times: NDArray[np.float64], rest: TimeSpan) -> NDArray[np.float64]:
    """For how long a shape has moved at times in [0, 1]: it stands still during its rest."""
    # Time up to the rest, and time behind it; none in between.
    return np.minimum(times, rest.start) + np.maximum(times - rest.end, 0.0)


# Samples: questions about places and times, with the answers' coordinates.

TRAIN, HELD_OUT = "train", "held_out"
_STREAMS = {TRAIN: 1, HELD_OUT: 2}
"""First words of the seeds."""
_PICTURES, _CLIPS = 1, 2
"""Second words of the seeds."""


@dataclass(frozen=True)
class GroundingData:
    """The data files of the demo."""

    train: tuple[Path, Path]
    held_out_pictures: Path
    held_out_clips: Path


@dataclass(frozen=True)
class Amounts:
    """How many pictures and clips a split has.

    In training every shape of a picture makes a sample of its own, and of a clip is asked too where it goes: the
    boxes of all frames teach in every sample what a span of time alone would teach in many.
    """

    pictures: int
    clips: int


def write_dataset(folder: Path, *, seed: int, train: Amounts, held_out: Amounts) -> GroundingData:
    """Write pictures, clips and data files; the same seed gives the same data."""

    def write(split: str, kind: str, write_one: Callable[..., list[Sample]], number: int) -> Path:
        (folder / split / kind).mkdir(parents=True, exist_ok=True)
        # Each draws from a seed of its own, so the cores' order does not matter.
        written = run_on_all_cores(partial(write_one, folder, split, seed), number)
        return write_samples(folder / f"{split}_{kind}.json", chain.from_iterable(written))

    train_pictures, train_clips, held_out_pictures, held_out_clips = (
        write(split, kind, write_one, getattr(amounts, kind))
        for split, amounts in ((TRAIN, train), (HELD_OUT, held_out))
        for kind, write_one in (("pictures", _write_picture), ("clips", _write_clip))
    )
    return GroundingData((train_pictures, train_clips), held_out_pictures, held_out_clips)


def pairs_of(split: str, index: int) -> tuple[Pair, ...]:
    """What is asked for: in every other held-out picture or clip a pair that none of training shows."""
    return HELD_OUT_PAIRS if split == HELD_OUT and index % 2 else TRAINING_PAIRS


def picture_scene(split: str, seed: int, index: int) -> Picture:
    """What one picture shows, the same however many there are; its first shape is of ``pairs_of``."""
    return sample_picture(np.random.default_rng((_STREAMS[split], _PICTURES, seed, index)), pairs_of(split, index))


def clip_scene(split: str, seed: int, index: int) -> Clip:
    """What one clip shows, the same however many there are."""
    return sample_clip(np.random.default_rng((_STREAMS[split], _CLIPS, seed, index)), pairs_of(split, index))


def asked_figures(split: str, scene: Picture) -> tuple[Figure, ...]:
    """The shapes of a picture that are asked for: in training all of them, else the first."""
    return scene.figures if split == TRAIN else scene.figures[:1]


def _write_picture(folder: Path, split: str, seed: int, index: int) -> list[Sample]:
    scene = picture_scene(split, seed, index)
    name = f"{split}/pictures/{index:05d}.png"
    Image.fromarray(render_picture(scene.figures, scene.background)).save(folder / name, compress_level=1)
    return [
        {
            "id": f"{split}-picture-{index:05d}-{number}",
            "image": name,
            "conversations": turns(ask_where(figure.pair), box_text()),
            "variables": box_coordinates([figure.box]).to_variables(),
        }
        for number, figure in enumerate(asked_figures(split, scene))
    ]


def _write_clip(folder: Path, split: str, seed: int, index: int) -> list[Sample]:
    scene = clip_scene(split, seed, index)
    name = f"{split}/clips/{index:05d}.mp4"
    write_clip(folder / name, render_frames(scene))
    conversation = turns(ask_when(scene.pair), span_text())
    boxes = [figure.box for figure in scene.figures] if split == TRAIN else []
    if boxes:
        # Where it is in each frame teaches what moves and what rests; held-out clips are not asked.
        conversation += turns(ASK_WHERE_IN_EACH_FRAME, box_text() * len(boxes))
    coordinates = replace(box_coordinates(boxes), temporal_output_locations=tuple(scene.rest))
    return [
        {
            "id": f"{split}-clip-{index:05d}",
            "video": name,
            "conversations": conversation,
            "variables": coordinates.to_variables(),
        }
    ]


def box_coordinates(boxes: Sequence[Box]) -> Coordinates:
    """The coordinates of a text with boxes in its answers."""
    return Coordinates(
        spatial_height_output_locations=tuple(y for box in boxes for y in (box.y1, box.y2)),
        spatial_width_output_locations=tuple(x for box in boxes for x in (box.x1, box.x2)),
    )
