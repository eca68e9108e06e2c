"""The spellings of the field: a raw sample with media beside its text, in its turns or in parts of them -> one form.

What is read, in words: ``docs/data.md``. A text keeps a placeholder wherever an image or a video stands, and the media
come in the order of their placeholders, each as the file has it (a path, bytes, an object of either).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from llava.constants import PLACEHOLDER
from llava.data.placeholders import PLACEHOLDERS
from llava.messages import shorten
from llava.types import MediaKind

T = TypeVar("T")

CONVERSATION_KEYS = ("conversations", "messages", "conversation")
MEDIA_KEYS: dict[MediaKind, tuple[str, str]] = {"image": ("image", "images"), "video": ("video", "videos")}
METADATA_KEYS = frozenset({
    "author", "category", "dataset", "data_source", "date", "domain", "image_id", "lang", "language", "license",
    "metadata", "model", "score", "split", "subset", "tags", "task", "title", "topic", "url", "video_id",
})  # fmt: skip
"""Keys that nothing reads and that nothing is said of."""

EMPTY_MEDIA, VIDEO_AS_IMAGE = "empty_media", "video_as_image"
HABITS = {
    EMPTY_MEDIA: "an empty string where a file of media would stand, which is none",
    VIDEO_AS_IMAGE: 'a "video" that the text shows as <image>, which is read as <video>',
}
"""Habits of the LLaVA family that are read as they are meant, in words."""

_ALL_MEDIA_KEYS = frozenset(key for keys in MEDIA_KEYS.values() for key in keys)
_OTHER_SPELLINGS = frozenset({*CONVERSATION_KEYS[1:], *(keys[1] for keys in MEDIA_KEYS.values())})
_READ_KEYS = ("id", "source", "meta", "variables", *CONVERSATION_KEYS, *MEDIA_KEYS["image"], *MEDIA_KEYS["video"])
_TURN_KEYS = ("from", "role", "value", "content", *MEDIA_KEYS["image"], *MEDIA_KEYS["video"])
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA_PARTS: dict[str, MediaKind] = {
    "image": "image", "image_url": "image", "input_image": "image", "video": "video", "video_url": "video",
    "input_video": "video",
}  # fmt: skip
_PART_SOURCES = ("path", "url", "bytes", "base64")
"""Keys of a part, beside the name of its kind, that say where its image or video is."""
_PART_OPTIONS = ("type", "detail")
_QUIET_KEYS = METADATA_KEYS | {f"part.{option}" for option in _PART_OPTIONS}
_NAMES = {kind: placeholder for placeholder, kind in PLACEHOLDERS.items()}

_MEDIA_NAME = re.compile(
    r"(?:input|main|query|raw)?(?:image|img|picture|pic|photo|frame|clip|video|vid|movie|gif|media|visual)s?"
    r"(?:file|list)?(?:path|file|filename|name|url|uri|bytes|src|data|base64|b64)?s?\d*"
)
_MEDIA_FILE = re.compile(
    r"(?i)[^\n]+\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|avif|mp4|m4v|mov|mkv|webm|avi|mpe?g|wmv|flv|ogv|3gp)"
)
_PLACEHOLDERS = re.compile(f"({PLACEHOLDER.pattern})")
_PLAIN_NAMES = ("image", "images", "video", "videos")


@dataclass
class RawSample:
    """A raw sample in one form.

    Attributes:
        turns: the role, as it is written, and the text of each turn.
        media: of each kind what the sample gives, in the order of its placeholders; more or fewer than these where
            the sample is wrong.
        unread: keys that nothing reads; those within turns and parts as "turn.KEY" and "part.KEY".
        habits: what it has of the habits of the LLaVA family that are worth a word, of ``HABITS``.
    """

    turns: list[tuple[object, str]]
    media: dict[MediaKind, list[object]]
    unread: list[str] = field(default_factory=list)
    habits: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Piece:
    """A stretch of text, or an image or a video: its kind, and what it is unless the sample's own list says so."""

    text: str = ""
    kind: MediaKind | None = None
    given: object = None
    is_part: bool = False


