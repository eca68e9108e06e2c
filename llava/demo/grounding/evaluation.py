"""Answers to questions about held-out pictures and clips, and how near they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.data.records import read_records
from llava.eval.metrics import bootstrap, box_iou, score_rec, score_tvg, span_iou
from llava.grounding.syntax import Box, TimeSpan
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
        question: as it was asked, with the placeholder of its medium.
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

    def to_json(self) -> dict[str, Any]:
        """As plain values, numbers to three decimals."""
        return {
            "file": self.file,
            "question": self.question,
            "reference": _rounded(self.reference),
            "answer": self.answer,
            "found": None if self.found is None else _rounded(self.found),
            "mIoU": round(self.scores["mIoU"], 3),
        }


def answer_questions(captioner: Captioner, data_file: Path) -> list[Case]:
    """Ask every question of a data file of pictures or of clips; places are told finer than by bins."""
    from llava.serve.generate import Request

    records = list(read_records(str(data_file)))
    requests = [Request(record.media, record.turns[0].text) for record in records]
    answers = captioner.answer(requests, _BATCH_SIZE, sub_bin=True, max_new_tokens=_LONGEST_ANSWER)
    return [score_answer(record, answer) for record, answer in zip(records, answers, strict=True)]


def score_answer(record: Record, answer: Answer) -> Case:
    """The case of one question."""
    reference = reference_place(record.coordinates)
    places: Sequence[Place] = answer.boxes if isinstance(reference, Box) else answer.spans
    return Case(
        file=record.media[0].path,
        question=record.turns[0].text,
        reference=reference,
        answer=str(answer),
        found=places[0] if places else None,
        scores=score_rec(answer.boxes, reference) if isinstance(reference, Box) else score_tvg(answer.spans, reference),
    )


def reference_place(coordinates: Coordinates) -> Place:
    """The box or the span of a held-out sample, whose answer has one."""
    if coordinates.temporal_output_locations:
        return TimeSpan(*coordinates.temporal_output_locations)
    (x1, x2), (y1, y2) = coordinates.spatial_width_output_locations, coordinates.spatial_height_output_locations
    return Box(x1, y1, x2, y2)


def summarise(cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Means over cases with their intervals, and what the best fixed answer would reach."""
    best = best_fixed_answer([case.reference for case in cases])
    return {**bootstrap([case.scores for case in cases], seed=0), "best fixed answer, mIoU": {"value": best}}


def best_fixed_answer(references: Sequence[Place]) -> float:
    """The mean IoU of the one reference that, given as the answer to every question, scores best: a blind guess."""
    return max(sum(_iou(one, other) for other in references) / len(references) for one in references)


def choose_examples(cases: Sequence[Case], number: int) -> list[Case]:
    """The first case of each question, then the second of each; what the model said plays no part."""
    ranks, seen = [], dict[str, int]()
    for case in cases:
        ranks.append(seen.setdefault(case.question, 0))
        seen[case.question] += 1
    order = sorted(range(len(cases)), key=ranks.__getitem__)
    return [cases[index] for index in order[:number]]


def _iou(one: Place, other: Place) -> float:
    if isinstance(one, Box) and isinstance(other, Box):
        return box_iou(one, other)
    assert isinstance(one, TimeSpan)
    assert isinstance(other, TimeSpan)
    return span_iou(one, other)


def _rounded(place: Place) -> list[float]:
    return [round(number, 3) for number in place]
