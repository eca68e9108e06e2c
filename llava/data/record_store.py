"""Records of one data file in an Arrow table, on disk or in memory, that worker processes share.

A stored file is a stream of Arrow batches (what ``datasets.Dataset.from_file`` opens), and behind it a
footer: JSON that says what the stream holds, its checksum, its length and a magic number. A file that was cut off has
no footer, one that was damaged another checksum.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llava.types import NO_COORDINATES, Coordinates, Media, MediaKind, Record, Turn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VERSION = 2
"""Of the stored form; a file of another version is not read but written anew."""

_MAGIC = b"LLAVARC2"
_LENGTH_BYTES = 8
_CHECKSUM_BYTES = 4
_ROWS_AT_ONCE = 4096
_BYTES_AT_ONCE = 1 << 24
NUMBERS = ("num_images", "num_videos", "num_turns", "text_bytes", "num_coordinates")
"""Columns beside the record itself, for questions that are asked of all records at once."""


class DamagedStoreError(ValueError):
    """A stored file that is cut off, changed or of another version."""


@dataclass(frozen=True)
class Footer:
    """What a store says of itself.

    Attributes:
        origin: what it was made from, as its maker describes it.
        faults: rows of bad samples, with what is wrong with each.
        repeated: rows whose id an earlier row has already, each with that row.
        notes: what else its maker wants to know again, as JSON has it.
        size, checksum: bytes of the stream and their CRC-32; 0 in memory.
    """

    origin: dict[str, Any] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    repeated: dict[int, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    checksum: int = 0
    version: int = VERSION

    def to_bytes(self) -> bytes:
        text = json.dumps(asdict(self)).encode()
        checksum = zlib.crc32(text).to_bytes(_CHECKSUM_BYTES, "little")
        return text + checksum + len(text).to_bytes(_LENGTH_BYTES, "little") + _MAGIC

    @classmethod
    def read(cls, path: Path) -> Footer:
        """The footer of a stored file.

        Raises:
            DamagedStoreError: there is none, or it is another version's.
        """
        tail = _CHECKSUM_BYTES + _LENGTH_BYTES + len(_MAGIC)
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - tail, 0))
            checksum = int.from_bytes(file.read(_CHECKSUM_BYTES), "little")
            length, magic = int.from_bytes(file.read(_LENGTH_BYTES), "little"), file.read()
            if magic != _MAGIC or length + tail > size:
                raise DamagedStoreError("it is cut off")
            file.seek(size - tail - length)
            text = file.read(length)
        if zlib.crc32(text) != checksum:
            raise DamagedStoreError("its end is damaged")
        entries = json.loads(text)
        if entries["version"] != VERSION:
            raise DamagedStoreError("another version of llava wrote it")
        if entries["size"] != size - tail - length:
            raise DamagedStoreError("its length is wrong")
        for name in ("faults", "repeated"):
            entries[name] = {int(row): value for row, value in entries[name].items()}
        return cls(**entries)


class RecordStore(Sequence[Record]):
    """The records of a data file.

    A million small Python objects would be copied into every worker as reference counts touch them;
    pages of a mapped file are shared, by forked and by spawned processes alike, and the buffers of a table in
    memory by forked ones.

    Args:
        data: the Arrow stream, or the file that begins with it.
        footer: what is known of it.
    """

    def __init__(self, data: Path | Any, footer: Footer) -> None:
        from datasets import Dataset

        self._data = data
        self.footer = footer
        dataset = Dataset.from_file(str(data)) if isinstance(data, Path) else Dataset.from_buffer(data)
        self._table = dataset.data
        self._column = self._table.column("record")

    @classmethod
    def open(cls, path: Path) -> RecordStore:
        """Map a stored file.

        Raises:
            DamagedStoreError: it is not what was written, or another version wrote it.
        """
        footer = Footer.read(path)
        if _checksum(path, footer.size) != footer.checksum:
            raise DamagedStoreError("its checksum is wrong")
        return cls(path, footer)

    @classmethod
    def write(
        cls,
        records: Iterable[Record],
        path: Path | None = None,
        origin: dict[str, Any] | None = None,
        notes: dict[str, Any] | None = None,
    ) -> RecordStore:
        """Store records, one by one as they come.

        Args:
            records: in order, those of bad samples (which have a ``fault``) among them.
            path: the file to write, with its footer; without it the records stay in memory.
            origin, notes: for the footer; notes are looked at when all records have come.
        """
        import pyarrow as pa

        with pa.BufferOutputStream() if path is None else pa.OSFile(str(path), "wb") as sink:
            faults, hashes = _write_stream(records, sink)
            data = sink.getvalue() if path is None else path
        draft = cls(data, Footer())
        repeated = _find_repeated(draft, faults, hashes)
        if path is None:
            return cls(data, Footer(origin or {}, faults, repeated, notes or {}))
        size = path.stat().st_size
        footer = Footer(origin or {}, faults, repeated, notes or {}, size, _checksum(path, size))
        del draft
        with path.open("ab") as file:
            file.write(footer.to_bytes())
        return cls(path, footer)

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordStore, (self._data, self.footer)

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = int(index) + len(self) if index < 0 else int(index)
        if not 0 <= row < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return _load(self._column[row].as_py())

    def media(self, rows: Sequence[int]) -> Iterator[tuple[int, list[Media]]]:
        """The media of some rows, each with its row; many times faster than the records themselves."""
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = [int(row) for row in rows[start : start + _ROWS_AT_ONCE]]
            for row, text in zip(block, self._column.take(block).to_pylist(), strict=True):
                yield row, [_load_media(*medium) for medium in json.loads(text)[2]]

    def numbers(self, name: str) -> NDArray[np.int32]:
        """One of the columns ``NUMBERS``; zero at bad samples."""
        return self._table.column(name).to_numpy()


def _write_stream(records: Iterable[Record], sink: Any) -> tuple[dict[int, str], array[int]]:
    """Write the batches; the faults by row, and for all other rows in order the hash of their ids."""
    import pyarrow as pa

    faults: dict[int, str] = {}
    hashes: array[int] = array("q")
    schema = pa.schema({"record": pa.large_string(), **dict.fromkeys(NUMBERS, pa.int32())})
    numbered = enumerate(records)
    with pa.ipc.new_stream(sink, schema) as writer:
        while chunk := list(islice(numbered, _ROWS_AT_ONCE)):
            faults |= {row: record.fault for row, record in chunk if record.fault is not None}
            hashes.extend(hash(record.id) for _, record in chunk if record.fault is None)
            columns = zip(*(_columns(record) for _, record in chunk), strict=True)
            batch = [pa.array(column, kind.type) for column, kind in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(batch, schema=schema))
    return faults, hashes


def _columns(record: Record) -> tuple[str, int, int, int, int, int]:
    kinds = [media.kind for media in record.media]
    text_bytes = sum(len(turn.text.encode()) for turn in record.turns)
    num_coordinates = sum(map(len, record.coordinates.to_variables().values()))
    media = kinds.count("image"), kinds.count("video")
    return _dump(record), *media, len(record.turns), text_bytes, num_coordinates


def _find_repeated(store: RecordStore, faults: Iterable[int], hashes: array[int]) -> dict[int, int]:
    """Rows whose id stands in an earlier row, each with the first such row."""
    import numpy as np

    rows = np.delete(np.arange(len(store)), list(faults))
    values = np.frombuffer(hashes, np.int64)
    order = np.argsort(values, kind="stable")
    same = np.flatnonzero(np.diff(values[order]) == 0)
    # Equal hashes are only likely to be equal ids.
    candidates = sorted({int(rows[order[i]]) for pair in same for i in (pair, pair + 1)})
    repeated, seen = {}, dict[str, int]()
    for row in candidates:
        first = seen.setdefault(store[row].id, row)
        if first != row:
            repeated[row] = first
    return repeated


def _checksum(path: Path, size: int) -> int:
    with path.open("rb") as file:
        checksum = 0
        for piece in _pieces(file, size):
            checksum = zlib.crc32(piece, checksum)
        return checksum


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (piece := file.read(min(size, _BYTES_AT_ONCE))):
        size -= len(piece)
        yield piece


def _dump(record: Record) -> str:
    turns = [[turn.role, turn.text] for turn in record.turns]
    media = [_dump_media(media) for media in record.media]
    coordinates = record.coordinates.to_variables() if record.coordinates else None
    return json.dumps([record.id, turns, media, record.source, record.split, record.fault, coordinates])


def _dump_media(media: Media) -> list[Any]:
    entry: list[Any] = [media.kind, media.path, media.root]
    return [*entry, media.frames, media.fps] if media.frames or media.fps else entry


def _load_media(kind: MediaKind, path: str, root: int, frames: Sequence[str] = (), fps: float = 0.0) -> Media:
    return Media(kind, path, root, tuple(frames), fps)


def _load(row: str) -> Record:
    identity, turns, media, source, split, fault, coordinates = json.loads(row)
    return Record(
        id=identity,
        turns=tuple(Turn(*turn) for turn in turns),
        media=tuple(_load_media(*medium) for medium in media),
        source=source,
        split=None if split is None else (split[0], split[1]),
        fault=fault,
        coordinates=NO_COORDINATES if coordinates is None else Coordinates.from_variables(coordinates),
    )
