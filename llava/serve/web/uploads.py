"""Uploads: what comes in as bytes is measured, looked at, decoded within limits, and not kept.

bytes -> a file in a folder of this process alone -> kind by content, against the name that it came with
-> decoded in a process of its own, within a time limit -> the tower's frames, and the file is deleted.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from llava.config import VisionConfig
from llava.data.containers import find_container
from llava.data.images import is_picture_file, open_picture
from llava.data.media import cut_views, fit_frames, load_media, sample_video
from llava.data.media_files import MediaError, MediaLimits, is_picture_name
from llava.types import Media, MediaKind, VisualInput

logger = logging.getLogger(__name__)

MIB = 2**20
_VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv", ".3gp",
)  # fmt: skip
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.IGNORECASE)
_NAME = re.compile(r"[^\w. -]+")


class UploadError(ValueError):
    """An upload that cannot be used; the message names it and says why."""


class UploadTooLargeError(UploadError):
    """An upload that is over a limit."""


@dataclass(frozen=True)
class UploadLimits:
    """The most that an upload, or all of a request's together, may ask for; the fields are flags."""

    max_upload_mb: int = 64
    """Largest file, in MiB; a request is at most one and a half times as large, as base64 is longer than bytes."""
    max_media: int = 8
    """Most images and videos of one request."""
    max_video_seconds: float = 600.0
    """Longest clip."""
    max_image_pixels: int = 40_000_000
    """Most pixels of an image, or of a frame."""
    decode_timeout: float = 30.0
    """Seconds that decoding one file may take."""

    @property
    def max_bytes(self) -> int:
        return self.max_upload_mb * MIB

    @property
    def max_request_bytes(self) -> int:
        return self.max_bytes * 3 // 2 + MIB

    @property
    def media(self) -> MediaLimits:
        """For the decoders."""
        # No clip of that length has more frames than 240 a second.
        frames = max(int(self.max_video_seconds * 240), 1)
        return MediaLimits(self.max_image_pixels, self.max_bytes, max(200_000_000, self.max_image_pixels), frames)


@dataclass(frozen=True)
class Upload:
    """A file that came in.

    Attributes:
        path: where it lies; deleted with ``Uploads.delete``.
        name: that it came with, without folders.
        kind: by its content.
    """

    path: str
    name: str
    kind: MediaKind


