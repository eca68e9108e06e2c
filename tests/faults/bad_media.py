"""Broken media files, each made from a good one."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts")


def walk_boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """The boxes of an MP4 as (kind, first byte, byte behind), those within others behind these."""
    end = len(data) if end is None else end
    while start + 8 <= end:
        size, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        yield kind, start, start + size
        if kind in CONTAINERS:
            yield from walk_boxes(data, start + 8, start + size)
        start += size


def find_box(data: bytes, kind: bytes) -> tuple[int, int]:
    return next((start, end) for found, start, end in walk_boxes(data) if found == kind)


def patch(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


def flip_bit(data: bytes, position: int, bit: int) -> bytes:
    return patch(data, position, bytes([data[position] ^ (1 << bit)]))


def flips(data: bytes, count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Bits to flip, one a file: half of them in the index of an MP4, half among its frames."""
    rng = np.random.default_rng(seed)
    places = [find_box(data, b"moov"), find_box(data, b"mdat")]
    return [
        (int(rng.integers(*places[i % 2])), int(rng.integers(8)))  # position, bit
        for i in range(count)
    ]


def without_index(data: bytes) -> bytes:
    start, end = find_box(data, b"moov")
    return data[:start] + data[end:]


def with_huge_frames(data: bytes) -> bytes:
    """The frames are declared as more than the file has: a length of eight bytes that speaks of a terabyte."""
    start, end = find_box(data, b"mdat")
    return data[:start] + struct.pack(">I4sQ", 1, b"mdat", 1 << 40) + data[start + 8 : end] + data[end:]


def with_many_frames(data: bytes) -> bytes:
    """The index speaks of four billion frames."""
    return patch(data, find_box(data, b"stsz")[0] + 16, b"\xff\xff\xff\xff")


def turned(data: bytes) -> bytes:
    """The display matrix turns the frames by 90 degrees."""
    start, _ = find_box(data, b"tkhd")
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    return patch(data, start + 48, matrix)


def write_sound(path: Path) -> None:
    """An MP4 of sound alone."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = np.zeros((1, 1024), np.float32)
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 1024 * i, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG of one bit a pixel; whether the pixels are as many as it says is not looked at."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def media_faults(clip: bytes, picture: bytes) -> dict[str, bytes | Callable[[Path], object]]:
    """Files that cannot be used by their names: what is in them, or what makes them."""
    shares = [0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 0.97]
    return {
        "missing.mp4": lambda path: None,
        "zero_byte.mp4": b"",
        "text.mp4": "questo non è un video\n".encode() * 100,
        "noise.mp4": np.random.default_rng(1).bytes(5000),
        "folder.mp4": lambda path: path.mkdir(),
        "pipe.mp4": lambda path: os.mkfifo(path),
        "loop.mp4": lambda path: path.symlink_to(path),
        "link_to_nothing.mp4": lambda path: path.symlink_to(path.parent / "nothing.mp4"),
        "only_sound.mp4": write_sound,
        "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "no_index.mp4": without_index(clip),
        "only_index.mp4": clip[slice(*find_box(clip, b"moov"))],
        "huge_frames.mp4": with_huge_frames(clip),
        **{f"cut_at_{share:.0%}.mp4": clip[: int(share * len(clip))] for share in shares},
        "missing.png": lambda path: None,
        "zero_byte.png": b"",
        "text.png": b"questa non \xc3\xa8 un'immagine",
        "folder.png": lambda path: path.mkdir(),
        "a_video.png": clip,
        "cut_at_half.png": picture[: len(picture) // 2],
        "cut_in_header.png": picture[:20],
        "bomb.png": png(30000, 30000, bytes(30000 * (30000 // 8 + 1))),
        "declared_huge.png": png(2_000_000_000, 2_000_000_000, bytes(100)),
        "declared_larger.png": png(4000, 4000, bytes(100)),
    }


def unusual_media(clip: bytes, one_frame: bytes) -> dict[str, bytes]:
    """Files that look wrong and can be used."""
    return {"one_frame.mp4": one_frame, "turned.mp4": turned(clip), "behind.mp4": clip + b"\0" * 1000}


def doubtful_media(clip: bytes) -> dict[str, bytes]:
    """Files that may or may not decode, as the decoder of the day sees it."""
    flipped = {f"flip_{position}_{bit}.mp4": flip_bit(clip, position, bit) for position, bit in flips(clip, 20)}
    return {**flipped, "many_frames.mp4": with_many_frames(clip)}
