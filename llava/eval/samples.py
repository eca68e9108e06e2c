"""What is asked of a model in an evaluation, what it should say, and what it said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava.coordinates import Box, TimeSpan
from llava.types import NO_COORDINATES, Coordinates, Media


@dataclass(frozen=True)
class Reference:
    """What is right, as far as an annotation file says it.

    Attributes:
        boxes: one box of a picture, or those of a tube, evenly spaced in time over its span; in the picture's [0, 1].
        span: in [0, 1] of the video's sampled stretch.
        captions: each a right one.
    """

    boxes: tuple[Box, ...] = ()
    span: TimeSpan | None = None
    captions: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "boxes": [list(box) for box in self.boxes],
            "span": self.span and list(self.span),
            "captions": list(self.captions),
        }


@dataclass(frozen=True)
class EvalSample:
    """One question with its media and its reference.

    Attributes:
        id: as the annotation file has it.
        source: where it stands ("testA.json, entry 3"), for errors.
        media: in the order in which they are shown.
        reference: what is right.
        expression: what is asked about, of which a template makes a question.
        question: the whole question, if the file has one, such as the user's turn of a data file as it stands.
        coordinates: of the placeholders in the expression, and in the question; in the picture's [0, 1].
        system: the system's turn.
        split: first and last frame of the part of the video that is shown; by default all of it.
        fault: why the sample cannot be scored, such as a file that is missing; None for a good one.
    """

    id: str
    source: str
    media: tuple[Media, ...]
    reference: Reference
    expression: str = ""
    question: str | None = None
    coordinates: Coordinates = NO_COORDINATES
    system: str = ""
    split: tuple[int, int] | None = None
    fault: str | None = None

    def __str__(self) -> str:
        return f"sample {self.id!r} ({self.source})"


@dataclass(frozen=True)
class Prediction:
    """What a model said: all of its text, and the boxes and spans that were found in it."""

    text: str
    boxes: tuple[Box, ...] = ()
    spans: tuple[TimeSpan, ...] = ()

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Prediction:
        return cls(
            row["answer"], tuple(Box(*box) for box in row["boxes"]), tuple(TimeSpan(*span) for span in row["spans"])
        )

    def to_json(self) -> dict[str, Any]:
        return {"answer": self.text, "boxes": _rounded(self.boxes), "spans": _rounded(self.spans)}


def _rounded(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    # A millionth of a picture is far below a pixel and above what the order of a sum changes.
    return [[round(number, 6) for number in row] for row in rows]
