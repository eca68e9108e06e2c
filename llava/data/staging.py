"""``--stage_media``: images and clips of a run, copied once to a disk of each node and read there.

A copy has the name of its file's path, and the index of the folder says what the file was like when it was copied:
size, times of its last change of content and of status, and a checksum of some blocks. The next run takes a copy only
where all of these are still so, and copies anew what has changed. Nothing else of a run knows of the copies: samples,
errors and keys have the paths of the data files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar

from llava.data.cache import own_folder
from llava.data.media import check_links
from llava.data.media_files import MediaError, local_path
from llava.io import append_json_lines, cut_unfinished_line, lock_file
from llava.types import Media, Record

logger = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")

FLAG = "--stage_media"
INDEX, LOCK, PROGRESS = "staged.jsonl", "lock", "progress.json"
_SUFFIX = re.compile(r"\.\w{1,10}")
_BLOCK, _NUM_BLOCKS = 64 << 10, 3
"""Bytes of a block of a checksum, and how many it has."""
_PIECE = 4 << 20
_SPARE = 64 << 20
"""Bytes that stay free on the disk, where more than media are written."""
_THREADS = 8
_FILES_AT_ONCE = 512
_SECONDS_BETWEEN_LINES = 10.0
_PAUSE = 0.5

Stamp = tuple[int, int, int]
"""A file's size, and the times of its last change of content and of status."""


@dataclass(frozen=True)
class StagedMedia:
    """Where copies lie.

    Attributes:
        folder: of the copies.
    """

    folder: str

    def place(self, path: str) -> str:
        """Where the copy of a file lies, whether there is one or not."""
        # Also of what can be the name of no file: whoever opens it says so, of its sample.
        name = hashlib.sha256(path.encode(errors="surrogatepass")).hexdigest()[:40]
        suffix = Path(path).suffix
        return os.path.join(self.folder, name[:2], name + (suffix if _SUFFIX.fullmatch(suffix) else ""))

    def locate(self, media: Media) -> Media:
        """An image or a clip by its copies; itself where one of them is not there."""
        copies = [self.place(path) for path in _files_of(media)]
        if not all(map(os.path.isfile, copies)):
            _warn_once("missing", f"{media.path} has no copy in {self.folder}, and is read where it lies")
            return media
        # A copy lies where this library has put it: there is no folder that it could lead out of.
        return replace(media, path=copies[0], root=0, frames=tuple(copies) if media.frames else ())

    def load(self, media: Media, load: Callable[[Media], Loaded]) -> Loaded:
        """What ``load`` makes of an image or a clip, read from its copy.

        Raises:
            MediaError: as of the file itself: where a copy cannot be used, the file is read.
        """
        copy = self.locate(media)
        if copy is not media:
            with contextlib.suppress(MediaError, OSError):
                return load(copy)
        loaded = load(media)  # A bad file is bad under its own name.
        if copy is not media:
            _warn_once("damaged", f"{copy.path}, the copy of {media.path}, is damaged and removed")
            for path in copy.frames or (copy.path,):
                Path(path).unlink(missing_ok=True)
        return loaded


_said: set[str] = set()


def _warn_once(kind: str, message: str) -> None:
    """One warning of a kind for each process: a worker would say it of every sample."""
    if kind not in _said:
        _said.add(kind)
        logger.warning("%s: %s; so may be others", FLAG, message)


def _files_of(media: Media) -> Sequence[str]:
    return [local_path(path) for path in media.frames or (media.path,)]


def list_files(record_sets: Iterable[Sequence[Record]]) -> dict[str, Media]:
    """The files of all images and clips, each once, with the medium that it belongs to."""
    from llava.data.index import Mixture

    found: dict[str, Media] = {}
    for records in record_sets:
        # The index has the media apart: no record is made of its JSON.
        of_records = (
            (media for _, media in records.media())
            if isinstance(records, Mixture)
            else (record.media for record in records)
        )
        for several in of_records:
            for media in several:
                root = media.path[: media.root]
                for path in _files_of(media):
                    # Of a clip that is given as its frames each is looked at by itself.
                    alone = bool(media.frames) and path.startswith(root)
                    found.setdefault(path, Media(media.kind, path, media.root) if alone else media)
    return found


# Copying.


@dataclass
class _Counts:
    """How far the copying is."""

    files: int = 0
    of_files: int = 0
    size: int = 0
    reused: int = 0
    unread: int = 0

    def describe(self) -> str:
        return f"{self.files:,} of {self.of_files:,} files, {self.size / 1e9:.2f} GB copied"


