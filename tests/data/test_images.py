"""Pictures: whole or an error, upright, on white, within the range of their numbers, and never larger than they say."""

from __future__ import annotations

import io
import resource
import struct
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFile, TiffImagePlugin, features

from llava.data import images
from llava.data.check import main as check
from llava.data.images import map_by_range, read_image_size, read_picture
from llava.data.media import fit_frames, load_image, load_media, resize
from llava.data.media_files import MediaError, MediaLimits
from llava.types import Media

NOISE = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
INK = Image.new("RGBA", (90, 60), (0, 0, 0, 0))
ImageDraw.Draw(INK).rectangle((10, 20, 50, 30), fill=(0, 0, 0, 255))

KINDS = {
    "jpg": {}, "progressive.jpg": {"progressive": True}, "optimized.jpg": {"optimize": True}, "png": {}, "gif": {},
    "webp": {}, "lossless.webp": {"lossless": True}, "tiff": {}, "lzw.tiff": {"compression": "tiff_lzw"},
    "deflate.tiff": {"compression": "tiff_adobe_deflate"}, "bmp": {}, "ppm": {}, "jp2": {},
}  # fmt: skip
if features.check("avif"):
    KINDS["avif"] = {}


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def write_png(path: Path, width: int, height: int, colour: int, depth: int, rows: bytes, *chunks: bytes) -> Path:
    """A PNG of raw rows (without their filter bytes); colour 0 is gray, 2 RGB, 3 a palette."""
    row = len(rows) // height
    filtered = b"".join(b"\0" + rows[i * row : (i + 1) * row] for i in range(height))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    parts += [(chunk[:4], chunk[4:]) for chunk in chunks]
    parts += [(b"IDAT", zlib.compress(filtered)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ))  # fmt: skip
    return path


