"""The folder of an evaluation: its settings, and answers that outlive the process that wrote them.

While it runs, each process appends to a file of its own (``predictions-00.jsonl``), batch by batch, on disk before the
next. In the end they are one file in the order of the samples, ``predictions.jsonl``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from llava.system import lock_file

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
