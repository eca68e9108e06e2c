"""Records of one data file in an Arrow table, on disk or in memory, that worker processes share.

A stored file is a stream of Arrow batches (what ``datasets.Dataset.from_file`` opens), and behind it a
footer: JSON that says what the stream holds, its checksum, its length and a magic number. A file that was cut off has
no footer, one that was damaged another checksum.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import uuid
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

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


# The folder of indexes: what was parsed or counted once is mapped the next time.

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BYTES_HASHED_AT_ONCE = 1 << 22


def digest(*things: Any) -> str:
    """32 hexadecimal digits for plain values."""
    return hashlib.sha256(json.dumps(things, sort_keys=True, default=str).encode()).hexdigest()[:32]


def open_store(
    folder: Path, file: Path, settings: dict[str, Any], write: Callable[[Path, dict[str, Any]], RecordStore]
) -> RecordStore:
    """The records of a data file, from its index if that is there and still true.

    Args:
        folder: of the indexes.
        file: the data file.
        settings: what else its records depend on; each combination has an index of its own.
        write: makes the store from the data file, at a path and with the origin that its footer must have.

    Raises:
        ValueError: the file changed while it was read, or what ``write`` raises.
    """
    path = folder / f"{file.stem[:40]}-{digest(os.path.realpath(file), settings)[:16]}.arrow"
    origin = _describe(file)

    def read() -> RecordStore:
        store = RecordStore.open(path)
        if store.footer.origin != origin:
            raise DamagedStoreError(f"{file} has changed since it was written")
        return store

    def make(part: Path) -> None:
        write(part, origin)
        if _describe(file) != origin:
            raise ValueError(f"{file}: it changed while it was read; start again when it is complete")

    return _read_or_make(path, read, make)


def open_array(path: Path, length: int, dtype: type[np.generic], compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """A mapped array of ``length`` numbers, computed if it is not there.

    The file is NumPy's, with the CRC-32 of its bytes behind it.
    """
    import numpy as np

    def read() -> NDArray[Any]:
        content = path.read_bytes()
        checksum = int.from_bytes(content[-_CHECKSUM_BYTES:], "little")
        if zlib.crc32(memoryview(content)[:-_CHECKSUM_BYTES]) != checksum:
            raise DamagedStoreError("it is damaged")
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DamagedStoreError("it is damaged") from error
        if found.shape != (length,) or found.dtype != dtype:
            raise DamagedStoreError("it holds something else")
        return found

    def make(part: Path) -> None:
        with part.open("wb") as file:
            np.save(file, compute().astype(dtype), allow_pickle=False)
        checksum = zlib.crc32(part.read_bytes())
        with part.open("ab") as file:
            file.write(checksum.to_bytes(_CHECKSUM_BYTES, "little"))

    return _read_or_make(path, read, make)


def _describe(file: Path) -> dict[str, Any]:
    """What tells whether a data file is still the same: a hash of all of its bytes, some 5 GB a second from memory.

    Size and time do not tell: an editor or ``rsync`` may keep both.
    """
    import xxhash

    hasher = xxhash.xxh3_128()
    # A folder of ``datasets`` is all the files in it.
    for part in [file] if file.is_file() else sorted(path for path in file.rglob("*") if path.is_file()):
        hasher.update(f"{part.relative_to(file)}\0{part.stat().st_size}\0".encode(errors="surrogateescape"))
        with part.open("rb", buffering=0) as stream:
            while piece := stream.read(_BYTES_HASHED_AT_ONCE):
                hasher.update(piece)
    return {"path": os.path.realpath(file), "hash": hasher.hexdigest()}


def _read_or_make(path: Path, read: Callable[[], T], make: Callable[[Path], None]) -> T:
    """``read()`` what lies at ``path``, and let ``make`` write it (to the path it is given) if it cannot be read."""

    def read_own() -> T:
        _check_own_file(path)
        return read()

    _check_own_folder(path.parent)
    with suppress(DamagedStoreError, OSError):
        return read_own()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path) as alone:
            try:
                return read_own()
            except FileNotFoundError:
                pass
            except (DamagedStoreError, PermissionError) as error:
                logger.warning("%s is made anew: %s", path, error)
            if alone:
                for part in path.parent.glob(f"{path.name}.*.part"):
                    part.unlink(missing_ok=True)
            _make(path, make)
    except OSError as error:
        raise ValueError(
            f"{path}: the index cannot be written: {error}; give another folder with --data_cache_dir"
        ) from error
    return read()


def _check_own_folder(folder: Path) -> None:
    """A ValueError for a folder of another user, who could put anything into it."""
    try:
        owner = folder.stat().st_uid
    except OSError:
        return  # It is made, or making it says what is wrong.
    if not _is_own(owner):
        raise ValueError(
            f"{folder}: the folder of indexes belongs to another user (number {owner}); give one of your own with "
            "--data_cache_dir"
        )


def _check_own_file(path: Path) -> None:
    """A DamagedStoreError for what is no file of this user's own; links are not followed."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise DamagedStoreError("it is a link" if stat.S_ISLNK(status.st_mode) else "it is no file")
    if not _is_own(status.st_uid):
        raise DamagedStoreError(f"it belongs to another user (number {status.st_uid})")


def _is_own(owner: int) -> bool:
    return not hasattr(os, "geteuid") or owner == os.geteuid()


def _make(path: Path, make: Callable[[Path], None]) -> None:
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        make(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Wait for the lock of a path; False where the system or its files have no locks.

    The lock is a file of its own, which is never written to. An OSError if a link lies in its place.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    name = path.with_name(path.name + ".lock")
    if name.is_symlink():
        raise OSError(f"its lock {name} is a link; remove it")
    lock = os.open(name, flags, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            raise OSError(f"{name} is no file")
        try:
            _wait_for_lock(lock)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)


def _wait_for_lock(lock: int) -> None:
    """Lock an open file, for as long as it is open; an OSError where there are no locks."""
    try:
        import fcntl
    except ImportError as error:  # Windows, where whoever comes first need not be waited for
        raise OSError("no locks on this system") from error
    fcntl.flock(lock, fcntl.LOCK_EX)
