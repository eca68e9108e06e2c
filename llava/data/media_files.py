"""Media files before a decoder looks at them: where they may lie, how large they may be, and bytes without a file."""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import io
import os
import re
import stat
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from llava.io import write_beside
from llava.messages import shorten_text
from llava.storage import read_again
from llava.types import Media, MediaKind, Record

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(data|file):")
_LONGEST_PATH = 4096
_THREADS = 16
_FILES_AT_ONCE = 2048
ANIMATED_SUFFIXES = (".gif", ".webp", ".png", ".apng", ".avif")
PICTURE_SUFFIXES = (*ANIMATED_SUFFIXES, ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".heic", ".heif")


class MediaError(ValueError):
    """A file that is missing, broken or not what it should be; the message names it.

    ``path`` is the file, where the message stands for a sample and not for the file alone.
    """

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


def local_path(path: str) -> str:
    """A path with ``~`` for the home folder replaced.

    Raises:
        MediaError: it is no path but an address, or the content of a file.
    """
    if address := _ADDRESS.match(path):
        raise MediaError(
            f"{path[:100]}{'...' if len(path) > 100 else ''}: is an address ({address.group()}), and only files are "
            "read, so that a run does not depend on a server; fetch it and give its path"
        )
    # Somebody's base64 without its "data:"; the system's own error would print all of it.
    if len(path) > _LONGEST_PATH:
        raise MediaError(f"{path[:40]}... has {len(path)} characters and is no path; write the content into a file")
    return os.path.expanduser(path) if path.startswith("~") else path  # noqa: PTH111


def is_picture_name(path: str) -> bool:
    """Whether a file is a picture by its name."""
    return path.lower().endswith(PICTURE_SUFFIXES)


def check_file(path: str) -> tuple[str, int]:
    """The path of a file as ``local_path`` has it, and its size in bytes.

    Raises:
        MediaError: it is missing, empty or no file, so that no decoder needs to be asked about it.
    """
    path = local_path(path)
    try:
        # One call answers all three: there, a file, not empty.
        status = os.stat(path)  # noqa: PTH116
    except FileNotFoundError as error:
        raise MediaError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise MediaError(f"{path}: cannot be opened: {reason}") from error
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{path}: {'a folder' if stat.S_ISDIR(status.st_mode) else 'a device or pipe'}, not a file")
    if status.st_size == 0:
        raise MediaError(f"{path}: the file is empty")
    return path, status.st_size


def check_mounted(media: Media) -> None:
    """An OSError of the storage for a file that is not there because all of its folder of media is gone."""
    root = media.path[: media.root]
    if root and not os.path.lexists(media.path) and not _has_files(root):
        raise OSError(errno.ENODEV, "the folder of media is gone, or empty; is its disk mounted?", root)


