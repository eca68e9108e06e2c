"""What the bytes of a picture file say before any pixel is made: its size, its frames' times, whether it is whole.

Pillow decodes much that is not there: a PNG's checksums are not looked at, a JPEG without an end is filled up with
gray, and zeros in the place of compressed data are decoded like any other bytes.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from llava.data.media_files import MediaLimits

# What files begin with.
_PNG, _GIF, _JPEG = b"\x89PNG\r\n\x1a\n", (b"GIF87a", b"GIF89a"), b"\xff\xd8\xff"
_BMP, _TIFF = b"BM", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
AVIF_BRANDS = (b"avif", b"avis")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

_PNG_CHECKED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"acTL", b"fcTL", b"fdAT", b"IEND")
_JPEG_END = b"\xff\xd9"
# A marker that ends compressed data: neither a stuffed zero, nor a restart, nor a fill byte.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# Compressed data have no such run of zeros, but where a code of zeros says that nothing changes.
_ZEROS = bytes(256)
# More than the bytes with which encoders fill up the last of a WebP's data.
_WEBP_NEEDED = 32
_JP2, _JP2_CODE = b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"
_LONGEST_WALK = 1 << 24
"""Bytes that are looked at one by one, in two seconds at most."""
_QOI_END = bytes(7) + b"\1"
_NO_DELAY = 0.1
"""Seconds that a frame is shown whose file says 0, as viewers have it."""


@dataclass(frozen=True)
class Animation:
    """The frames of an animated picture.

    Attributes:
        seconds: how long each is shown.
        first: Pillow's number of the first; 1 where a PNG shows another picture to those that cannot animate.
    """

    seconds: tuple[float, ...]
    first: int = 0


def is_picture(head: bytes) -> bool:
    """Whether a file is a picture, by its first 16 bytes or more."""
    return head.startswith((_PNG, *_GIF, _JPEG, _BMP, *_TIFF)) or _is_webp(head) or is_heif(head)


def _is_webp(head: bytes) -> bool:
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP"


def is_heif(head: bytes) -> bool:
    """Whether a file is a HEIC or an AVIF: one of ISO/IEC 23008-12, by the brand of its first box."""
    return head[4:8] == b"ftyp" and head[8:12] in (*AVIF_BRANDS, *HEIC_BRANDS)


def read_structure(data: bytes, limits: MediaLimits) -> Animation | None:
    """The frames of an animation, after a walk through a PNG, GIF, WebP or JPEG from its first byte to its last.

    Args:
        data: all of the file; other formats are looked at only for zeros at their end.
        limits: how large it may be.

    Returns:
        None for a still picture.

    Raises:
        ValueError: it is cut off, damaged or too large.
    """
    try:
        if data.startswith(_PNG):
            return _walk_png(data, limits)
        if data.startswith(_GIF):
            return _walk_gif(data, limits)
        if _is_webp(data):
            return _walk_webp(data, limits)
        if data.startswith(_JPEG):
            _walk_jpeg(data)
        elif data.endswith(_ZEROS) and not _ends_before_zeros(data):
            raise ValueError("its end is zeros: it was not written to its end")
        return None
    except (IndexError, struct.error) as error:
        raise _cut_off() from error


def _cut_off() -> ValueError:
    return ValueError("it is cut off: it ends before its picture does")


def _zero_filled() -> ValueError:
    return ValueError("part of its compressed data is zeros: it was not written in full")


def _ends_before_zeros(data: bytes) -> bool:
    """Whether the picture may end before the zeros at the end of its file, or consist of them.

    Only the formats below say where they end, in a way that zeros cannot.
    """
    if is_heif(data):
        media = [end for kind, _, end in _iso_boxes(data) if kind == b"mdat"]
        return bool(media) and not data[: media[-1]].endswith(_ZEROS)
    if data.startswith(_JP2):
        code = next((data[body:end] for kind, body, end in _iso_boxes(data) if kind == b"jp2c"), b"")
        return code.rstrip(b"\0").endswith(_JPEG_END)
    if data.startswith(_JP2_CODE):
        return data.rstrip(b"\0").endswith(_JPEG_END)
    if data.startswith(b"qoif"):
        return data.rstrip(b"\0").endswith(_QOI_END)
    if data[:1] == b"\n" and data[2:3] == b"\1" and len(data) <= _LONGEST_WALK:
        return not data[: _pcx_end(data)].endswith(_ZEROS)
    if data.startswith(b"\x01\xda\1"):
        return not data[: _sgi_end(data)].endswith(_ZEROS)
    return True


def _pcx_end(data: bytes) -> int:
    """Where the pixels of a PCX end: runs of a length and a value, of which none is zeros alone."""
    top, bottom = struct.unpack_from("<H2xH", data, 6)
    planes, line = struct.unpack_from("<BH", data, 65)
    missing, at = planes * line * (bottom - top + 1), 128
    while missing > 0:
        is_run = data[at] >= 0xC0
        missing -= data[at] & 0x3F if is_run else 1
        at += 2 if is_run else 1
    return at


def _sgi_end(data: bytes) -> int:
    """Where the last row of an SGI with runs of pixels ends: behind the header a table has the place of each."""
    _, height, channels = struct.unpack_from(">HHH", data, 6)
    number = height * channels
    places = struct.unpack_from(f">{2 * number}I", data, 512)
    return max(map(sum, zip(places[:number], places[number:], strict=True)), default=len(data))


def _iso_boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each outermost box, where its content begins, and where it ends (ISO/IEC 14496-12, 4.2).

    A length of 0 means to the end of the file, one of 1 that eight bytes follow with the length.
    """
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, body)
            body += 8
        end = at + length if length else len(data)
        if kind == bytes(4) or end < body:
            return
        yield kind, body, end
        at = end