def read_raw(sample: Mapping[str, object], where: str, ignored: Collection[str] = ()) -> RawSample:
    """Bring a sample into one form.

    Args:
        sample: the object of a data file.
        where: names it, for errors.
        ignored: keys that are not looked at, of ``--ignore_keys``.

    Raises:
        ValueError: it has no turns, a turn or a part is not as it should be, or it has no media but a key that
            nothing reads and that looks like one: it would be trained on blind.
    """
    if ignored:
        sample = {key: value for key, value in sample.items() if key not in ignored}
    unread = [key for key, value in sample.items() if key not in _READ_KEYS and not _is_empty(value)]
    if (plain := _read_plain(sample, unread)) is not None:
        return plain
    turns: list[tuple[object, str]] = []
    # What the sample lists beside its turns waits for placeholders, and parts, that bring no file of their own.
    waiting = {kind: _only_value(sample, keys, where, _as_list) for kind, keys in MEDIA_KEYS.items()}
    given: dict[MediaKind, list[object]] = {"image": [], "video": []}
    own: dict[MediaKind, list[object]] = {"image": [], "video": []}
    raw_turns = _turns_of(sample, unread, where)
    read = [_read_turn(turn, f"{where}, turn {number}", unread) for number, turn in enumerate(raw_turns, start=1)]
    holders = [one for one in (sample, *raw_turns) if isinstance(one, dict) and not _ALL_MEDIA_KEYS.isdisjoint(one)]
    habits = [EMPTY_MEDIA] if any(holder.get(key) == "" for holder in holders for key in _ALL_MEDIA_KEYS) else []
    if waiting["video"] and _shows_videos_as_images(waiting, [piece for _, pieces in read for piece in pieces]):
        habits.append(VIDEO_AS_IMAGE)
    for role, pieces in read:
        for piece in pieces:
            if VIDEO_AS_IMAGE in habits and piece.kind == "image":
                piece.kind = "video"
            if piece.kind is None:
                continue
            if piece.given is not None:
                given[piece.kind].append(piece.given)
                own[piece.kind].append(piece.given)
            elif waiting[piece.kind]:
                given[piece.kind].append(waiting[piece.kind].pop(0))
        turns.append((role, _join(pieces)))
    # What is left over makes the numbers differ, which parse_record refuses.
    for kind, rest in waiting.items():
        # Some files list beside the turns what stands in their parts already.
        given[kind] += [] if rest == own[kind] else rest
    if not any(given.values()):
        _check_not_blind(sample, unread, where)
    return RawSample(turns, given, [key for key in unread if key not in _QUIET_KEYS], habits)


def _read_plain(sample: Mapping[str, object], unread: Sequence[str]) -> RawSample | None:
    """What ``read_raw`` makes of a sample in the one spelling that nearly all have, in a third of its time.

    Those are turns of a role and a text, and beside them no more than one path; None for every other sample.
    """
    image, video = sample.get("image"), sample.get("video")
    raw_turns, path = sample.get("conversations"), video if image is None else image
    if type(raw_turns) is not list or not raw_turns or not _OTHER_SPELLINGS.isdisjoint(sample):
        return None
    # Nothing that is read as media, and a key that may mean some: that is for ``_check_not_blind``.
    if unread if path is None else type(path) is not str or not path or (image is not None and video is not None):
        return None
    turns: list[tuple[object, str]] = []
    for turn in raw_turns:
        if type(turn) is not dict or len(turn) != 2:
            return None
        role, text = (
            (turn.get("from"), turn.get("value")) if "from" in turn else (turn.get("role"), turn.get("content"))
        )
        # <image> may be the family's word for the video.
        if type(role) is not str or type(text) is not str or (video is not None and "<image>" in text):
            return None
        turns.append((role, text))
    media: dict[MediaKind, list[object]] = {"image": [image] if image else [], "video": [video] if video else []}
    return RawSample(turns, media, [key for key in unread if key not in _QUIET_KEYS])


def _shows_videos_as_images(waiting: Mapping[MediaKind, Sequence[object]], pieces: Sequence[_Piece]) -> bool:
    """Whether a sample has videos and no images, and an ``<image>`` for each: LLaVA-NeXT has no other placeholder."""
    shown = [piece for piece in pieces if piece.kind is not None]
    are_placeholders = all(piece.kind == "image" and piece.given is None for piece in shown)
    return bool(shown) and are_placeholders and not waiting["image"] and len(waiting["video"]) == len(shown)


def suggest(key: str) -> str:
    """What a key that nothing reads may have been meant to be, as the end of a sentence; "" if nothing is near."""
    name = key.rpartition(".")[2].lower()
    known = _TURN_KEYS if key.startswith("turn.") else _READ_KEYS
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return f'; did you mean "{near[0]}"?'
    kind = _kind_of_name(name)
    return f'; did you mean "{kind}"?' if kind else ""


def _kind_of_name(key: str) -> MediaKind | None:
    """The kind of media that a key speaks of, if it does."""
    name = re.sub(r"[^a-z0-9]", "", key.lower())
    if not (_MEDIA_NAME.fullmatch(name) or difflib.get_close_matches(name, _PLAIN_NAMES, n=1, cutoff=0.8)):
        return None
    return "video" if re.search("v[aeio]*d|clip|frame|movie", name) else "image"


