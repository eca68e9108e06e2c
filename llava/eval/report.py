"""What an evaluation has found: ``scores.json``, and a table of it."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from PIL import Image

from llava.config import VisionConfig
from llava.data.media import decode_media
from llava.data.media_files import MediaError
from llava.draw import draw_case
from llava.eval import list_versions
from llava.eval.blind import BlindCheck
from llava.eval.store import EvalSample, Prediction, Row, Settings
from llava.eval.tasks import Task
from llava.io import write_json
from llava.types import BadSample

if TYPE_CHECKING:
    from typing_extensions import NotRequired

logger = logging.getLogger(__name__)

UNPARSABLE = "unparsable"
"""The score that every task has: the share of answers that do not hold what was asked for."""
_FRAMES_SHOWN = 8
"""Of a video, where it is not known which frames the model saw."""
_MOST_FRAMES = 16
_SCORES_SHOWN = 4


class Report(TypedDict):
    """What ``scores.json`` holds (docs/evaluation.md)."""

    task: str
    model: str
    data: list[str]
    num_samples: int
    unparsable: float
    scores: dict[str, dict[str, float]]
    bootstrap: dict[str, float]
    bad_samples: list[dict[str, str]]
    settings: Settings
    versions: dict[str, str]
    blind_check: NotRequired[dict[str, Any]]


def write_report(
    path: Path,
    settings: Settings,
    report: dict[str, dict[str, float]],
    rows: Sequence[Row],
    blind: BlindCheck | None = None,
    **bootstrap: float,
) -> Report:
    """Write ``scores.json`` and return what it holds.

    Args:
        path: the file.
        settings: of the evaluation.
        report: for each score its value and the ends of its interval.
        rows: of all samples; those of bad ones are listed with their reasons.
        blind: whether the score falls with other samples' media; None where that was not asked.
        **bootstrap: how the intervals were found.
    """
    content: Report = {
        "task": settings["task"],
        "model": settings["model"],
        "data": settings["data"],
        "num_samples": len(rows),
        "unparsable": report[UNPARSABLE]["value"],
        "scores": {name: score for name, score in report.items() if name != UNPARSABLE},
        # How the intervals were drawn, so that they can be drawn again.
        "bootstrap": bootstrap,
        "bad_samples": [BadSample(row["id"], row["source"], **row["bad"]).to_json() for row in rows if "bad" in row],
        "settings": settings,
        "versions": list_versions(),
    }
    if blind is not None:
        content["blind_check"] = blind.to_json()
    write_json(path, content)
    return content


def format_report(content: Report) -> str:
    """The scores as lines of a table."""
    width = max(map(len, [*content["scores"], UNPARSABLE]))
    lines = [f"{content['task']}: {content['num_samples']} samples"]
    for name, score in content["scores"].items():
        lines.append(f"  {name:<{width}}  {score['value']:.4f}  [{score['low']:.4f}, {score['high']:.4f}]")
    lines.append(f"  {UNPARSABLE:<{width}}  {content['unparsable']:.4f}")
    if "blind_check" in content:
        lines.append(f"  {BlindCheck(**content['blind_check']).describe('blind check')}")
    if content["bad_samples"]:
        lines.append(f"  bad samples: {len(content['bad_samples'])} (unparsable, counted 0; listed in scores.json)")
    return "\n".join(lines)


# The best and the worst answers, drawn.


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
    # What an earlier scoring drew may no longer be among the best and worst.
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
    # sorted is stable: of equal scores the earlier sample comes first, on every machine.
    usable = [index for index, row in enumerate(rows) if "bad" not in row]
    order = sorted(usable, key=lambda index: -rows[index]["scores"][task.main_score])
    num_best = min(num_cases, (len(order) + 1) // 2)
    num_worst = min(num_cases, len(order) - num_best)
    # Worst first, as best first.
    best, worst = order[:num_best], order[len(order) - num_worst :][::-1]
    return [
        (f"{kind}_{place:02d}_{_file_name(rows[index]['id'])}", index)
        for kind, indices in (("best", best), ("worst", worst))
        for place, index in enumerate(indices, start=1)
    ]


def _file_name(identity: str) -> str:
    return re.sub(r"[^\w.-]+", "_", identity)[:60]


def _draw(sample: EvalSample, row: Row, task: Task, vision: VisionConfig | None) -> Image.Image:
    prediction = Prediction.from_row(row)
    # The score that ranks comes first: only some are shown.
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
    media = sample.media[-1]  # Of several it is the last that places speak of.
    sampling = (_FRAMES_SHOWN, 0.0, 0)
    if vision is not None:
        sampling = (vision.num_frames, vision.video_fps, vision.frames_upbound)
    video = decode_media(media, *sampling, sample.split)
    if media.kind == "image":
        return [Image.fromarray(video.frames[0].numpy())], None
    chosen = list(range(len(video.frames)))
    if len(chosen) > _MOST_FRAMES:
        # Evenly spread from the first to the last, both of which stay.
        chosen = [round(i * (len(video.frames) - 1) / (_MOST_FRAMES - 1)) for i in range(_MOST_FRAMES)]
    first, last = video.times[0], video.times[-1]
    times = [(video.times[i] - first) / (last - first) if last > first else 0.0 for i in chosen]
    return [Image.fromarray(video.frames[i].numpy()) for i in chosen], times
