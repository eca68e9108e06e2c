"""Moments of videos, and things that move through them over a stretch of time, with what is said of them.

Moments, as Charades-STA and ActivityNet Captions have them, come in three layouts: text lines
``VIDEO START END##sentence``; an object of videos with ``timestamps`` and ``sentences``; and rows with a video, a
sentence and its time. Tubes come in two: ST-Align's, whose boxes stand by the number of their frame and whose texts
hold names (``<s>``, ``<bboxes>``) for times and boxes; and rows with boxes in shares of the picture. Times in seconds
become shares of the video's length, which stands in the entry, in a file of lengths (``.csv`` or ``.json``), or is
read from the video itself.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from llava.constants import DEFAULT_VIDEO_TOKEN
from llava.data.decoding import read_times
from llava.data.media_files import MediaError
from llava.data.video import is_constant
from llava.eval.annotations.entries import (
    SENTENCE_KEYS,
    VIDEO_KEYS,
    Entry,
    MediaFolders,
    as_entry,
    check_box,
    check_span,
    is_number,
    read_entries,
    read_lines,
    read_object,
)
from llava.eval.store import EvalSample, Reference
from llava.geometry import Box, TimeSpan
from llava.grounding.syntax import box_text
from llava.types import Coordinates, Media

_SECONDS_KEYS = ("timestamp", "timestamps", "time", "seconds")
_LENGTH_KEYS = ("duration", "length", "video_duration")
_VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
_LINE = re.compile(r"(?P<video>\S+)\s+(?P<start>\S+)\s+(?P<end>\S+?)\s*##(?P<sentence>.+)")

Lengths = dict[str, float | str]
"""By the name of a video the seconds that it lasts, or why they cannot be read."""


def find_video(name: str, folders: MediaFolders, entry: Entry) -> Media:
    """The video that an entry names, with or without the end of its file's name."""
    media = folders.find(name, "video", entry)
    if Path(name).suffix in _VIDEO_SUFFIXES or Path(media.path).is_file():
        return media
    # Charades-STA and ActivityNet name videos without the end of their files' names.
    others = [folders.find(f"{name}{suffix}", "video", entry) for suffix in _VIDEO_SUFFIXES]
    return next((other for other in others if Path(other.path).is_file()), others[0])


@dataclass(frozen=True)
class _Stretch:
    """A part of a video, in seconds or, where ``in_shares``, as shares of the clip."""

    start: float
    end: float
    in_shares: bool = False

    @classmethod
    def read(cls, row: Entry) -> _Stretch:
        in_shares = "span" in row
        start, end = row.numbers(2, *(("span",) if in_shares else _SECONDS_KEYS))
        return cls(start, end, in_shares)

    def locate(self, entry: Entry, video: str, media: Media, lengths: Lengths) -> tuple[TimeSpan | None, str | None]:
        """The span in shares, or why the video's length is not known; one that had to be read joins ``lengths``."""
        length = 1.0 if self.in_shares else entry.positive(*_LENGTH_KEYS) or lengths.get(video)
        if length is None:
            try:
                # Opening every video takes minutes: lengths in a file of their own come first.
                length = read_times(media.path)[1]
            except MediaError as error:
                length = str(error)
            # Videos have several sentences each; a failure is remembered too.
            lengths[video] = length
        if isinstance(length, str):
            return None, length
        return check_span(self.start / length, self.end / length, entry), None


# Moments.


@dataclass(frozen=True)
class _Moment:
    """A sentence and its time."""

    entry: Entry
    id: str
    video: str
    sentence: str
    stretch: _Stretch


def read_moments(files: Sequence[str], folders: MediaFolders) -> list[EvalSample]:
    """Read files of one of the three layouts of moments, and files of lengths among them.

    Raises:
        ValueError: names the file and the entry that is not as ``docs/evaluation.md`` describes.
    """
    lengths: Lengths = {}
    moments: list[_Moment] = []
    for file in files:
        # What a file is shows in its content: lengths, ActivityNet's videos, rows or lines.
        content = read_object(file)
        if Path(file).suffix == ".csv":
            lengths |= _read_length_table(file)
        elif content is not None:
            first = next(iter(content.values()), None)
            if isinstance(first, dict) and "sentences" in first:
                moments += _read_videos(content, file)
            else:
                lengths |= _read_length_object(content, file)
        else:
            moments += _read_text(file) if Path(file).suffix == ".txt" else _read_moment_rows(read_entries(file))
    samples = []
    for moment in moments:
        media = find_video(moment.video, folders, moment.entry)
        span, fault = moment.stretch.locate(moment.entry, moment.video, media, lengths)
        reference = Reference(span=span)
        samples.append(
            EvalSample(moment.id, moment.entry.source, (media,), reference, expression=moment.sentence, fault=fault)
        )
    return samples


