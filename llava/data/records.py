"""Data files: each sample read and validated once."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, VISUAL_TOKENS
from llava.data.coordinates import check_coordinates, parse_variables
from llava.data.data_files import DataEntry, find_entries
from llava.data.media_folder import find_media
from llava.data.mixture import Mixture, Part, choose_rows, cut_rows
from llava.data.raw_samples import read_samples, read_values
from llava.data.record_index import open_store
from llava.data.record_store import RecordStore
from llava.types import Media, MediaKind, Record, Role, Turn

__all__ = ["parse_record", "read_records", "read_samples"]

logger = logging.getLogger(__name__)

_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
_PLACEHOLDER: dict[MediaKind, str] = {"image": DEFAULT_IMAGE_TOKEN, "video": DEFAULT_VIDEO_TOKEN}
_RESERVED = re.compile("|".join(map(re.escape, VISUAL_TOKENS)))


def read_records(
    paths: str | Sequence[str],
    image_folder: str | None = None,
    video_folder: str | None = None,
    *,
    cache_dir: str | None = None,
    seed: int = 42,
    on_bad_sample: str = "error",
    allow_duplicate_ids: bool = False,
    allow_outside_paths: bool = False,
    flag: str = "--data_path",
) -> Mixture:
    """Read and validate data files.

    Args:
        paths: one word or several: ``.json`` (a list of samples) and ``.jsonl`` (one a line) files, patterns such
            as ``prefix{a,b}.json``, YAML mixtures.
        image_folder: what relative image paths start from; by default the folder of their data file.
        video_folder: the same for videos.
        cache_dir: where the records are indexed; without it they stay in memory and are parsed every time.
        seed: of random samples.
        on_bad_sample: ``error`` raises over the first bad sample, ``skip`` keeps its place: its record has a ``fault``.
        allow_duplicate_ids: whether samples of one file may share an id.
        allow_outside_paths: whether the paths of media may lead out of the folders that they start from.
        flag: its name, for errors.

    Raises:
        ValueError: a file or a sample is not as ``docs/data.md`` describes; names file and sample.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    cache = Path(cache_dir) if cache_dir else None
    parts: list[Part] = []
    drawn: Counter[str] = Counter()
    for entry in find_entries(paths, flag):
        folders = (entry.data_folder or image_folder, entry.data_folder or video_folder)
        stores = [
            _open_file(file, *folders, entry.source, cache, on_bad_sample, allow_outside_paths) for file in entry.files
        ]
        faults = [_judge(store, on_bad_sample, allow_duplicate_ids) for store in stores]
        # The names of its files, and how often they were drawn from before, tell an entry: not its place, which
        # changes with its neighbours, nor its folder, which changes with the machine.
        names = "/".join(Path(file).name for file in entry.files)
        parts += _sample(entry, stores, faults, f"{seed} {names} {drawn[names]}")
        drawn[names] += 1
    if not sum(len(part.rows) for part in parts):
        raise ValueError(f"{flag} {' '.join(paths)}: no samples, there is nothing to train on")
    return Mixture(parts, cache)


def _open_file(
    path: str,
    image_folder: str | None,
    video_folder: str | None,
    media_source: str | None,
    cache: Path | None,
    on_bad_sample: str,
    allow_outside_paths: bool,
) -> RecordStore:
    """The records of one data file, from its index or newly parsed."""
    home = str(Path(path).absolute().parent)
    settings: dict[str, Any] = {
        "image_folder": os.path.abspath(image_folder or home),
        "video_folder": os.path.abspath(video_folder or home),
        "media_source": media_source,
        "allow_outside_paths": allow_outside_paths,
    }

    def records() -> Iterator[Record]:
        for sample, source in read_values(path):
            try:
                if isinstance(sample, ValueError):
                    raise sample
                yield parse_record(sample, source, **settings)
            except ValueError as error:
                if on_bad_sample == "error":
                    raise
                identity = sample.get("id", "") if isinstance(sample, dict) else ""
                yield Record(str(identity), (), source=source, fault=str(error))

    def write(index: Path, origin: dict[str, Any]) -> RecordStore:
        logger.info("indexing %s", path)
        return RecordStore.write(records(), index, origin)

    return RecordStore.write(records()) if cache is None else open_store(cache, Path(path), settings, write)


def _judge(store: RecordStore, on_bad_sample: str, allow_duplicate_ids: bool) -> dict[int, str]:
    """What is wrong with rows of a store, repeated ids among it; the first is raised if bad samples are an error."""
    faults = dict(store.footer.faults)
    for row, first in {} if allow_duplicate_ids else store.footer.repeated.items():
        faults[row] = (
            f"{store[row]}: {store[first].source} has the same id; give each its own, or allow it with "
            "--allow_duplicate_ids"
        )
    if faults and on_bad_sample == "error":
        raise ValueError(faults[min(faults)])
    return faults


def _sample(
    entry: DataEntry, stores: Sequence[RecordStore], faults: Sequence[dict[int, str]], seed: str
) -> Iterator[Part]:
    """The parts that an entry takes of its stores."""
    try:
        rows = choose_rows(entry.sampling, sum(map(len, stores)), seed)
    except ValueError as error:
        raise ValueError(f"{entry.name}: {error}") from error
    start = 0
    for store, of_store in zip(stores, faults, strict=True):
        yield Part(store, cut_rows(rows, start, start + len(store)), of_store)
        start += len(store)


def parse_record(
    sample: Any,
    source: str,
    image_folder: str,
    video_folder: str,
    media_source: str | None = None,
    allow_outside_paths: bool = False,
) -> Record:
    """Validate one raw sample, see ``docs/data.md``.

    Args:
        sample: the parsed JSON.
        source: where it stands, for errors.
        image_folder, video_folder: what its relative paths start from, or the folders that its source is in.
        media_source: the sub-folder of both that its relative paths start from, in place of the sample's
            own ``source``; "" is none.
        allow_outside_paths: whether its paths may lead out of both folders.
    """
    if not isinstance(sample, dict):
        raise ValueError(f"{source}: expected an object, found {_name(sample)}")
    identity = sample.get("id")
    if not isinstance(identity, (str, int)) or isinstance(identity, bool) or identity == "":
        raise ValueError(f'{source}: needs an "id", a string or a number, found {identity!r}')
    where = f"sample {str(identity)!r} ({source})"
    folder = _parse_source(sample.get("source"), where) if media_source is None else media_source
    record = Record(
        id=str(identity),
        turns=tuple(_parse_turns(sample.get("conversations"), where)),
        media=(
            *_parse_media(sample.get("image"), "image", image_folder, folder, allow_outside_paths, where),
            *_parse_media(sample.get("video"), "video", video_folder, folder, allow_outside_paths, where),
        ),
        source=source,
        split=_parse_split(sample.get("meta"), where),
        coordinates=parse_variables(sample.get("variables"), where),
    )
    _check_placeholders(record)
    check_coordinates(record)
    _check_split(record)
    return record


def _parse_source(value: Any, where: str) -> str:
    if not isinstance(value, str | None):
        raise ValueError(f'{where}: "source" must be the name of a folder, found {_name(value)}')
    return value or ""


def _parse_media(value: Any, kind: MediaKind, root: str, source: str, anywhere: bool, where: str) -> list[Media]:
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f'{where}: "{kind}" must be a path or a list of paths, found {value!r}')
    return [find_media(os.path.join(source, path), kind, root, anywhere, where) for path in paths]


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
