"""Records in Arrow tables: written once, mapped by every process, read in any order.

RecordStore   the records of one data file, in memory or in a file of the index folder
Mixture       chosen records of several stores, one behind the other: what training reads
open_store    a store out of the index folder, written anew when its data file is another

``datasets`` maps the tables. The file around a table is our own, a stream of Arrow batches with a footer of JSON
behind it: unlike a folder of ``Dataset.save_to_disk`` it knows the content of its data file, and shows a flipped bit
or a missing end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsInt, overload

from llava.constants import RELEASE
from llava.data.cache import append_footer, open_array, open_or_write, read_footer
from llava.data.record_rows import RECORDS_AT_ONCE, load_media, load_record, make_batches, stored_types
from llava.io import hash_json
from llava.messages import shorten_text
from llava.storage import naming
from llava.types import Media, Record

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from llava.data.files import Rows

logger = logging.getLogger(__name__)

VERSION = 4
_HASH_DIGITS = 32
_BYTES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Footer:
    """What is known of a store as a whole.

    Attributes:
        origin: the data file: its path, and a hash of its content.
        faults: rows of bad samples, with what is wrong with each.
        repeated: rows whose id an earlier row has already, each with that row.
        notes: what the reader of the data file counted.
        size, checksum: bytes of the stream and their CRC-32; 0 in memory.
        version: of the stored form; a file of another version is not read but written anew.
    """

    origin: dict[str, str] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    repeated: dict[int, int] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    size: int = 0
    checksum: int = 0
    version: int = VERSION


class RecordSequence(Sequence[Record]):
    """A sequence whose records are made when they are asked for."""

    def _make_record(self, position: int) -> Record:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: SupportsInt) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: SupportsInt | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self._make_record(position) for position in range(*index.indices(len(self)))]
        position = int(index) + len(self) if int(index) < 0 else int(index)
        if not 0 <= position < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._make_record(position)


class RecordStore(RecordSequence):
    """The records of a data file.

    Args:
        data: the Arrow stream, or the file that begins with it.
        footer: what is known of it.
    """

    # Why a table: a million small Python objects would be copied into every worker as reference counts touch them.
    # Pages of a mapped file are shared by forked and spawned processes, buffers of a table in memory by forked ones.

    def __init__(self, data: Path | pa.Buffer, footer: Footer) -> None:
        from datasets import Dataset

        self._data = data
        self.footer = footer
        dataset = Dataset.from_file(str(data)) if isinstance(data, Path) else Dataset.from_buffer(data)
        self._table = dataset.data
        # A view of the mapped file: nothing is read before a record is asked for.
        self._column = self._table.column("record")

    @classmethod
    def write(cls, records: Iterable[Record], path: Path | None = None) -> RecordStore:
        """Store records, one by one as they come, as ``write_batches``."""
        return cls.write_batches(make_batches(records), path)

    @classmethod
    def write_batches(
        cls,
        batches: Iterable[pa.RecordBatch],
        path: Path | None = None,
        origin: dict[str, str] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> RecordStore:
        """Store records.

        Args:
            batches: of ``record_rows.make_batch``, in order; what is written does not depend on where they end.
            path: the file to write, with its footer; without it the records stay in memory.
            origin, notes: for the footer; notes are looked at when all batches have come.
        """
        import pyarrow as pa

        with pa.BufferOutputStream() if path is None else pa.OSFile(str(path), "wb") as sink:
            faults, hashes = _write_stream(batches, sink)
            data = sink.getvalue() if path is None else path
        # Ids are compared when all are written: no set of a million of them is held meanwhile.
        draft = cls(data, Footer())
        footer = Footer(origin or {}, faults, _find_repeated(draft, faults, hashes), notes or {})
        if path is not None:
            del draft  # It has the file mapped.
            footer = Footer(**append_footer(path, asdict(footer)))
        return cls(data, footer)

    def check(self) -> None:
        """A ValueError for a table, or a footer, that is none of this library's, though its checksum is right."""
        found = {one.name: one.type for one in self._table.schema}
        rows = {*self.footer.faults, *self.footer.repeated, *self.footer.repeated.values()}
        if found != stored_types() or not all(row in range(len(self)) for row in rows):
            raise ValueError("its table is another")

    def __reduce__(self) -> tuple[type[RecordStore], tuple[Path | pa.Buffer, Footer]]:
        return RecordStore, (self._data, self.footer)

    def __len__(self) -> int:
        return len(self._column)

    def _make_record(self, position: int) -> Record:
        # Parsed when it is asked for, by the worker that needs it.
        try:
            return load_record(self._column[position].as_py())
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise ValueError(
                f"{self._data}: row {position + 1} is no record ({shorten_text(repr(error), 120)}); remove the file, "
                "and it is made anew"
            ) from error

    def media(self, rows: Sequence[int]) -> Iterator[list[Media]]:
        """The media of some rows; many times faster than the records themselves."""
        import numpy as np

        wanted = np.asarray(rows, np.int64)
        starts = np.cumsum([0, *map(len, self._column.chunks)])  # (chunks + 1,)
        chunks = np.searchsorted(starts, wanted, side="right") - 1  # (rows,)
        # Chunk by chunk: rows taken of the column would have all of it copied for each call.
        for of_chunk in np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(chunks)) + 1) if len(wanted) else ():
            number = chunks[of_chunk[0]]
            texts = self._column.chunk(number).take(wanted[of_chunk] - starts[number])
            for text in texts.to_pylist():
                yield [load_media(*fields) for fields in json.loads(text)[2]]

    def numbers(self, name: str) -> NDArray[np.int32]:
        """One of the columns ``record_rows.NUMBERS``, int32 (records,); zero at bad samples."""
        return self._table.column(name).to_numpy()


