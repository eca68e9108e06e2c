"""Annotation files: their entries, each of which can say what is wrong with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from llava.data.json_text import parse_json
from llava.data.media_files import find_media, find_root
from llava.data.raw_samples import read_samples
from llava.geometry import Box, TimeSpan
from llava.messages import shorten
from llava.types import Media, MediaKind

SENTENCE_KEYS = ("expression", "sent", "sents", "sentence", "sentences", "caption", "captions", "query", "text")
IMAGE_KEYS = ("image", "file_name", "img_path", "image_path", "img_id")
VIDEO_KEYS = ("video", "video_path", "video_id", "vid")
ID_KEYS = ("id", "sent_id", "question_id", "qid")


@dataclass(frozen=True)
class MediaFolders:
    """Where the media of annotation files lie; without a folder, beside the annotation file (see ``read_records``).

    ``allow_outside_paths`` lets their paths lead out of the folder.
    """

    images: str | None = None
    videos: str | None = None
    allow_outside_paths: bool = False

    def find(self, path: str, kind: MediaKind, entry: Entry) -> Media:
        """The file that an entry names; a ValueError if it lies outside the folder."""
        # The file's own folder, as for data files.
        folder = self.images if kind == "image" else self.videos
        root = find_root(folder, str(Path(entry.file).absolute().parent))
        return find_media(path, kind, root, self.allow_outside_paths or folder == "", entry.source)


@dataclass(frozen=True)
class Entry:
    """One entry of an annotation file.

    Attributes:
        values: its keys.
        file: path of the annotation file.
        source: where it stands ("testA.json, entry 3").
    """

    values: Mapping[str, object]
    file: str
    source: str

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.source}: {message}")

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def first(self, *names: str) -> object:
        """The value of the first of several keys that is there; None without any."""
        return next((self.values[name] for name in names if name in self), None)

    def key(self, *names: str) -> object:
        """What entries refer to each other by, under the first of several keys that is there; None without any."""
        value = self.first(*names)
        if isinstance(value, list | dict):
            raise self.error(f"{_listed(names)} must be a number or a text, found {shorten(value)}")
        return value

    def identity(self, otherwise: object) -> str:
        # Benchmarks name them in many ways; without any the place in the file will do.
        return str(value) if (value := self.first(*ID_KEYS)) is not None else str(otherwise)

    def text(self, *names: str) -> str:
        """The text under the first of several keys that is there."""
        value = self.first(*names)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"needs {_listed(names)}, a text, found {value!r:.80}")
        return value.strip()

    def texts(self, *names: str) -> list[str]:
        """The texts under a key that holds one or a list of them; RefCOCO's ``{"sent": text}`` counts as a text."""
        value = self.first(*names)
        # RefCOCO: {"sent": "the left cup", "tokens": [...]}.
        items = [item.get("sent") if isinstance(item, dict) else item for item in _as_list(value)]
        found = [item.strip() for item in items if isinstance(item, str) and item.strip()]
        if not found or len(found) < len(items):
            raise self.error(f"needs {_listed(names)}, a text or a list of texts, found {value!r:.80}")
        return found

    def numbers(self, count: int, *names: str) -> tuple[float, ...]:
        """As many finite numbers under the first of several keys that is there."""
        return self.check_numbers(self.first(*names), count, _listed(names))

    def check_numbers(self, value: object, count: int, name: str) -> tuple[float, ...]:
        """As many finite numbers; a ValueError that names what was expected otherwise."""
        if not (isinstance(value, list | tuple) and len(value) == count and all(map(is_number, value))):
            raise self.error(f"needs {name}, {count} numbers, found {value!r:.80}")
        return tuple(map(float, value))

    def positive(self, *names: str) -> float | None:
        """A number above zero under the first of several keys that is there; None without any."""
        value = self.first(*names)
        if value is None:
            return None
        if not is_number(value) or value <= 0:
            raise self.error(f"{_listed(names)} must be a number above 0, found {value!r:.80}")
        return float(value)


def read_entries(path: str) -> list[Entry]:
    """The entries of a ``.jsonl`` file or of a ``.json`` file that holds a list.

    Raises:
        ValueError: the file or one of its lines is not what it should be; names it.
    """
    return [as_entry(value, path, source) for value, source in read_samples(path)]


def as_entry(value: object, file: str, source: str) -> Entry:
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected an object, found {type(value).__name__}")
    return Entry(value, file, source)


def list_entries(content: Mapping[str, object], name: str, file: str) -> list[Entry]:
    """The entries of a list inside an annotation file that holds an object."""
    values = content.get(name)
    if not isinstance(values, list):
        raise ValueError(f'{file}: needs "{name}", a list, found {type(values).__name__}')
    return [
        as_entry(value, file, f"{Path(file).name}, {name} {number}") for number, value in enumerate(values, start=1)
    ]


def read_object(path: str) -> dict[str, object] | None:
    """What a ``.json`` file holds if that is an object; None for a file of another kind or with a list."""
    if Path(path).suffix != ".json":
        return None
    # Annotation files are read whole: lists of images and boxes refer to each other.
    data = Path(path).read_bytes()
    if not data.lstrip().startswith(b"{"):
        return None
    content: dict[str, object] = parse_json(data, path)
    return content


def read_lines(path: str) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, each with the words that say where it stands."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    # Not splitlines, which would also end a line at characters that a sentence may have.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield line.strip(), f"{Path(path).name}, line {number}"


def check_box(numbers: tuple[float, ...], entry: Entry) -> Box:
    """A box of fractions, cut at the picture's edge; a ValueError for one that is none."""
    # Annotators draw a little beyond the edge; what is left must still be a box.
    box = Box(*(min(max(number, 0.0), 1.0) for number in numbers))
    if box.x2 <= box.x1 or box.y2 <= box.y1:
        raise entry.error(
            f"its box {[round(n, 4) for n in numbers]} (x1 y1 x2 y2, as shares of the picture) is empty or lies outside"
        )
    return box


def check_span(start: float, end: float, entry: Entry) -> TimeSpan:
    """A span of fractions, cut at the ends of the clip; a ValueError for one that ends before it begins."""
    # Equal ends are a moment; the first and last frame may be one.
    if end < start:
        raise entry.error(f"its span ends ({end:g}) before it begins ({start:g})")
    return TimeSpan(min(max(start, 0.0), 1.0), min(max(end, 0.0), 1.0))


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    # True is an int to Python, and NaN a float.
    # Whole numbers of JSON may be larger than any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _listed(names: tuple[str, ...]) -> str:
    return " or ".join(f'"{name}"' for name in names)
