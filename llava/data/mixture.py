"""Chosen rows of several stores as one sequence of records."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.data.files import Sampling
from llava.data.index import RecordStore, digest, open_array
from llava.types import Record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = range | NDArray[np.int64]


def choose_rows(sampling: Sampling, available: int, seed: str) -> Rows:
    """The rows that a sampling takes of ``available`` ones, ascending.

    A random choice depends on the seed and on nothing else, and of two with one seed the larger holds the
    smaller: each row draws a 64-bit number, and those with the lowest are taken.

    Raises:
        ValueError: it asks for more than there are.
    """
    count = sampling.count(available)
    if sampling.kind != "random":
        return range(available - count, available) if sampling.kind == "end" else range(count)
    import numpy as np

    # Numpy keeps the stream of a bit generator forever, but not what its other functions make of it.
    generator = np.random.PCG64(int(hashlib.sha256(seed.encode()).hexdigest(), 16))
    return np.sort(np.argsort(generator.random_raw(available), kind="stable")[:count])


def cut_rows(rows: Rows, start: int, stop: int) -> Rows:
    """Those of ascending rows from ``start`` to before ``stop``, counted from ``start``."""
    if isinstance(rows, range):
        return range(max(rows.start, start) - start, max(min(rows.stop, stop), start) - start)
    import numpy as np

    first, last = np.searchsorted(rows, [start, stop])
    return rows[first:last] - start


@dataclass(frozen=True)
class Part:
    """Rows of one store, by row of the store what is wrong with bad samples, and what to call the data file."""

    store: RecordStore
    rows: Rows
    faults: dict[int, str]
    label: str = ""

    @property
    def name(self) -> Any:
        """What tells this part from others; the records of a store with an origin are fixed by it."""
        rows = self.rows if isinstance(self.rows, range) else hashlib.sha256(self.rows.tobytes()).hexdigest()
        return [self.store.footer.origin, self.store.footer.checksum, str(rows), sorted(self.faults)]


class Mixture(Sequence[Record]):
    """Records of several parts, one behind the other.

    Beside what lies in files, a process holds nothing for each record but the number of its row, and that
    only of a random sample. The record of a bad sample has a ``fault`` and nothing else to use.

    Args:
        parts: in order.
        cache_dir: the folder of indexes; None keeps what is computed in memory.
    """

    def __init__(self, parts: Sequence[Part], cache_dir: Path | None = None) -> None:
        self.parts = list(parts)
        self.cache_dir = cache_dir
        self._ends = list(accumulate(len(part.rows) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = int(index) + len(self) if index < 0 else int(index)
        if not 0 <= position < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect_right(self._ends, position)
        part = self.parts[number]
        row = int(part.rows[position - self._ends[number] + len(part.rows)])
        return self._name(part, part.store[row], part.faults.get(row))

    def _name(self, part: Part, record: Record, fault: str | None) -> Record:
        """A record with its data file; where several files have one name, the whole path stands in its source."""
        data_file = os.path.abspath(part.label) if part.label else ""
        changes: dict[str, Any] = {"data_file": data_file}
        name = os.path.basename(part.label)
        if name in self._shared_names:
            changes["source"] = record.source.replace(name, part.label, 1)
            fault = fault and fault.replace(f"{name}, ", f"{part.label}, ", 1)
        if fault is not None:
            changes |= {"turns": (), "media": (), "fault": fault}
        return replace(record, **changes)

    @cached_property
    def _shared_names(self) -> set[str]:
        """Names that several data files have."""
        names = Counter(os.path.basename(label) for label in {part.label for part in self.parts})
        return {name for name, count in names.items() if count > 1}

    @cached_property
    def faults(self) -> dict[int, str]:
        """What is wrong with bad samples, by their index."""
        import numpy as np

        faults: dict[int, str] = {}
        for part, end in zip(self.parts, self._ends, strict=True):
            rows, start = np.asarray(part.rows), end - len(part.rows)
            for row in sorted(part.faults):
                at = int(np.searchsorted(rows, row))
                if at < len(rows) and rows[at] == row:
                    faults[start + at] = part.faults[row]
        return faults

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same records in the same order."""
        return digest(*(part.name for part in self.parts))

    def numbers(self, name: str) -> NDArray[np.int32]:
        """A number of each record, of ``record_store.NUMBERS``; zero at bad samples' turns and media."""
        import numpy as np

        return np.concatenate([part.store.numbers(name)[np.asarray(part.rows)] for part in self.parts])

    def computed(
        self, name: str, key: Sequence[Any], dtype: type[np.generic], compute: Callable[[], NDArray[Any]]
    ) -> NDArray[Any]:
        """A number of each record that was computed once and is mapped from then on.

        Args:
            name: what the numbers are.
            key: plain values that they depend on beside the records.
            dtype: of the numbers.
            compute: makes them.
        """
        if self.cache_dir is None:
            return compute().astype(dtype)
        path = self.cache_dir / f"{name}-{digest(self.fingerprint, *key)}.npy"
        return open_array(path, len(self), dtype, compute)