def stage_files(files: dict[str, Media], folder: str, timeout: float, run: str) -> StagedMedia:
    """Copy what is not there yet, in one process of a machine; others wait for it.

    Args:
        files: as ``list_files`` gives them.
        folder: on a disk of this machine; made if it is not there.
        timeout: seconds in which something must be copied.
        run: a name that this start of the run has, the same in all of its processes.

    Raises:
        ValueError: the folder cannot be used, its disk is too small, or the process that copies gets no further.
    """
    try:
        Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        place = own_folder(Path(folder))
        lock = (place / LOCK).open("ab")
    except OSError as error:
        raise ValueError(f"{FLAG} {folder}: cannot be used: {error}; give another folder") from error
    except ValueError as error:  # Who could put anything into it.
        raise ValueError(f"{FLAG} {folder}: belongs to another user; give a folder of your own") from error
    with lock:
        _wait_for(lock, place, timeout)
        staged = StagedMedia(str(place.absolute()))
        progress = _read_progress(place)
        if (progress.get("run"), progress.get("done")) != (run, True):
            try:
                _Copier(staged, files, run).run()
            except OSError as error:
                raise ValueError(f"{FLAG} {folder}: {error}; give another folder, or leave the flag out") from error
            _write_progress(place, run, done=True)
    return staged


def _write_progress(folder: Path, run: str, done: bool = False, said: str = "") -> None:
    """For those who wait. It is no loss where it cannot be written."""
    with contextlib.suppress(OSError):
        beside = folder / f"{PROGRESS}.{os.getpid()}"
        beside.write_text(json.dumps({"run": run, "done": done, "said": said, "at": time.time(), "pid": os.getpid()}))
        beside.replace(folder / PROGRESS)


def _read_progress(folder: Path) -> dict[str, object]:
    try:
        content = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _wait_for(lock: IO[bytes], folder: Path, timeout: float) -> None:
    """Take the lock; a ValueError where whoever has it gets no further."""
    moved, before, said = time.monotonic(), "", time.monotonic()
    while True:
        try:
            lock_file(lock, wait=False)
            return
        except BlockingIOError:
            progress = _read_progress(folder)
        if (now := f"{progress.get('said')} {progress.get('at')}") != before:
            moved, before = time.monotonic(), now
        if time.monotonic() - moved > timeout:
            raise ValueError(
                f"{FLAG} {folder}: process {progress.get('pid', 'unknown')} has its lock and has copied nothing for "
                f"{timeout:g} s ({progress.get('said') or 'nothing is known of it'}); end it, or raise --stage_timeout"
            )
        if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            logger.info("%s: waiting for process %s: %s", FLAG, progress.get("pid"), progress.get("said"))
        time.sleep(_PAUSE)


