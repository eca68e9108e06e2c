"""What can be said of a media file before a decoder looks at it."""

from __future__ import annotations

import os
import re
import stat

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(data|file):")
_LONGEST_PATH = 4096
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
    if len(path) > _LONGEST_PATH:
        raise MediaError(f"{path[:40]}... has {len(path)} characters and is no path; write the content into a file")
    return expand_home(path)


def expand_home(path: str) -> str:
    """A path with ``~`` at its beginning replaced by the home folder."""
    return os.path.expanduser(path) if path.startswith("~") else path  # noqa: PTH111


def is_picture_name(path: str) -> bool:
    """Whether a file is a picture by its name."""
    return path.lower().endswith(PICTURE_SUFFIXES)


def check_file(path: str) -> int:
    """The size of a file in bytes; a MediaError for what no decoder needs to be asked about."""
    try:
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
    return status.st_size
