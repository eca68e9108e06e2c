"""From data files to Records: each sample read, brought into one form and validated once.

read_records   files, patterns, mixtures -> a Mixture, out of the index where it is there
parse_record   one raw sample            -> a Record, or the error that names file, sample and remedy
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, PLACEHOLDER, VISUAL_TOKEN
from llava.data.cache import own_folder
from llava.data.files import choose_rows, find_entries
from llava.data.index import Mixture, Part, RecordStore, open_store
from llava.data.media_files import ANIMATED_SUFFIXES, find_root, is_picture_name, read_media, temporary_folder
from llava.data.placeholders import PLACEHOLDERS, placeholder_kinds
from llava.data.raw_samples import PlainText, can_be_cut, read_block, read_blocks, read_samples
from llava.data.record_rows import make_batch, make_batches
from llava.data.spellings import CONVERSATION_KEYS, HABITS, name_type, read_raw, suggest
from llava.data.worker_pool import map_blocks, serve
from llava.grounding.samples import parse_variables
from llava.io import num_cores
from llava.storage import read_again
from llava.types import ERROR, Media, MediaKind, Record, Role, Turn

if TYPE_CHECKING:
    import pyarrow as pa

_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
_LONGEST_ID = 1000
_LONGEST_TEXT = 4_000_000
"""Characters: what is longer takes a tokenizer gigabytes and minutes, and at 60 MB ends the process."""
_MOST_MEDIA = 10_000
_LONG_FILE = 1 << 24
"""Bytes from which on a file is worth the start of other processes, a third of a second each."""
_MOST_PROCESSES = 8
"""More of them would wait for this one, which reads the file."""


class Notes(TypedDict):
    """What is worth a word of a data file: samples with keys that nothing reads, with habits, and without an id."""

    unread: dict[str, int]
    habits: dict[str, int]
    without_id: int


def read_records(
    paths: str | Sequence[str],
    image_folder: str | None = None,
    video_folder: str | None = None,
    *,
    cache_dir: str | None = None,
    seed: int = 42,
    on_bad_sample: str = ERROR,
    allow_duplicate_ids: bool = False,
    allow_outside_paths: bool = False,
    ignore_keys: Sequence[str] = (),
    text_column: str | None = None,
    flag: str = "--data_path",
) -> Mixture:
    """Read and validate data files.

    Args:
        paths: one word or several: data files (``.json``, ``.jsonl``, ``.parquet``, ``.arrow``, ``.txt``,
            ``.txt.gz``), folders, patterns such as ``prefix{a,b}.json`` or ``*.train``, YAML mixtures.
        image_folder: what relative image paths start from; by default the folder of their data file. An empty string
            takes paths as they are: relative ones start from the current folder, absolute ones lead anywhere.
        video_folder: the same for videos.
        cache_dir: where the records are indexed; without it they stay in memory and are parsed every time.
        seed: of random samples.
        on_bad_sample: ``error`` raises over the first bad sample, ``skip`` keeps its place: its record has a ``fault``.
        allow_duplicate_ids: whether samples of one file may share an id.
        allow_outside_paths: whether the paths of media may lead out of the folders that they start from.
        ignore_keys: keys of samples that are not looked at, whatever they seem to hold.
        text_column: the key of samples without turns that are a text and nothing else.
        flag: its name, for errors.

    Raises:
        ValueError: a file or a sample is not as ``docs/data.md`` describes; names file and sample.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    cache = own_folder(Path(cache_dir)) if cache_dir else None
    parts: list[Part] = []
    drawn: Counter[str] = Counter()
    for entry in find_entries(paths, flag):
        stores = []
        for file in entry.files:
            home = str(Path(file).absolute().parent)
            settings: dict[str, Any] = {
                "image_folder": find_root(entry.data_folder or image_folder, home),
                "video_folder": find_root(entry.data_folder or video_folder, home),
                "media_source": entry.source,
                "outside": [
                    kind
                    for kind, folder in (("image", image_folder), ("video", video_folder))
                    if allow_outside_paths or (not entry.data_folder and folder == "")
                ],
                "ignore_keys": tuple(ignore_keys),
                "text_column": text_column,
                "media_dir": cache and cache.absolute() / "media",
            }
            stores.append(_open_file(file, settings, cache, on_bad_sample))
        # The names of its files, and how often they were drawn from before, tell an entry: not its place, which
        # changes with its neighbours, nor its folder, which changes with the machine.
        names = "/".join(Path(file).name for file in entry.files)
        try:
            # Over all files of an entry together: "first:100" of two files are 100 samples.
            chosen = choose_rows(entry.sampling, [len(store) for store in stores], f"{seed} {names} {drawn[names]}")
        except ValueError as error:
            raise ValueError(f"{entry.name}: {error}") from error
        drawn[names] += 1
        for file, store, rows in zip(entry.files, stores, chosen, strict=True):
            parts.append(Part(store, rows, _find_faults(store, on_bad_sample, allow_duplicate_ids), file))
    if not sum(len(part.rows) for part in parts):
        raise ValueError(f"{flag} {' '.join(paths)}: no samples, there is nothing to train on")
    return Mixture(parts, cache)