class _Copier:
    """Brings a folder up to date with the files of a run."""

    def __init__(self, staged: StagedMedia, files: dict[str, Media], run: str) -> None:
        self.staged, self.files, self.run_name = staged, files, run
        self.folder = Path(staged.folder)
        self.counts = _Counts(of_files=len(files))
        self._index = _read_index(self.folder / INDEX)
        self._lock = threading.Lock()
        self._told, self._moved = time.monotonic(), 0.0

    def run(self) -> None:
        """Look at all files first: whether the disk has room is said before anything is copied."""
        wanted: list[tuple[str, Stamp]] = []
        for path, stamp, has_copy in self._each(self._look, list(self.files.items())):
            if has_copy:
                self.counts.reused += 1
            elif stamp is not None:
                wanted.append((path, stamp))
            else:
                self.counts.unread += 1
            self._tell(f"looking at {len(self.files):,} files")
        self.counts.files = self.counts.reused
        self._check_room(sum(stamp[0] for _, stamp in wanted))
        cut_unfinished_line(self.folder / INDEX)  # Of a process that was killed.
        with (self.folder / INDEX).open("ab") as index:
            for entry in self._each(self._copy, wanted):
                if entry is None:
                    self.counts.unread += 1
                    continue
                # Behind the copy, which has its name by now: a copy without an entry is none.
                append_json_lines(index, [entry], durable=False)
                self.counts.files += 1
                self._tell(f"copying: {self.counts.describe()}")
        counts = self.counts
        logger.info(
            "%s %s: %s files of media, of which %s were there", FLAG, self.folder, f"{counts.files:,}",
            f"{counts.reused:,}",
        )  # fmt: skip
        if counts.unread:
            logger.warning(
                "%s: %s files are read where they lie: folders of frames, and what is missing, unreadable or just "
                "being changed", FLAG, f"{counts.unread:,}"
            )  # fmt: skip

    def _each(self, function: Callable, items: Sequence) -> Iterator:  # type: ignore[type-arg]
        """What a function gives for each item, by several threads."""
        waiting = iter(items)
        with ThreadPoolExecutor(_THREADS) as pool:
            while some := list(islice(waiting, _FILES_AT_ONCE)):
                yield from pool.map(lambda item: function(*item), some)

    def _tell(self, said: str) -> None:
        """Say how far this is, to those who wait for it twice a second, and in the log from time to time."""
        with self._lock:
            now = time.monotonic()
            if now - self._moved > _PAUSE:
                self._moved = now
                _write_progress(self.folder, self.run_name, said=said)
            if now - self._told > _SECONDS_BETWEEN_LINES:
                self._told = now
                logger.info("%s %s: %s", FLAG, self.folder, said)

    def _look(self, path: str, media: Media) -> tuple[str, Stamp | None, bool]:
        """What a file is like now, if it is one that can be copied, and whether its copy is of just that."""
        copy = Path(self.staged.place(path))
        try:
            check_links(media)
            stamp = None if os.path.isdir(path) else _stamp(path)
        except (OSError, ValueError):  # Whoever opens it says so.
            stamp = None
        known = self._index.get(copy.name)
        if stamp is not None and known is not None and known[0] == stamp:
            with contextlib.suppress(OSError):
                if copy.stat().st_size == stamp[0] and _checksum(copy) == known[1]:
                    return path, stamp, True
        copy.unlink(missing_ok=True)  # Of what the file was before, or damaged: it must not be read.
        return path, stamp, False

    def _check_room(self, needed: int) -> None:
        """A ValueError where the disk is too small for what is to be copied."""
        free = shutil.disk_usage(self.folder).free
        if needed and needed + _SPARE > free:
            raise ValueError(
                f"{FLAG} {self.folder}: {needed / 1e9:.2f} GB are to be copied, and its disk has "
                f"{free / 1e9:.2f} GB free; give another folder, remove copies of other data, or leave the flag out"
            )

    def _copy(self, path: str, stamp: Stamp) -> dict[str, object] | None:
        """The entry of a file's new copy in the index; None where the file cannot be read or changes meanwhile."""
        copy = Path(self.staged.place(path))
        copy.parent.mkdir(mode=0o700, exist_ok=True)
        beside = copy.with_name(f"{copy.name}.{os.getpid()}")
        try:
            with beside.open("wb") as target:
                try:
                    source = open(path, "rb")  # noqa: PTH123, SIM115
                except OSError:
                    return None
                with source:
                    self._copy_bytes(source, target)
                if stamp[0] > _NUM_BLOCKS * _BLOCK:  # What a crash takes of these, no checksum shows.
                    target.flush()
                    os.fsync(target.fileno())
            try:
                same = _stamp(path) == stamp and beside.stat().st_size == stamp[0]
                checksum = _checksum(beside)
                same = same and _checksum(Path(path)) == checksum
            except OSError:
                same = False
            if not same:
                return None
            beside.replace(copy)
        finally:
            beside.unlink(missing_ok=True)
        return {"name": copy.name, "stamp": stamp, "checksum": checksum}

    def _copy_bytes(self, source: IO[bytes], target: IO[bytes]) -> None:
        while True:
            try:
                piece = source.read(_PIECE)
            except OSError:
                return  # The size tells that it is not whole.
            if not piece:
                return
            target.write(piece)
            with self._lock:
                self.counts.size += len(piece)
            self._tell(f"copying: {self.counts.describe()}")


def _stamp(path: str) -> Stamp:
    status = os.stat(path)  # noqa: PTH116
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _checksum(path: Path) -> int:
    """CRC-32 of the first, the middle and the last block of a file: zeros that a crash has left there show."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        checksum = 0
        for at in sorted({0, max(0, size // 2 - _BLOCK // 2), max(0, size - _BLOCK)}):
            file.seek(at)
            checksum = zlib.crc32(file.read(_BLOCK), checksum)
    return checksum


def _read_index(path: Path) -> dict[str, tuple[Stamp, int]]:
    """What copies are of, by name; the last entry of a name counts."""
    found = {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(TypeError, KeyError, ValueError):  # A line that is damaged is of no copy.
            row = json.loads(line)
            size, changed, status = row["stamp"]
            found[str(row["name"])] = ((int(size), int(changed), int(status)), int(row["checksum"]))
    return found
