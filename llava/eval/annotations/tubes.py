"""Things that move through videos: their boxes over a stretch of time, and what is said of them.

Two layouts: ST-Align's, whose boxes stand by the number of their frame and whose texts hold names (``<s>``,
``<bboxes>``) for times and boxes; and plain rows with shares of the picture and of the clip.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

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
)
from llava.eval.annotations.moments import SECONDS_KEYS, find_video, read_length
from llava.eval.store import EvalSample, Reference
from llava.geometry import Box, TimeSpan
from llava.grounding.syntax import box_text
from llava.types import Coordinates

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
    return [
        _read_st_align(row, folders, number) if is_st_align(row.values) else _read_row(row, folders, number)
        for number, row in enumerate(rows, start=1)
    ]


def is_st_align(values: Mapping[str, Any]) -> bool:
    meta = values.get("meta")
    return isinstance(meta, dict) and ("time_token" in meta or "spatial_token" in meta)


def _read_row(row: Entry, folders: MediaFolders, number: int) -> EvalSample:
    """A plain row: ``boxes`` are evenly spaced over the ``span``, or over ``timestamps`` in seconds."""
    media, fault, length = find_video(row.text(*VIDEO_KEYS), folders, row), None, 1.0
    if "span" in row:
        start, end = row.numbers(2, "span")
    else:
        start, end = row.numbers(2, *SECONDS_KEYS)
        try:
            length = row.positive("duration", "length") or read_length(media.path)
        except MediaError as error:
            fault = str(error)
    values = row.first("boxes", "bboxes")
    if not isinstance(values, list) or not values:
        raise row.error(f'needs "boxes", a list of [x1, y1, x2, y2], found {values!r:.80}')
    boxes = tuple(check_box(row.check_numbers(value, 4, '"boxes" of [x1, y1, x2, y2]'), row) for value in values)
    span = None if fault else check_span(start / length, end / length, row)
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
    times: dict[str, Any]
    places: dict[str, Any]
    seconds: Sequence[float] = ()
    """Of each frame of the file, where its frame rate varies."""

    def time(self, frame: Any) -> float:
        """A frame's time as a share of the clip: by its time stamp where the frame rate varies."""
        if not is_number(frame):
            raise self.entry.error(f"a time must be the number of a frame, found {frame!r:.80}")
        if self.seconds:
            start, end = self.seconds[self.first], self.seconds[self.last]
            shown = np.interp(frame, np.arange(len(self.seconds)), self.seconds)
            return float((shown - start) / (end - start))
        return (frame - self.first) / (self.last - self.first)

    def box(self, numbers: Any) -> Box:
        """A box of x y width height, in pixels."""
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
    boxes = clip.places.get(_BOXES)
    if not isinstance(boxes, dict) or not boxes:
        raise row.error(f'"meta.spatial_token" needs {_BOXES}, an object of boxes by frame, found {boxes!r:.80}')
    question, answer = _read_turns(row)
    question = _FROM_TO.sub(_SPAN_QUESTION, question)
    text, coordinates = _write_names(question, clip)
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

    names = [*clip.times, *(name for name, value in clip.places.items() if isinstance(value, list))]
    written = re.sub("|".join(map(re.escape, names)), write, text)
    if _BOXES in written:
        raise clip.entry.error(f"its question has {_BOXES}, the boxes of many frames, which are for the answer")
    return written, Coordinates(
        temporal_input_locations=tuple(times),
        spatial_width_input_locations=tuple(x for box in boxes for x in (box.x1, box.x2)),
        spatial_height_input_locations=tuple(y for box in boxes for y in (box.y1, box.y2)),
    )


def _space_evenly(clip: _Clip, by_frame: dict[str, Any], span: TimeSpan) -> tuple[Box, ...]:
    """The boxes of a tube, evenly spaced over its span: as they are, or interpolated where their frames are not."""
    numbered = []
    for name, numbers in by_frame.items():
        if not name.strip().isdecimal():
            raise clip.entry.error(f"a box must stand by the number of its frame, found {name!r:.80}")
        numbered.append((clip.time(int(name)), clip.box(numbers)))
    numbered.sort()
    times = np.array([time for time, _ in numbered])
    frame = 1 / (clip.last - clip.first)
    if len(times) == 1 or np.allclose(times, np.linspace(*span, len(times)), rtol=0, atol=frame / 2):
        return tuple(box for _, box in numbered)
    even = np.linspace(*span, _UNEVEN_BOXES)
    columns = np.array([box for _, box in numbered]).T
    return tuple(
        Box(*row) for row in np.stack([np.interp(even, times, column) for column in columns], axis=-1).tolist()
    )