def assert_refused(path: Path, message: str = "cannot be read as an image") -> None:
    with pytest.raises(MediaError, match=message) as caught:
        load_image(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# Whole or not


@pytest.mark.parametrize("kind", KINDS)
def test_whole_pictures_are_read(tmp_path: Path, kind: str) -> None:
    pixels = load_image(str(save(tmp_path / f"a.{kind}", Image.fromarray(NOISE), **KINDS[kind]))).numpy()
    assert pixels.shape == NOISE.shape
    assert np.corrcoef(pixels.ravel(), NOISE.ravel())[0, 1] > 0.5


@pytest.mark.parametrize("harm", ["cut", "cut at the end", "zeros", "zeros from a quarter", "a page of zeros"])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_that_were_not_written_in_full(tmp_path: Path, kind: str, harm: str) -> None:
    if harm == "a page of zeros" and kind in ("tiff", "bmp", "ppm", "jp2", "avif", "lossless.webp"):
        pytest.skip("black pixels in the midst of a picture without compression may be meant; others have no checksum")
    if harm == "cut at the end" and kind in ("avif",):
        pytest.skip("the decoder does not need its last bytes")
    path = save(tmp_path / f"a.{kind}", Image.fromarray(NOISE), **KINDS[kind])
    data, half = path.read_bytes(), path.stat().st_size // 2 + 100
    path.write_bytes({
        "cut": data[:half],
        "cut at the end": data[:-2],
        "zeros": data[:half] + bytes(len(data) - half),
        "zeros from a quarter": data[: half // 2] + bytes(len(data) - half // 2),
        "a page of zeros": data[:half] + bytes(4096) + data[half + 4096 :],
    }[harm])  # fmt: skip
    assert_refused(path)


def test_the_checksums_of_a_png_are_looked_at(tmp_path: Path) -> None:
    row = bytes(range(90))
    path = write_png(tmp_path / "a.png", 30, 3, 2, 8, row * 3)
    data = path.read_bytes()
    at = data.index(b"IDAT")
    length = struct.unpack_from(">I", data, at - 4)[0]
    # As zlib stores them: pixels like any others, but for the checksum.
    body = zlib.compress((b"\0" + row) * 3, 0)
    harmed = body.replace(row[40:50], bytes(10), 1)
    assert harmed != body
    chunk = struct.pack(">I", len(body)) + b"IDAT" + harmed + struct.pack(">I", zlib.crc32(b"IDAT" + body))
    path.write_bytes(data[: at - 4] + chunk + data[at + length + 8 :])
    assert_refused(path, "the checksum of its chunk IDAT at byte 33 is wrong")


def test_the_check_before_training_finds_them(tmp_path: Path, capsys) -> None:
    for name in ("whole.jpg", "zero.jpg"):
        save(tmp_path / name, Image.fromarray(NOISE), quality=90)
    data = (tmp_path / "zero.jpg").read_bytes()
    (tmp_path / "zero.jpg").write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    sample = '{{"id": "{0}", "image": "{0}", "conversations": [{{"from": "human", "value": "<image> x"}}]}}\n'
    (tmp_path / "a.jsonl").write_text(sample.format("whole.jpg") + sample.format("zero.jpg"))
    assert check([str(tmp_path / "a.jsonl"), "--workers", "0"]) == 1
    assert "zero.jpg: cannot be read as an image: part of its compressed data is zeros" in capsys.readouterr().out


@pytest.mark.parametrize("shade", [0, 128, 255])
@pytest.mark.parametrize("kind", KINDS)
def test_flat_pictures_are_whole(tmp_path: Path, kind: str, shade: int) -> None:
    image = Image.new("RGB", (900, 900), (shade,) * 3)
    ImageDraw.Draw(image).ellipse((100, 100, 300, 200), fill=(255 - shade,) * 3)
    assert load_image(str(save(tmp_path / f"a.{kind}", image, **KINDS[kind]))).shape == (900, 900, 3)


def test_zeros_of_a_lossless_webp_may_be_meant(tmp_path: Path) -> None:
    image = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(image).text((5, 5), "ciao " * 20, fill="black")
    path = save(tmp_path / "a.webp", image, lossless=True, quality=0, method=0)
    assert bytes(1000) in path.read_bytes()
    assert np.array_equal(load_image(str(path)).numpy(), np.asarray(image))


@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "webp"])
def test_what_stands_behind_a_picture_does_no_harm(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / f"a.{kind}", Image.fromarray(NOISE))
    expected = load_image(str(path))
    for tail in (bytes(5000), b"a film behind the photograph"):
        path.write_bytes(save(path, Image.fromarray(NOISE)).read_bytes() + tail)
        assert torch.equal(load_image(str(path)), expected)


@pytest.mark.parametrize("kind", ["jp2", "j2k", "avif", "qoi", "tga", "pcx", "sgi", "ppm"])
def test_zeros_behind_a_picture_do_no_harm(tmp_path: Path, kind: str) -> None:
    Image.init()
    if f".{kind}" not in Image.EXTENSION or Image.EXTENSION[f".{kind}"] not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    path = save(tmp_path / f"a.{kind}", Image.fromarray(NOISE))
    expected, data = load_image(str(path)), path.read_bytes()
    path.write_bytes(data + bytes(1000))
    assert torch.equal(load_image(str(path)), expected)
    if kind in ("jp2", "j2k", "avif", "qoi"):  # they say where they end
        for filled in (300, len(data) // 2):
            path.write_bytes(data[:-filled] + bytes(filled + 1000))
            assert_refused(path)


@pytest.mark.parametrize("kind", ["sgi", "tga", "pcx", "dib", "qoi", "pbm"])
def test_black_pictures_are_whole(tmp_path: Path, kind: str) -> None:
    if kind == "qoi" and "QOI" not in Image.SAVE:
        pytest.skip("this Pillow writes no qoi")
    image = Image.new("1" if kind == "pbm" else "RGB", (300, 200), "white" if kind == "pbm" else "black")
    assert (load_image(str(save(tmp_path / f"a.{kind}", image))) == (255 if kind == "pbm" else 0)).all()


@pytest.mark.parametrize("black", [slice(0, 750), slice(750, 1500)])
@pytest.mark.parametrize("method", [0, 6])
def test_zeros_of_a_webp_that_is_half_black_may_be_meant(tmp_path: Path, black: slice, method: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), dtype=np.uint8)
    pixels[black] = 0
    path = save(tmp_path / "a.webp", Image.fromarray(pixels), quality=1, method=method)
    assert load_image(str(path)).shape == pixels.shape
    data = path.read_bytes()
    half = len(data) // 2
    for harmed in (data[:half] + bytes(len(data) - half), data[:half] + bytes(4096) + data[half + 4096 :]):
        if harmed != data:
            path.write_bytes(harmed)
            assert_refused(path)


