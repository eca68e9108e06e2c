"""The folder of a feature cache: its shards, found by key.

    DIR/cache.json            the form that all features in it are kept in
    DIR/*.safetensors         shards.py: features of many images and clips, with all that they depend on
    DIR/digests/              digests.py: hashes of files
    DIR/towers/               towers.py: which weights the files of a tower hold, so that they need not be read

Any number of processes may read it and add shards to it: a file has its name only when it is whole, and none is ever
changed. Removing shards, or the whole folder, loses no more than the time to make them.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.data.cache import find_stranger
from llava.data.feature_cache.digests import FOLDER as DIGESTS
from llava.data.feature_cache.shards import SUFFIX, DamagedShardError, Kept, OtherFormError, Shard, write_shard
from llava.data.feature_cache.storage import Storage
from llava.io import write_beside
from llava.messages import shorten_text
from llava.storage import find_cause, read_again
from llava.stored_forms import FEATURE_CACHE
from llava.types import BadSampleError, FeatureEntry

logger = logging.getLogger(__name__)

SETTINGS, TOWERS = "cache.json", "towers"
FLAG = "--feature_cache"
_SETTLED_NS = 2 * 10**9
"""Nanoseconds after a change of a folder from which on the next one has another time."""


class FeatureCacheError(BadSampleError):
    """Under ``--feature_cache_strict``: features that are not there, or damaged. No sample is to blame."""


class FeatureCache:
    """A folder of features.

    Args:
        folder: of the cache.
        storage: the form that features are kept in, for a folder that is to be made if it is no cache yet; None for
            one that must be one.
        strict: whether a damaged shard is an error; else it is a warning, and its features are not there.

    Raises:
        ValueError: the folder is no cache, keeps features in another form, or (``strict``) has a damaged shard.
    """

    def __init__(self, folder: str | os.PathLike[str], storage: Storage | None = None, strict: bool = False) -> None:
        self.folder, self.strict = Path(folder).expanduser().absolute(), strict
        self.storage = self._open(storage)
        self.shards: dict[str, Shard] = {}  # by file name
        self.damaged: dict[str, str] = {}  # what is wrong with a file that is none
        self._places: dict[str, Shard] = {}  # by key
        self._looked: tuple[int, bool] | None = None  # when the folder had changed at the last look, see look
        self.look()

    @staticmethod
    def exists(folder: str | os.PathLike[str]) -> bool:
        """Whether a folder is a cache."""
        return (Path(folder).expanduser() / SETTINGS).exists()

    def _open(self, wanted: Storage | None) -> Storage:
        try:
            return self._read_settings(wanted)
        except OSError as error:
            raise ValueError(
                f"{FLAG} {self.folder}: {error.strerror}: {error.filename}; give another folder"
            ) from error

    def _read_settings(self, wanted: Storage | None) -> Storage:
        path = self.folder / SETTINGS
        if not path.exists():
            if wanted is None:
                raise ValueError(
                    f"{FLAG} {self.folder}: is no feature cache (it has no {SETTINGS}); build one with python -m "
                    f"llava.data.feature_cache build, or fill it in training with {FLAG}_fill"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            own = (SETTINGS, TOWERS, DIGESTS)  # Another process may be making it too.
            if others := [path.name for path in self.folder.iterdir() if not path.name.startswith(own)]:
                raise ValueError(f"{FLAG} {self.folder}: is no feature cache, and holds {others[0]}; give another")
            with write_beside(path, shared=True) as beside:
                settings = {**FEATURE_CACHE.stamp, "storage": wanted.kind, "pool": wanted.pool}
                beside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        if stranger := find_stranger(path, self.folder):
            raise ValueError(f"{FLAG} {self.folder}: {path} {stranger}; give another folder")
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            told = None
        FEATURE_CACHE.check(told, str(path))
        try:
            found = Storage(told["storage"], told["pool"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: is damaged ({shorten_text(repr(error), 200)}); give another {FLAG}") from error
        if wanted is not None and found != wanted:
            raise ValueError(f"{FLAG} {self.folder} keeps features as {found}, not as {wanted}; give another folder")
        return found

    # Shards.

    def look(self) -> bool:
        """Open shards that have come since the last look; whether there are any."""
        try:
            changed = self.folder.stat().st_mtime_ns
        except OSError:  # It was removed, and nothing can have come.
            return False
        # A change right behind another one may have its time: whatever is that young is looked at again.
        settled = time.time_ns() - changed > _SETTLED_NS
        if self._looked == (changed, True):
            return False
        self._looked, found = (changed, settled), False
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path.name in self.shards or path.name in self.damaged:
                continue
            try:
                if stranger := find_stranger(path, self.folder):
                    raise DamagedShardError(f"{path}: it {stranger}")
                shard = read_again(partial(Shard.open, path), path)
            except DamagedShardError as error:
                self._tell_damage(path, error)
                continue
            self.shards[path.name] = shard
            for key in shard.keys:  # The same features from two processes: one is as good as the other.
                self._places.setdefault(key, shard)
            found = True
        return found

    def _tell_damage(self, path: Path, error: DamagedShardError) -> None:
        if find_cause(error) is not None:  # It is whole, for all that is known: whoever asks may try again.
            raise error
        if isinstance(error, OtherFormError):
            raise FeatureCacheError(f"{error}; upgrade llava, or give another {FLAG}") from error
        if self.strict:
            raise FeatureCacheError(f"{error}; remove it, and build it again") from error
        if path.name not in self.damaged:
            logger.warning("%s; its features are computed anew. Remove the file, and build it again", error)
        self.damaged[path.name] = str(error)
        self.shards.pop(path.name, None)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def read(self, key: str) -> tuple[FeatureEntry, Tensor] | None:
        """An entry with its features, (frames, patches, width); None where there are none.

        Raises:
            FeatureCacheError: they are damaged (``strict``).
        """
        while (shard := self._places.get(key)) is not None:
            try:
                return shard.read(key, self.storage)
            except DamagedShardError as error:
                self._tell_damage(shard.path, error)
                del self._places[key]
                others = (other for other in self.shards.values() if key in other.keys)
                if (other := next(others, None)) is not None:
                    self._places[key] = other
        return self.read(key) if self.look() and key in self._places else None

    def add(self, name: str, kept: Sequence[Kept], contexts: dict[str, Any]) -> None:
        """Write a shard of a name without its suffix."""
        if not self.exists(self.folder):  # Somebody has removed it.
            self._open(self.storage)
        used = {one.entry.context for one in kept}
        write_shard(self.folder / f"{name}{SUFFIX}", kept, {k: contexts[k] for k in sorted(used)})

    def remove(self, name: str) -> None:
        """Remove a damaged file, so that another can take its name."""
        (self.folder / name).unlink(missing_ok=True)
        del self.damaged[name]

    def count_of(self, contexts: Collection[str]) -> int:
        """How many entries are of these contexts."""
        return sum(shard.counts[context] for shard in self.shards.values() for context in contexts)

    def count_contexts(self) -> list[tuple[dict[str, Any], int]]:
        """Every context that there are entries of, and how many, most first."""
        counts = sum((shard.counts for shard in self.shards.values()), Counter[str]())
        all_contexts = {name: context for shard in self.shards.values() for name, context in shard.contexts.items()}
        return [(all_contexts[name], count) for name, count in counts.most_common()]