def _open_file(path: str, settings: dict[str, Any], cache: Path | None, on_bad_sample: str) -> RecordStore:
    """The records of one data file, from its index or newly parsed; ``settings`` are arguments of ``parse_record``."""

    def open_file() -> RecordStore:
        notes = _new_notes()  # Counted as samples are read, kept with the index.
        return open_store(Path(path), cache, settings, partial(read, notes), notes)

    def read(notes: Notes) -> Iterator[pa.RecordBatch]:
        processes = min(num_cores(), _MOST_PROCESSES)
        if processes > 1 and can_be_cut(path) and Path(path).stat().st_size >= _LONG_FILE:
            return _read_in_parallel(path, settings, on_bad_sample, notes, processes)
        return make_batches(_parse_all(read_samples(path, keep_errors=True), settings, on_bad_sample, notes))

    return read_again(open_file, path)


def _new_notes() -> Notes:
    return {"unread": {}, "habits": {}, "without_id": 0}


def _parse_all(
    samples: Iterable[tuple[Any, str]], settings: Mapping[str, Any], on_bad_sample: str, notes: Notes
) -> Iterator[Record]:
    """The records of raw samples or their ValueErrors, each with the words that say where it stands."""
    for sample, source in samples:
        try:
            if isinstance(sample, ValueError):
                raise sample
            yield parse_record(sample, source, **settings, notes=notes)
        except ValueError as error:
            if on_bad_sample == ERROR:
                raise
            # It keeps its place, so that rows, and with them the order of the data, are those of the file.
            identity = sample.get("id", "") if isinstance(sample, dict) else ""
            yield Record(str(identity)[:_LONGEST_ID], (), source=source, fault=str(error))


def _read_in_parallel(
    path: str, settings: Mapping[str, Any], on_bad_sample: str, notes: Notes, num_processes: int
) -> Iterator[pa.RecordBatch]:
    """The records of a data file, which other processes parse: the same, in the same order, with the same errors."""
    import pyarrow as pa

    # Bytes of media are for this process to keep as long as it lives.
    media_dir = settings["media_dir"] or temporary_folder()
    job = [path, {**settings, "media_dir": str(media_dir)}, on_bad_sample]
    for answer in map_blocks(_answer_blocks, json.dumps(job).encode(), read_blocks(path), num_processes, path):
        stream = pa.ipc.open_stream(answer)
        _add_notes(notes, json.loads(stream.schema.metadata[b"notes"]))
        yield stream.read_next_batch()


def _answer_blocks() -> None:
    """What each of these processes runs."""
    serve(_prepare)