def _has_files(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def check_media_folders(image_folder: str | None, video_folder: str | None) -> None:
    """A ValueError for a folder of media that is not there."""
    for flag, folder in (("image_folder", image_folder), ("video_folder", video_folder)):
        if folder and not os.path.isdir(os.path.expanduser(folder)):  # noqa: PTH111
            raise ValueError(f"--{flag} {shorten_text(folder, 200)}: no such folder")


def find_missing(records: Sequence[Record]) -> list[str]:
    """What is wrong with the first file of each sample that is not there or empty, in the order of the samples.

    No file is decoded: a million of them take seconds.
    """
    from llava.data.index import Mixture

    # The index has the media apart: no record is made of its JSON.
    if isinstance(records, Mixture):
        waiting = ((i, file) for i, media in records.media() for file in media)
    else:
        waiting = ((i, file) for i, record in enumerate(records) for file in record.media)
    chunks = iter(lambda: list(islice(waiting, _FILES_AT_ONCE)), [])
    first: dict[int, str] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        # So many chunks at once, not all: the paths of a million files are not held together.
        while batch := list(islice(chunks, _THREADS)):
            for of_chunk in pool.map(_find_unusable, batch):
                for index, message in of_chunk:
                    first.setdefault(index, message)
    return [f"{records[index]}: {message}" for index, message in first.items()]


def _find_unusable(chunk: Sequence[tuple[int, Media]]) -> list[tuple[int, str]]:
    """What is wrong with files that are not there or empty, each with the index of its sample."""
    found = []
    for index, media in chunk:
        try:
            # A folder of frames is looked into when it is decoded.
            if not (media.kind == "video" and os.path.isdir(media.path)):
                read_again(partial(check_file, media.path), media.path)
        except MediaError as error:
            found.append((index, str(error)))
    return found


# Paths in data files stay inside the folder of media, whatever they say and wherever links lead.


def find_root(folder: str | None, home: str) -> str:
    """The full path of a folder of media: ``home`` where there is none, the current folder for an empty string."""
    return os.path.abspath(os.path.expanduser(home if folder is None else folder))  # noqa: PTH111


@cache
def _is_full(folder: str) -> bool:
    """Whether ``find_root`` would leave a path as it is, wherever this process is."""
    return Path(folder).is_absolute() and os.path.normpath(folder) == folder


def find_media(path: str, kind: MediaKind, root: str, anywhere: bool, where: str) -> Media:
    """The file that a path of a data file names.

    Only the path is looked at here, which is quick enough for a million samples; where links lead is for
    ``media.check_links`` to say, when the file is opened.

    Args:
        path: absolute, or relative to the root.
        kind: what the file is.
        root: the folder of media.
        anywhere: whether the path may lead out of it.
        where: names the sample.

    Raises:
        ValueError: it leads out of the root.
    """
    try:
        path = local_path(path)
    except MediaError as error:
        raise ValueError(f"{where}: its {kind} {error}") from error
    if not _is_full(root):
        root = find_root(root, root)
    # normpath resolves ".." in the text alone, without a look at the disk.
    found = os.path.normpath(os.path.join(root, path))
    if anywhere:
        return Media(kind, found)
    # With the separator: "/data/images2" does not lie in "/data/images".
    if not found.startswith(root.rstrip(os.sep) + os.sep):
        raise ValueError(
            f"{where}: its {kind} {path!r} lies outside the folder {root}; give the folder that has it with "
            f"--{kind}_folder, or allow it with --allow_outside_paths"
        )
    return Media(kind, found, len(root))


# How large media may be. More is an error before anything is decoded, and no process without memory.

PILLOW_LIMIT = 178_956_970
"""Pixels above which Pillow refuses an image (twice its ``MAX_IMAGE_PIXELS``, which is the whole process's to set)."""


@dataclass(frozen=True)
class MediaLimits:
    """The most that a file may ask for; each field is a flag.

    A damaged or malicious header of a few bytes can declare a picture of many gigabytes. So each check comes before
    anything is decoded. They raise ValueErrors without the path, which whoever opened the file adds.
    """

    max_image_pixels: int = 100_000_000
    """Most pixels of an image, or of one frame of a video (default 100 million)."""
    max_image_bytes: int = 2**29
    """Largest image file, in bytes (default 512 MiB)."""
    max_video_pixels: int = 500_000_000
    """Most pixels of the frames sampled from a clip, before they are fitted to the tower (default 500 million, which
    take 1.5 GB)."""
    max_video_frames: int = 1_000_000
    """Most frames of a clip (default 1 million)."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")
        if self.max_image_pixels > PILLOW_LIMIT:
            raise ValueError(
                f"--max_image_pixels is {self.max_image_pixels}; it can be at most {PILLOW_LIMIT}, where Pillow stops"
            )

    def check_picture(self, width: int, height: int) -> None:
        """Before an image, or any frame of a clip, is decoded; sizes as its header declares them."""
        if width * height > self.max_image_pixels:
            raise ValueError(
                f"it is {width} x {height} pixels, {width * height}, but --max_image_pixels is {self.max_image_pixels}"
            )

    def check_frames(self, num_frames: int, width: int, height: int) -> None:
        """Before the frames sampled from a clip are decoded."""
        if (pixels := num_frames * width * height) > self.max_video_pixels:
            raise ValueError(
                f"{num_frames} frames of {width} x {height} are {pixels} pixels, but --max_video_pixels is "
                f"{self.max_video_pixels}; scale the clip down, or lower --num_frames or --frames_upbound"
            )

    def check_length(self, num_frames: int) -> None:
        """While the frames of a clip are counted."""
        if num_frames > self.max_video_frames:
            raise ValueError(f"it has more frames than --max_video_frames, {self.max_video_frames}; cut it into clips")


DEFAULT_LIMITS = MediaLimits()


# Media of a raw sample: paths, or bytes that are written once to a folder of files, which everything else reads.

_DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,")
_SUFFIX = re.compile(r"\.[a-z0-9]{1,5}")
_MEDIA_KEYS = ("bytes", "path", "url", "image", "video", "image_url", "video_url", "file")
"""Keys of an object that stands for an image or a video."""


def read_media(
    value: object, kind: MediaKind, root: str, source: str, anywhere: bool, media_dir: Path | None, where: str
) -> Media:
    """The file of an image or a video, given as a path, bytes, a ``data:`` address, a picture or an object of these.

    Args:
        value: what the sample has.
        kind, root, anywhere, where: as for ``find_media``.
        source: the sub-folder of the root that a relative path starts from.
        media_dir: where bytes are written; None is a folder that goes with this process.

    Raises:
        ValueError: it is none of these, or its path leads out of the root.
    """
    try:
        data, path = _split_value(value)
        if data is not None:
            folder = media_dir or temporary_folder()
            return Media(kind, _write_media(data, path, folder), len(str(folder)))
    except ValueError as error:
        raise ValueError(f'{where}: "{kind}": {error}') from error
    if not path:
        raise ValueError(f'{where}: "{kind}" must be a path or a list of paths, found {value!r:.80}')
    return find_media(os.path.join(source, path) if source else path, kind, root, anywhere, where)


def _split_value(value: object) -> tuple[bytes | None, str]:
    """The bytes of an image or a video, if they were given, and its path or name."""
    if isinstance(value, str) and ":" not in value:  # No address: nearly always.
        return None, local_path(value)
    if isinstance(value, bytes):
        return value, ""
    if hasattr(value, "save") and hasattr(value, "tobytes"):  # A picture of Pillow: a PNG loses nothing of it.
        file = io.BytesIO()
        value.save(file, "PNG")
        return file.getvalue(), ".png"
    if isinstance(value, dict):
        given = {key: item for key, item in value.items() if key in _MEDIA_KEYS and item}
        if isinstance(data := given.pop("bytes", None), bytes):
            return data, str(given.get("path", ""))
        # Two of them would be two media, or one said twice: neither can be told.
        value = next(iter(given.values())) if len(given) == 1 else None
    if not isinstance(value, str):
        return None, ""
    if match := _DATA_URI.match(value):
        try:
            return base64.b64decode(value[match.end() :], validate=True), ""
        except binascii.Error as error:
            raise ValueError(f"its data: address is not base64: {error}") from error
    if value.startswith("file://"):
        return None, unquote(value.removeprefix("file://"))
    return None, local_path(value)


@cache
def temporary_folder() -> Path:
    """A folder of media that goes with this process."""
    import atexit
    import shutil

    # Without an index folder there is nowhere else, and no process reads it but this one and its workers.
    folder = tempfile.mkdtemp(prefix="llava-media-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _write_media(data: bytes, name: str, folder: Path) -> str:
    """The path of a file with these bytes; it is named after them, so that each is there once.

    Args:
        data: of an image or a video.
        name: that it had, of which the suffix is kept; "" if none is known.
        folder: below which it is written.

    Raises:
        ValueError: there are none.
    """
    if not data:
        raise ValueError("its bytes are empty")
    # Named after their content: a million samples may show one picture.
    digest = hashlib.sha256(data).hexdigest()
    suffix = Path(name).suffix.lower()
    path = folder / digest[:2] / (digest + (suffix if _SUFFIX.fullmatch(suffix) else ""))
    # Written by an earlier run or another worker.
    if path.is_file() and path.stat().st_size == len(data):
        return str(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_beside(path, durable=False, shared=True) as beside:
        beside.write_bytes(data)
    return str(path)
