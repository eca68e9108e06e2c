"""Which container a video file is, and whether the file ends where its container does.

libav guesses the container from names too, and knows hundreds: it plays a text as terminal art, takes ``v%03d.jpg`` for
all pictures with such names, and opens whatever a playlist names. So the file's first bytes choose one of a few
containers, and the only protocol is that of files. Decoders play what is there of a half-copied file and say nothing,
and its frames would be sampled from the wrong stretch of the clip. So the container's own parts are walked through
first: files that were cut off, and files with zeros where a part should begin, are refused.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO, Literal

if TYPE_CHECKING:
    from av.container import InputContainer

_HEAD_BYTES = _TAIL_BYTES = 4096
_AT_ONCE = 1 << 20
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"styp", b"sidx", b"free", b"skip", b"wide", b"pnot", b"uuid")
# What files begin with, and libav's name of the container.
_SIGNATURES = {
    b"\x1a\x45\xdf\xa3": "matroska", b"OggS": "ogg", b"FLV\x01": "flv", b"GIF87a": "gif", b"GIF89a": "gif",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c": "asf", b"DKIF": "ivf", b".RMF": "rm",
    b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02": "mxf", b"nut/multimedia container\0": "nut",
    b"YUV4MPEG2 ": "yuv4mpegpipe", b"\x1f\x07\x00": "dv", b"\x12\x00\x0a": "obu",
    b"\xb7\xd8\x00\x20\x37\x49\xda\x11\xa6\x4e\x00\x07\xe9\x5e\xad\x8d": "wtv",
    b"\0\0\1\xba": "mpeg", b"\0\0\1\xb3": "mpegvideo",
}  # fmt: skip
_NO_VIDEO = "it has no video stream, it is an audio file"
_UNKNOWN = "its content is no video of a kind that is read, whatever its name says (docs/data.md lists them)"
_AUDIO = (b"ID3", b"fLaC", b"caff", b"FORM", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"\xff\xf1", b"\xff\xf9", b"#!AMR")
_LISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"<smil", b"[playlist]")


def find_container(path: str) -> str:
    """libav's name of the container that a file is; a ValueError, without the path, if it is none that is read."""
    with open(path, "rb") as file:  # noqa: PTH123
        head = file.read(_HEAD_BYTES)
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            return name
    if head[4:8] in _MP4_BOXES:
        return "mov"
    if head.startswith(b"RIFF"):
        if head[8:12] in (b"AVI ", b"AVIX", b"AMV "):
            return "avi"
        raise ValueError(_NO_VIDEO if head[8:12] == b"WAVE" else _UNKNOWN)
    if packet_size(head):
        return "mpegts"
    if raw := _raw_stream(head):
        return raw
    if head.startswith(_AUDIO):
        raise ValueError(_NO_VIDEO)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(_LISTS):
        raise ValueError("it is a list of other files, not a video")
    raise ValueError(_UNKNOWN if any(head) else "it holds only zeros")


def packet_size(head: bytes) -> int:
    """Bytes of each packet of an MPEG transport stream, 0 for what is none: every packet begins with 0x47, ``G``."""
    for size in (188, 192, 204):
        for start in range(min(size, len(head))):
            marks = head[start::size][: 5 if len(head) > 6 * 204 else None]
            if len(marks) > 1 and not marks.strip(b"G"):
                return size
    return 0


def _raw_stream(head: bytes) -> str | None:
    """The kind of a stream of H.264, HEVC or MPEG-4 without a container, by the unit behind its first start code."""
    start = head.find(b"\0\0\1")
    if start < 0 or head[:start].strip(b"\0") or start + 5 > len(head):
        return None
    first, second = head[start + 3 : start + 5]
    if first == 0xB0 or (0x20 <= first <= 0x2F and second in (0, 0x80)):
        return "m4v"
    if (first >> 1) & 63 in (32, 33, 34, 35, 39) and not first & 0x81 and second == 1:
        return "hevc"
    if not first & 0x80 and first & 31 in (1, 5, 6, 7, 9):
        return "h264"
    return None