def _write_stream(
    batches: Iterable[pa.RecordBatch], sink: pa.NativeFile
) -> tuple[dict[int, str], list[NDArray[np.uint64]]]:
    """Write the batches, cut anew to one length; the faults by row, and the hashes of all ids."""
    import pyarrow as pa

    faults: dict[int, str] = {}
    hashes: list[NDArray[np.uint64]] = []
    waiting: list[pa.RecordBatch] = []
    num_rows = num_waiting = 0
    stored = pa.schema(stored_types())
    with pa.ipc.new_stream(sink, stored) as writer:
        for batch in batches:
            if batch.column("fault").null_count < len(batch):
                found = enumerate(batch.column("fault").to_pylist(), start=num_rows)
                faults |= {row: fault for row, fault in found if fault is not None}
            hashes.append(batch.column("hash").to_numpy().copy())  # Not a view, which would keep all of the batch.
            waiting.append(batch.select(stored.names))
            num_rows, num_waiting = num_rows + len(batch), num_waiting + len(batch)
            if num_waiting >= RECORDS_AT_ONCE:
                table = pa.Table.from_batches(waiting)
                whole = num_waiting - num_waiting % RECORDS_AT_ONCE
                for start in range(0, whole, RECORDS_AT_ONCE):
                    writer.write_table(_copy_rows(table, start, start + RECORDS_AT_ONCE))
                waiting, num_waiting = table.slice(whole).to_batches(), num_waiting - whole
        if num_waiting:
            writer.write_table(_copy_rows(pa.Table.from_batches(waiting), 0, num_waiting))
    return faults, hashes


def _copy_rows(table: pa.Table, start: int, stop: int) -> pa.Table:
    """Some rows in buffers of their own, as long as they need: the padding of buffers that came through a pipe is
    written as well, and the file would depend on where batches ended.
    """
    import numpy as np

    return table.take(np.arange(start, stop)).combine_chunks()


def _find_repeated(store: RecordStore, faults: Iterable[int], hashes: Sequence[NDArray[np.uint64]]) -> dict[int, int]:
    """Rows whose id stands in an earlier row, each with the first such row."""
    import numpy as np

    # Bad samples have no id to be repeated.
    rows = np.delete(np.arange(len(store)), list(faults))
    of_rows = np.concatenate([np.empty(0, np.uint64), *hashes])[rows]
    _, inverse, counts = np.unique(of_rows, return_inverse=True, return_counts=True)
    repeated, seen = {}, dict[str, int]()
    # Equal hashes are only likely to be equal ids, so the few records that have one are read again.
    for row in rows[counts[inverse] > 1].tolist():
        first = seen.setdefault(store[row].id, row)
        if first != row:
            repeated[row] = first
    return repeated


@dataclass(frozen=True)
class Part:
    """Rows of one store, by row of the store what is wrong with bad samples, and what to call the data file."""

    store: RecordStore
    rows: Rows
    faults: dict[int, str]
    label: str = ""