def _read_text(file: str) -> Iterator[_Moment]:
    for number, (line, source) in enumerate(read_lines(file), start=1):
        entry = Entry({}, file, source)
        # "AO8RW 0.0 6.9##a person is putting a book on a shelf."
        match = _LINE.fullmatch(line)
        start, end = (_parse(match[name]) if match else None for name in ("start", "end"))
        if match is None or start is None or end is None:
            raise entry.error(f"expected VIDEO START END##sentence, with times in seconds, found {line!r:.80}")
        yield _Moment(entry, str(number), match["video"], match["sentence"].strip(), _Stretch(start, end))


def _parse(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return number if is_number(number) else None


def _read_videos(content: Mapping[str, object], file: str) -> Iterator[_Moment]:
    """``{video: {"duration": seconds, "timestamps": [[start, end], ...], "sentences": [...]}}``."""
    for video, value in content.items():
        # Errors name the video: such an object has no lines to count.
        entry = as_entry(value, file, f"{Path(file).name}, {video}")
        sentences, times = entry.texts("sentences"), entry.first("timestamps")
        if not isinstance(times, list) or len(times) != len(sentences):
            raise entry.error(f'needs "timestamps" for its {len(sentences)} sentences, found {times!r:.80}')
        for number, (sentence, time) in enumerate(zip(sentences, times, strict=True), start=1):
            start, end = entry.check_numbers(time, 2, '"timestamps" of [start, end]')
            yield _Moment(entry, f"{video}-{number}", video, sentence, _Stretch(start, end))


def _read_moment_rows(rows: Sequence[Entry]) -> Iterator[_Moment]:
    for number, row in enumerate(rows, start=1):
        stretch, sentence = _Stretch.read(row), row.text(*SENTENCE_KEYS)
        yield _Moment(row, row.identity(number), row.text(*VIDEO_KEYS), sentence, stretch)


def _read_length_table(file: str) -> dict[str, float]:
    """A table with a column of names and one of lengths, such as ``Charades_v1_test.csv``."""
    try:
        return _read_length_rows(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{file}: not CSV: {error}") from error


def _read_length_rows(file: str) -> dict[str, float]:
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
            # A row that is too short has None where the length should stand.
            seconds = _parse(row[length] or "")
            if seconds is None or seconds <= 0:
                raise ValueError(f"{Path(file).name}, line {number}: {length} must be seconds, found {row[length]!r}")
            found[row[name]] = seconds
    return found


def _read_length_object(content: Mapping[str, object], file: str) -> dict[str, float]:
    """``{video: seconds}`` or ``{video: {"duration": seconds}}``."""
    found = {}
    for video, value in content.items():
        entry = Entry(value if isinstance(value, dict) else {"duration": value}, file, f"{Path(file).name}, {video}")
        seconds = entry.positive(*_LENGTH_KEYS)
        if seconds is None:
            raise entry.error("needs the seconds that the video lasts, a number or an object with duration")
        found[video] = seconds
    return found


# Tubes.

_START, _END, _BOXES = "<s>", "<e>", "<bboxes>"
_FROM_TO = re.compile(rf"from {_START} to {_END}", re.IGNORECASE)
_SPAN_QUESTION = f"during {{{_START}{_END}}}"
_ENDS_IN = re.compile(rf"^\s*ends in {_END}\s*,?\s*", re.IGNORECASE)
_BOXES_FOLLOW = re.compile(rf"\s*(?:object )?bounding box(?:es)?: {_BOXES}\.?\s*$", re.IGNORECASE)
_UNEVEN_BOXES = 100
"""Boxes of a tube whose frames are not evenly spaced: as many as frames are scored."""


def read_tubes(rows: Sequence[Entry], folders: MediaFolders) -> list[EvalSample]:
    """Samples of both layouts, which one file may mix.

    Raises:
        ValueError: names the file and the entry that is not as ``docs/evaluation.md`` describes.
    """
    lengths: Lengths = {}
    return [
        _read_st_align(row, folders, number)
        if is_st_align(row.values)
        else _read_tube_row(row, folders, number, lengths)
        for number, row in enumerate(rows, start=1)
    ]


def is_st_align(values: Mapping[str, object]) -> bool:
    """Whether an entry is one of ST-Align's."""
    meta = values.get("meta")
    return isinstance(meta, dict) and ("time_token" in meta or "spatial_token" in meta)


def _read_tube_row(row: Entry, folders: MediaFolders, number: int, lengths: Lengths) -> EvalSample:
    """A plain row: ``boxes`` are evenly spaced over the ``span``, or over ``timestamps`` in seconds."""
    name = row.text(*VIDEO_KEYS)
    media = find_video(name, folders, row)
    span, fault = _Stretch.read(row).locate(row, name, media, lengths)
    values = row.first("boxes", "bboxes")
    if not isinstance(values, list) or not values:
        raise row.error(f'needs "boxes", a list of [x1, y1, x2, y2], found {values!r:.80}')
    boxes = tuple(check_box(row.check_numbers(value, 4, '"boxes" of [x1, y1, x2, y2]'), row) for value in values)
    # A question of its own is asked as it is; without one the sentence goes into the template.
    words = row.text("question", *SENTENCE_KEYS)
    captions = (row.text(*SENTENCE_KEYS),) if any(key in row for key in SENTENCE_KEYS) else ()
    return EvalSample(
        row.identity(number),
        row.source,
        (media,),
        Reference(boxes, span, captions),
        expression=words,
        question=words if "question" in row else None,
        fault=fault,
    )


@dataclass(frozen=True)
class _Clip:
    """What the ``meta`` of an ST-Align entry says: its frames, its picture's size and what its names stand for."""

    entry: Entry
    first: int
    last: int
    width: float
    height: float
    times: dict[str, object]
    places: dict[str, object]
    seconds: Sequence[float] = ()
    """Of each frame of the file, where its frame rate varies."""

    def time(self, frame: object) -> float:
        """A frame's time as a share of the clip: by its time stamp where the frame rate varies."""
        if not is_number(frame):
            raise self.entry.error(f"a time must be the number of a frame, found {frame!r:.80}")
        if self.seconds:
            # Frame numbers are no times where the rate varies; np.interp also takes numbers between two frames.
            start, end = self.seconds[self.first], self.seconds[self.last]
            shown = np.interp(frame, np.arange(len(self.seconds)), self.seconds)
            return float((shown - start) / (end - start))
        # At a constant rate frame i of n lies at i / (n - 1), as for the model.
        return (frame - self.first) / (self.last - self.first)

    def box(self, numbers: object) -> Box:
        """A box of x y width height, in pixels."""
        # ST-Align writes x y width height in pixels; a model's boxes are corners in [0, 1].
        x, y, width, height = self.entry.check_numbers(numbers, 4, "boxes of [x, y, width, height]")
        return check_box(
            (x / self.width, y / self.height, (x + width) / self.width, (y + height) / self.height), self.entry
        )

    def span(self) -> TimeSpan:
        for name in (_START, _END):
            if name not in self.times:
                raise self.entry.error(f'"meta.time_token" needs {name}, found {sorted(self.times)}')
        return check_span(self.time(self.times[_START]), self.time(self.times[_END]), self.entry)


def _read_st_align(row: Entry, folders: MediaFolders, number: int) -> EvalSample:
    media = find_video(row.text("video_path", "video"), folders, row)
    clip = _read_clip(row)
    clip = replace(clip, seconds=_uneven_times(media.path, clip.first, clip.last))
    span = clip.span()
    # By the number of the frame: {"50": [384, 144, 192, 144], ...}.
    boxes = clip.places.get(_BOXES)
    if not isinstance(boxes, dict) or not boxes:
        raise row.error(f'"meta.spatial_token" needs {_BOXES}, an object of boxes by frame, found {boxes!r:.80}')
    question, answer = _read_turns(row)
    question = _FROM_TO.sub(_SPAN_QUESTION, question)
    text, coordinates = _write_names(question, clip)
    # "Ends in <e>, the dog runs. Object bounding box: <bboxes>" says "the dog runs."
    caption = _BOXES_FOLLOW.sub("", _ENDS_IN.sub("", answer)).strip()
    return EvalSample(
        row.identity(number),
        row.source,
        (media,),
        Reference(_space_evenly(clip, boxes, span), span, (caption,) if caption else ()),
        expression=text,
        question=text,
        coordinates=coordinates,
        split=(clip.first, clip.last),
    )


@lru_cache
def _uneven_times(path: str, first: int, last: int) -> tuple[float, ...]:
    """Seconds of a video's frames, if those of the part from first to last frame do not come at a constant rate."""
    try:
        seconds, _ = read_times(path)
    except MediaError:  # It is named when the sample's frames are wanted.
        return ()
    return () if last >= len(seconds) or is_constant(seconds[first : last + 1]) else tuple(seconds)


def _read_clip(row: Entry) -> _Clip:
    meta = as_entry(row.values["meta"], row.file, f"{row.source}, meta")
    # Only these frames are shown, and times are counted from them.
    first, last = (int(number) for number in meta.numbers(2, "split"))
    if not 0 <= first < last:
        raise meta.error(f'"split" must be [first, last] frame, found {meta.first("split")!r}')
    width, height = meta.positive("width"), meta.positive("height")
    if width is None or height is None:
        raise meta.error('needs "width" and "height", those of the video in pixels')
    times, places = (meta.values.get(name) or {} for name in ("time_token", "spatial_token"))
    if not isinstance(times, dict) or not isinstance(places, dict):
        raise meta.error('"time_token" and "spatial_token" must be objects')
    return _Clip(row, first, last, width, height, times, places)


def _read_turns(row: Entry) -> tuple[str, str]:
    """What the user asks, without the video's placeholder, and what the assistant says."""
    turns = row.values.get("conversations")
    values = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) < 2:
        raise row.error('needs "conversations", a question and its answer')
    return texts[0].replace(DEFAULT_VIDEO_TOKEN, "").strip(), texts[1].replace(DEFAULT_VIDEO_TOKEN, "")


def _write_names(text: str, clip: _Clip) -> tuple[str, Coordinates]:
    """Put placeholders for coordinates in the place of names of times and boxes."""
    times: list[float] = []
    boxes: list[Box] = []

    def write(match: re.Match[str]) -> str:
        name = match.group()
        if name in clip.times:
            times.append(min(max(clip.time(clip.times[name]), 0.0), 1.0))
            return "<TEMP-INPUT>"
        boxes.append(clip.box(clip.places[name]))
        return box_text("INPUT")

    # The placeholders of boxes of one frame; <bboxes>, an object, is for the answer.
    names = [*clip.times, *(name for name, value in clip.places.items() if isinstance(value, list))]
    written = re.sub("|".join(map(re.escape, names)), write, text)
    if _BOXES in written:
        raise clip.entry.error(f"its question has {_BOXES}, the boxes of many frames, which are for the answer")
    return written, Coordinates(
        temporal_input_locations=tuple(times),
        spatial_width_input_locations=tuple(x for box in boxes for x in (box.x1, box.x2)),
        spatial_height_input_locations=tuple(y for box in boxes for y in (box.y1, box.y2)),
    )


def _space_evenly(clip: _Clip, by_frame: dict[str, object], span: TimeSpan) -> tuple[Box, ...]:
    """The boxes of a tube, evenly spaced over its span: as they are, or interpolated where their frames are not."""
    numbered = []
    for name, numbers in by_frame.items():
        if not name.strip().isdecimal():
            raise clip.entry.error(f"a box must stand by the number of its frame, found {name!r:.80}")
        numbered.append((clip.time(int(name)), clip.box(numbers)))
    # Keys of a JSON object are strings, in any order.
    numbered.sort()
    times = np.array([time for time, _ in numbered])
    frame = 1 / (clip.last - clip.first)
    # Half a frame of tolerance: sampling at a fixed stride rounds to whole frames.
    if len(times) == 1 or np.allclose(times, np.linspace(*span, len(times)), rtol=0, atol=frame / 2):
        return tuple(box for _, box in numbered)
    even = np.linspace(*span, _UNEVEN_BOXES)
    # (4, boxes): each edge is interpolated on its own.
    columns = np.array([box for _, box in numbered]).T
    return tuple(
        Box(*row) for row in np.stack([np.interp(even, times, column) for column in columns], axis=-1).tolist()
    )