def test_zeros_in_the_description_of_a_photograph_do_no_harm(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x927C] = bytes(3000)
    path = save(tmp_path / "a.jpg", Image.fromarray(NOISE), exif=exif)
    assert bytes(3000) in path.read_bytes()
    assert load_image(str(path)).shape == NOISE.shape


def test_black_parts_without_compression_do_no_harm(tmp_path: Path) -> None:
    letterbox, disc = NOISE.copy(), np.zeros_like(NOISE)
    letterbox[:40], letterbox[-100:] = 0, 0
    y, x = np.mgrid[:256, :256]
    disc[(y - 100) ** 2 + (x - 90) ** 2 < 3000] = 200
    for number, pixels in enumerate((letterbox, disc, NOISE // 255)):
        for kind in ("bmp", "tiff", "ppm"):
            path = save(tmp_path / f"{number}.{kind}", Image.fromarray(pixels))
            assert np.array_equal(load_image(str(path)).numpy(), pixels)


# Size


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (2, 99_999)])
def test_a_line_takes_no_more_memory_than_its_square(tmp_path: Path, tiny_vision, size: tuple[int, int]) -> None:
    path = save(tmp_path / "line.png", Image.new("L", size, 77))
    assert path.stat().st_size < 1000
    for aspect_ratio, resize_size in (("square", 256), ("pad", None), ("square", None)):
        vision = replace(tiny_vision, image_size=224, image_aspect_ratio=aspect_ratio, image_resize_size=resize_size)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        square = fit_frames(load_image(str(path)).unsqueeze(0), vision)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes"
        assert square.shape == (1, 3, 224, 224)
        assert vision.image_aspect_ratio == "pad" or (square == 77).all()
    assert load_media(Media("image", str(path)), tiny_vision).frames.shape[0] == 1


@pytest.mark.parametrize(("height", "width"), [(5, 300), (300, 5), (40, 700), (31, 1000)])
def test_cutting_before_resizing_gives_what_cutting_behind_it_gives(tiny_vision, height: int, width: int) -> None:
    vision = replace(tiny_vision, image_size=64, image_resize_size=80)
    y, x = np.mgrid[:height, :width]
    picture = np.stack([(np.sin(x / 5) * np.cos(y / 3) + 1) * 100, x % 250, (x + y) * 3 % 250], -1).astype(np.uint8)
    letterbox = vision.letterbox((height, width))
    whole = resize(torch.from_numpy(picture).permute(2, 0, 1)[None], letterbox.height, letterbox.width)
    expected = whole[..., -letterbox.top : 64 - letterbox.top, -letterbox.left : 64 - letterbox.left]
    found = fit_frames(torch.from_numpy(picture)[None], vision)
    assert letterbox.height * letterbox.width > 8 * 64 * 64
    assert (found.int() - expected.int()).abs().max() <= 2


def webp_of(kind: bytes, body: bytes) -> bytes:
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def three(number: int) -> bytes:
    return number.to_bytes(3, "little")


BOMBS = {
    "extended.webp": webp_of(b"VP8X", bytes(4) + three(49_999) + three(49_999)),
    "lossless.webp": webp_of(b"VP8L", b"\x2f" + struct.pack("<I", 16382 | 16382 << 14)),
    "lossy.webp": webp_of(b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383)),
    "screen.gif": b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b";",
    "frame.gif": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0)
    + b"," + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x01\x4c\0;",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_cannot_ask_for_gigabytes(tmp_path: Path, name: str, monkeypatch) -> None:
    (tmp_path / name).write_bytes(BOMBS[name])
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("a decoder was made"))
    assert_refused(tmp_path / name, r"\d+ x \d+ pixels, \d+, but --max_image_pixels is 100000000")


