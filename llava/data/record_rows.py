"""Records as rows of a table: the record itself as JSON, and numbers for questions about all of them at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from json.encoder import encode_basestring_ascii as quote
from typing import TYPE_CHECKING

from llava.data.words import count_words
from llava.types import NO_COORDINATES, Coordinates, Media, MediaKind, Record, Turn

if TYPE_CHECKING:
    import pyarrow as pa

NUMBERS = (
    "num_images", "num_videos", "num_turns", "text_bytes", "num_coordinates", "num_words", "num_user_words",
    "num_answer_words",
)  # fmt: skip
"""Columns beside the record itself, for questions about all records at once."""

RECORDS_AT_ONCE = 4096
"""Rows of a batch of a stored table."""


def make_batches(records: Iterable[Record]) -> Iterator[pa.RecordBatch]:
    """Records as batches; no more than one of them is in memory."""
    records = iter(records)
    while chunk := list(islice(records, RECORDS_AT_ONCE)):
        yield make_batch(chunk)


def make_batch(records: Iterable[Record]) -> pa.RecordBatch:
    """Rows of a store, with two columns that are not stored: what is wrong with a record, and a hash of its id."""
    import pyarrow as pa
    import xxhash

    rows = [
        (
            dump_record(record),
            *count_parts(record),
            record.fault,
            # Python's own hash differs from process to process.
            xxhash.xxh3_64_intdigest(record.id.encode("utf-8", "surrogatepass")),
        )
        for record in records
    ]
    schema = pa.schema({**stored_types(), "fault": pa.large_string(), "hash": pa.uint64()})
    columns = zip(*rows, strict=True)
    return pa.record_batch(
        [pa.array(column, kind.type) for column, kind in zip(columns, schema, strict=True)], schema=schema
    )


def stored_types() -> dict[str, pa.DataType]:
    import pyarrow as pa

    return {"record": pa.large_string(), **dict.fromkeys(NUMBERS, pa.int32())}


def count_parts(record: Record) -> tuple[int, ...]:
    """The ``NUMBERS`` of a record."""
    kinds = [media.kind for media in record.media]
    text_bytes = num_words = 0
    words = {"user": 0, "assistant": 0, "system": 0}
    for turn in record.turns:
        text_bytes += len(turn.text) if turn.text.isascii() else len(turn.text.encode())
        words_of_turn = count_words(turn.text)
        num_words += words_of_turn
        words[turn.role] += words_of_turn
    has_coordinates = record.coordinates is not NO_COORDINATES
    num_coordinates = sum(map(len, vars(record.coordinates).values())) if has_coordinates else 0
    of_text = (len(record.turns), text_bytes, num_coordinates, num_words, words["user"], words["assistant"])
    return kinds.count("image"), kinds.count("video"), *of_text


def dump_record(record: Record) -> str:
    # A list, not an object: names of keys in a million rows would be half of the file. Written as ``json.dumps`` would,
    # which takes twice as long over one so short.
    turns = ", ".join([f"[{quote(turn.role)}, {quote(turn.text)}]" for turn in record.turns])
    media = ", ".join(map(_dump_media, record.media))
    split = "null" if record.split is None else json.dumps(record.split)
    fault = "null" if record.fault is None else quote(record.fault)
    has_coordinates = record.coordinates is not NO_COORDINATES and record.coordinates
    coordinates = json.dumps(vars(record.coordinates)) if has_coordinates else "null"
    return f"[{quote(record.id)}, [{turns}], [{media}], {quote(record.source)}, {split}, {fault}, {coordinates}]"


def _dump_media(file: Media) -> str:
    if file.frames or file.fps:
        return json.dumps([file.kind, file.path, file.root, file.frames, file.fps])
    return f"[{quote(file.kind)}, {quote(file.path)}, {file.root}]"


def load_record(row: str) -> Record:
    identity, turns, media, source, split, fault, coordinates = json.loads(row)
    return Record(
        id=identity,
        turns=tuple(Turn(*turn) for turn in turns),
        media=tuple(load_media(*fields) for fields in media),
        source=source,
        split=None if split is None else (split[0], split[1]),
        fault=fault,
        coordinates=NO_COORDINATES if coordinates is None else Coordinates.from_variables(coordinates),
    )


def load_media(kind: MediaKind, path: str, root: int, frames: Sequence[str] = (), fps: float = 0.0) -> Media:
    return Media(kind, path, root, tuple(frames), fps)
