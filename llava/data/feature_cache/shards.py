"""Shards: safetensors files with the features of many images and clips, checked by checksums and mapped.

A shard has a tensor for each entry, named by its key, and with int8 another one, ``KEY.scale``. Its ``__metadata__``
holds a checksum of all that its header says, and JSON about every entry: what ``FeatureEntry`` has, a CRC-32 of its
bytes, the dtype that its features come back in and their patches. What safetensors opens, opens it too.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llava.constants import RELEASE
from llava.data.feature_cache.storage import Storage
from llava.io import hash_json, lock_file, write_beside
from llava.messages import is_out_of_memory, shorten
from llava.types import FeatureEntry

SUFFIX = ".safetensors"
FORMAT = "llava-features-1"
SCALE = ".scale"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_MOST_HEADER = 1 << 28
_HEADERS = 512
"""Headers that are kept in memory; others are read again, so that caches of any size take little of it."""


class DamagedShardError(ValueError):
    """A shard that is cut off, changed or none at all; the message names the file and what is wrong."""


_MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RuntimeError, RecursionError)
"""What reading something else raises that has the checksums of a shard: torch says RuntimeError of most."""


@contextmanager
def _damage_of(path: Path, what: str) -> Iterator[None]:
    """Within it, whatever the content of a file makes Python or torch raise says that the file is damaged."""
    try:
        yield
    except DamagedShardError:
        raise
    except OSError as error:
        raise DamagedShardError(f"{path}: cannot be read: {error.strerror}") from error
    except _MALFORMED as error:
        if is_out_of_memory(error):
            raise
        raise DamagedShardError(f"{path}: {what} damaged") from error


class OtherFormError(DamagedShardError):
    """A shard of a form that this release does not know, and that is not to be removed for it."""


@dataclass(frozen=True)
class Kept:
    """The features of an entry on their way into a shard."""

    entry: FeatureEntry
    tensors: Mapping[str, Tensor]  # of Storage.encode
    dtype: torch.dtype  # that they were computed in
    num_patches: int  # of a frame, before any pooling

    @classmethod
    def of(cls, entry: FeatureEntry, features: Tensor, storage: Storage) -> Kept:
        """What is kept of (frames, patches, width)."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in storage.encode(features).items()}
        return cls(entry, tensors, features.dtype, features.shape[1])

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def write_shard(path: Path, kept: Sequence[Kept], contexts: Mapping[str, Any]) -> None:
    """Write a shard, atomically and durably; the same entries give the same bytes.

    Args:
        path: of the file.
        kept: its entries.
        contexts: the settings of all that entries are of, by ``FeatureEntry.context``.
    """
    named = [(one.entry.key + ("" if name == "features" else SCALE), one, t) for one in kept for name, t in _parts(one)]
    # Wide numbers first: every tensor then begins at a multiple of its own width.
    named.sort(key=lambda item: -item[2].element_size())
    header: dict[str, Any] = {}
    place = 0
    for name, _, tensor in named:
        end = place + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    about = {"entries": {one.entry.key: _describe(one) for one in kept}, "contexts": dict(contexts)}
    metadata = {"format": FORMAT, "about": json.dumps(about, sort_keys=True)}
    metadata["checksum"] = hash_json([metadata, header])
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may write the same shard: each does so in a file of its own, which it holds the lock of.
    with write_beside(path, shared=True) as beside, _open_locked(beside) as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for _, _, tensor in named:
            file.write(_bytes_of(tensor))


def _open_locked(path: Path) -> BinaryIO:
    """A new file, which ``remove_unfinished`` of another process cannot have removed before it was locked."""
    while True:
        file = path.open("wb")
        lock_file(file, wait=True)
        if path.exists():
            return file
        file.close()


def remove_unfinished(folder: Path) -> None:
    """Remove what writers that were killed have left."""
    for left in folder.glob(f"*{SUFFIX}.*.part"):
        try:
            with left.open("r+b") as file:
                if lock_file(file, wait=False):  # Nobody is writing it.
                    left.unlink(missing_ok=True)
        except OSError:
            continue  # Somebody is, or it is gone.


def _parts(kept: Kept) -> list[tuple[str, Tensor]]:
    return sorted(kept.tensors.items())


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _describe(kept: Kept) -> dict[str, Any]:
    entry, checksum = kept.entry, 0
    for _, tensor in _parts(kept):
        checksum = zlib.crc32(_bytes_of(tensor), checksum)
    return {
        "context": entry.context,
        "kind": entry.kind,
        "size": list(entry.original_size),
        "times": list(entry.times),
        "duration": entry.duration,
        "crc32": checksum,
        "dtype": _NAMES.get(kept.dtype, "F32"),
        "patches": kept.num_patches,
    }