def test_tiles_of_a_tiff_are_judged_as_pictures_are(tmp_path: Path) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    image = Image.new("L", (16, 16), 9)
    path = save(tmp_path / "a.tiff", image, tiffinfo=tags)
    entry = struct.pack("<HHII", 322, 4, 1, 50_000) + struct.pack("<HHII", 323, 4, 1, 50_000)
    data = path.read_bytes()
    start, (count,) = struct.unpack_from("<I", data, 4)[0], struct.unpack_from("<H", data, 8)
    entries = data[start + 2 : start + 2 + 12 * count]
    moved = sorted([entries[i : i + 12] for i in range(0, len(entries), 12)] + [entry[:12], entry[12:]],
                   key=lambda item: struct.unpack_from("<H", item))  # fmt: skip
    directory = struct.pack("<H", count + 2) + b"".join(moved) + bytes(4)
    path.write_bytes(data[:4] + struct.pack("<I", len(data)) + data[8:] + directory)
    assert_refused(path, "50000 x 50000 pixels")


def test_containers_that_unpack_without_a_bound_are_not_opened(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.ico")
    (tmp_path / "a.fits").write_bytes(b"SIMPLE  =                    T" + b" " * 3000)
    for name in ("a.ico", "a.fits"):
        assert_refused(tmp_path / name, "it is none of JPEG, PNG, GIF")


def test_a_clip_under_the_key_of_images_is_told(media_dir: Path) -> None:
    assert_refused(next(media_dir.glob("*.mp4")), 'it is a video; give it under the key "video"')


# Orientation


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_exactly(tmp_path: Path, orientation: int, kind: str) -> None:
    blocks = np.kron(np.array([[10, 240, 60], [200, 30, 120]], np.uint8), np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(kind, {})
    path = save(tmp_path / f"a.{kind}", Image.fromarray(blocks).convert("RGB"), exif=exif, **options)
    upright = {
        1: blocks, 2: blocks[:, ::-1], 3: blocks[::-1, ::-1], 4: blocks[::-1], 5: blocks.T, 6: np.rot90(blocks, -1),
        7: np.rot90(blocks, 2).T, 8: np.rot90(blocks),
    }[orientation]  # fmt: skip
    found = load_image(str(path)).numpy()
    assert found.shape == (*upright.shape, 3)
    assert np.abs(found.astype(int) - upright[..., None]).max() <= 2
    assert read_image_size(str(path)) == upright.shape


# Transparency


@pytest.mark.parametrize("kind", ["rgba.png", "la.png", "palette.png", "palette.gif", "a.webp", "rgba.tiff", "la.tiff"])
def test_black_ink_on_a_transparent_ground_is_dark_on_white(tmp_path: Path, kind: str) -> None:
    image = INK
    if kind.startswith("la"):
        image = INK.convert("LA")
    options: dict[str, object] = {"lossless": True} if kind == "a.webp" else {}
    if kind.startswith("palette"):
        ground = Image.new("P", INK.size, 1)
        ground.putpalette([0, 0, 0, 0, 0, 0])
        ground.paste(0, (10, 20, 51, 31))
        image, options["transparency"] = ground, 1
    pixels = load_image(str(save(tmp_path / kind, image, **options))).numpy()
    expected = np.full((60, 90, 3), 255)
    expected[20:31, 10:51] = 0
    assert np.array_equal(pixels, expected)


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.new("RGBA", (4, 4), (100, 0, 200, 51)))
    assert load_image(str(path))[0, 0].tolist() == [224, 204, 244]
    opaque = np.dstack([NOISE, np.full(NOISE.shape[:2], 255, np.uint8)])
    assert np.array_equal(load_image(str(save(tmp_path / "b.png", Image.fromarray(opaque)))).numpy(), NOISE)


@pytest.mark.parametrize(("depth", "row", "transparent"), [
    (1, b"\x50", 0), (2, b"\x1b", 2), (4, b"\x05\xa0", 5), (8, b"\x05\x0a", 10), (16, b"\x01\x05\x01\x06", 0x0105),
])  # fmt: skip
def test_the_transparent_gray_of_a_png_is_in_its_own_depth(tmp_path: Path, depth: int, row: bytes, transparent) -> None:
    width = {1: 4, 2: 4, 4: 3, 8: 2, 16: 2}[depth]
    path = write_png(tmp_path / "a.png", width, 1, 0, depth, row, b"tRNS" + struct.pack(">H", transparent))
    bits = "".join(f"{byte:08b}" for byte in row)
    samples = [int(bits[i * depth : (i + 1) * depth], 2) for i in range(width)]
    most = 2**depth - 1
    gray = [255 if s == transparent else s * 255 // most if depth < 16 else s >> 8 for s in samples]
    assert 255 in gray
    assert load_image(str(path))[0, :, 0].tolist() == gray


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_a_png(tmp_path: Path, depth: int) -> None:
    pack = struct.Struct(">3B" if depth == 8 else ">3H").pack
    scale = 1 if depth == 8 else 257
    row = pack(9 * scale, 8 * scale, 7 * scale) + pack(1 * scale, 2 * scale, 3 * scale)
    trns = b"tRNS" + struct.pack(">3H", 9 * scale, 8 * scale, 7 * scale)
    path = write_png(tmp_path / "a.png", 2, 1, 2, depth, row, trns)
    assert load_image(str(path))[0].tolist() == [[255, 255, 255], [1, 2, 3]]


# Range


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "big.tiff"])
def test_sixteen_bits(tmp_path: Path, name: str) -> None:
    values = np.linspace(0, 65535, 64 * 4).astype(np.uint16).reshape(4, 64)
    image = Image.fromarray(values)
    if name == "big.tiff":
        image = Image.frombytes("I;16B", (64, 4), values.astype(">u2").tobytes())
    pixels = load_image(str(save(tmp_path / name, image))).numpy()
    assert np.array_equal(pixels, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, -1))


