"""Rows of Localized Narratives: what an annotator said of an image and when, and where the pointer was meanwhile.

A row is an object with ``dataset_id``, ``image_id``, ``annotator_id``, ``caption``, ``timed_caption``, a list of
``{"utterance", "start_time", "end_time"}``, and ``traces``, a list of lists of ``{"x", "y", "t"}``. Times are
seconds, x and y fractions of the image's width and height.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard, cast

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, VISUAL_TOKENS
from llava.data.raw_samples import parse_line, read_lines
from llava.grounding.syntax import count_bins, find_placeholders

_LARGEST = 1e9
"""No time or place is beyond: what is not a finite number is not, either."""


class Point(NamedTuple):
    """Where the pointer was in the image, from 0 to 1 or a little outside, and when, in seconds."""

    x: float
    y: float
    t: float


@dataclass(frozen=True)
class Utterance:
    """Some words that were said together; ``interval`` is (start, end) in seconds, None where it is not known."""

    text: str
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Finding:
    """What is wrong with a row: a reason in words that many rows may share, and what it is about in this one."""

    reason: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Narrative:
    """A row that can become a sample.

    Attributes:
        dataset_id, image_id, annotator_id: as in the row, "" where it has none.
        caption: with single spaces.
        utterances: in the order of the row.
        points: of all traces, in order of time.
        findings: what of the row could not be used.
    """

    dataset_id: str
    image_id: str
    annotator_id: str
    caption: str
    utterances: tuple[Utterance, ...]
    points: tuple[Point, ...]
    findings: tuple[Finding, ...] = ()


class RowError(ValueError):
    """A row that can be no sample, with the finding that says why."""

    def __init__(self, reason: str, *details: str) -> None:
        super().__init__(reason)
        self.finding = Finding(reason, details)


def read_rows(paths: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """The values of JSONL files' lines, one by one, each with the words that say where it stands.

    Files whose names end with ``.gz`` are decompressed. The place of a line that is no JSON takes the ValueError
    that says so; blank lines are skipped. A progress bar counts the bytes, where somebody watches.

    Raises:
        ValueError: a compressed file is broken.
    """
    from tqdm import tqdm

    # Of compressed files the compressed bytes: how far they are read is known, how much they hold is not.
    total = sum(Path(path).stat().st_size for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading rows", disable=None) as bar:
        behind = 0
        for path in paths:
            with Path(path).open("rb") as file:
                for number, line in enumerate(_read_lines(path, file), start=1):
                    # By the place in the file as it lies on the disk.
                    bar.update(behind + file.tell() - bar.n)
                    if line.strip():
                        where = f"{Path(path).name}, line {number}"
                        yield parse_line(line, where), where
                behind += file.tell()


def _read_lines(path: str, file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, decompressed if its name says that it is compressed."""
    compressed = path.endswith(".gz")
    try:
        with gzip.open(file) if compressed else nullcontext(file) as lines:
            yield from read_lines(cast("BinaryIO", lines))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from error


def parse_narrative(row: object) -> Narrative:
    """Validate a row.

    A row without traces or times is a narrative nevertheless, whose findings say what is missing.

    Raises:
        RowError: it has no image or no caption that a model could learn.
    """
    if isinstance(row, ValueError):
        raise RowError("the line is not JSON", str(row))
    if not isinstance(row, dict):
        raise RowError("the line is no object", f"found {type(row).__name__}")
    image_id = _parse_name(row, "image_id")
    if not image_id:
        raise RowError("no image_id")
    findings: list[Finding] = []
    return Narrative(
        dataset_id=_parse_name(row, "dataset_id"),
        image_id=image_id,
        annotator_id=_parse_name(row, "annotator_id"),
        caption=_parse_caption(row.get("caption")),
        utterances=_parse_utterances(row.get("timed_caption"), findings),
        points=_parse_traces(row.get("traces"), findings),
        findings=tuple(findings),
    )


def _parse_name(row: Mapping[str, object], key: str) -> str:
    name = row.get(key)
    if name is None:
        return ""
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise RowError(f"{key} is neither a string nor a whole number", repr(name)[:80])
    if not _is_unicode(str(name)):
        raise RowError(f"{key} has half a character", repr(name))
    return str(name)


def _parse_caption(caption: object) -> str:
    if not isinstance(caption, str) or not caption.strip():
        raise RowError("no caption")
    if not _is_unicode(caption):
        raise RowError("the caption has half a character")
    kept = (DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, *VISUAL_TOKENS)
    # Such a name in a caption would become an image that is not there.
    reserved = [name for name in kept if name in caption] + find_placeholders(caption)
    if reserved or count_bins(caption):
        raise RowError("the caption has a name kept for images, videos or coordinates", *reserved)
    return " ".join(caption.split())


def _parse_utterances(value: object, findings: list[Finding]) -> tuple[Utterance, ...]:
    if value is None or value == []:
        findings.append(Finding("no timed_caption"))
        return ()
    utterances = []
    for entry in value if isinstance(value, list) else [value]:
        # All or none: a list with a hole could not be aligned with the caption.
        if not isinstance(entry, dict) or not isinstance(words := entry.get("utterance"), str):
            findings.append(Finding("timed_caption is not a list of utterances"))
            return ()
        # A reversed interval is no time: the utterance stays and gets no box.
        start, end = entry.get("start_time"), entry.get("end_time")
        interval = (float(start), float(end)) if _is_number(start) and _is_number(end) and start <= end else None
        # An utterance is only shown and compared: half a character does no harm once it is none.
        utterances.append(Utterance(" ".join(words.encode(errors="replace").decode().split()), interval))
    return tuple(utterances)


def _parse_traces(value: object, findings: list[Finding]) -> tuple[Point, ...]:
    points = []
    for segment in [] if value is None else value if isinstance(value, list) else [value]:
        if not isinstance(segment, list) or not all(map(_is_point, segment)):
            findings.append(Finding("traces is not a list of lists of points with x, y and t"))
            return ()
        points += [Point(float(point["x"]), float(point["y"]), float(point["t"])) for point in segment]
    if not points:
        findings.append(Finding("no trace"))
    # Segments may overlap in time; boxes.py cuts by time.
    return tuple(sorted(points, key=lambda point: point.t))


def _is_point(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    # Written out: a row has hundreds of points, and most of the time goes here.
    return _is_number(value.get("x")) and _is_number(value.get("y")) and _is_number(value.get("t"))


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST  # type: ignore[operator]


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
