"""Finds videos that were cut off, or end in zeros, from what their container says of its own parts.

Decoders play what is there of a half-copied file and say nothing, and its frames would be sampled
from the wrong stretch of the clip.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import BinaryIO

from llava.data.packets import find_container, packet_size

_TAIL_BYTES = 4096
_AT_ONCE = 1 << 20
_RAW = ("h264", "hevc", "m4v", "mpegvideo", "obu", "nut")


def check_complete(path: str, size: int) -> None:
    """A ValueError if a video ends before its container does, or is none (see ``find_container``).

    Args:
        path: the file.
        size: its length in bytes.
    """
    name = find_container(path)
    with open(path, "rb") as file:  # noqa: PTH123
        _CHECKS.get(name, _check_last_bytes if name in _RAW else _check_tail)(_Reader(file, size))


class _Reader:
    """A file whose parts are looked at one after the other."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size = file, size

    def read(self, start: int, count: int) -> bytes:
        """Bytes at a place, fewer at the end of the file."""
        self._file.seek(start)
        return self._file.read(count)

    def number(self, start: int, count: int, order: str = "little") -> int:
        """A whole number at a place."""
        return int.from_bytes(self.read(start, count), "big" if order == "big" else "little")

    def check_end(self, end: int) -> None:
        """A ValueError if a part ends behind the file."""
        if end > self.size:
            raise ValueError(f"it is cut off: its container speaks of {end} bytes, the file has {self.size}")

    def check_hole(self, start: int, most: int = 64) -> None:
        """A ValueError if more than ``most`` zeros, which may be filling, lie where a part should begin."""
        self.check_zeros(start, most)
        if len(found := self.read(start, most + 1)) > most and not any(found):
            raise ValueError(
                f"it holds only zeros at byte {start} of {self.size}: part of it was not copied or downloaded"
            )

    def check_zeros(self, start: int, most: int = 64) -> None:
        """A ValueError if all is zeros from a place on to the end, or to where nobody looks any more."""
        rest = self.read(start, _TAIL_BYTES)
        if len(rest) > most and not any(rest):
            raise ValueError(
                f"it holds only zeros from byte {start} of {self.size} on: it was not copied or downloaded to its end"
            )


