"""Answers to questions about held-out pictures and clips: how near they come, as figures, as lines and as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from llava.data.media import sample_video
from llava.data.records import read_records
from llava.demo.grounding.dataset import NUM_FRAMES
from llava.demo.sentences import names_held_out_pair
from llava.draw import draw_case
from llava.eval.metrics import bootstrap, score_rec, score_tvg
from llava.geometry import Box, TimeSpan, box_iou, span_iou
from llava.types import Coordinates, Record

if TYPE_CHECKING:
    from llava.serve.generate import Answer, Captioner

Place = Box | TimeSpan

_LONGEST_ANSWER = 8
_BATCH_SIZE = 64


@dataclass(frozen=True)
class Case:
    """A question with the model's answer.

    Attributes:
        file: the picture or the clip.
        question: as it was asked, with the placeholder of its picture or clip.
        reference: where or when it is.
        answer: the model's text, with numbers for bins.
        found: the first place of the answer; None of one that tells none.
        scores: of ``score_rec`` or ``score_tvg``.
    """

    file: str
    question: str
    reference: Place
    answer: str
    found: Place | None
    scores: dict[str, float]

    def to_json(self) -> dict[str, object]:
        """As plain values, numbers to three decimals."""
        return {
            "file": self.file,
            "question": self.question,
            "reference": [round(number, 3) for number in self.reference],
            "answer": self.answer,
            "found": self.found and [round(number, 3) for number in self.found],
            "mIoU": round(self.scores["mIoU"], 3),
        }


def answer_questions(captioner: Captioner, data_file: Path) -> list[Case]:
    """Ask every question of a data file of pictures or of clips; places are told finer than by bins."""
    from llava.serve.generate import Request

    records = list(read_records(str(data_file)))
    requests = [Request(record.media, record.turns[0].text) for record in records]
    # Eight tokens: a box has six, a span four.
    answers = captioner.answer(requests, _BATCH_SIZE, sub_bin=True, max_new_tokens=_LONGEST_ANSWER)
    return [score_answer(record, answer) for record, answer in zip(records, answers, strict=True)]


def score_answer(record: Record, answer: Answer) -> Case:
    """The case of one question; an answer of the other kind, such as a span for a box, tells nothing."""
    # A sample asks for one place, so its coordinates are one box or one span.
    reference = _reference(record.coordinates)
    places: Sequence[Place]
    if isinstance(reference, Box):
        places, scores = answer.boxes, score_rec(answer.boxes, reference)
    else:
        places, scores = answer.spans, score_tvg(answer.spans, reference)
    # The first place counts, as in llava.eval.
    found = places[0] if places else None
    return Case(record.media[0].path, record.turns[0].text, reference, str(answer), found, scores)


def _reference(coordinates: Coordinates) -> Place:
    """The box or the span of a held-out sample, whose answer has one."""
    if coordinates.temporal_output_locations:
        return TimeSpan(*coordinates.temporal_output_locations)
    # Coordinates come by axis: x1 x2 and y1 y2.
    (x1, x2), (y1, y2) = coordinates.spatial_width_output_locations, coordinates.spatial_height_output_locations
    return Box(x1, y1, x2, y2)


def summarise(cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Means over cases with their intervals, and what the best fixed answer would reach."""
    # Shapes lie around the middle and rests in it: an answer may score without looking.
    best = best_fixed_answer([case.reference for case in cases])
    return {**bootstrap([case.scores for case in cases], seed=0), "best fixed answer, mIoU": {"value": best}}


def best_fixed_answer(references: Sequence[Place]) -> float:
    """The mean IoU of the one reference that, given as the answer to every question, scores best: a blind guess."""
    return max(sum(_iou(one, other) for other in references) / len(references) for one in references)


def _iou(one: Place, other: Place) -> float:
    if isinstance(one, Box) and isinstance(other, Box):
        return box_iou(one, other)
    assert isinstance(one, TimeSpan)
    assert isinstance(other, TimeSpan)
    return span_iou(one, other)


def case_lines(cases: Sequence[Case]) -> str:
    """One line a case: the question, where or when it is, what the model says, and their IoU."""
    width = max(len(case.question) for case in cases)
    return "\n".join(
        f"{case.question:<{width}} is {_numbers(case.reference)}, "
        f"said {'nothing' if case.found is None else _numbers(case.found)}, IoU {case.scores['mIoU']:.2f}"
        for case in cases
    )


def _numbers(place: Place) -> str:
    return "(" + " ".join(f"{number:.2f}" for number in place) + ")"


def score_lines(mode: str, pictures: Sequence[Case], clips: Sequence[Case]) -> str:
    """The figures of a model with a kind of coordinates."""
    lines = [
        f"--grounding {mode}, on {len(pictures)} held-out pictures and {len(clips)} held-out clips:",
        f"  where in the picture   {_scores(pictures)}",
    ]
    if new := [case for case in pictures if names_held_out_pair(case.question)]:
        lines.append(f"    in a colour in which it never was in training   {_scores(new)}")
    return "\n".join([*lines, f"  when in the clip       {_scores(clips)}"])


def _scores(cases: Sequence[Case]) -> str:
    summary = summarise(cases)
    score = summary["mIoU"]
    # Boxes and spans name their threshold differently.
    half = next(value["value"] for name, value in summary.items() if name in ("IoU>=0.5", "R@1 IoU>0.5"))
    return (
        f"mIoU {score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f}; the best fixed answer "
        f"{summary['best fixed answer, mIoU']['value']:.3f}), {half:.1%} at IoU 0.5 or more, "
        f"{summary['unparsable']['value']:.1%} unparsable"
    )


def write_pictures(folder: Path, examples: Mapping[str, Sequence[Case]]) -> None:
    """Draw each case as ``folder/NAME_NUMBER.png``, the reference in green and the answer in red."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, cases in examples.items():
        for number, case in enumerate(cases):
            if isinstance(case.reference, Box):
                # As it was painted: pictures of the demo need no orientation.
                frames = [Image.open(case.file).convert("RGB")]
            else:
                frames = [Image.fromarray(frame) for frame in sample_video(case.file, NUM_FRAMES).frames.numpy()]
            texts = {"question": case.question, "answer": case.answer, "IoU": f"{case.scores['mIoU']:.2f}"}
            found = [] if case.found is None else [case.found]
            picture = draw_case(frames, [case.reference], found, texts)
            picture.save(folder / f"{name}_{number}.png", optimize=True)