def _walk_png(data: bytes, limits: MediaLimits) -> Animation | None:
    """PNG, third edition, 5.3: chunks of a length, a kind, data and a checksum; each frame has an fcTL."""
    view, at = memoryview(data), 8
    declared, first = 0, 0
    seconds: list[float] = []
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        body, end = at + 8, at + 12 + length  # four bytes of checksum follow
        if not kind.isalpha():
            raise ValueError(f"it is damaged: no chunk begins at byte {at}")
        if end > len(data):
            raise _cut_off()
        if kind in _PNG_CHECKED and zlib.crc32(view[at + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise ValueError(f"it is damaged: the checksum of its chunk {kind.decode()} at byte {at} is wrong")
        if kind == b"acTL":
            (declared,) = struct.unpack_from(">I", data, body)
        elif kind == b"IDAT" and declared and not seconds:
            first = 1
        elif kind == b"fcTL":
            numerator, denominator = struct.unpack_from(">HH", data, body + 20)
            seconds.append(numerator / (denominator or 100) or _NO_DELAY)
            limits.check_length(len(seconds))
        elif kind == b"IEND":
            break
        at = end
    if not declared:
        return None
    if len(seconds) != declared:
        raise ValueError(f"it is damaged: it declares {declared} frames and has {len(seconds)}")
    return Animation(tuple(seconds), first) if declared > 1 else None


def _walk_gif(data: bytes, limits: MediaLimits) -> Animation | None:
    """GIF89a: extensions (0x21), of which the graphic control (0xF9) has the delay, and images (0x2C), up to 0x3B."""
    limits.check_picture(*struct.unpack_from("<HH", data, 6))
    at = 13 + _palette_bytes(data[10])
    delay = 0.0
    seconds: list[float] = []
    while data[at] != 0x3B:
        if data[at] == 0:  # Some writers end a block twice.
            at = len(data) - len(data[at:].lstrip(b"\0"))
        elif data[at] == 0x21:
            if data[at + 1] == 0xF9:
                delay = struct.unpack_from("<H", data, at + 4)[0] / 100
            at = _skip_blocks(data, at + 2)
        elif data[at] == 0x2C:
            left, top, width, height = struct.unpack_from("<HHHH", data, at + 1)
            limits.check_picture(left + width, top + height)
            at = _skip_blocks(data, at + 11 + _palette_bytes(data[at + 9]))
            # Browsers take so short a delay for none.
            seconds.append(delay if delay > 0.01 else _NO_DELAY)
            delay = 0.0
            limits.check_length(len(seconds))
        else:
            raise ValueError(f"it is damaged: no block begins at byte {at}")
    return Animation(tuple(seconds)) if len(seconds) > 1 else None


def _palette_bytes(flags: int) -> int:
    """Bytes of a table of colours: bit 7 says whether there is one, bits 0 to 2 how large it is."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _skip_blocks(data: bytes, at: int) -> int:
    """The place behind blocks of a length and so many bytes, of which the last is empty."""
    while length := data[at]:
        at += 1 + length
    return at + 1


def _walk_webp(data: bytes, limits: MediaLimits) -> Animation | None:
    """WebP, RFC 9649: a RIFF file, whose chunks have a kind, a length and data filled up to an even number."""
    limits.check_picture(*_webp_size(data))
    size = struct.unpack_from("<I", data, 4)[0] + 8
    if size > len(data):
        raise _cut_off()
    seconds: list[float] = []
    for kind, body, end in _riff_chunks(data, 12, size):
        chunks = iter([(kind, body, end)])
        if kind == b"ANMF":  # a frame: its place, size, time and flags in 16 bytes, then chunks of its own
            milliseconds = int.from_bytes(data[body + 12 : body + 15], "little")
            seconds.append(milliseconds / 1000 or _NO_DELAY)
            limits.check_length(len(seconds))
            chunks = _riff_chunks(data, body + 16, end)
        for inner, start, stop in chunks:
            if inner in (b"VP8 ", b"VP8L"):
                _check_webp_zeros(inner, data[start:stop], limits)
    return Animation(tuple(seconds)) if len(seconds) > 1 else None


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of the canvas, for which the decoder takes memory as soon as it is made."""
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _riff_chunks(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each chunk, where its content begins, and where it ends."""
    while at + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, at)
        if not kind.isascii() or b"\0" in kind:
            raise ValueError(f"it is damaged: no chunk begins at byte {at}")
        if at + 8 + length > end:
            raise _cut_off()
        yield kind, at + 8, at + 8 + length
        at += 8 + length + length % 2


def _check_webp_zeros(kind: bytes, body: bytes, limits: MediaLimits) -> None:
    """A ValueError for the data of a frame that are zeros where its encoder wrote others.

    Where nothing changes, zeros may be right, and many thousands of them. Then all of the data are needed to the last
    bytes; behind zeros that are not its own, a decoder is through too early, or runs out of data.
    """
    from PIL import Image

    if _ZEROS not in body:
        return
    # A file of this frame alone, without its last bytes.
    body = body[:-_WEBP_NEEDED]
    chunk = struct.pack("<4sI", kind, len(body)) + body + bytes(len(body) % 2)
    data = struct.pack("<4sI4s", b"RIFF", 4 + len(chunk), b"WEBP") + chunk
    limits.check_picture(*_webp_size(data))
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, ValueError, RuntimeError):
        return
    raise _zero_filled()


def _walk_jpeg(data: bytes) -> None:
    """ITU-T T.81, annex B: segments behind markers, and compressed data behind those that start a scan."""
    if data.endswith(_JPEG_END) and _ZEROS not in data:
        return
    first_symbols: dict[int, int] = {}  # by class and number of the table: what a code of zeros alone stands for
    at = 2
    while (at := data.find(b"\xff", at)) >= 0:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        at += 2
        if marker == 0xD9:  # the end of the image
            return
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # those that no segment follows
            continue
        end = at + struct.unpack_from(">H", data, at)[0]
        if marker == 0xC4:  # Huffman tables
            first_symbols |= _first_symbols(data[at + 2 : end])
        elif marker == 0xDA:  # a scan
            found = _JPEG_MARKER.search(data, end)
            zeros = data.find(_ZEROS, end, found.start() if found else len(data))
            if zeros >= 0 and not _zeros_are_flat(data[at + 2 : end], first_symbols):
                raise _zero_filled()
            if found is None:
                break
            end = found.start()
        at = end
    raise _cut_off()


def _first_symbols(tables: bytes) -> dict[int, int]:
    """The first symbol of each Huffman table of a segment (B.2.4.2): class and number, sixteen counts, symbols."""
    found, at = {}, 0
    while at + 17 < len(tables):
        found[tables[at]] = tables[at + 17]
        at += 17 + sum(tables[at + 1 : at + 17])
    return found


def _zeros_are_flat(scan: bytes, first_symbols: dict[int, int]) -> bool:
    """Whether zeros in a scan say that nothing changes: no difference, and no more of the block.

    The header of a scan (B.2.3) has the tables of each component, and which coefficients it holds: 0 is the mean of a
    block (tables of class 0), others its details (class 1).
    """
    selectors = scan[2 : 1 + 2 * scan[0] : 2]
    tables = {selector >> 4 for selector in selectors} | {0x10 | selector & 15 for selector in selectors}
    low, high = scan[1 + 2 * scan[0]], scan[2 + 2 * scan[0]]
    used = [table for table in tables if (low == 0 if table < 0x10 else high > 0)]
    return all(first_symbols.get(table, 0) & 15 == 0 for table in used)
