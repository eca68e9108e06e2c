"""Small pictures and clips of all kinds, and damage that knows their parts: boxes, elements, chunks."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from numpy.typing import NDArray
from strategies import damaged

from tests.data.clips import copy_packets, encode

REAL = Path(__file__).parents[1] / "media" / "video"
SIZE = (64, 48)


class Files(dict[str, bytes]):
    """Files by name, which errors do not print."""

    def __repr__(self) -> str:
        return f"{len(self)} files"


def write_clips(folder: Path, shared: Path | None) -> Files:
    """Clips by name: a few dozen frames each, in every container that PyAV can write, and small real ones."""
    folder.mkdir(exist_ok=True)
    h264 = {"crf": "20", "g": "6", "bf": "2"}
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    written: dict[str, tuple[str, dict[str, Any]]] = {
        "h264.mp4": ("libx264", {"options": h264}),
        "h264_fragments.mp4": ("libx264", {"options": h264, "container_options": fragments}),
        "h264_fast.mp4": ("libx264", {"options": h264, "container_options": {"movflags": "faststart"}}),
        "h264.mkv": ("libx264", {"options": h264}), "h264.ts": ("libx264", {"options": h264}),
        "h264.flv": ("libx264", {"options": h264}), "h264.avi": ("libx264", {"options": h264}),
        "h264_plain.mp4": ("libx264", {"options": {"crf": "30", "g": "12", "bf": "0"}}),
        "hevc.mp4": ("libx265", {"options": {"x265-params": "log-level=none:keyint=8"}}),
        "vp8.webm": ("libvpx", {"options": {"g": "6"}}),
        "vp9.webm": ("libvpx-vp9", {"options": {"g": "6", "cpu-used": "8"}}),
        "mpeg4.avi": ("mpeg4", {"options": {"g": "6"}}), "mpeg4.mp4": ("mpeg4", {"options": {"g": "6"}}),
        "mpeg2.mpg": ("mpeg2video", {"options": {"g": "6"}}), "mpeg2.ts": ("mpeg2video", {"options": {"g": "6"}}),
        "mjpeg.mov": ("mjpeg", {"pix_fmt": "yuvj420p"}), "wmv2.wmv": ("wmv2", {}), "flv1.flv": ("flv1", {}),
        "ffv1.mkv": ("ffv1", {}),
    }  # fmt: skip
    times = [0, 1, 2, 3, 6, 7, 9, 14, 15, 16, 20, 26]
    for name, (codec, options) in written.items():
        if codec in av.codecs_available:
            encode(folder / name, codec, numbers=range(18), size=SIZE, **options)
    encode(folder / "varying.mkv", "libx264", h264, range(12), size=SIZE, times=times, time_base=Fraction(1, 25))
    copy_packets(folder / "h264_plain.mp4", folder / "copied.mov")
    real = [REAL / "broken" / "unordered.mov", REAL / "broken" / "corrupted.mp4", REAL / "signs" / "milk.mkv"]
    names = ("video_90.mov", "av1_video.mkv", "h265_video.mp4", "h264_10bits.mp4")
    real += [shared / "video" / "codecs" / name for name in names] if shared is not None else []
    return Files({path.name: path.read_bytes() for path in [*sorted(folder.iterdir()), *real]})


def write_pictures(shared: Path | None) -> Files:
    """Pictures by name, in every format that Pillow can write, and modes that are told apart."""
    from PIL import Image

    rng = np.random.default_rng(3)
    smooth = np.linspace(0, 255, 40 * 56 * 3).reshape(40, 56, 3).astype(np.uint8)
    colours = Image.fromarray(smooth ^ rng.integers(0, 32, smooth.shape, dtype=np.uint8))
    frames = [Image.fromarray(np.roll(smooth, 7 * i, axis=1)) for i in range(4)]
    alpha = Image.fromarray(np.dstack([smooth, np.arange(40 * 56).reshape(40, 56).astype(np.uint8)]))
    exif = Image.Exif()
    exif[0x0112] = 6
    several = {"save_all": True, "append_images": frames[1:], "duration": 80}
    written: dict[str, tuple[Any, dict[str, Any]]] = {
        "rgb.png": (colours, {}), "gray.png": (colours.convert("L"), {}), "alpha.png": (alpha, {}),
        "palette.png": (colours.quantize(16), {}),
        "deep.png": (Image.fromarray(rng.integers(0, 65535, (40, 56), dtype=np.uint16)), {}),
        "two.png": (colours.convert("1"), {}), "animated.png": (frames[0], several),
        "base.jpg": (colours, {"quality": 80}), "progressive.jpg": (colours, {"progressive": True}),
        "turned.jpg": (colours, {"exif": exif}), "gray.jpg": (colours.convert("L"), {}),
        "cmyk.jpg": (colours.convert("CMYK"), {}),
        "restart.jpg": (colours, {"restart_marker_blocks": 2}), "animated.gif": (frames[0], several),
        "still.gif": (colours, {}),
        "lossy.webp": (colours, {"quality": 60}), "lossless.webp": (alpha, {"lossless": True}),
        "animated.webp": (frames[0], several),
        "rgb.bmp": (colours, {}), "rgb.tif": (colours, {}), "lzw.tif": (colours, {"compression": "tiff_lzw"}),
        "deflate.tif": (colours, {"compression": "tiff_deflate"}), "rgb.ppm": (colours, {}), "rgb.tga": (colours, {}),
        "rle.tga": (colours, {"compression": "tga_rle"}), "rgb.pcx": (colours, {}), "rgb.sgi": (colours, {}),
        "rgb.jp2": (colours, {}),
        "rgb.avif": (colours, {}), "rgb.qoi": (colours, {}),
    }  # fmt: skip
    found = Files()
    for name, (image, options) in written.items():
        file = io.BytesIO()
        suffix = name.rpartition(".")[2]
        kind = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(suffix, suffix.upper())
        try:
            image.save(file, kind, **options)
        except (KeyError, OSError, ValueError):  # This Pillow writes no such files.
            continue
        found[name] = file.getvalue()
    found["rle.sgi"] = write_sgi(np.asarray(colours))
    if shared is not None:
        photo = min((shared / "image" / "coco_boxes").glob("*.jpg"), key=lambda path: path.stat().st_size)
        found["photo.jpg"] = photo.read_bytes()
    return found


def write_sgi(pixels: NDArray[np.uint8]) -> bytes:
    """An SGI with runs of pixels, which Pillow does not write; each row of each channel is stored as it is, in runs."""
    height, width, channels = pixels.shape
    rows = [
        b"".join(bytes([0x80 | len(row[i : i + 100])]) + row[i : i + 100] for i in range(0, width, 100)) + b"\0"
        for channel in range(channels)
        for row in (pixels[y, :, channel].tobytes() for y in range(height - 1, -1, -1))
    ]
    header = struct.pack(">HBBHHHHII", 0x01DA, 1, 1, 3, width, height, channels, 0, 255).ljust(512, b"\0")
    start = 512 + 8 * len(rows)
    places = [start + sum(map(len, rows[:i])) for i in range(len(rows))]
    table = struct.pack(f">{2 * len(rows)}I", *places, *map(len, rows))
    return header + table + b"".join(rows)


# Parts of files, as (start, end) of each, with what gives a part another length.

_MP4_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf", b"mvex", b"udta", b"dinf")
_EBML_MASTERS = (
    b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75", b"\x16\x54\xae\x6b", b"\xae", b"\xe0", b"\xa0",
    b"\x1c\x53\xbb\x6b", b"\x15\x49\xa9\x66",
)  # fmt: skip


def mp4_boxes(data: bytes, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """The boxes of an MP4, at all levels."""
    end, found = len(data) if end is None else end, []
    while start + 8 <= end:
        size = int.from_bytes(data[start : start + 4], "big")
        if size < 8 or start + size > end:
            break
        found.append((start, start + size))
        if data[start + 4 : start + 8] in _MP4_CONTAINERS:
            found += mp4_boxes(data, start + 8, start + size)
        start += size
    return found


def ebml_elements(data: bytes, start: int = 0, end: int | None = None, depth: int = 0) -> list[tuple[int, int]]:
    """The elements of a Matroska file, at all levels."""
    end, found = len(data) if end is None else end, []
    while start < end:
        first = data[start]
        width = 9 - first.bit_length()
        if not first or width > 4 or start + width >= end or not data[start + width]:
            break
        size_width = 9 - data[start + width].bit_length()
        body = start + width + size_width
        length = int.from_bytes(data[start + width : body], "big") & ((1 << 7 * size_width) - 1)
        stop = end if length == (1 << 7 * size_width) - 1 else body + length
        if stop > end:
            break
        found.append((start, stop))
        if data[start : start + width] in _EBML_MASTERS and depth < 4:
            found += ebml_elements(data, body, stop, depth + 1)
        start = stop
    return found


def riff_chunks(data: bytes, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """The chunks of an AVI or a WebP, at all levels."""
    end, found = len(data) if end is None else end, []
    while start + 8 <= end:
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        stop = min(start + 8 + size + size % 2, end)
        found.append((start, stop))
        if data[start : start + 4] in (b"RIFF", b"LIST", b"ANMF"):
            found += riff_chunks(data, start + (24 if data[start : start + 4] == b"ANMF" else 12), stop)
        start = stop
    return found


def png_chunks(data: bytes) -> list[tuple[int, int]]:
    found, start = [], 8
    while start + 12 <= len(data):
        stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if stop > len(data):
            break
        found.append((start, stop))
        start = stop
    return found


def jpeg_segments(data: bytes) -> list[tuple[int, int]]:
    found, start = [], 2
    while start + 4 <= len(data) and data[start] == 0xFF and data[start + 1] != 0xDA:
        stop = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        found.append((start, min(stop, len(data))))
        start = stop
    return [*found, (start, len(data))]


def parts_of(data: bytes) -> list[tuple[int, int]]:
    """The parts of a file of a kind that has some; elsewhere stretches of 188 bytes, which are a transport stream's."""
    if data[4:8] == b"ftyp" or data[4:8] in (b"moov", b"mdat", b"wide"):
        return mp4_boxes(data)
    walks: dict[bytes, Callable[[bytes], list[tuple[int, int]]]] = {
        b"\x1a\x45\xdf\xa3": ebml_elements, b"RIFF": riff_chunks, b"\x89PNG": png_chunks,
        b"\xff\xd8\xff": jpeg_segments,
    }  # fmt: skip
    walk = next((walk for head, walk in walks.items() if data.startswith(head)), None)
    found = walk(data) if walk else [(at, min(at + 188, len(data))) for at in range(0, len(data), 188)]
    return [(start, end) for start, end in found if 0 <= start < end <= len(data)]