def _prepare(job: bytes) -> Callable[[bytes], bytes]:
    """From blocks of a data file to streams with a batch of its records, the notes on them in the schema."""
    import pyarrow as pa

    path, settings, on_bad_sample = json.loads(job)
    settings["media_dir"] = Path(settings["media_dir"])

    def answer(block: bytes) -> bytes:
        notes = _new_notes()
        batch = make_batch(_parse_all(read_block(path, block), settings, on_bad_sample, notes))
        batch = batch.replace_schema_metadata({"notes": json.dumps(notes)})
        with pa.BufferOutputStream() as sink:
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            return sink.getvalue().to_pybytes()

    return answer


def _add_notes(notes: Notes, more: Notes) -> None:
    for counts, added in ((notes["unread"], more["unread"]), (notes["habits"], more["habits"])):
        for key, count in added.items():
            counts[key] = counts.get(key, 0) + count
    notes["without_id"] += more["without_id"]


def _find_faults(store: RecordStore, on_bad_sample: str, allow_duplicate_ids: bool) -> dict[int, str]:
    """What is wrong with rows of a store, repeated ids among it; the first is raised if bad samples are an error."""
    # A copy: the footer is the index's own, and repeated ids may be allowed the next time.
    faults = dict(store.footer.faults)
    if not allow_duplicate_ids:
        for row, first in store.footer.repeated.items():
            faults[row] = (
                f"{store[row]}: {store[first].source} has the same id; give each its own, or allow it with "
                "--allow_duplicate_ids"
            )
    if faults and on_bad_sample == ERROR:
        raise ValueError(faults[min(faults)])
    return faults


def parse_record(
    sample: object,
    source: str,
    image_folder: str,
    video_folder: str,
    media_source: str | None = None,
    outside: Collection[MediaKind] = (),
    ignore_keys: Sequence[str] = (),
    media_dir: Path | None = None,
    text_column: str | None = None,
    notes: Notes | None = None,
) -> Record:
    """Validate one raw sample, see ``docs/data.md``.

    Args:
        sample: the parsed JSON.
        source: where it stands, for errors.
        image_folder, video_folder: what its relative paths start from, or the folders that its source is in.
        media_source: the sub-folder of both that its relative paths start from, in place of the sample's
            own ``source``; "" is none.
        outside: the kinds of media whose paths may lead out of their folder.
        ignore_keys: keys that are not looked at, whatever they seem to hold.
        media_dir: where media that are given as bytes are written; by default a folder that goes with the process.
        text_column: the key of a sample without turns that is a text and nothing else.
        notes: counts what is worth a word.
    """
    if text_column is not None and isinstance(sample, dict) and not any(map(sample.get, CONVERSATION_KEYS)):
        sample = _read_column(sample, text_column, source)
    if isinstance(sample, PlainText):
        return _make_text(sample.text, source)
    if not isinstance(sample, dict):
        raise ValueError(f"{source}: expected an object, found {name_type(sample)}")
    identity = _parse_id(sample.get("id"), source)
    where = f"sample {identity!r} ({source})"
    folder = _parse_source(sample.get("source"), where) if media_source is None else media_source

    def read(value: object, kind: MediaKind) -> Media:
        root = image_folder if kind == "image" else video_folder
        return read_media(value, kind, root, folder, kind in outside, media_dir, where)

    # 1. All spellings of turns and media in one form; 2. each image or video as a file; 3. what must fit together.
    raw = read_raw(sample, where, ignore_keys)
    turns = tuple(_parse_turns(raw.turns, where))
    text = " ".join([turn.text for turn in turns])
    shown = placeholder_kinds(text)
    _check_amount(len(text), sum(map(len, raw.media.values())), where)
    clips = _gather_frames(raw.media["video"], shown.count("video"), where)
    frame_rate = _parse_frame_rate(sample.get("meta"), clips, where)
    media = [read(value, "image") for value in raw.media["image"]]
    for clip in clips:
        if isinstance(clip, list) and clip:  # A clip that is given as its frames.
            frames = [read(frame, "video") for frame in clip]
            media.append(replace(frames[0], frames=tuple(frame.path for frame in frames), fps=frame_rate))
        else:
            media.append(replace(read(clip, "video"), fps=frame_rate))
    split = _parse_split(sample.get("meta"), where)
    _check_placeholders(shown, media, raw.unread, where)
    if split is not None and (num_videos := shown.count("video")) > 1:
        raise ValueError(f'{where}: has "meta.split" and {num_videos} videos; it can only speak of one')
    coordinates = parse_variables(sample.get("variables"), text, where)
    if notes is not None and (raw.unread or raw.habits):
        for counts, found in ((notes["unread"], raw.unread), (notes["habits"], raw.habits)):
            for key in dict.fromkeys(found):  # Each once, in the order in which the sample has them.
                counts[key] = counts.get(key, 0) + 1
    if notes is not None:
        notes["without_id"] += sample.get("id") is None
    return Record(identity, turns, tuple(media), source, split, coordinates=coordinates)