def open_container(path: str) -> InputContainer:
    """Open a video file with PyAV; a ValueError as from ``find_container``, or an av.FFmpegError if it is broken."""
    import av

    # Only files, and none whose name says otherwise ("concat:a|b"): nothing but this one is opened.
    options = {"protocol_whitelist": "file"}
    return av.open(f"file:{path}", format=find_container(path), options=options, metadata_errors="ignore")


def check_complete(path: str, size: int) -> None:
    """A ValueError if a video of ``size`` bytes ends before its container does, or is none (see ``find_container``)."""
    with open(path, "rb") as file:  # noqa: PTH123
        _CHECKS.get(find_container(path), _check_tail)(_Reader(file, size))


class _Reader:
    """A file whose parts are looked at one after the other."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size = file, size

    def read(self, start: int, count: int) -> bytes:
        """Bytes at a place, fewer at the end of the file."""
        self._file.seek(start)
        return self._file.read(count)

    def number(self, start: int, count: int, order: Literal["little", "big"] = "little") -> int:
        """A whole number at a place."""
        return int.from_bytes(self.read(start, count), order)

    def check_end(self, end: int) -> None:
        """A ValueError if a part ends behind the file."""
        if end > self.size:
            raise ValueError(f"it is cut off: its container speaks of {end} bytes, the file has {self.size}")

    def check_hole(self, start: int, most: int = 64) -> None:
        """A ValueError if more than ``most`` zeros, which may be filling, lie where a part should begin."""
        self.check_zeros(start, most)
        if len(found := self.read(start, most + 1)) > most and not any(found):
            raise ValueError(f"it holds only zeros at byte {start} of {self.size}: part of it was not copied")

    def check_zeros(self, start: int, most: int = 64) -> None:
        """A ValueError if all is zeros from a place on, to the end or for 4096 bytes."""
        rest = self.read(start, _TAIL_BYTES)
        if len(rest) > most and not any(rest):
            raise ValueError(f"it holds only zeros from byte {start} of {self.size} on: it was not copied to its end")

    def runs_of_zeros(self, least: int) -> Iterator[tuple[int, int]]:
        """Where so many zeros and more begin and end."""
        place = 0
        while place < self.size:
            if (found := self.read(place, _AT_ONCE + least).find(bytes(least))) < 0:
                place += _AT_ONCE
                continue
            start = place = place + found
            while place < self.size and not any(self.read(place, 64)):
                place += 64
            place += len(rest := self.read(place, 64)) - len(rest.lstrip(b"\0"))
            yield start, place


def _check_tail(file: _Reader) -> None:
    """The only check of containers whose parts are not walked through."""
    file.check_zeros(max(file.size - min(_TAIL_BYTES, file.size // 8), 0))


def _check_last_bytes(file: _Reader) -> None:
    """Coded pictures and sound do not end in so many zeros."""
    file.check_zeros(max(file.size - 65, 0))


def _check_byte_stream(file: _Reader) -> None:
    """Units behind start codes (ISO/IEC 13818-2, 14496-2, 14496-10, 23008-2), before which zeros may be filling."""
    _check_last_bytes(file)
    for start, end in file.runs_of_zeros(65):
        if file.read(end, 1) != b"\1":
            file.check_hole(start)


def _check_parts(file: _Reader, start: int, find_next: Callable[[_Reader, int], int | None]) -> None:
    """Walk from the part at ``start`` to the last one, each within the file; ``find_next`` gives None to stop early."""
    while start < file.size:
        following = find_next(file, start)
        if following is None:
            return
        file.check_end(following)
        start = following
    _check_last_bytes(file)


def _check_mp4(file: _Reader) -> None:
    """Boxes of ISO/IEC 14496-12, 4.2: four bytes of length, four of kind."""
    start, fragments = 0, False
    while start + 8 <= file.size:
        header = file.read(start, 16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:  # the length follows as eight bytes
            length = int.from_bytes(header[8:16], "big")
        if length < 8:  # 0: the box lasts to the end of the file; others are no length of a box
            if fragments:
                file.check_hole(start)
            return
        fragments = fragments or kind == b"moof"
        if kind in (b"mdat", b"moov", b"moof"):
            file.check_end(start + length)
        elif kind == b"sidx":
            file.check_end(start + length + _fragment_bytes(file.read(start, min(length, _AT_ONCE))))
        start += length


def _fragment_bytes(index: bytes) -> int:
    """How many bytes of fragments an index (``sidx``) speaks of that follow it, ISO/IEC 14496-12, 8.16.3."""
    place = 20 if index[8:9] == b"\0" else 28  # of first_offset, behind times of 32 or 64 bits
    offset_bytes = (place - 12) // 2
    offset = int.from_bytes(index[place : place + offset_bytes], "big")
    place += offset_bytes
    count = int.from_bytes(index[place + 2 : place + 4], "big")
    entries = [index[place + 4 + 12 * i : place + 8 + 12 * i] for i in range(count)]
    return offset + sum(int.from_bytes(entry, "big") & 0x7FFFFFFF for entry in entries)


_SEGMENT, _CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"


def _check_matroska(file: _Reader) -> None:
    """Elements of EBML, RFC 8794: an id and a length of variable width, in each other."""
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
    for cluster_start, cluster_end in clusters:
        _check_elements(file, cluster_start, cluster_end)
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
        num_bytes = 9 - first[0].bit_length()  # of the id
        if num_bytes > 4:
            break
        is_cluster = file.read(start, num_bytes) == _CLUSTER
        length, start = _element_size(file, start + num_bytes)
        if length is None and not is_cluster:
            break
        if is_cluster and length is not None:  # the parts of others follow like those of the segment
            clusters.append((start, start + length))
        start += length or 0
        file.check_end(start)
    return clusters


def _element_size(file: _Reader, start: int) -> tuple[int | None, int]:
    """A length in Matroska's coding (as many bytes as the first has leading zero bits, and one) and its end.

    The length is None where it is not known, which all ones say; a file that ends within it is cut off.
    """
    if not (first := file.number(start, 1, "big")):  # no length begins so: the id before it was copied last
        file.check_hole(start)
    num_bytes = min(9 - first.bit_length(), 8)
    file.check_end(start + num_bytes)
    unknown = (1 << 7 * num_bytes) - 1
    value = file.number(start, num_bytes, "big") & unknown
    return (None if value == unknown or not first else value), start + num_bytes


_NO_LENGTH = (0, 0xFFFFFFFF)  # of a file that was never closed


def _check_avi(file: _Reader) -> None:
    """Chunks of RIFF: four bytes of kind, four of length, filled up to an even number."""
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


def _check_flv(file: _Reader) -> None:
    declared = file.read(0, _TAIL_BYTES).partition(b"\0\x08filesize\0")[2][:8]
    if len(declared) == 8 and 0 < (total := struct.unpack(">d", declared)[0]) < 2**53:
        file.check_end(int(total))
    # A byte of kind, three of length, seven of times and stream, the data, and four with the length of all that.
    _check_parts(file, file.number(5, 4, "big") + 4, _next_flv_tag)


def _next_flv_tag(file: _Reader, start: int) -> int | None:
    kind = file.number(start, 1, "big") & 31
    if kind == 0:
        file.check_hole(start)
    if kind not in (8, 9, 18):  # sound, pictures, descriptions
        return None
    file.check_end(start + 11)
    end = start + 11 + file.number(start + 1, 3, "big")
    file.check_end(end)
    return min(end + 4, file.size)  # the length behind the last tag may be missing


_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_INDEX = bytes.fromhex("90080033b1e5cf1189f400a0c90349cb")
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")


def _check_asf(file: _Reader) -> None:
    """Objects of ASF: sixteen bytes of kind, eight of length; the data object holds packets of one size."""
    start = file.number(16, 8)
    header = file.read(0, min(start, _AT_ONCE))
    place = header.find(_ASF_PROPERTIES)
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


def _next_ogg_page(file: _Reader, start: int) -> int | None:
    """RFC 3533: a header of 27 bytes, of which the last counts the segments, their lengths, and the segments."""
    header = file.read(start, 27 + 255)
    if header[:4] != b"OggS":
        file.check_hole(start)
        if b"OggS".startswith(header):
            file.check_end(start + 27)
        return None
    file.check_end(start + 27 + (header[26] if len(header) > 26 else 0))
    return start + 27 + header[26] + sum(header[27 : 27 + header[26]])


def _next_ivf_frame(file: _Reader, start: int) -> int:
    """Four bytes of length, eight of time, and the frame."""
    file.check_hole(start, most=12)
    file.check_end(start + 12)
    return start + 12 + file.number(start, 4)


def _check_transport_stream(file: _Reader) -> None:
    packet = packet_size(file.read(0, _TAIL_BYTES))
    file.check_zeros(max(file.size - packet, 0))
    # Whatever it carries, every packet begins with a byte that is none.
    for start, _ in file.runs_of_zeros(2 * packet):
        file.check_hole(start)
    # Counted from its last packets: whatever was lost on the way has moved them.
    tail = file.read(max(file.size - _TAIL_BYTES, 0), _TAIL_BYTES)
    starts = [i for i in range(min(packet, len(tail))) if not tail[i::packet].strip(b"G")]
    # A packet of 192 or 204 bytes has 188 that count, in front or behind.
    left = [(len(tail) - start) % packet for start in starts]
    if left and not any(count in (0, 188) for count in left):
        file.check_end(file.size + packet - left[0])


def _check_program_stream(file: _Reader) -> None:
    """Packs and packets of ISO/IEC 13818-1, 2.5.3, each behind a start code."""
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
        if kind == 0xBA:  # a pack header, longer in MPEG-2, whose last bits count stuffing bytes
            is_mpeg2 = len(header) > 4 and header[4] >> 6 == 1
            start += 14 + (header[13] & 7 if len(header) > 13 else 0) if is_mpeg2 else 12
        elif kind == 0xB9:  # the end of the stream
            start += 4
        else:
            start += 6 + int.from_bytes(header[4:6], "big")
        file.check_end(start)


def _check_dv(file: _Reader) -> None:
    """Frames of one size: ten sequences of 150 blocks of 80 bytes for 525 lines, twelve for 625."""
    _check_tail(file)
    frame = 150 * 80 * (12 if file.number(3, 1) & 0x80 else 10)
    file.check_end(-(-file.size // frame) * frame)


_Y4M_LAYOUT = re.compile(rb"(420|422|444alpha|444|411|mono)(?:jpeg|mpeg2|paldv|p?(\d+))?")


def _check_y4m(file: _Reader) -> None:
    header, line_end, _ = file.read(0, _TAIL_BYTES).partition(b"\n")
    fields = {word[:1]: word[1:] for word in header.split()[1:]}
    width, height, chroma = fields.get(b"W", b""), fields.get(b"H", b""), fields.get(b"C", b"420")
    if not (line_end and width.isdigit() and height.isdigit()):
        return
    picture, start = _y4m_picture_bytes(int(width), int(height), chroma), len(header) + 1
    while picture and start < file.size:
        line = file.read(start, 256).partition(b"\n")[0]
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
    planes, across, down = {
        b"420": (2, 2, 2), b"422": (2, 2, 1), b"444": (2, 1, 1), b"444alpha": (3, 1, 1), b"411": (2, 4, 1),
        b"mono": (0, 1, 1),
    }[match[1]]  # fmt: skip
    samples = width * height + planes * -(-width // across) * -(-height // down)
    return samples * (2 if match[2] else 1)  # a number of bits behind the layout is more than 8


_CHECKS: dict[str, Callable[[_Reader], None]] = {
    "mov": _check_mp4, "matroska": _check_matroska, "avi": _check_avi, "flv": _check_flv, "asf": _check_asf,
    "ogg": lambda file: _check_parts(file, 0, _next_ogg_page),
    "ivf": lambda file: _check_parts(file, file.number(6, 2), _next_ivf_frame),
    "mpegts": _check_transport_stream, "mpeg": _check_program_stream, "dv": _check_dv, "yuv4mpegpipe": _check_y4m,
    **dict.fromkeys(("h264", "hevc", "m4v", "mpegvideo"), _check_byte_stream),
    **dict.fromkeys(("obu", "nut"), _check_last_bytes),
}  # fmt: skip
