"""Finds videos that were cut off, from the length that their container gives itself.

Decoders play what is there of a half-copied file and say nothing, and its frames would be sampled
from the wrong stretch of the clip.
"""

from __future__ import annotations

from typing import BinaryIO

_EBML_HEADER = b"\x1a\x45\xdf\xa3"
_MATROSKA_SEGMENT = b"\x18\x53\x80\x67"
_MP4_NEEDED = (b"mdat", b"moov", b"moof")


def check_complete(path: str, size: int) -> None:
    """A ValueError if an MP4, MOV, Matroska or WebM file ends before its container does.

    Args:
        path: any file; other formats pass.
        size: its length in bytes.
    """
    with open(path, "rb") as file:  # noqa: PTH123
        matroska = file.read(4) == _EBML_HEADER
        end = _matroska_end(file) if matroska else _mp4_end(file, size)
    if end > size:
        raise ValueError(f"it is cut off: its container speaks of {end} bytes, the file has {size}")


def _matroska_end(file: BinaryIO) -> int:
    """Where the segment ends; 0 where it does not say (as in a live recording)."""
    header = _read_size(file)
    if header is None:
        return 0
    file.seek(header, 1)
    if file.read(4) != _MATROSKA_SEGMENT:
        return 0
    segment = _read_size(file)
    return 0 if segment is None else file.tell() + segment


def _read_size(file: BinaryIO) -> int | None:
    """A length in Matroska's coding: as many bytes as the first has leading zero bits, and one."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    num_bytes = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(num_bytes - 1), "big") & ((1 << 7 * num_bytes) - 1)
    unknown = (1 << 7 * num_bytes) - 1
    return None if value == unknown else value


def _mp4_end(file: BinaryIO, size: int) -> int:
    """Where the frames and their index end; 0 for what is no row of boxes."""
    start = end = 0
    while start + 8 <= size:
        file.seek(start)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:  # the length follows as eight bytes
            length = int.from_bytes(header[8:16], "big")
        if length < 8:  # 0: the box lasts to the end of the file
            break
        start += length
        if kind in _MP4_NEEDED:
            end = start
    return end
