"""The library's own data files: the user's turn is the question, and the assistant's has the reference."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from llava.config import GroundingConfig
from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN
from llava.data.placeholders import literal_text, placeholder_kinds
from llava.data.records import read_records
from llava.eval.annotations.entries import MediaFolders
from llava.eval.store import EvalSample, Reference
from llava.geometry import Box, TimeSpan
from llava.grounding.syntax import LOCATIONS, bin_token, find_placeholders, parse_places, strip_coordinates
from llava.types import Coordinates, Media, Record

_LEADING_MEDIA = re.compile(rf"^(?:\s*(?:{DEFAULT_IMAGE_TOKEN}|{DEFAULT_VIDEO_TOKEN}))*\s*")
_PLACEHOLDER = re.compile(r"<(TEMP|HEIGHT|WIDTH)-(?:INPUT|OUTPUT)>")


def read_conversations(paths: Sequence[str], folders: MediaFolders) -> list[EvalSample]:
    """Read data files as training does (``docs/data.md``), mixtures too.

    Raises:
        ValueError: a file or a sample is not as described there, or is no question with one answer.
    """
    records: Iterable[Record] = read_records(
        list(paths),
        folders.images,
        folders.videos,
        allow_duplicate_ids=True,
        allow_outside_paths=folders.allow_outside_paths,
        flag="--data",
    )
    return [_sample(record) for record in records]


def _sample(record: Record) -> EvalSample:
    system = record.turns[0].text if record.turns[0].role == "system" else ""
    turns = record.turns[1:] if system else record.turns
    if [turn.role for turn in turns] != ["user", "assistant"]:
        roles = ", ".join(turn.role for turn in turns)
        raise ValueError(
            f"{record}: has turns of {roles}; an evaluation asks one question: a user's turn and an answer"
        )
    question = turns[0].text.strip()
    waiting = {placeholder: list(getattr(record.coordinates, name)) for placeholder, name in LOCATIONS.items()}
    asked = _take(question, waiting)
    answered = _take(turns[1].text, waiting)
    places = _places(turns[1].text, answered)
    spans = [place for place in places if isinstance(place, TimeSpan)]
    # Where the time is given (SVG), it stands in the question.
    spans = spans or [place for place in _places(question, asked) if isinstance(place, TimeSpan)]
    caption = strip_coordinates(_with_bins(literal_text(turns[1].text)))
    return EvalSample(
        record.id,
        record.source,
        _in_reading_order(record, question),
        Reference(
            tuple(place for place in places if isinstance(place, Box)),
            spans[0] if spans else None,
            (caption,) if caption else (),
        ),
        expression=_LEADING_MEDIA.sub("", question, count=1),
        question=question,
        coordinates=_coordinates(asked),
        system=system,
        split=record.split,
    )


def _in_reading_order(record: Record, text: str) -> tuple[Media, ...]:
    """The media in the order of their placeholders."""
    waiting = {kind: iter([m for m in record.media if m.kind == kind]) for kind in ("image", "video")}
    return tuple(next(waiting[kind]) for kind in placeholder_kinds(text))


def _take(text: str, waiting: dict[str, list[float]]) -> list[tuple[str, float]]:
    """The placeholders of a text with their numbers, which are taken from the front of the lists."""
    return [(placeholder, waiting[placeholder].pop(0)) for placeholder in find_placeholders(text)]


def _places(text: str, taken: Sequence[tuple[str, float]]) -> list[Box | TimeSpan]:
    """The boxes and spans of a text whose placeholders stand for numbers."""
    return parse_places(_with_bins(text), GroundingConfig(), [number for _, number in taken])


def _with_bins(text: str) -> str:
    """A text with some bin in the place of each placeholder."""
    return _PLACEHOLDER.sub(_some_bin, text)


def _some_bin(match: re.Match[str]) -> str:
    axis: Any = match.group(1)
    return bin_token(axis, 0)


def _coordinates(taken: Sequence[tuple[str, float]]) -> Coordinates:
    return Coordinates.from_variables(
        {
            name: [number for placeholder, number in taken if placeholder == its_placeholder]
            for its_placeholder, name in LOCATIONS.items()
        }
    )
