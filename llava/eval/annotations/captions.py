"""Captions of images and videos, and the library's own data files, which serve any task.

Captions come as rows, and as COCO's object of ``images`` and ``annotations``. Of a data file the user's turn is the
question, and the assistant's has the reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from llava.config import GroundingConfig
from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN
from llava.data.placeholders import in_reading_order, literal_text
from llava.data.records import read_records
from llava.eval.annotations.entries import (
    IMAGE_KEYS,
    SENTENCE_KEYS,
    VIDEO_KEYS,
    Entry,
    MediaFolders,
    list_entries,
    read_entries,
    read_object,
)
from llava.eval.annotations.videos import find_video
from llava.eval.store import EvalSample, Reference
from llava.geometry import Box, TimeSpan
from llava.grounding.syntax import LOCATIONS, find_placeholders, parse_places, stand_in_bins, strip_coordinates
from llava.types import Coordinates, Record

_LEADING_MEDIA = re.compile(rf"^(?:\s*(?:{DEFAULT_IMAGE_TOKEN}|{DEFAULT_VIDEO_TOKEN}))*\s*")


def read_captions(files: Sequence[str], folders: MediaFolders) -> list[EvalSample]:
    """Read files of one of the two layouts; several captions of an image are all right answers to one question.

    Raises:
        ValueError: names the file and the entry that is not as ``docs/evaluation.md`` describes.
    """
    samples: list[EvalSample] = []
    for file in files:
        content = read_object(file)
        samples += _read_rows(read_entries(file), folders) if content is None else _read_coco(content, file, folders)
    return samples


def _read_coco(content: Mapping[str, object], file: str, folders: MediaFolders) -> Iterator[EvalSample]:
    captions: dict[object, list[str]] = {}
    for entry in list_entries(content, "annotations", file):
        # COCO has five captions an image, each an annotation of its own.
        captions.setdefault(entry.key("image_id"), []).append(entry.text("caption"))
    for image in list_entries(content, "images", file):
        if image.key("id") not in captions:
            raise image.error(f"no annotation has its id {image.first('id')!r}")
        media = folders.find(image.text("file_name"), "image", image)
        reference = Reference(captions=tuple(captions[image.first("id")]))
        yield EvalSample(image.identity(""), image.source, (media,), reference)


def _read_rows(rows: Sequence[Entry], folders: MediaFolders) -> Iterator[EvalSample]:
    for number, row in enumerate(rows, start=1):
        if any(key in row for key in VIDEO_KEYS):
            media = find_video(row.text(*VIDEO_KEYS), folders, row)
        else:
            media = folders.find(row.text(*IMAGE_KEYS), "image", row)
        # With a question of its own, a row asks it in place of the template.
        question = row.text("question") if "question" in row else None
        yield EvalSample(
            row.identity(number),
            row.source,
            (media,),
            Reference(captions=tuple(row.texts(*SENTENCE_KEYS, "answer", "answers"))),
            expression=question or "",
            question=question,
        )


# The library's own data files.


def read_conversations(paths: Sequence[str], folders: MediaFolders) -> list[EvalSample]:
    """Read data files as training does (``docs/data.md``), mixtures too.

    Raises:
        ValueError: a file or a sample is not as described there, or is no question with one answer.
    """
    records = read_records(
        list(paths),
        folders.images,
        folders.videos,
        allow_duplicate_ids=True,
        allow_outside_paths=folders.allow_outside_paths,
        flag="--data",
    )
    return [build_sample(record) for record in records]


def build_sample(record: Record) -> EvalSample:
    """A record of a data file as a question with its reference.

    Raises:
        ValueError: it is no question with one answer; names it.
    """
    system = record.turns[0].text if record.turns[0].role == "system" else ""
    turns = record.turns[1:] if system else record.turns
    if [turn.role for turn in turns] != ["user", "assistant"]:
        roles = ", ".join(turn.role for turn in turns)
        raise ValueError(
            f"{record}: has turns of {roles}; an evaluation asks one question: a user's turn and an answer"
        )
    # Turns are user and assistant from here on.
    question = turns[0].text.strip()
    # One list for both turns: numbers stand in the order of all placeholders, the question's first.
    waiting = {placeholder: list(getattr(record.coordinates, name)) for placeholder, name in LOCATIONS.items()}
    asked = _take(question, waiting)
    answered = _take(turns[1].text, waiting)
    places = _places(turns[1].text, answered)
    spans = [place for place in places if isinstance(place, TimeSpan)]
    # Where the time is given (SVG), it stands in the question.
    spans = spans or [place for place in _places(question, asked) if isinstance(place, TimeSpan)]
    caption = strip_coordinates(stand_in_bins(literal_text(turns[1].text)))
    return EvalSample(
        record.id,
        record.source,
        tuple(in_reading_order(record.media, [question])),
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


def split_media(text: str) -> tuple[str, str]:
    """The placeholders of media that a text begins with, and what comes behind them."""
    end = _LEADING_MEDIA.match(text).end()  # type: ignore[union-attr] # It matches the empty string too.
    return text[:end].strip(), text[end:]


def _take(text: str, waiting: dict[str, list[float]]) -> list[tuple[str, float]]:
    """The placeholders of a text with their numbers, which are taken from the front of the lists."""
    return [(placeholder, waiting[placeholder].pop(0)) for placeholder in find_placeholders(text)]


def _places(text: str, taken: Sequence[tuple[str, float]]) -> list[Box | TimeSpan]:
    """The boxes and spans of a text whose placeholders stand for numbers."""
    return parse_places(stand_in_bins(text), GroundingConfig(), [number for _, number in taken])


def _coordinates(taken: Sequence[tuple[str, float]]) -> Coordinates:
    return Coordinates.from_variables(
        {
            name: [number for placeholder, number in taken if placeholder == its_placeholder]
            for its_placeholder, name in LOCATIONS.items()
        }
    )
