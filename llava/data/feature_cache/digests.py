"""Hashes of the bytes of images and clips, remembered as long as nothing says that a file has changed.

A hash is taken for a file as it stands (device, number, size and the times of its last change of content and of
status) and is believed as long as all of these are the same. The time of the last change of status is set by the
system alone: a clip that is replaced by another of the same size and time of change is hashed anew, and so are files
that were moved to another machine. A hash that was taken within two seconds of the change is not remembered, as a
second change could have the same time. Where the system has no such times (Windows), every file is read each time.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
import zlib
from collections.abc import Iterable
from pathlib import Path

from llava.data.cache import find_stranger
from llava.data.images import list_frames
from llava.data.media_files import local_path
from llava.io import append_json_lines, hash_file, read_json_lines
from llava.types import Media

FOLDER = "digests"
_SETTLED = 2.0
"""Seconds after a change from which on the next one has another time, on any file system."""

Signature = tuple[int, ...]


class Digests:
    """Hashes of files, with what is remembered of them in a folder.

    Args:
        folder: where each process appends those that it has taken to a file of its own; None remembers nothing there.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._known: dict[Signature, str] = {}
        self._file: Path | None = None
        self._process = 0
        if folder is None:
            return
        for path in sorted(folder.glob("*.jsonl")):
            if find_stranger(path, folder.parent) is None:  # Not hashes that somebody else says files have.
                self._known |= dict(_read(path))

    def of_media(self, media: Media) -> str:
        """SHA-256 of the bytes of an image or a clip; of the hashes of its pictures for one that is given as these.

        Raises:
            OSError: a file cannot be read.
            ValueError: a folder has no pictures.
        """
        if media.frames:
            return self._of_files(media.frames)
        path = local_path(media.path)
        return self._of_files(list_frames(path)) if os.path.isdir(path) else self.of_file(path)

    def _of_files(self, paths: Iterable[str]) -> str:
        return hashlib.sha256("\n".join(self.of_file(local_path(path)) for path in paths).encode()).hexdigest()

    def of_file(self, path: str) -> str:
        """SHA-256 of a file's bytes."""
        before = _sign(path)
        if os.name != "nt" and (known := self._known.get(before)) is not None:
            return known
        digest, now = hash_file(Path(path)), time.time()
        changed = max(before[3:]) / 1e9
        if _sign(path) == before and now - changed > _SETTLED:
            self._known[before] = digest
            self._remember(before, digest)
        return digest

    def _remember(self, signature: Signature, digest: str) -> None:
        if self.folder is None:
            return
        if self._process != os.getpid():  # Also in a process that was forked from one with a file.
            self._process, self._file = os.getpid(), self.folder / f"{uuid.uuid4().hex}.jsonl"
        assert self._file is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab") as file:
                row = {"file": signature, "sha256": digest, "crc32": _checksum(signature, digest)}
                append_json_lines(file, [row], durable=False)
        except OSError:  # The folder is read-only or full: hashes are taken again the next time.
            self.folder = None


def _sign(path: str) -> Signature:
    status = os.stat(path)  # noqa: PTH116
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _checksum(signature: Signature, digest: str) -> int:
    return zlib.crc32(f"{list(signature)} {digest}".encode())


def _read(path: Path) -> Iterable[tuple[Signature, str]]:
    """The hashes of a file; lines that are damaged are left out."""
    try:
        rows = read_json_lines(path)
    except (OSError, ValueError):
        return
    for row in rows:
        try:
            signature, digest = tuple(row["file"]), row["sha256"]
            if _checksum(signature, digest) == row["crc32"]:
                yield signature, digest
        except (TypeError, KeyError):
            continue
