"""Writes the data set: pictures and clips, and the data files with coordinates that the trainer reads."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.demo.clips import write_clip
from llava.demo.grounding.questions import ask_when, ask_where, ask_where_frame_by_frame
from llava.demo.grounding.scenes import (
    Clip,
    Figure,
    Picture,
    render_frames,
    render_picture,
    sample_clip,
    sample_picture,
)
from llava.demo.scenes import HELD_OUT_PAIRS, TRAINING_PAIRS, Pair
from llava.grounding.syntax import Box, box_text, span_text
from llava.types import Coordinates

Sample = dict[str, Any]

_CHUNK = 64
TRAIN, HELD_OUT = "train", "held_out"
_STREAMS = {TRAIN: 1, HELD_OUT: 2}
"""First words of the seeds."""
_PICTURES, _CLIPS = 1, 2
"""Second words of the seeds."""


@dataclass(frozen=True)
class GroundingData:
    """The data files of the demo."""

    train: tuple[Path, ...]
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
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, amounts in ((TRAIN, train), (HELD_OUT, held_out)):
        for kind, write, number in (
            ("pictures", _write_picture, amounts.pictures),
            ("clips", _write_clip, amounts.clips),
        ):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
            path = files[split, kind] = folder / f"{split}_{kind}.json"
            _write_json(path, write_samples(partial(write, folder, split, seed), number))
    return GroundingData(
        train=(files[TRAIN, "pictures"], files[TRAIN, "clips"]),
        held_out_pictures=files[HELD_OUT, "pictures"],
        held_out_clips=files[HELD_OUT, "clips"],
    )


def write_samples(write: Callable[[int], list[Sample]], number: int) -> Iterator[Sample]:
    """Write media 0, 1, ... on all cores, and give their samples in order."""
    chunks = [range(start, min(start + _CHUNK, number)) for start in range(0, number, _CHUNK)]
    if len(chunks) == 1:
        yield from chain.from_iterable(map(write, chunks[0]))
        return
    # Spawned, not forked: the parent may run threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        yield from chain.from_iterable(pool.map(write, range(number), chunksize=_CHUNK))


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
            "conversations": _turns(ask_where(figure.pair, "<image>"), box_text()),
            "variables": box_coordinates([figure.box]).to_variables(),
        }
        for number, figure in enumerate(asked_figures(split, scene))
    ]


def _write_clip(folder: Path, split: str, seed: int, index: int) -> list[Sample]:
    scene = clip_scene(split, seed, index)
    name = f"{split}/clips/{index:05d}.mp4"
    write_clip(folder / name, render_frames(scene))
    turns, boxes = _turns(ask_when(scene.pair, "<video>"), span_text()), []
    if split == TRAIN:
        boxes = [figure.box for figure in scene.figures]
        turns += _turns(ask_where_frame_by_frame(), "".join(box_text() for _ in boxes))
    coordinates = replace(box_coordinates(boxes), temporal_output_locations=tuple(scene.rest))
    return [
        {
            "id": f"{split}-clip-{index:05d}",
            "video": name,
            "conversations": turns,
            "variables": coordinates.to_variables(),
        }
    ]


def box_coordinates(boxes: Sequence[Box]) -> Coordinates:
    """The coordinates of a text with boxes in its answers."""
    return Coordinates(
        spatial_height_output_locations=tuple(y for box in boxes for y in (box.y1, box.y2)),
        spatial_width_output_locations=tuple(x for box in boxes for x in (box.x1, box.x2)),
    )


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _write_json(path: Path, records: Iterable[Sample]) -> None:
    lines = ",\n ".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(f"[{lines}]\n", encoding="utf-8")