def _read_column(sample: Mapping[str, object], column: str, source: str) -> PlainText:
    """The text of a row of a table."""
    if column not in sample:
        raise ValueError(
            f'{source}: has neither turns nor "{column}", which --text_column names; it has: '
            f"{', '.join(map(str, sample)) or 'nothing'}"
        )
    value = sample[column]
    if not isinstance(value, str) or not value.strip():
        found = "an empty text" if isinstance(value, str) else name_type(value)
        raise ValueError(f'{source}: "{column}" (--text_column) must be a text, found {found}')
    return PlainText(value)


def _make_text(text: str, source: str) -> Record:
    """The record of a text: a turn of the assistant's, in which a placeholder is a word like others."""
    _check_amount(len(text), 0, source)
    turns = _parse_turns([("assistant", PLACEHOLDER.sub(lambda match: "\\" + match.group(), text))], source)
    return Record(_parse_id(None, source), tuple(turns), source=source)


def _check_amount(num_characters: int, num_media: int, where: str) -> None:
    """A ValueError for a sample that would take gigabytes before anything of it is cut."""
    if num_characters > _LONGEST_TEXT:
        raise ValueError(
            f"{where}: its text has {num_characters:,} characters, and a sample has at most {_LONGEST_TEXT:,}; write "
            "it as several samples"
        )
    if num_media > _MOST_MEDIA:
        raise ValueError(f"{where}: has {num_media:,} images and videos, and a sample has at most {_MOST_MEDIA:,}")


def _parse_id(value: object, source: str) -> str:
    """The id of a sample; one that has none is named after its file and its place there."""
    if value is None:
        # "captions.json, sample 12" becomes "captions.json:12".
        file, _, place = source.rpartition(", ")
        return f"{file}:{place.rpartition(' ')[2]}"
    # pandas turns a column of whole numbers with a gap into 1.0, 2.0 ...
    if isinstance(value, float) and value.is_integer():
        raise ValueError(
            f'{source}: "id" is {value!r}, a number with a point; write {int(value)}, or "{value!r}" in quotes'
        )
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise ValueError(f'{source}: needs an "id", a string or a whole number, or none at all; found {value!r:.80}')
    identity = str(value)
    if len(identity) > _LONGEST_ID:
        raise ValueError(f'{source}: its "id" has {len(identity)} characters; give it at most {_LONGEST_ID}')
    return identity


def _parse_source(value: object, where: str) -> str:
    if not isinstance(value, str | None):
        raise ValueError(f'{where}: "source" must be the name of a folder, found {name_type(value)}')
    return value or ""