@dataclass
class Uploads:
    """The folder of a server's uploads, which goes with the process, and their decoding."""

    limits: UploadLimits = field(default_factory=UploadLimits)

    def __post_init__(self) -> None:
        # mkdtemp makes it for this user alone.
        self.folder = Path(tempfile.mkdtemp(prefix="llava-web-"))
        # One decoder process, and one file at a time in it.
        self._decoder = threading.Lock()

    def close(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def check_size(self, size: int, name: str) -> None:
        """An UploadTooLargeError for more bytes than are taken."""
        if size > self.limits.max_bytes:
            raise UploadTooLargeError(
                f"{name}: the file has {size / MIB:.1f} MiB, but at most {self.limits.max_upload_mb} are taken; "
                "shorten or scale it, or raise --max_upload_mb"
            )

    def write(self, data: bytes, name: str) -> Upload:
        """Keep the bytes of an upload in a file.

        Args:
            data: of an image or a video.
            name: that it came with; its ending must not contradict the content.

        Raises:
            UploadError: it is empty, too large, or not what its name says.
        """
        name = clean_name(name)
        self.check_size(len(data), name)
        # A name of the server's own: nothing of the visitor's gets into a path.
        path = self.folder / secrets.token_hex(16)
        path.write_bytes(data)
        try:
            return Upload(str(path), name, self.find_kind(str(path), name))
        except UploadError:
            path.unlink()
            raise

    def find_kind(self, path: str, name: str) -> MediaKind:
        """Whether a file is an image or a video, by its content; an UploadError if it is neither or says otherwise."""
        self.check_size(os.path.getsize(path), name)  # noqa: PTH202
        try:
            kind = self._look_at(path)
        except ValueError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise UploadError(f"{name}: {reason}") from error
        suffix = Path(name).suffix.lower()
        claimed = "image" if is_picture_name(name) else "video" if suffix in _VIDEO_SUFFIXES else kind
        # Animated pictures are clips with the names of pictures.
        if claimed != kind and not (kind == "video" and claimed == "image" and is_picture_file(path)):
            raise UploadError(
                f"{name}: its name says that it is {'an' if claimed == 'image' else 'a'} {claimed}, but its content is "
                f"{'an' if kind == 'image' else 'a'} {kind}; give it its right name"
            )
        return kind

    def _look_at(self, path: str) -> MediaKind:
        if is_picture_file(path):
            with open_picture(path, self.limits.media) as (image, animation):
                several = animation is not None or getattr(image, "n_frames", 1) > 1
                return "video" if several and image.format in ("GIF", "WEBP", "PNG", "AVIF") else "image"
        find_container(path)
        return "video"

    def load(self, upload: Upload, vision: VisionConfig) -> VisualInput:
        """The frames of an upload as a tower sees them.

        Raises:
            UploadError: it cannot be decoded, or is over a limit.
        """
        try:
            with self._decoder:
                loaded = self._decode(upload, vision)
        except MediaError as error:
            # Visitors see the name that they gave, not where the file lies here.
            reason = str(error).replace(f"{upload.path}: ", "").replace(upload.path, "it")
            raise UploadError(f"{upload.name}: {reason}") from error
        if loaded.kind == "video" and loaded.duration > self.limits.max_video_seconds:
            raise UploadTooLargeError(
                f"{upload.name}: it lasts {loaded.duration:.0f} seconds, but at most "
                f"{self.limits.max_video_seconds:.0f} are taken; cut it, or raise --max_video_seconds"
            )
        return loaded

    def _decode(self, upload: Upload, vision: VisionConfig) -> VisualInput:
        limits, timeout = self.limits.media, self.limits.decode_timeout
        if upload.kind == "video":
            return load_media(Media("video", upload.path), vision, timeout=timeout, limits=limits)
        # As a clip of one frame, which is decoded where a decoder that hangs or crashes takes nothing along.
        sampled = sample_video(upload.path, 1, timeout=timeout, limits=limits, frame_files=(upload.path,))
        size = (sampled.frames.shape[1], sampled.frames.shape[2])
        views = fit_frames(sampled.frames, vision) if vision.anyres is None else cut_views(sampled.frames[0], vision)
        return VisualInput("image", views, size, (0.0,))

    def delete(self, upload: Upload) -> None:
        """Delete the file of an upload."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(upload.path)  # noqa: PTH108

    @contextlib.contextmanager
    def holding(self) -> Iterator[list[Upload]]:
        """A list whose uploads are deleted at the end of the ``with``."""
        held: list[Upload] = []
        try:
            yield held
        finally:
            for upload in held:
                self.delete(upload)


def clean_name(name: str) -> str:
    """A file's name for messages: without folders, control characters and markup, and short."""
    name = _NAME.sub("_", name.replace("\\", "/").rsplit("/", 1)[-1]).strip(" .")
    return name[-80:] or "upload"


def read_data_url(url: str, limit: int) -> tuple[bytes, str]:
    """The bytes of a ``data:`` address, and a name with the ending of its type.

    Raises:
        UploadError: it is not base64.
        UploadTooLargeError: it is more than ``limit`` bytes.
    """
    match = _DATA_URL.match(url)
    if match is None:
        raise UploadError("a data: address must be data:TYPE/SUBTYPE;base64,...")
    if (len(url) - match.end()) * 3 // 4 > limit + 2:
        raise UploadTooLargeError(f"the data: address has more than {limit // MIB} MiB; raise --max_upload_mb")
    try:
        data = base64.b64decode(url[match.end() :], validate=True)
    except binascii.Error as error:
        raise UploadError(f"the data: address is not base64: {error}") from error
    kind, _, subtype = (match[1] or "").lower().partition("/")
    suffix = {"image": ".png", "video": ".mp4"}.get(kind, "")
    # What matters of a type is whether it claims an image or a video; image/jpeg over a PNG is common and harmless.
    return data, f"{kind or 'upload'}{suffix}" if subtype else "upload"


# Files that are uploaded first and named in a request later.

FILE_SECONDS = 3600.0
_MOST_FILES = 64


@dataclass(frozen=True)
class StoredFile:
    """An upload with the name that requests have for it."""

    id: str
    upload: Upload
    size: int
    created: int


class FileStore:
    """Uploads that wait for requests: at most an hour, and at most 64."""

    def __init__(self, uploads: Uploads, seconds: float = FILE_SECONDS) -> None:
        self.uploads, self.seconds = uploads, seconds
        self._files: dict[str, StoredFile] = {}
        self._lock = threading.Lock()

    def add(self, data: bytes, name: str) -> StoredFile:
        """Keep an upload; the oldest one goes where there are too many."""
        upload = self.uploads.write(data, name)
        stored = StoredFile(f"file-{secrets.token_hex(12)}", upload, len(data), int(time.time()))
        with self._lock:
            self._expire()
            while len(self._files) >= _MOST_FILES:
                self._remove(next(iter(self._files)))
            self._files[stored.id] = stored
        return stored

    def get(self, file_id: str) -> StoredFile | None:
        with self._lock:
            self._expire()
            return self._files.get(file_id)

    def list(self) -> list[StoredFile]:
        with self._lock:
            self._expire()
            return list(self._files.values())

    def delete(self, file_id: str) -> bool:
        """Whether there was such a file."""
        with self._lock:
            return self._remove(file_id)

    def copy(self, stored: StoredFile) -> Upload:
        """The same content in a file of its own, for a request that deletes what it has used."""
        path = self.uploads.folder / secrets.token_hex(16)
        try:
            os.link(stored.upload.path, path)
        except OSError:
            try:
                shutil.copyfile(stored.upload.path, path)
            except FileNotFoundError as error:
                raise UploadError(f"{stored.upload.name}: the file was deleted meanwhile") from error
        return replace(stored.upload, path=str(path))

    def _remove(self, file_id: str) -> bool:
        stored = self._files.pop(file_id, None)
        if stored is not None:
            self.uploads.delete(stored.upload)
        return stored is not None

    def _expire(self) -> None:
        limit = time.time() - self.seconds
        for file_id in [file_id for file_id, stored in self._files.items() if stored.created < limit]:
            self._remove(file_id)
