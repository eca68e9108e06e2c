"""Moments of videos and the sentences that describe them, as Charades-STA and ActivityNet Captions have them.

Three layouts: text lines ``VIDEO START END##sentence``; an object of videos with ``timestamps`` and ``sentences``; and
rows with a video, a sentence and its time. Times in seconds become shares of the video's length, which stands in the
entry, in a file of lengths (``.csv`` or ``.json``), or is read from the video itself.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.data.decoding import read_times
from llava.data.media_files import MediaError
from llava.eval.annotations.entries import (
    SENTENCE_KEYS,
    VIDEO_KEYS,
    Entry,
    MediaFolders,
    as_entry,
    check_span,
    is_number,
    read_entries,
    read_lines,
    read_object,
)
from llava.eval.store import EvalSample, Reference
from llava.types import Media

SPAN_KEYS = ("span",)
SECONDS_KEYS = ("timestamp", "timestamps", "time", "seconds")
_VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
_LINE = re.compile(r"(?P<video>\S+)\s+(?P<start>\S+)\s+(?P<end>\S+?)\s*##(?P<sentence>.+)")
_LENGTH_KEYS = ("duration", "length", "video_duration")


@dataclass(frozen=True)
class _Moment:
    """A sentence and its time, in seconds or, where ``in_shares``, as shares of the clip."""

    entry: Entry
    id: str
    video: str
    sentence: str
    start: float
    end: float
    in_shares: bool = False


def read_moments(files: Sequence[str], folders: MediaFolders) -> list[EvalSample]:
    """Read files of one of the three layouts, and files of lengths among them.

    Raises:
        ValueError: names the file and the entry that is not as ``docs/evaluation.md`` describes.
    """
    lengths: dict[str, float] = {}
    moments: list[_Moment] = []
    for file in files:
        content = read_object(file)
        if Path(file).suffix == ".csv":
            lengths |= _read_length_table(file)
        elif content is not None and not _has_sentences(content):
            lengths |= _read_length_object(content, file)
        elif content is not None:
            moments += _read_videos(content, file)
        else:
            moments += _read_text(file) if Path(file).suffix == ".txt" else _read_rows(read_entries(file))
    known: dict[str, float | str] = dict(lengths)
    return [_sample(moment, folders, known) for moment in moments]


def find_video(name: str, folders: MediaFolders, entry: Entry) -> Media:
    """The video that an entry names, with or without the end of its file's name."""
    media = folders.find(name, "video", entry)
    if Path(name).suffix in _VIDEO_SUFFIXES or Path(media.path).is_file():
        return media
    others = [folders.find(f"{name}{suffix}", "video", entry) for suffix in _VIDEO_SUFFIXES]
    return next((other for other in others if Path(other.path).is_file()), others[0])


def read_length(path: str) -> float:
    """How many seconds a video lasts; a MediaError if it cannot be read."""
    return read_times(path)[1]


def _read_text(file: str) -> Iterator[_Moment]:
    for number, (line, source) in enumerate(read_lines(file), start=1):
        entry = Entry({}, file, source)
        match = _LINE.fullmatch(line)
        start, end = (_parse(match[name]) if match else None for name in ("start", "end"))
        if match is None or start is None or end is None:
            raise entry.error(f"expected VIDEO START END##sentence, with times in seconds, found {line!r:.80}")
        yield _Moment(entry, str(number), match["video"], match["sentence"].strip(), start, end)


def _parse(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return number if is_number(number) else None


def _has_sentences(content: dict[str, Any]) -> bool:
    first = next(iter(content.values()), None)
    return isinstance(first, dict) and "sentences" in first


def _read_videos(content: dict[str, Any], file: str) -> Iterator[_Moment]:
    """``{video: {"duration": seconds, "timestamps": [[start, end], ...], "sentences": [...]}}``."""
    for video, value in content.items():
        entry = as_entry(value, file, f"{Path(file).name}, {video}")
        sentences, times = entry.texts("sentences"), entry.first("timestamps")
        if not isinstance(times, list) or len(times) != len(sentences):
            raise entry.error(f'needs "timestamps" for its {len(sentences)} sentences, found {times!r:.80}')
        for number, (sentence, time) in enumerate(zip(sentences, times, strict=True), start=1):
            start, end = entry.check_numbers(time, 2, '"timestamps" of [start, end]')
            yield _Moment(entry, f"{video}-{number}", video, sentence, start, end)


def _read_rows(rows: Sequence[Entry]) -> Iterator[_Moment]:
    for number, row in enumerate(rows, start=1):
        in_shares = any(key in row for key in SPAN_KEYS)
        start, end = row.numbers(2, *(SPAN_KEYS if in_shares else SECONDS_KEYS))
        sentence = row.text(*SENTENCE_KEYS)
        yield _Moment(row, row.identity(number), row.text(*VIDEO_KEYS), sentence, start, end, in_shares)


def _read_length_table(file: str) -> dict[str, float]:
    """A table with a column of names and one of lengths, such as ``Charades_v1_test.csv``."""
    with Path(file).open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines)
        columns = table.fieldnames or []
        name = next((c for c in ("id", *VIDEO_KEYS) if c in columns), None)
        length = next((c for c in _LENGTH_KEYS if c in columns), None)
        if name is None or length is None:
            raise ValueError(
                f"{file}: needs a column id or video and a column {' or '.join(_LENGTH_KEYS)}, found {columns!r:.80}"
            )
        found = {}
        for number, row in enumerate(table, start=2):
            seconds = _parse(row[length] or "")
            if seconds is None or seconds <= 0:
                raise ValueError(f"{Path(file).name}, line {number}: {length} must be seconds, found {row[length]!r}")
            found[row[name]] = seconds
    return found


def _read_length_object(content: dict[str, Any], file: str) -> dict[str, float]:
    """``{video: seconds}`` or ``{video: {"duration": seconds}}``."""
    found = {}
    for video, value in content.items():
        entry = Entry(value if isinstance(value, dict) else {"duration": value}, file, f"{Path(file).name}, {video}")
        seconds = entry.positive(*_LENGTH_KEYS)
        if seconds is None:
            raise entry.error("needs the seconds that the video lasts, a number or an object with duration")
        found[video] = seconds
    return found


def _sample(moment: _Moment, folders: MediaFolders, lengths: dict[str, float | str]) -> EvalSample:
    """The sample of a moment; what had to be read of a video joins ``lengths``, an error as its text."""
    entry = moment.entry
    media = find_video(moment.video, folders, entry)
    length: float | str | None = 1.0 if moment.in_shares else entry.positive(*_LENGTH_KEYS) or lengths.get(moment.video)
    if length is None:
        try:
            length = read_length(media.path)
        except MediaError as error:
            length = str(error)
        lengths[moment.video] = length
    fault = length if isinstance(length, str) else None
    span = None if isinstance(length, str) else check_span(moment.start / length, moment.end / length, entry)
    return EvalSample(moment.id, entry.source, (media,), Reference(span=span), expression=moment.sentence, fault=fault)