class Mixture(RecordSequence):
    """Records of several parts, one behind the other.

    Beside what lies in files, a process holds nothing for each record but the number of its row, and that
    only of a random sample. The record of a bad sample has a ``fault`` and nothing else to use.

    Args:
        parts: in order.
        cache_dir: the folder of indexes; None keeps what is computed in memory.

    Attributes:
        faults: what is wrong with bad samples, by their index.
    """

    def __init__(self, parts: Sequence[Part], cache_dir: Path | None = None) -> None:
        self.parts = list(parts)
        self.cache_dir = cache_dir
        self._ends = list(accumulate(len(part.rows) for part in self.parts))
        # The name of each part's data file, and its full path, found once and not for each record.
        self._files = [(os.path.basename(p.label), os.path.abspath(p.label) if p.label else "") for p in self.parts]
        self.faults: dict[int, str] = {}
        for part, end in zip(self.parts, self._ends, strict=True):
            # Rows of a random sample are ascending: whether a bad one was drawn is a search.
            for row, fault in sorted(part.faults.items()):
                at = bisect_left(part.rows, row)
                if at < len(part.rows) and part.rows[at] == row:
                    self.faults[end - len(part.rows) + at] = fault

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _make_record(self, position: int) -> Record:
        """A record with its data file; where several files have one name, the whole path stands in its source."""
        number = bisect_right(self._ends, position)  # The part that holds this position.
        part = self.parts[number]
        row = int(part.rows[position - self._ends[number] + len(part.rows)])
        record, fault = part.store[row], part.faults.get(row)
        source, (name, data_file) = record.source, self._files[number]
        if name in self._shared_names:
            # Two files named train.json: only the whole path tells them apart.
            source = source.replace(name, part.label, 1)
            fault = fault and fault.replace(f"{name}, ", f"{part.label}, ", 1)
        if fault is not None:
            return replace(record, source=source, data_file=data_file, turns=(), media=(), fault=fault)
        # As ``replace``, in a third of its time.
        return Record(**{**vars(record), "source": source, "data_file": data_file})

    @cached_property
    def _shared_names(self) -> set[str]:
        """Names that several data files have."""
        names = Counter(os.path.basename(label) for label in {part.label for part in self.parts})
        return {name for name, count in names.items() if count > 1}

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same records in the same order."""
        described = []
        for part in self.parts:
            rows = str(part.rows) if isinstance(part.rows, range) else hashlib.sha256(part.rows.tobytes()).hexdigest()
            described.append([part.store.footer.origin, part.store.footer.checksum, rows, sorted(part.faults)])
        return hash_json(described, _HASH_DIGITS)

    def numbers(self, name: str) -> NDArray[np.int32]:
        """One of ``record_rows.NUMBERS``, int32 (records,); zero at the turns and media of bad samples."""
        import numpy as np

        return np.concatenate([part.store.numbers(name)[np.asarray(part.rows, np.int64)] for part in self.parts])

    def media(self) -> Iterator[tuple[int, list[Media]]]:
        """The media of each good sample that has some, with its index; no record is made for them."""
        import numpy as np

        places = np.flatnonzero(self.numbers("num_images") + self.numbers("num_videos"))
        for part, end in zip(self.parts, self._ends, strict=True):
            start = end - len(part.rows)
            of_part = places[slice(*np.searchsorted(places, [start, end]))]  # Those of this part, from its start on.
            rows = np.asarray(part.rows, np.int64)[of_part - start].tolist()
            for place, row, media in zip(of_part.tolist(), rows, part.store.media(rows), strict=True):
                if row not in part.faults:
                    yield place, media

    def computed(
        self,
        name: str,
        key: Sequence[object],
        dtype: type[np.generic],
        compute: Callable[[], NDArray[Any]],
        length: int | None = None,
    ) -> NDArray[Any]:
        """Numbers that were computed once and are mapped from then on.

        Args:
            name: what the numbers are.
            key: plain values that they depend on beside the records.
            dtype: of the numbers.
            compute: makes them.
            length: how many; by default one for each record.
        """
        if self.cache_dir is None:
            return compute().astype(dtype, copy=False)
        # The key is in the name: other settings have a file of their own beside it, and so has each release, which may
        # count otherwise.
        made_from = [RELEASE, self.fingerprint, *key]
        path = self.cache_dir / f"{name}-{hash_json(made_from, _HASH_DIGITS)}.npy"
        return open_array(path, len(self) if length is None else length, dtype, compute)


def open_store(
    file: Path,
    folder: Path | None,
    settings: Mapping[str, object],
    read: Callable[[], Iterable[pa.RecordBatch]],
    notes: Mapping[str, Any],
) -> RecordStore:
    """The records of a data file, from its index if that is there and still true.

    Args:
        file: the data file.
        folder: of the indexes; None keeps the records in memory.
        settings: what else the records depend on; each combination has an index of its own.
        read: parses the data file, into batches of ``record_rows.make_batch``.
        notes: what ``read`` counts, for the footer.

    Raises:
        ValueError: the file changed while it was read, or what ``read`` raises.
    """
    if folder is None:
        return RecordStore.write_batches(read(), notes=notes)
    path = folder / f"{file.stem[:40]}-{hash_json([os.path.realpath(file), settings], 16)}.arrow"
    origin = _describe(file)

    def write_index(part: Path) -> None:
        logger.info("indexing %s", file)
        RecordStore.write_batches(read(), part, origin, notes)
        # Somebody may still be writing it: the index would say that half a file is all of it.
        if _describe(file) != origin:
            raise ValueError(f"{file}: it changed while it was read; start again when it is complete")

    def open_index() -> RecordStore:
        content = read_footer(path, VERSION, origin)
        for name in ("faults", "repeated"):  # JSON has no keys but strings.
            content[name] = {int(row): value for row, value in content[name].items()}
        store = RecordStore(path, Footer(**content))
        store.check()
        return store

    return open_or_write(path, open_index, write_index)


def _describe(file: Path) -> dict[str, str]:
    """What tells whether a data file is still the same."""
    import xxhash

    # Size and time do not tell: an editor or rsync may keep both. Hashing takes a second for 5 GB in memory.
    hasher = xxhash.xxh3_128()
    hasher.update(f".\0{file.stat().st_size}\0".encode())
    with naming(file), file.open("rb", buffering=0) as stream:
        while piece := stream.read(_BYTES_AT_ONCE):
            hasher.update(piece)
    return {"path": os.path.realpath(file), "hash": hasher.hexdigest()}
