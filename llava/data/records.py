"""Data files: each line read and validated once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, VISUAL_TOKENS
from llava.types import Media, MediaKind, Record, Turn

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_PLACEHOLDER: dict[MediaKind, str] = {"image": DEFAULT_IMAGE_TOKEN, "video": DEFAULT_VIDEO_TOKEN}
_RESERVED = re.compile("|".join(map(re.escape, VISUAL_TOKENS)))


class RecordStore(Sequence[Record]):
    """Records held as one Arrow column of JSON text.

    A million small Python objects would be copied into every worker as reference counts touch them;
    one buffer of bytes is shared.
    """

    def __init__(self, entries: list[tuple[dict[str, Any], str, str]]) -> None:
        from datasets import Dataset

        rows = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        self._rows = Dataset.from_dict({"entry": rows})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        sample, source, folder = json.loads(self._rows[int(index)]["entry"])
        return parse_record(sample, source, folder, folder)

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))


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
    entries = []
    for path in [paths] if isinstance(paths, str) else paths:
        home = str(Path(path).parent)
        for sample, source in read_samples(path):
            record = parse_record(sample, source, image_folder or home, video_folder or home)
            resolved = {**sample, "id": record.id, "image": None, "video": None}
            for kind in ("image", "video"):
                resolved[kind] = [os.path.abspath(m.path) for m in record.media if m.kind == kind] or None
            entries.append((resolved, source, ""))
    if not entries:
        raise ValueError(f"no samples in {paths}; the training data is empty")
    return RecordStore(entries)


def read_samples(path: str) -> Iterator[tuple[Any, str]]:
    """The raw samples of a file, each with the words that say where it stands."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--data_path {path}: no such file")
    if file.suffix not in (".json", ".jsonl"):
        raise ValueError(f"--data_path {path}: unknown kind of file {file.suffix!r}; known: .json, .jsonl")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield _parse_json(line, f"{path}, line {number}"), f"{file.name}, line {number}"
        return
    samples = _parse_json(text, path)
    if not isinstance(samples, list):
        raise ValueError(
            f"{path}: expected a list of samples, found {type(samples).__name__}; use .jsonl for one a line"
        )
    for number, sample in enumerate(samples, start=1):
        yield sample, f"{file.name}, sample {number}"


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def parse_record(sample: Any, source: str, image_folder: str, video_folder: str) -> Record:
    """Validate one raw sample, see ``docs/data.md``.

    Args:
        sample: the parsed JSON.
        source: where it stands, for errors.
        image_folder, video_folder: what its relative paths start from.
    """
    if not isinstance(sample, dict):
        raise ValueError(f"{source}: expected an object, found {type(sample).__name__}")
    identity = sample.get("id")
    if not isinstance(identity, (str, int)):
        raise ValueError(f'{source}: needs an "id", a string or a number, found {identity!r}')
    where = f"sample {str(identity)!r} ({source})"
    if any((sample.get("variables") or {}).values()):
        raise ValueError(f'{where}: has "variables" (coordinates), which this version cannot train on yet')
    media = (
        *_parse_media(sample.get("image"), "image", image_folder, where),
        *_parse_media(sample.get("video"), "video", video_folder, where),
    )
    record = Record(
        id=str(identity),
        turns=tuple(_parse_turns(sample.get("conversations"), where)),
        media=media,
        source=source,
        split=_parse_split(sample.get("meta"), where),
    )
    _check_placeholders(record)
    return record


def _parse_media(value: Any, kind: MediaKind, folder: str, where: str) -> Iterator[Media]:
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f'{where}: "{kind}" must be a path or a list of paths, found {value!r}')
    return (Media(kind, os.path.join(folder, path)) for path in paths)


def _parse_turns(value: Any, where: str) -> Iterator[Turn]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'{where}: needs "conversations", a list of turns, found {value!r}')
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise ValueError(f"{where}, turn {number}: expected an object, found {type(turn).__name__}")
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if role not in _ROLES:
            raise ValueError(f"{where}, turn {number}: unknown role {role!r}; known: {', '.join(_ROLES)}")
        if not isinstance(text, str):
            raise ValueError(f'{where}, turn {number}: "value" must be a string, found {type(text).__name__}')
        if reserved := _RESERVED.search(text):
            raise ValueError(
                f"{where}, turn {number}: has {reserved.group()!r}, a name kept for visual tokens; "
                f"write {DEFAULT_IMAGE_TOKEN} or {DEFAULT_VIDEO_TOKEN} where media stand"
            )
        yield Turn(_ROLES[role], text)  # type: ignore[arg-type]


def _parse_split(meta: Any, where: str) -> tuple[int, int] | None:
    split = meta.get("split") if isinstance(meta, dict) else None
    if split is None:
        return None
    if (
        not (isinstance(split, list) and len(split) == 2 and all(isinstance(n, int) for n in split))
        or not 0 <= split[0] <= split[1]
    ):
        raise ValueError(f'{where}: "meta.split" must be [first, last] frame, found {split!r}')
    return split[0], split[1]


def _check_placeholders(record: Record) -> None:
    text = " ".join(turn.text for turn in record.turns)
    for kind, placeholder in _PLACEHOLDER.items():
        wanted, given = text.count(placeholder), sum(media.kind == kind for media in record.media)
        if wanted != given:
            raise ValueError(
                f"{record}: its text has {wanted} {placeholder}, but the sample has {given} {kind} "
                f"file{'' if given == 1 else 's'}; there must be one for each"
            )
