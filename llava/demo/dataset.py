"""Writes the demo's data set: clips as MP4 files, and the data files that the trainer reads."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.demo.captions import COLOURS, MOVEMENTS, OTHER_NOUNS, SHAPES, caption
from llava.demo.clips import write_clip
from llava.demo.render import render_clip
from llava.demo.scenes import HELD_OUT_PAIRS, TRAINING_PAIRS, Pair, Scene, sample_scene

_CHUNK = 64
_SPLITS: dict[str, tuple[int, tuple[Pair, ...]]] = {
    "train": (1, TRAINING_PAIRS),
    "held_out": (2, HELD_OUT_PAIRS),
}
"""First word of the seed, and the pairs, of each split."""


@dataclass(frozen=True)
class DemoData:
    """The data files of the demo."""

    text: Path
    train: Path
    held_out: Path


def write_dataset(folder: Path, *, seed: int, num_train_clips: int, num_held_out_clips: int) -> DemoData:
    """Write clips and data files; the same seed gives the same data."""
    folder.mkdir(parents=True, exist_ok=True)
    data = DemoData(
        text=folder / "text_t_it.json",
        train=folder / "train_vi_it.json",
        held_out=folder / "held_out_vi_it.json",
    )
    _write_json(data.text, text_records())
    for path, split, num_clips in (
        (data.train, "train", num_train_clips),
        (data.held_out, "held_out", num_held_out_clips),
    ):
        _write_json(path, list(write_clips(folder, split, num_clips, seed)))
    return data


def clip_scene(split: str, seed: int, index: int) -> Scene:
    """The scene of one clip, the same however many clips there are."""
    stream, pairs = _SPLITS[split]
    return sample_scene(np.random.default_rng((stream, seed, index)), pairs)


def write_clips(folder: Path, split: str, num_clips: int, seed: int) -> Iterator[dict[str, Any]]:
    """Write `folder/split/*.mp4` on all cores, and give their records in order."""
    (folder / split).mkdir(exist_ok=True)
    starts = range(0, num_clips, _CHUNK)
    chunks = [range(start, min(start + _CHUNK, num_clips)) for start in starts]
    arguments = ([value] * len(chunks) for value in (folder, split, seed))
    if len(chunks) == 1:
        yield from _write_chunk(folder, split, seed, chunks[0])
        return
    # Spawned, not forked: the parent may run threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for records in pool.map(_write_chunk, *arguments, chunks):
            yield from records


def _write_chunk(folder: Path, split: str, seed: int, indices: range) -> list[dict[str, Any]]:
    records = []
    for index in indices:
        scene = clip_scene(split, seed, index)
        name = f"{split}/{index:05d}.mp4"
        write_clip(folder / name, render_clip(scene))
        records.append(
            {
                "id": f"{split}-{index:05d}",
                "video": name,
                "conversations": _turns("<video>", scene.caption),
            }
        )
    return records


def text_records() -> list[dict[str, Any]]:
    """Text-only records: every sentence about a training pair, and about nouns no clip shows."""
    sentences = [
        caption(noun, colour, movement)
        for noun in (*SHAPES.values(), *OTHER_NOUNS)
        for colour in COLOURS
        for movement in MOVEMENTS
        if (noun.word, colour) not in HELD_OUT_PAIRS
    ]
    return [
        {"id": f"text-{number:05d}", "conversations": _turns("", sentence)} for number, sentence in enumerate(sentences)
    ]


def read_captions(path: Path) -> list[str]:
    """The captions of a data file, in order."""
    records = json.loads(path.read_text(encoding="utf-8"))
    return [record["conversations"][-1]["value"] for record in records]


def _turns(human: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]


def _write_json(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