@dataclass(frozen=True)
class Header:
    """What a shard says of its entries."""

    tensors: dict[str, Any]  # name -> dtype, shape and place, as safetensors has them
    entries: dict[str, dict[str, Any]]
    contexts: dict[str, Any]
    start: int  # of the tensors in the file


@lru_cache(maxsize=_HEADERS)
def read_header(path: Path, size: int, changed: int) -> Header:
    """The header of a shard; ``size`` and ``changed`` are the file's, so that what is remembered is of this file.

    Raises:
        DamagedShardError: it is cut off, damaged or no shard.
    """
    with _damage_of(path, "its header is"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size, _MOST_HEADER):
                raise DamagedShardError(f"{path}: it is cut off, or no shard")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        told = metadata.pop("checksum")
        if metadata["format"] != FORMAT:
            raise OtherFormError(
                f"{path}: a newer release of llava wrote it ({shorten(metadata['format'])}; llava {RELEASE} reads "
                f"{FORMAT})"
            )
        if told != hash_json([metadata, header]):
            raise DamagedShardError(f"{path}: its header is damaged")
        about = json.loads(metadata["about"])
        start = _LENGTH_BYTES + length
        end = start + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if size != end:
            raise DamagedShardError(f"{path}: it has {size} bytes, and its header says {end}")
        return Header(header, dict(about["entries"]), dict(about["contexts"]), start)


@dataclass
class Shard:
    """A shard whose header is whole. The features of an entry are checked when they are first read."""

    path: Path
    keys: tuple[str, ...]  # of its entries
    contexts: dict[str, Any]
    counts: Counter[str]  # how many entries are of each context
    size: int  # of the file
    changed: int  # when it was, in nanoseconds
    _checked: set[str] = field(default_factory=set)
    _mapped: Tensor | None = None

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Look into a shard; a DamagedShardError as from ``read_header``."""
        with _damage_of(path, "what it says of its entries is"):
            status = path.stat()
            header = read_header(path, status.st_size, status.st_mtime_ns)
            counts = Counter(about["context"] for about in header.entries.values())
            if missing := counts.keys() - header.contexts.keys():
                raise DamagedShardError(f"{path}: it lacks the settings of {len(missing)} of its entries")
        return cls(path, tuple(header.entries), header.contexts, counts, status.st_size, status.st_mtime_ns)

    def read(self, key: str, storage: Storage) -> tuple[FeatureEntry, Tensor]:
        """An entry and its features, (frames, patches, width) in memory of their own.

        Raises:
            DamagedShardError: the file is gone or shorter, or the entry's bytes are not those that were written.
        """
        with _damage_of(self.path, f"the entry {key} is"):
            header = read_header(self.path, self.size, self.changed)
            about = header.entries[key]
            names = {"features": key} | ({"scale": key + SCALE} if key + SCALE in header.tensors else {})
            kept = {name: self._tensor(header, of_file) for name, of_file in names.items()}
            if key not in self._checked:
                checksum = 0
                for _, tensor in sorted(kept.items()):
                    checksum = zlib.crc32(_bytes_of(tensor), checksum)
                if checksum != about["crc32"]:
                    raise DamagedShardError(f"{self.path}: the features of {key} are damaged (CRC-32)")
                self._checked.add(key)
            features = storage.decode(kept, _DTYPES[about["dtype"]], about["patches"])
            # A tensor that shares the map would be handed on by a worker with all of the shard.
            if features.data_ptr() == kept["features"].data_ptr():
                features = features.clone()
            size, times = tuple(about["size"]), tuple(about["times"])
            return FeatureEntry(key, about["context"], about["kind"], size, times, about["duration"]), features

    def _tensor(self, header: Header, name: str) -> Tensor:
        """A tensor of the map."""
        about = header.tensors[name]
        start, end = about["data_offsets"]
        # A map of what is no longer there would end the process: the length is asked for each time.
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise DamagedShardError(f"{self.path}: cannot be read: {error.strerror}") from error
        if size != self.size:
            raise DamagedShardError(f"{self.path}: it had {self.size} bytes when it was opened, and has {size} now")
        if self._mapped is None:
            # Private: nothing that is done with it reaches the file. All processes share what the system has read.
            self._mapped = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        place = slice(header.start + start, header.start + end)
        return self._mapped[place].view(_DTYPES[about["dtype"]]).view(about["shape"])

    def __getstate__(self) -> dict[str, Any]:
        # A map does not travel to another process.
        return vars(self) | {"_mapped": None}
