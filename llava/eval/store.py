"""What is asked of a model in an evaluation, what it should say, and what it said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NotRequired, TypedDict

from llava.geometry import Box, TimeSpan
from llava.io import append_json_lines, cut_unfinished_line, lock_file, read_json_lines, sync, write_beside
from llava.messages import shorten_text
from llava.types import NO_COORDINATES, Coordinates, Media

Numbers = Sequence[float]


class Settings(TypedDict):
    """What answers depend on: a run with other settings does not go on with them. ``settings.json`` holds it."""

    task: str
    model: str
    model_files: str
    model_base: str | None
    data: list[str]
    limit: int | None
    prompt: str | None
    bits: int
    sub_bin: bool
    max_new_tokens: int
    num_beams: int
    decoding: dict[str, object]
    samples: str
    features: NotRequired[str]


class BadReason(TypedDict):
    """Why a sample could not be used, and the file whose fault it is; "" where it is none's."""

    file: str
    reason: str


class ReferenceRow(TypedDict):
    """A ``Reference`` as plain values."""

    boxes: list[Numbers]
    span: Numbers | None
    captions: list[str]


class Row(TypedDict, total=False):
    """A line of ``predictions.jsonl``: what was asked, what should come, and what came (docs/evaluation.md)."""

    index: int
    id: str
    source: str
    media: list[str]
    question: str
    reference: ReferenceRow
    answer: str
    boxes: list[Numbers]
    spans: list[Numbers]
    bad: BadReason
    scores: dict[str, float]


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

    def to_row(self) -> ReferenceRow:
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
    def from_row(cls, row: Row) -> Prediction:
        return cls(
            row["answer"], tuple(Box(*box) for box in row["boxes"]), tuple(TimeSpan(*span) for span in row["spans"])
        )

    def to_row(self) -> Row:
        return {"answer": self.text, "boxes": _rounded(self.boxes), "spans": _rounded(self.spans)}


def _rounded(places: Sequence[Numbers]) -> list[Numbers]:
    # A millionth of a picture is far below a pixel and above what the order of a sum changes.
    return [[round(number, 6) for number in place] for place in places]


# The folder of an evaluation: its settings, and answers that outlive the process that wrote them.

SETTINGS = "settings.json"
PREDICTIONS = "predictions.jsonl"
SCORES = "scores.json"
PICTURES = "pictures"
BLIND = "blind_check"
_PART = "predictions-{:02d}.jsonl"
_PARTS = "predictions-[0-9][0-9]*.jsonl"


class PredictionStore:
    """A folder that belongs to this process until it ends.

    Args:
        folder: made if it is not there.
        settings: what the answers depend on, as plain values.
        overwrite: whether what an evaluation with other settings left there is deleted.

    Raises:
        ValueError: another process has it, it has another evaluation, or it is no folder.
    """

    def __init__(self, folder: str, settings: Mapping[str, object], overwrite: bool = False) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out {folder}: not a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.predictions = self.folder / PREDICTIONS
        # Kept open as long as the store lives: closing the file would let the lock go.
        self._lock = self._take_lock()
        if overwrite:
            # The settings go first: a process killed here leaves predictions without any, which is refused below.
            (self.folder / SETTINGS).write_bytes(b"")
            for path in (self.folder / SCORES, *self._files()):
                path.unlink(missing_ok=True)
            for name in (PICTURES, BLIND):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        self._check_settings(settings)

    def _take_lock(self) -> BinaryIO:
        """The settings file, which one process at a time may hold; it is let go when the process ends."""
        # For appending: opening must not empty what another process has written.
        file = (self.folder / SETTINGS).open("ab")
        try:
            lock_file(file, wait=False)
        except BlockingIOError as error:
            raise ValueError(f"--out {self.folder}: another evaluation is writing there; give it another") from error
        return file

    def _check_settings(self, settings: Mapping[str, object]) -> None:
        path = self.folder / SETTINGS
        try:
            found = json.loads(path.read_text(encoding="utf-8") or "null")
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error}); begin anew with --overwrite") from error
        if found == settings:
            return
        if not any(part.stat().st_size for part in self._files()):
            # Nothing was answered yet. In its place, not renamed to it: the file is the lock.
            with path.open("w", encoding="utf-8") as file:
                file.write(json.dumps(settings, ensure_ascii=False, indent=1) + "\n")
            sync(path)
        elif found is None:
            raise ValueError(f"--out {self.folder}: has predictions without settings; begin anew with --overwrite")
        else:
            # The first that differs is enough to see what the other evaluation was.
            name = next(key for key in (*settings, *found) if found.get(key) != settings.get(key))
            there, here = (shorten_text(json.dumps(of.get(name), ensure_ascii=False), 200) for of in (found, settings))
            raise ValueError(
                f"--out {self.folder}: has an evaluation with {name} {there}, here it is {here}; give another folder, "
                "or --overwrite to begin anew"
            )

    def _files(self) -> list[Path]:
        """The files with predictions that are there."""
        return [*([self.predictions] if self.predictions.exists() else []), *sorted(self.folder.glob(_PARTS))]

    def read(self) -> dict[int, Row]:
        """The rows that are there, by the number of their sample; a half-written last line is cut off its file.

        Raises:
            ValueError: a line is no row; names file and line.
        """
        rows: dict[int, Row] = {}
        for path in self._files():
            cut_unfinished_line(path)
            try:
                values = read_json_lines(path)
                for number, row in enumerate(values, start=1):
                    # Another program's lines, or an edited file.
                    if not (isinstance(row, dict) and isinstance(row.get("index"), int)):
                        raise ValueError(f"{path}, line {number}: it is no prediction")
            except ValueError as error:
                raise ValueError(f"{error}; delete the line, or begin anew with --overwrite") from error
            # A later file wins: a sample that was asked again has its newest answer.
            rows |= {row["index"]: row for row in values}
        return rows

    def part(self, number: int) -> Path:
        """The file to which one process appends."""
        return self.folder / _PART.format(number)

    def finish(self, rows: Sequence[Row]) -> None:
        """Put all rows in one file and delete the parts."""
        with write_beside(self.predictions) as beside, beside.open("wb") as file:
            append_json_lines(file, rows)
        # Only now: until the one file is whole and on the disk, the parts are all there is.
        for path in self.folder.glob(_PARTS):
            path.unlink()
