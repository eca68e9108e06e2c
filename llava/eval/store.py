"""What is asked of a model in an evaluation, what it should say, and what it said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llava.geometry import Box, TimeSpan
from llava.io import lock_file
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


# The folder of an evaluation: its settings, and answers that outlive the process that wrote them.

SETTINGS = "settings.json"
PREDICTIONS = "predictions.jsonl"
SCORES = "scores.json"
PICTURES = "pictures"
_PART = "predictions-{:02d}.jsonl"
_PARTS = "predictions-[0-9][0-9]*.jsonl"

Row = dict[str, Any]


class PredictionStore:
    """A folder that belongs to this process until it ends.

    Args:
        folder: made if it is not there.
        settings: what the answers depend on, as plain values.
        overwrite: whether what an evaluation with other settings left there is deleted.

    Raises:
        ValueError: the folder has an evaluation with other settings, or another process works in it.
    """

    def __init__(self, folder: str, settings: dict[str, Any], overwrite: bool = False) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out {folder}: not a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        if overwrite:
            self._clear()
        self._check_settings(json.loads(json.dumps(settings)))

    @property
    def predictions(self) -> Path:
        return self.folder / PREDICTIONS

    def _take_lock(self) -> BinaryIO:
        """The settings file, which one process at a time may hold; it is let go when the process ends."""
        file = (self.folder / SETTINGS).open("ab")
        try:
            lock_file(file, wait=False)
        except BlockingIOError as error:
            raise ValueError(f"--out {self.folder}: another evaluation is writing there; give it another") from error
        return file

    def _clear(self) -> None:
        (self.folder / SETTINGS).write_bytes(b"")
        for path in (self.predictions, self.folder / SCORES, *self._parts()):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder / PICTURES, ignore_errors=True)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        try:
            found = json.loads(path.read_text(encoding="utf-8") or "null")
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error}); begin anew with --overwrite") from error
        if found == settings:
            return
        if not any(path.exists() and path.stat().st_size for path in (self.predictions, *self._parts())):
            # Nothing was answered yet. In its place, not renamed to it: the file is the lock.
            with path.open("w", encoding="utf-8") as file:
                file.write(json.dumps(settings, ensure_ascii=False, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
        elif found is None:
            raise ValueError(f"--out {self.folder}: has predictions without settings; begin anew with --overwrite")
        else:
            name = next(key for key in (*settings, *found) if found.get(key) != settings.get(key))
            raise ValueError(
                f"--out {self.folder}: has an evaluation with {name} {_short(found.get(name))}, here it is "
                f"{_short(settings.get(name))}; give another folder, or --overwrite to begin anew"
            )

    def read(self) -> dict[int, Row]:
        """The rows that are there, by the number of their sample; a half-written last line is cut off its file.

        Raises:
            ValueError: a line is no row; names file and line.
        """
        rows: dict[int, Row] = {}
        for path in (self.predictions, *self._parts()):
            if path.exists():
                _cut_last_line(path)
                rows |= {row["index"]: row for row in _read_rows(path)}
        return rows

    def part(self, number: int) -> Path:
        """The file to which one process appends."""
        return self.folder / _PART.format(number)

    def finish(self, rows: Sequence[Row]) -> None:
        """Put all rows in one file and delete the parts."""
        waiting = self.predictions.with_suffix(".jsonl.new")
        with waiting.open("wb") as file:
            write_rows(file, rows)
        waiting.replace(self.predictions)
        for path in self._parts():
            path.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(_PARTS))


def write_rows(file: BinaryIO, rows: Iterable[Row]) -> None:
    """Append rows to an open file; they are on disk when this returns."""
    file.write(
        b"".join(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for row in rows)
    )
    file.flush()
    os.fsync(file.fileno())


def _cut_last_line(path: Path) -> None:
    """Drop what stands behind the last newline: a line whose writer was killed."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def _read_rows(path: Path) -> Iterable[Row]:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and isinstance(row.get("index"), int)):
                raise ValueError("it is no prediction")
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: {error}; delete the line, or begin anew with --overwrite"
            ) from error
        yield row


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."
