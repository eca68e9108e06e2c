"""The data files of the demo: clips with captions to train on and to describe at the end, and captions alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from llava.demo.common import Sample, run_on_all_cores, turns, write_samples
from llava.demo.scenes import Scene, render_clip, sample_scene, write_clip
from llava.demo.sentences import (
    COLOURS,
    HELD_OUT_PAIRS,
    MOVEMENTS,
    OTHER_NOUNS,
    SHAPES,
    TRAINING_PAIRS,
    Pair,
    caption,
)

_SPLITS: dict[str, tuple[int, tuple[Pair, ...]]] = {"train": (1, TRAINING_PAIRS), "held_out": (2, HELD_OUT_PAIRS)}
"""First word of the seed, and the pairs, of each split."""


@dataclass(frozen=True)
class DemoData:
    """The data files of the demo."""

    text: Path
    train: Path
    held_out: Path


def write_dataset(folder: Path, *, seed: int, num_train_clips: int, num_held_out_clips: int) -> DemoData:
    """Write clips and data files; the same seed gives the same data."""
    for split in _SPLITS:
        (folder / split).mkdir(parents=True, exist_ok=True)
    return DemoData(
        write_samples(folder / "text_t_it.json", text_samples()),
        *(
            write_samples(
                folder / f"{split}_vi_it.json", run_on_all_cores(partial(_write_sample, folder, split, seed), number)
            )
            for split, number in (("train", num_train_clips), ("held_out", num_held_out_clips))
        ),
    )


def clip_scene(split: str, seed: int, index: int) -> Scene:
    """The scene of one clip, the same however many clips there are."""
    stream, pairs = _SPLITS[split]
    # A generator for each clip: they are drawn on all cores, in any order, and come out the same.
    return sample_scene(np.random.default_rng((stream, seed, index)), pairs)


def _write_sample(folder: Path, split: str, seed: int, index: int) -> Sample:
    scene = clip_scene(split, seed, index)
    # Relative to the data file, so that the folder can be moved.
    name = f"{split}/{index:05d}.mp4"
    write_clip(folder / name, render_clip(scene))
    return {"id": f"{split}-{index:05d}", "video": name, "conversations": turns("<video>", scene.caption)}


def text_samples() -> list[Sample]:
    """Samples of text alone: every sentence about a training pair, and about nouns that no clip shows."""
    sentences = [
        caption(noun, colour, movement)
        for noun in (*SHAPES.values(), *OTHER_NOUNS)
        for colour in COLOURS
        for movement in MOVEMENTS
        # The words of held-out pairs are all learned, but never side by side.
        if (noun.word, colour) not in HELD_OUT_PAIRS
    ]
    return [{"id": f"text-{i:05d}", "conversations": turns("", sentence)} for i, sentence in enumerate(sentences)]


def read_captions(path: Path) -> list[str]:
    """The captions of a data file, in order."""
    samples = json.loads(path.read_text(encoding="utf-8"))
    return [sample["conversations"][-1]["value"] for sample in samples]