def _parse_turns(turns: Sequence[tuple[object, str]], where: str) -> list[Turn]:
    parsed = []
    for number, (role, text) in enumerate(turns, start=1):
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"{where}, turn {number}: unknown role {role!r:.80}; known: {', '.join(_ROLES)}")
        if "<" in text and (reserved := VISUAL_TOKEN.search(text)):
            raise ValueError(
                f"{where}, turn {number}: has {reserved.group()!r}, a name kept for visual tokens; "
                f"write {DEFAULT_IMAGE_TOKEN} or {DEFAULT_VIDEO_TOKEN} where media stand"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise ValueError(
                f"{where}, turn {number}: has half a character ({half!r}), as of an emoji that was cut in two"
            ) from error
        parsed.append(Turn(_ROLES[role], text))
    return parsed


def _gather_frames(values: Sequence[object], num_clips: int, where: str) -> Sequence[object]:
    """The clips of a sample; a list of pictures becomes the frames of one clip where the text has one ``<video>``."""
    names = [value for value in values if isinstance(value, str) and is_picture_name(value)]
    # A single picture is a clip of its own: an animation, or one frame.
    if len(values) < 2 or len(names) < len(values):
        return values
    if num_clips == 1:
        return [names]
    if num_clips == len(names) and not any(name.lower().endswith(ANIMATED_SUFFIXES) for name in names):
        raise ValueError(
            f'{where}: its "video" has {len(values)} pictures and its text {num_clips} <video>; give the frames of '
            'each clip as a list of their own, [["1.jpg", "2.jpg"], ["3.jpg"]], or pictures as "image" with <image>'
        )
    return values


def _parse_frame_rate(meta: object, clips: Sequence[object], where: str) -> float:
    """Frames a second of clips that are lists or folders of frames; 0 where the sample has none or does not say."""
    # A video file knows its own rate; only frames have to be told theirs.
    fps = meta.get("fps") if isinstance(meta, dict) else None
    if fps is None or not any(
        isinstance(clip, list) or (isinstance(clip, str) and not Path(clip).suffix) for clip in clips
    ):
        return 0.0
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf"):
        raise ValueError(f'{where}: "meta.fps" must be the frames a second of a clip, above 0, found {fps!r:.80}')
    return float(fps)


def _parse_split(meta: object, where: str) -> tuple[int, int] | None:
    if not isinstance(meta, dict | None):
        raise ValueError(f'{where}: "meta" must be an object, found {name_type(meta)}')
    split = (meta or {}).get("split")
    if split is None:
        return None
    if not (isinstance(split, list) and [type(n) for n in split] == [int, int]) or not 0 <= split[0] <= split[1]:
        raise ValueError(f'{where}: "meta.split" must be [first, last] frame, found {split!r}')
    return split[0], split[1]


def _check_placeholders(shown: Sequence[MediaKind], media: Sequence[Media], unread: Sequence[str], where: str) -> None:
    """A ValueError unless each image or video has its placeholder, and each placeholder its file."""
    if list(shown) == [item.kind for item in media]:
        return
    for placeholder, kind in PLACEHOLDERS.items():
        wanted, given = shown.count(kind), sum(item.kind == kind for item in media)
        if wanted == given:
            continue
        if wanted > given:
            way = rf"; where the text means the word and no {kind}, write \{placeholder}"
            hints = [f'; nothing reads "{key}"{hint}' for key in unread if (hint := suggest(key))]
        else:
            way, hints = f"; write {placeholder} where the {kind} is to be seen", []
        raise ValueError(
            f"{where}: its text has {wanted} {placeholder}, but the sample has {given} {kind} "
            f"file{'' if given == 1 else 's'}; there must be one for each{''.join(hints)}{way}"
        )


def describe_notes(mixture: Mixture) -> list[str]:
    """Lines about keys of data files that nothing reads, habits and samples without an id, with their numbers."""
    lines = []
    for label, store in {part.label: part.store for part in mixture.parts}.items():
        notes = store.footer.notes
        for key, count in notes.get("unread", {}).items():
            level, _, name = key.rpartition(".")
            place = f" of a {level}" if level else ""
            samples, have = ("1 sample", "has") if count == 1 else (f"{count} samples", "have")
            lines.append(
                f'{label}: nothing reads the key "{name}"{place}, which {samples} of {len(store)} {have}{suggest(key)}'
            )
        for habit, count in notes.get("habits", {}).items():
            samples, have = ("1 sample", "has") if count == 1 else (f"{count} samples", "have")
            lines.append(f"{label}: {samples} of {len(store)} {have} {HABITS[habit]}")
        if count := notes.get("without_id", 0):
            lines.append(f"{label}: {count} of {len(store)} samples have no id; they are named after file and place")
    return lines