_EXTREME = (0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x01000000)


@st.composite
def shuffled(draw: DrawFn, data: bytes) -> bytes:
    """A file with parts that changed places, are missing, are there twice, or say something extreme."""
    for _ in range(draw(st.integers(1, 3))):
        parts = parts_of(data)
        if not parts:
            break
        number = draw(st.integers(0, len(parts) - 1))
        start, end = parts[number]
        following = next((part for part in parts[number + 1 :] if part[0] == end), None)
        way = draw(st.sampled_from(("swap", "drop", "twice", "number", "number", "number", "number", "cut")))
        if way == "swap" and following is not None:
            data = data[:start] + data[end : following[1]] + data[start:end] + data[following[1] :]
        elif way == "drop":
            data = data[:start] + data[end:]
        elif way == "twice":
            data = data[:end] + data[start:end] + data[end:]
        elif way == "cut":
            data = data[: draw(st.integers(start, end))]
        else:
            width = draw(st.sampled_from((1, 2, 4)))
            at = draw(st.integers(start, max(min(end, start + 160) - width, start)))
            value = draw(st.sampled_from(_EXTREME)) & ((1 << 8 * width) - 1)
            data = data[:at] + value.to_bytes(width, draw(st.sampled_from(("big", "little")))) + data[at + width :]
    return with_png_checksums(data) if data.startswith(b"\x89PNG") and draw(st.booleans()) else data


def with_png_checksums(data: bytes) -> bytes:
    """A PNG whose checksums are right again."""
    pieces = [data[:8]]
    at = 8
    for start, end in png_chunks(data):
        pieces.append(data[start : end - 4] + struct.pack(">I", zlib.crc32(data[start + 4 : end - 4])))
        at = end
    return b"".join([*pieces, data[at:]])


@st.composite
def mutated(draw: DrawFn, files: Files) -> tuple[str, bytes]:
    """The name of a file, and its bytes after damage: anywhere, to its parts, or spliced with another file."""
    name = draw(st.sampled_from(sorted(files)))
    data = files[name]
    way = draw(st.sampled_from(("damage", "damage", "parts", "parts", "splice", "both")))
    if way == "splice":
        other = files[draw(st.sampled_from(sorted(files)))]
        data = data[: draw(st.integers(0, len(data)))] + other[draw(st.integers(0, len(other))) :]
    elif way != "damage":
        data = draw(shuffled(data))
    return name, draw(damaged(data)) if way in ("damage", "both") else data