def _check_not_blind(sample: Mapping[str, object], unread: Sequence[str], where: str) -> None:
    """A ValueError for a sample without media that has a key which looks as if it held some."""
    for key in unread:
        level, _, name = key.rpartition(".") if key not in sample else ("", "", key)
        value = next((held for held in _values_of(sample, level, name) if _looks_like_media(name, held)), None)
        if value is not None:
            remedy = "remove the key" if level else f"give --ignore_keys {key}"
            meant = suggest(key).removeprefix("; ") or 'media are read from "image" and "video".'
            raise ValueError(
                f'{where}: has no media, but "{key}" ({shorten(value)}), which nothing reads: it would be trained on '
                f"blind; {meant} If it is no image or video, {remedy}"
            )


def _values_of(sample: Mapping[str, object], level: str, name: str) -> Iterator[object]:
    """What the keys of one name hold: the sample's own or, of a level "turn" or "part", those of its turns or parts."""
    lists = [value for key in CONVERSATION_KEYS if isinstance(value := sample.get(key), list)]
    turns = [turn for turns in lists for turn in turns if isinstance(turn, dict)]
    contents = [_first(turn, "value", "content") for turn in turns]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    holders = turns if level == "turn" else parts if level == "part" else [sample]
    yield from (holder[name] for holder in holders if name in holder)


def _looks_like_media(key: str, value: object) -> bool:
    # The first of a list tells for all.
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        return _kind_of_name(key) is not None or bool(first.get("bytes"))
    if not isinstance(first, str):
        return isinstance(first, bytes) or hasattr(first, "tobytes")
    if _kind_of_name(key) is None:  # The name of a file in a key of any name; an address may be where text is from.
        return bool(_MEDIA_FILE.fullmatch(first)) and "://" not in first
    # In "image" or "frames" any words count; in "image_name" or "clip" they must look like a path, or like data.
    plain = re.sub(r"[^a-z]", "", key.lower()).removesuffix("s") in ("image", "img", "video", "frame", "photo")
    return bool(first.strip()) and (plain or bool(re.search(r"[/\\.]|^data:", first)) or len(first) > 200)


def _turns_of(sample: Mapping[str, object], unread: Sequence[str], where: str) -> list[object]:
    # "conversations" of LLaVA, "messages" of OpenAI and TRL: two that differ are no sample.
    turns = _only_value(sample, CONVERSATION_KEYS, where, lambda value: value)
    if isinstance(turns, dict) and turns and all(isinstance(column, list) for column in turns.values()):
        # A sequence of objects, as ``datasets`` stores it: an object of lists.
        turns = [dict(zip(turns, row, strict=False)) for row in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list) or not turns:
        near = next((key for key in unread if difflib.get_close_matches(key.lower(), CONVERSATION_KEYS, n=1)), None)
        hint = f'; did you mean "{near}" to be that?' if near else ""
        if not hint and isinstance(sample.get("text"), str):
            hint = "; where a sample is a text and nothing else, give --text_column text"
        raise ValueError(f'{where}: needs "conversations", a list of turns, found {shorten(turns)}{hint}')
    return turns


def _only_value(source: Mapping[str, object], keys: Sequence[str], where: str, read: Callable[[object], T]) -> T:
    """What the one of several keys holds that is there; a ValueError where two of them say different things.

    Args:
        source: a sample or a turn.
        keys: spellings of one key.
        where: names the sample, for errors.
        read: brings a value into the form that is compared and returned.
    """
    present = [key for key in keys if key in source]
    if len(present) < 2:  # Nearly always: a million samples are read this way.
        return read(source[present[0]] if present else None)
    found = {key: source[key] for key in present if not _is_empty(source[key])}
    values = [read(value) for value in found.values()]
    if any(value != values[0] for value in values[1:]):
        raise ValueError(f"{where}: has both {' and '.join(map(repr, found))}, and they differ; keep one of them")
    if values:
        return values[0]
    return read(source[present[0]])


def _read_turn(turn: object, where: str, unread: list[str]) -> tuple[object, list[_Piece]]:
    """The role of a turn and its pieces."""
    if not isinstance(turn, dict):
        raise ValueError(f"{where}: expected an object, found {name_type(turn)}")
    # ShareGPT says from and value, OpenAI role and content.
    role, content = _first(turn, "from", "role"), _first(turn, "value", "content")
    _note(unread, "turn", turn, _TURN_KEYS)
    if isinstance(content, str):
        pieces = list(_cut(content))
    elif isinstance(content, list):
        pieces = [piece for part in content for piece in _read_part(part, where, unread)]
    else:
        others = "" if content is not None else f" (its keys: {shorten(list(turn))})"
        raise ValueError(
            f'{where}: "value" must be a string, found {name_type(content)}{others}; or give a list of parts'
        )
    return role, pieces if _ALL_MEDIA_KEYS.isdisjoint(turn) else [*_shown_first(turn, pieces, where), *pieces]