@pytest.mark.parametrize(("values", "expected"), [
    (np.linspace(0, 1, 256, dtype=np.float32), np.arange(256)),
    (np.linspace(-3, 3, 256, dtype=np.float32), np.arange(256)),
    (np.linspace(0, 10, 256, dtype=np.float32), np.arange(256)),
    (np.arange(256, dtype=np.float32), np.arange(256)),
    (np.full(256, 0.5, np.float32), np.full(256, 128)),
    (np.full(256, 200, np.float32), np.full(256, 200)),
    (np.linspace(0, 100_000, 256).astype(np.int32), np.arange(256)),
    (np.linspace(-(2**31), 2**31 - 1, 256).astype(np.int32), np.arange(256)),
    (np.arange(256, dtype=np.int32) // 2, np.arange(256) // 2),
])  # fmt: skip
def test_floats_and_integers_of_32_bits(tmp_path: Path, values: np.ndarray, expected: np.ndarray) -> None:
    path = save(tmp_path / "a.tiff", Image.fromarray(values.reshape(16, 16)))
    pixels = load_image(str(path)).numpy()
    assert np.abs(pixels.reshape(256, 3).astype(int) - expected[:, None]).max() <= 1


def test_numbers_that_are_not_finite() -> None:
    found = map_by_range(np.array([[np.nan, 0.0, 0.5], [1.0, np.inf, -np.inf]], np.float32))
    assert found.tolist() == [[0, 0, 128], [255, 255, 0]]
    with pytest.raises(ValueError, match="none of its numbers is finite"):
        map_by_range(np.full((2, 2), np.nan, np.float32))


def patch_tag(path: Path, tag: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    start = struct.unpack_from("<I", data, 4)[0]
    for at in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        if struct.unpack_from("<H", data, at)[0] == tag:
            struct.pack_into("<H", data, at + 8, value)
    path.write_bytes(data)


def test_unsigned_integers_of_32_bits_and_gray_whose_white_is_zero(tmp_path: Path) -> None:
    values = np.linspace(0, 2**32 - 1, 256).astype(np.uint32)
    path = save(tmp_path / "a.tiff", Image.fromarray(values.view(np.int32).reshape(16, 16)))
    patch_tag(path, 339, 1)
    assert np.abs(load_image(str(path))[..., 0].numpy().ravel().astype(int) - np.arange(256)).max() <= 1
    path = save(tmp_path / "b.tiff", Image.fromarray((np.arange(256) * 257).astype(np.uint16).reshape(16, 16)))
    patch_tag(path, 262, 0)
    assert load_image(str(path))[..., 0].ravel().tolist() == list(range(255, -1, -1))


# CMYK


@pytest.mark.parametrize("name", ["a.jpg", "a.tiff"])
def test_inks(tmp_path: Path, name: str) -> None:
    inks = {(255, 0, 0, 0): (0, 255, 255), (0, 255, 0, 0): (255, 0, 255), (0, 0, 0, 255): (0, 0, 0),
            (0, 0, 0, 0): (255, 255, 255)}  # fmt: skip
    for ink, colour in inks.items():
        path = save(tmp_path / name, Image.new("CMYK", (16, 16), ink))
        assert np.abs(load_image(str(path)).numpy().astype(int) - colour).max() <= 2


def test_ycck(tmp_path: Path) -> None:
    """A CMYK JPEG whose Adobe marker says that its inks are stored as luminance and colour differences."""
    colour = (200, 80, 30)
    inks = tuple(255 - channel for channel in colour)
    luminance = Image.new("RGB", (16, 16), inks).convert("YCbCr")
    # Pillow writes CMYK inverted; so what is to stand in the file is given to it inverted.
    planes = [band.point(lambda value: 255 - value) for band in luminance.split()]
    stored = Image.merge("CMYK", [*planes, Image.new("L", (16, 16), 0)])
    stream = io.BytesIO()
    stored.save(stream, "JPEG", quality=100, subsampling=0)
    data = bytearray(stream.getvalue())
    at = data.index(b"Adobe")
    assert data[at + 11] == 0
    data[at + 11] = 2
    (tmp_path / "a.jpg").write_bytes(data)
    assert np.abs(load_image(str(tmp_path / "a.jpg")).numpy().astype(int) - colour).max() <= 4


# Plug-ins, addresses, the home folder


def test_heic_and_avif_name_the_plugin_that_reads_them(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.heic").write_bytes(struct.pack(">I4s4sI", 24, b"ftyp", b"heic", 0) + b"mif1heic" + bytes(100) + b"x")
    (tmp_path / "a.avif").write_bytes(struct.pack(">I4s4sI", 24, b"ftyp", b"avif", 0) + b"mif1avif" + bytes(100) + b"x")
    monkeypatch.setattr(features, "check", lambda name: False)
    monkeypatch.setattr(images, "_known_formats", lambda: ["JPEG", "PNG"])
    Image.init()
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    for name in ("pillow_heif", "pillow_avif"):
        monkeypatch.setitem(sys.modules, name, None)
    assert_refused(tmp_path / "a.heic", "it is HEIC, which Pillow reads with a plug-in only; pip install pillow-heif")
    assert_refused(tmp_path / "a.avif", "it is AVIF, .* pip install pillow-avif-plugin")
    registered = []
    plugin = SimpleNamespace(register_heif_opener=lambda: registered.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    assert_refused(tmp_path / "a.heic")
    assert registered


@pytest.mark.parametrize("path", [
    "http://x.org/a.jpg", "https://x.org/a.jpg", "s3://bucket/a.jpg", "gs://bucket/a.jpg", "file:///tmp/a.jpg",
    "data:image/png;base64," + "QUJD" * 100_000, "rtsp://camera/1",
])  # fmt: skip
def test_addresses_are_refused_with_a_reason(path: str, tiny_vision) -> None:
    for kind in ("image", "video"):
        with pytest.raises(MediaError, match=r"is an address .*only files are read.*fetch it") as caught:
            load_media(Media(kind, path), tiny_vision)
        assert len(str(caught.value)) < 400
    with pytest.raises(MediaError, match="400000 characters and is no path"):
        load_image("QUJD" * 100_000)


def test_the_home_folder(tmp_path: Path, monkeypatch, media_dir: Path, tiny_vision) -> None:
    monkeypatch.setenv("HOME", str(media_dir))
    assert load_image("~/a.png").shape == (60, 90, 3)
    assert load_media(Media("video", "~/a.mp4"), tiny_vision).frames.shape[0] == 3


def test_limits_hold_for_what_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.webp", Image.new("RGB", (100, 50)))
    assert read_picture(str(path), MediaLimits(max_image_pixels=5000)).shape == (50, 100, 3)
    with pytest.raises(MediaError, match="it is 100 x 50 pixels, 5000, but --max_image_pixels is 4999"):
        read_picture(str(path), MediaLimits(max_image_pixels=4999))


# What a header says, and pictures in general


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tiff", "a.webp", "a.gif", "a.bmp"])
def test_headers_tell_the_upright_size(tmp_path: Path, monkeypatch, name: str, orientation: int | None) -> None:
    path = str(tmp_path / name)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.new("RGB", (70, 30)).save(path, exif=exif)
    expected = tuple(load_image(path).shape[:2])
    sideways = orientation in (6, 8) and not name.endswith((".gif", ".bmp"))
    assert expected == ((70, 30) if sideways else (30, 70))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    assert read_image_size(path) == expected


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_a_file_without_a_header_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=str(path)):
        read_image_size(str(path))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_is_turned_upright(tmp_path, orientation, suffix):
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:8, :8] = 255  # the bright corner is at the top left of the stored picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=exif)
    image = load_image(str(tmp_path / f"a.{suffix}")).numpy()
    corner = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    row, column = 4 if corner[0] == "t" else -4, 4 if corner[1] == "l" else -4
    assert image.shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
    assert image[row, column].min() > 200
    assert image.mean() < 40


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
def test_image_of_any_mode_becomes_rgb(tmp_path, mode):
    gray = np.full((10, 12), 200, np.uint8)
    if mode in ("I;16", "I"):
        image = Image.fromarray(gray.astype(np.uint16) * 257 if mode == "I;16" else gray.astype(np.int32) * 257)
        assert image.mode == mode
    else:
        image = Image.fromarray(gray).convert("RGB").convert(mode)
    path = tmp_path / {"CMYK": "a.jpg", "I": "a.tiff"}.get(mode, "a.png")
    image.save(path)
    pixels = load_image(str(path))
    assert pixels.shape == (10, 12, 3)
    assert str(pixels.dtype) == "torch.uint8"
    assert (pixels.float().mean() - (255 if mode == "1" else 200)).abs() < (60 if mode == "1" else 3)


def test_palette_with_transparency_is_laid_on_white_without_a_warning(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8), mode="P")
    image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200, 90, 90, 90])
    image.save(tmp_path / "a.png", transparency=bytes([0, 128, 255, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = load_image(str(tmp_path / "a.png"))
    assert pixels.tolist() == [[[255, 255, 255], [132, 227, 132]], [[10, 10, 200], [90, 90, 90]]]


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp"])
def test_truncated_image(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match="cannot be read as an image") as caught:
        load_image(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_image_errors(tmp_path, monkeypatch):
    for name, content, message in (
        ("none.png", None, "no such file"),
        ("empty.png", b"", "the file is empty"),
        ("text.png", b"questa non e una fotografia", "cannot be read as an image"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match=message) as caught:
            load_image(str(tmp_path / name))
        assert str(caught.value).count(name) == 1
    Image.new("RGB", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(MediaError, match=r"bomb\.png: .*decompression bomb"):
        load_image(str(tmp_path / "bomb.png"))


def test_real_photographs(shared_data):
    for path in sorted((shared_data / "image/photos").iterdir()):
        with Image.open(path) as image:
            assert tuple(load_image(str(path)).shape) == (image.height, image.width, 3)
