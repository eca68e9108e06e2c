"""Data files: each line read and validated once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, VISUAL_TOKENS
from llava.data.record_store import RecordStore
from llava.types import Media, MediaKind, Record, Role, Turn

_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
_PLACEHOLDER: dict[MediaKind, str] = {"image": DEFAULT_IMAGE_TOKEN, "video": DEFAULT_VIDEO_TOKEN}
_RESERVED = re.compile("|".join(map(re.escape, VISUAL_TOKENS)))


def read_records(
    paths: str | Sequence[str], image_folder: str | None = None, video_folder: str | None = None
) -> RecordStore:
    """Read and validate data files.

    Args:
        paths: one file or several, ``.json`` (a list of samples) or ``.jsonl`` (one a line).
        image_folder: what relative image paths start from; by default the folder of their data file.
        video_folder: the same for videos.

    Raises:
        ValueError: a file or a sample is not as ``docs/data.md`` describes; names file and sample.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    store = RecordStore.write(_parse_files(paths, image_folder, video_folder))
    if not len(store):
        raise ValueError(f"--data_path {' '.join(paths)}: no samples, there is nothing to train on")
    return store


def _parse_files(paths: Iterable[str], image_folder: str | None, video_folder: str | None) -> Iterator[Record]:
    for path in paths:
        home = str(Path(path).absolute().parent)
        folders = [os.path.abspath(folder) if folder else home for folder in (image_folder, video_folder)]
        for sample, source in read_samples(path):
            yield parse_record(sample, source, *folders)


def read_samples(path: str) -> Iterator[tuple[Any, str]]:
    """The raw samples of a file, each with the words that say where it stands."""
    file = Path(path)
    if not file.exists():
        raise ValueError(f"--data_path {path}: no such file")
    if not file.is_file():
        raise ValueError(f"--data_path {path}: not a file")
    if file.suffix == ".jsonl":
        # Lines end with a newline only: JSON strings may hold the other characters that split text.
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse_json(line, f"{path}, line {number}"), f"{file.name}, line {number}"
    elif file.suffix == ".json":
        samples = _parse_json(file.read_bytes(), path)
        if not isinstance(samples, list):
            raise ValueError(f"{path}: expected a list of samples, found {_name(samples)}; use .jsonl for one a line")
        for number, sample in enumerate(samples, start=1):
            yield sample, f"{file.name}, sample {number}"
    else:
        raise ValueError(f"--data_path {path}: unknown kind of file {file.suffix!r}; known: .json, .jsonl")


def _parse_json(data: bytes, where: str) -> Any:
    if not data.strip():
        raise ValueError(f"{where}: the file is empty; expected a list of samples")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not a sample: brackets within brackets without end") from error


def parse_record(sample: Any, source: str, image_folder: str, video_folder: str) -> Record:
    """Validate one raw sample, see ``docs/data.md``.

    Args:
        sample: the parsed JSON.
        source: where it stands, for errors.
        image_folder, video_folder: what its relative paths start from.
    """
    if not isinstance(sample, dict):
        raise ValueError(f"{source}: expected an object, found {_name(sample)}")
    identity = sample.get("id")
    if not isinstance(identity, (str, int)) or isinstance(identity, bool) or identity == "":
        raise ValueError(f'{source}: needs an "id", a string or a number, found {identity!r}')
    where = f"sample {str(identity)!r} ({source})"
    _check_no_variables(sample.get("variables"), where)
    record = Record(
        id=str(identity),
        turns=tuple(_parse_turns(sample.get("conversations"), where)),
        media=(
            *_parse_media(sample.get("image"), "image", image_folder, where),
            *_parse_media(sample.get("video"), "video", video_folder, where),
        ),
        source=source,
        split=_parse_split(sample.get("meta"), where),
    )
    _check_placeholders(record)
    _check_split(record)
    return record


def _check_no_variables(variables: Any, where: str) -> None:
    if variables is not None and not isinstance(variables, dict):
        raise ValueError(f'{where}: "variables" must be an object of lists, found {_name(variables)}')
    if any((variables or {}).values()):
        raise ValueError(f'{where}: has "variables" (coordinates), which this version cannot train on yet')


def _parse_media(value: Any, kind: MediaKind, folder: str, where: str) -> list[Media]:
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f'{where}: "{kind}" must be a path or a list of paths, found {value!r}')
    return [Media(kind, os.path.normpath(os.path.join(folder, path))) for path in paths]


def _parse_turns(value: Any, where: str) -> Iterator[Turn]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'{where}: needs "conversations", a list of turns, found {value!r}')
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise ValueError(f"{where}, turn {number}: expected an object, found {_name(turn)}")
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"{where}, turn {number}: unknown role {role!r}; known: {', '.join(_ROLES)}")
        if not isinstance(text, str):
            raise ValueError(f'{where}, turn {number}: "value" must be a string, found {_name(text)}')
        _check_text(text, f"{where}, turn {number}")
        yield Turn(_ROLES[role], text)


def _check_text(text: str, where: str) -> None:
    if reserved := _RESERVED.search(text):
        raise ValueError(
            f"{where}: has {reserved.group()!r}, a name kept for visual tokens; "
            f"write {DEFAULT_IMAGE_TOKEN} or {DEFAULT_VIDEO_TOKEN} where media stand"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: has half a character ({text[error.start]!r}), as of an emoji that was cut in two"
        ) from error


def _parse_split(meta: Any, where: str) -> tuple[int, int] | None:
    if meta is not None and not isinstance(meta, dict):
        raise ValueError(f'{where}: "meta" must be an object, found {_name(meta)}')
    split = (meta or {}).get("split")
    if split is None:
        return None
    if not (isinstance(split, list) and [type(n) for n in split] == [int, int]) or not 0 <= split[0] <= split[1]:
        raise ValueError(f'{where}: "meta.split" must be [first, last] frame, found {split!r}')
    return split[0], split[1]


def _check_split(record: Record) -> None:
    num_videos = sum(media.kind == "video" for media in record.media)
    if record.split is not None and num_videos > 1:
        raise ValueError(f'{record}: has "meta.split" and {num_videos} videos; it can only speak of one')


def _check_placeholders(record: Record) -> None:
    text = " ".join(turn.text for turn in record.turns)
    for kind, placeholder in _PLACEHOLDER.items():
        wanted, given = text.count(placeholder), sum(media.kind == kind for media in record.media)
        if wanted != given:
            raise ValueError(
                f"{record}: its text has {wanted} {placeholder}, but the sample has {given} {kind} "
                f"file{'' if given == 1 else 's'}; there must be one for each"
            )


def _name(value: Any) -> str:
    return "null" if value is None else type(value).__name__