def _shown_first(turn: Mapping[str, object], pieces: Sequence[_Piece], where: str) -> Iterator[_Piece]:
    """Gives the media that stand in a turn beside its text to its placeholders; those left over come before it."""
    for kind, keys in MEDIA_KEYS.items():
        media = _only_value(turn, keys, where, _as_list)
        places = [piece for piece in pieces if piece.kind == kind and piece.given is None]
        for piece, value in zip(places, media, strict=False):
            piece.given = value
        yield from (_Piece(kind=kind, given=value, is_part=True) for value in media[len(places) :])


def _read_part(part: object, where: str, unread: list[str]) -> Iterator[_Piece]:
    """The pieces of one part of a turn."""
    if isinstance(part, str):
        yield from _cut(part)
        return
    if not isinstance(part, dict):
        raise ValueError(f"{where}: expected a part with a type, found {name_type(part)}")
    named = part.get("type")
    if named is None:  # {"image": "a.jpg"} or {"text": "..."}, as some processors take them.
        named = next((key for key in ("text", *_MEDIA_PARTS) if not _is_empty(part.get(key))), None)
    if named in _TEXT_PARTS:
        text = part.get("text")
        if not isinstance(text, str):
            raise ValueError(f'{where}: "text" of a part must be a string, found {name_type(text)}')
        _note(unread, "part", part, ("type", "text"))
        yield from _cut(text)
        return
    kind = _MEDIA_PARTS.get(named) if isinstance(named, str) else None
    if kind is None:
        known = ", ".join((*_TEXT_PARTS[:1], *_MEDIA_PARTS))
        raise ValueError(f"{where}: a part has the unknown type {shorten(named)}; known: {known}")
    # {"type": "image", "image": "a.jpg"}, {"type": "image", "path": "a.jpg"}, or
    # {"type": "image_url", "image_url": {"url": "a.jpg"}}, whose object is read with all other media.
    own = [key for key, its_kind in _MEDIA_PARTS.items() if its_kind == kind]
    _note(unread, "part", part, ("type", *own, *_PART_SOURCES))
    sources = {key: part[key] for key in (*own, *_PART_SOURCES) if not _is_empty(part.get(key))}
    if sources.keys() <= {"path", "bytes"}:
        # Together they are one file: bytes, and the name they had.
        yield _Piece(kind=kind, given=sources or None, is_part=True)
    elif len(sources) == 1:
        yield _Piece(kind=kind, given=next(iter(sources.values())), is_part=True)
    else:
        raise ValueError(f"{where}: a part of type {named!r} has {' and '.join(sources)}; it can only have one of them")


def _cut(text: str) -> Iterator[_Piece]:
    """The text between placeholders, and these as media that the sample names elsewhere."""
    for i, piece in enumerate(_PLACEHOLDERS.split(text) if "<" in text else [text]):
        if i % 2:
            yield _Piece(kind=PLACEHOLDERS[piece])
        elif piece:
            yield _Piece(piece)


def _join(pieces: Sequence[_Piece]) -> str:
    """The text of a turn. Parts are joined as the LLaVA family does: an image or a video has a line before words."""
    text, behind_part = "", False
    for piece in pieces:
        if piece.kind is None:
            text += "\n" if behind_part and not piece.text[:1].isspace() else ""
            text += piece.text
        else:
            # A backslash that ends a text is its own, and does not escape the placeholder behind it.
            text += "\n" if piece.is_part and text.endswith("\\") else ""
            text += _NAMES[piece.kind]
        behind_part = piece.is_part
    return text


def _as_list(value: object) -> list[object]:
    """Media of a key: one or several."""
    return [] if _is_empty(value) else list(value) if isinstance(value, list | tuple) else [value]


def _first(source: Mapping[str, object], *keys: str) -> object:
    """The first of some keys that is there and not null."""
    for key in keys:
        if (value := source.get(key)) is not None:
            return value
    return None


def _note(unread: list[str], level: str, source: Mapping[str, object], known: Collection[str]) -> None:
    unread += [f"{level}.{key}" for key, value in source.items() if key not in known and not _is_empty(value)]


def _is_empty(value: object) -> bool:
    """Null, or nothing in it: what columns hold where a row has nothing for them."""
    if isinstance(value, dict):
        return all(_is_empty(item) for item in value.values())
    return value is None or (isinstance(value, (str, bytes, list, tuple)) and not value)


def name_type(value: object) -> str:
    return "null" if value is None else type(value).__name__