def _check_tail(file: _Reader) -> None:
    file.check_zeros(max(file.size - min(_TAIL_BYTES, file.size // 8), 0))


def _check_last_bytes(file: _Reader) -> None:
    """Coded pictures and sound do not end in so many zeros."""
    file.check_zeros(max(file.size - 65, 0))


_MP4_NEEDED = (b"mdat", b"moov", b"moof")


def _check_mp4(file: _Reader) -> None:
    start, fragments = 0, False
    while start + 8 <= file.size:
        header = file.read(start, 16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:  # the length follows as eight bytes
            length = int.from_bytes(header[8:16], "big")
        if length < 8:  # 0: the box lasts to the end of the file
            if fragments:
                file.check_hole(start)
            return
        fragments = fragments or kind == b"moof"
        if kind in _MP4_NEEDED:
            file.check_end(start + length)
        elif kind == b"sidx":
            file.check_end(start + length + _fragment_bytes(file.read(start, min(length, 1 << 20))))
        start += length


def _fragment_bytes(index: bytes) -> int:
    """How many bytes of fragments an index speaks of that follow it, ISO/IEC 14496-12, 8.16.3."""
    place = 20 if index[8:9] == b"\0" else 28
    offset = int.from_bytes(index[place : place + (place - 12) // 2], "big")
    place += (place - 12) // 2
    count = int.from_bytes(index[place + 2 : place + 4], "big")
    entries = [index[place + 4 + 12 * i : place + 8 + 12 * i] for i in range(count)]
    return offset + sum(int.from_bytes(entry, "big") & 0x7FFFFFFF for entry in entries)


_SEGMENT, _CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"


def _check_matroska(file: _Reader) -> None:
    header, start = _element_size(file, 4)
    start += header or 0
    if file.read(start, 4) != _SEGMENT:
        return
    length, start = _element_size(file, start + 4)
    end = file.size
    if length is not None:  # a live recording does not say it
        file.check_end(start + length)
        end = start + length
    clusters = _check_elements(file, start, end)
    for cluster in clusters:
        _check_elements(file, *cluster)
    if clusters and clusters[-1][1] == file.size:
        _check_last_bytes(file)


def _check_elements(file: _Reader, start: int, end: int) -> list[tuple[int, int]]:
    """Look at the parts of a segment or cluster; gives beginning and end of each cluster in it."""
    clusters = []
    while start < end:
        first = file.read(start, 1)
        if not first[0]:
            file.check_hole(start)
            break
        num_bytes = 9 - first[0].bit_length()
        if num_bytes > 4:
            break
        is_cluster = file.read(start, num_bytes) == _CLUSTER
        length, start = _element_size(file, start + num_bytes)
        if length is None and not is_cluster:
            break
        # The parts of a cluster that does not say its length follow like parts of the segment.
        if is_cluster and length is not None:
            clusters.append((start, start + length))
        start += length or 0
        file.check_end(start)
    return clusters


def _element_size(file: _Reader, start: int) -> tuple[int | None, int]:
    """A length in Matroska's coding (as many bytes as the first has leading zero bits, and one) and its end.

    The length is None where it is not known; a file that ends within it is cut off.
    """
    first = file.number(start, 1)
    num_bytes = 9 - first.bit_length() if first else 8
    file.check_end(start + num_bytes)
    unknown = (1 << 7 * num_bytes) - 1
    value = file.number(start, num_bytes, "big") & unknown
    return (None if value == unknown or not first else value), start + num_bytes


_NO_LENGTH = (0, 0xFFFFFFFF)


def _check_avi(file: _Reader) -> None:
    start = 0
    while start + 12 <= file.size and file.read(start, 4) == b"RIFF":
        length = file.number(start + 4, 4)
        end = file.size if length in _NO_LENGTH else start + 8 + length
        file.check_end(end)
        _check_chunks(file, start + 12, end)
        start = end + end % 2


def _check_chunks(file: _Reader, start: int, end: int) -> None:
    while start + 8 <= end:
        kind, length = file.read(start, 4), file.number(start + 4, 4)
        if not any(kind):
            file.check_hole(start)
            return
        if kind == b"LIST" and (length in _NO_LENGTH or file.read(start + 8, 4) in (b"movi", b"rec ")):
            start += 12  # its chunks follow
            continue
        file.check_end(start + 8 + length)
        start += 8 + length + length % 2


_FLV_SIZE = b"\0\x08filesize\0"


def _check_flv(file: _Reader) -> None:
    start = file.number(5, 4, "big") + 4
    declared = file.read(0, _TAIL_BYTES).partition(_FLV_SIZE)[2][:8]
    if len(declared) == 8 and 0 < (total := struct.unpack(">d", declared)[0]) < 2**53:
        file.check_end(int(total))
    while start < file.size:
        kind = file.number(start, 1) & 31
        if kind == 0:
            file.check_hole(start)
        if kind not in (8, 9, 18):  # sound, pictures, descriptions
            return
        file.check_end(start + 11)
        start += 11 + file.number(start + 1, 3, "big")
        file.check_end(start)
        start += 4
    _check_last_bytes(file)


_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_INDEX = bytes.fromhex("90080033b1e5cf1189f400a0c90349cb")
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")


def _check_asf(file: _Reader) -> None:
    header = file.read(0, min(file.number(16, 8), 1 << 20))
    place, start = header.find(_ASF_PROPERTIES), file.number(16, 8)
    file.check_end(start + 50)
    if place < 0 or len(header) < place + 96 or file.read(start, 16) != _ASF_DATA:
        return
    packet = int.from_bytes(header[place + 92 : place + 96], "little")
    if header[place + 88] & 1:  # a live recording does not say how long it is
        end = start + 50
        while packet and end < file.size and file.read(end, 16) != _ASF_INDEX:
            end += packet
    else:
        file.check_end(int.from_bytes(header[place + 40 : place + 48], "little"))
        end = start + file.number(start + 16, 8)
    file.check_end(end)
    # Packets are filled up with zeros, but neither they nor the index behind them begin so.
    for place in (*range(start + 50, end, packet), end) if packet else ():
        if not any(file.read(place, 16)):
            file.check_hole(place, most=min(64, packet - 1))


def _check_ogg(file: _Reader) -> None:
    start = 0
    while start < file.size:
        header = file.read(start, 27 + 255)
        if header[:4] != b"OggS":
            file.check_hole(start)
            if b"OggS".startswith(header):
                file.check_end(start + 27)
            return
        file.check_end(start + 27 + (header[26] if len(header) > 26 else 0))
        start += 27 + header[26] + sum(header[27 : 27 + header[26]])
        file.check_end(start)
    _check_last_bytes(file)


def _check_transport_stream(file: _Reader) -> None:
    packet = packet_size(file.read(0, _TAIL_BYTES))
    file.check_zeros(max(file.size - packet, 0))
    # Whatever it carries, every packet begins with a byte that is none.
    zeros = bytes(2 * packet)
    for at in range(0, file.size, _AT_ONCE):
        if (found := file.read(at, _AT_ONCE + len(zeros)).find(zeros)) >= 0:
            file.check_hole(at + found)
    # Counted from its last packets: whatever was lost on the way has moved them.
    place = max(file.size - _TAIL_BYTES, 0)
    tail = file.read(place, _TAIL_BYTES)
    starts = [i for i in range(min(packet, len(tail))) if not tail[i::packet].strip(b"G")]
    # A packet of 192 or 204 bytes has 188 that count, in front or behind.
    left = [(len(tail) - start) % packet for start in starts]
    if left and not any(count in (0, 188) for count in left):
        file.check_end(file.size + packet - left[0])


def _check_program_stream(file: _Reader) -> None:
    start = 0
    while start < file.size:
        header = file.read(start, 14)
        if header[:3] != b"\0\0\1":
            file.check_zeros(start)
            if b"\0\0\1".startswith(header):
                file.check_end(start + 4)
            # Sectors of a disc may be filled up with zeros, to the next start code.
            zeros = len(found := file.read(start, _AT_ONCE)) - len(rest := found.lstrip(b"\0"))
            if zeros < 2:
                return
            if rest[:1] != b"\1":
                file.check_hole(start)
                return
            start += zeros - 2
            continue
        kind = header[3] if len(header) > 3 else 0
        if kind == 0xBA:
            newer = len(header) > 4 and header[4] >> 6 == 1
            start += 14 + (header[13] & 7 if len(header) > 13 else 0) if newer else 12
        elif kind == 0xB9:
            start += 4
        else:
            start += 6 + int.from_bytes(header[4:6], "big")
        file.check_end(start)


def _check_gif(file: _Reader) -> None:
    flags = file.number(10, 1)
    start = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while True:
        file.check_end(start + 1)
        kind = file.number(start, 1)
        if kind == 0x2C:  # a picture, perhaps with colours of its own, and the size of its codes
            flags = file.number(start + 9, 1)
            start += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        elif kind == 0x21:
            start += 2
        else:
            if kind != 0x3B:
                file.check_zeros(start, most=0)
            return
        while length := file.number(start, 1):
            start += 1 + length
            file.check_end(start + 1)
        start += 1


def _check_ivf(file: _Reader) -> None:
    start = file.number(6, 2)
    while start < file.size:
        file.check_hole(start, most=12)
        file.check_end(start + 12)
        start += 12 + file.number(start, 4)
        file.check_end(start)
    _check_last_bytes(file)


_Y4M_LAYOUT = re.compile(rb"(420|422|444alpha|444|411|mono)(?:jpeg|mpeg2|paldv|p?(\d+))?")
_DV_SEQUENCE = 150 * 80
"""Bytes of a tenth of a frame of 525 lines, of a twelfth of one of 625."""


def _check_dv(file: _Reader) -> None:
    frame = _DV_SEQUENCE * (12 if file.number(3, 1) & 0x80 else 10)
    file.check_zeros(max(file.size - min(_TAIL_BYTES, file.size // 8), 0))
    file.check_end(-(-file.size // frame) * frame)


def _check_y4m(file: _Reader) -> None:
    header, line_end, _ = file.read(0, _TAIL_BYTES).partition(b"\n")
    fields = {word[:1]: word[1:] for word in header.split()[1:]}
    width, height, chroma = fields.get(b"W", b""), fields.get(b"H", b""), fields.get(b"C", b"420")
    if not (line_end and width.isdigit() and height.isdigit()):
        return
    picture, start = _y4m_picture_bytes(int(width), int(height), chroma), len(header) + 1
    while picture and start < file.size:
        line, line_end, _ = file.read(start, 256).partition(b"\n")
        if not line.startswith(b"FRAME"):
            file.check_hole(start)
        if not line.startswith(b"FRAME"[: len(line)]):
            return
        start += len(line) + 1 + picture
        file.check_end(start)


def _y4m_picture_bytes(width: int, height: int, chroma: bytes) -> int:
    """Bytes of one picture; 0 for a layout that is not known."""
    match = _Y4M_LAYOUT.fullmatch(chroma)
    if match is None:
        return 0
    half_width, half_height = -(-width // 2), -(-height // 2)
    colours = {
        b"420": 2 * half_width * half_height, b"422": 2 * half_width * height, b"444": 2 * width * height,
        b"444alpha": 3 * width * height, b"411": 2 * -(-width // 4) * height, b"mono": 0,
    }[match[1]]  # fmt: skip
    return (width * height + colours) * (2 if match[2] else 1)


_CHECKS: dict[str, Callable[[_Reader], None]] = {
    "mov": _check_mp4,
    "matroska": _check_matroska,
    "avi": _check_avi,
    "flv": _check_flv,
    "asf": _check_asf,
    "ogg": _check_ogg,
    "mpegts": _check_transport_stream,
    "mpeg": _check_program_stream,
    "gif": _check_gif,
    "ivf": _check_ivf,
    "dv": _check_dv,
    "yuv4mpegpipe": _check_y4m,
}
