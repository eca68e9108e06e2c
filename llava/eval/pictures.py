"""The best and the worst answers, drawn."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava.config import VisionConfig
from llava.data.files import MediaError
from llava.data.media import load_image, sample_video
from llava.eval.draw import draw_case
from llava.eval.samples import EvalSample, Prediction
from llava.eval.store import Row
from llava.eval.tasks import Task

logger = logging.getLogger(__name__)

_FRAMES_SHOWN = 8
"""Of a video, where it is not known which frames the model saw."""
_MOST_FRAMES = 16
_SCORES_SHOWN = 4


def write_pictures(
    folder: Path,
    samples: Sequence[EvalSample],
    rows: Sequence[Row],
    task: Task,
    num_cases: int,
    vision: VisionConfig | None = None,
) -> list[Path]:
    """Write a PNG of each case, with the reference's and the answer's boxes, in place of those that are there.

    Args:
        folder: made if there is something to draw.
        samples, rows: in one order; the rows have ``scores``.
        num_cases: of the best answers, and of the worst.
        vision: of the model, which says what frames of a video it saw.
    """
    shutil.rmtree(folder, ignore_errors=True)
    written = []
    for name, index in choose_cases(rows, task, num_cases):
        try:
            picture = _draw(samples[index], rows[index], task, vision)
        except MediaError as error:
            logger.warning("no picture of %s: %s", samples[index], error)
            continue
        folder.mkdir(exist_ok=True)
        written.append(folder / f"{name}.png")
        picture.save(written[-1])
    return written


def choose_cases(rows: Sequence[Row], task: Task, num_cases: int) -> list[tuple[str, int]]:
    """A name and the index of the best answers and of the worst, at most so many of each.

    None is both. Bad samples, of which there is nothing to draw, are left out; of equals the first come first.
    """
    usable = [index for index, row in enumerate(rows) if "bad" not in row]
    order = sorted(usable, key=lambda index: -rows[index]["scores"][task.main_score])
    num_best = min(num_cases, (len(order) + 1) // 2)
    num_worst = min(num_cases, len(order) - num_best)
    best, worst = order[:num_best], order[len(order) - num_worst :][::-1]
    return [
        (f"{kind}_{place:02d}_{_file_name(rows[index]['id'])}", index)
        for kind, indices in (("best", best), ("worst", worst))
        for place, index in enumerate(indices, start=1)
    ]


def _file_name(identity: str) -> str:
    return re.sub(r"[^\w.-]+", "_", identity)[:60]


def _draw(sample: EvalSample, row: Row, task: Task, vision: VisionConfig | None) -> Image.Image:
    prediction = Prediction.from_json(row)
    scores = {task.main_score: row["scores"][task.main_score], **row["scores"]}
    texts = {
        "sample": sample.id,
        "question": row["question"],
        "answer": prediction.text,
        "reference": " | ".join(sample.reference.captions) if task.has_captions else "",
        "score": ", ".join(f"{name} {score:.3f}" for name, score in list(scores.items())[:_SCORES_SHOWN]),
    }
    frames, times = _frames(sample, vision)
    return draw_case(
        frames,
        task.reference_places(sample.reference),
        task.answered_places(prediction, sample.reference),
        {label: text for label, text in texts.items() if text},
        times,
    )


def _frames(sample: EvalSample, vision: VisionConfig | None) -> tuple[list[Image.Image], list[float] | None]:
    """The image, or the frames of the video that the model saw, at most 16 of them, with their places in its time."""
    medium = sample.media[-1]  # Of several it is the last that places speak of.
    if medium.kind == "image":
        return [Image.fromarray(load_image(medium.path).numpy())], None
    frames: dict[str, Any] = {"frame_files": medium.frames, "frame_rate": medium.fps}
    if vision is None:
        video = sample_video(medium.path, _FRAMES_SHOWN, split=sample.split, **frames)
    else:
        video = sample_video(
            medium.path,
            vision.num_frames,
            fps=vision.video_fps,
            max_frames=vision.frames_upbound,
            split=sample.split,
            **frames,
        )
    chosen = list(range(len(video.frames)))
    if len(chosen) > _MOST_FRAMES:
        chosen = [round(i * (len(video.frames) - 1) / (_MOST_FRAMES - 1)) for i in range(_MOST_FRAMES)]
    first, last = video.times[0], video.times[-1]
    times = [(video.times[i] - first) / (last - first) if last > first else 0.0 for i in chosen]
    return [Image.fromarray(video.frames[i].numpy()) for i in chosen], times
