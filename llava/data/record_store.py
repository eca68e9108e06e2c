"""Records on disk, in a form that worker processes share."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from llava.types import Media, Record, Turn

_ROWS_AT_ONCE = 4096


class RecordStore(Sequence[Record]):
    """Validated records in a memory-mapped Arrow file.

    A million small Python objects would be copied into every worker as reference counts touch them;
    pages of a mapped file are shared, by forked and by spawned processes alike. ``write`` makes a
    temporary file, which goes with the store it returns.

    Args:
        path: the Arrow file, with one column of records as JSON.
    """

    def __init__(self, path: Path) -> None:
        from datasets import Dataset

        self._path = path
        self._column = Dataset.from_file(str(path)).data.column("record")

    @classmethod
    def write(cls, records: Iterable[Record]) -> RecordStore:
        """Store records, one by one as they come."""
        import pyarrow as pa

        folder = tempfile.mkdtemp(prefix="llava-records-")
        path = Path(folder) / "records.arrow"
        schema = pa.schema({"record": pa.large_string()})
        rows = map(_dump, records)
        try:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                while chunk := list(islice(rows, _ROWS_AT_ONCE)):
                    writer.write_batch(pa.record_batch([pa.array(chunk, pa.large_string())], schema=schema))
            store = cls(path)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(store, _remove, folder, os.getpid())
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordStore, (self._path,)

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return _load(self._column[int(position)].as_py())

    def __iter__(self) -> Iterator[Record]:
        return (_load(row.as_py()) for row in self._column)


def _remove(folder: str, owner: int) -> None:
    """Take the files away, unless this is a process that was forked from the one that wrote them."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _dump(record: Record) -> str:
    turns = [[turn.role, turn.text] for turn in record.turns]
    media = [[media.kind, media.path] for media in record.media]
    return json.dumps([record.id, turns, media, record.source, record.split])


def _load(row: str) -> Record:
    identity, turns, media, source, split = json.loads(row)
    return Record(
        id=identity,
        turns=tuple(Turn(*turn) for turn in turns),
        media=tuple(Media(*medium) for medium in media),
        source=source,
        split=None if split is None else (split[0], split[1]),
    )
