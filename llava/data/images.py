"""From picture files to 8-bit RGB: whole files only, within their limits, upright, transparent parts on white.

Clips that are pictures (animations, folders and lists of frames) are here too. Takes no torch: the decoder process
imports it.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llava.data.containers import find_container
from llava.data.image_structure import AVIF_BRANDS, Animation, is_heif, is_picture, read_structure
from llava.data.media_files import DEFAULT_LIMITS, MediaError, MediaLimits, check_file, is_picture_name

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "MPO", "DIB", "TGA", "PCX",
           "SGI", "QOI")  # fmt: skip
"""Pillow's names of the formats that are read. Others hold programs, unpack without a bound, or are no pictures."""

# EXIF orientations whose picture lies on its side in the file.
_SIDEWAYS = (5, 6, 7, 8)
_POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
# Tags of TIFF.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT, _TILE_WIDTH, _TILE_LENGTH = 258, 262, 339, 322, 323
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


@contextmanager
def _named(path: str, limits: MediaLimits = DEFAULT_LIMITS) -> Iterator[None]:
    """Turn what goes wrong within the ``with`` into a MediaError that names the file."""
    from PIL import Image

    try:
        yield
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        # Above what any --max_image_pixels can allow; Pillow says how large it is.
        raise MediaError(f"{path}: {error} --max_image_pixels is {limits.max_image_pixels}") from error
    except Image.UnidentifiedImageError as error:
        raise MediaError(f"{path}: cannot be read as an image: {_describe_other(path)}") from error
    except MemoryError as error:
        raise MediaError(f"{path}: cannot be read as an image: it does not fit into memory") from error
    except (OSError, ValueError, SyntaxError, RuntimeError, EOFError, TypeError, OverflowError) as error:
        raise MediaError(f"{path}: cannot be read as an image: {str(error).replace(repr(path), 'it')}") from error


def _describe_other(path: str) -> str:
    """What a file is that no format of pictures knows."""
    try:
        find_container(path)
    except (OSError, ValueError):
        return f"it is none of {', '.join(FORMATS)}"
    return 'it is a video; give it under the key "video", with <video> in the text'


@contextmanager
def open_picture(path: str, limits: MediaLimits = DEFAULT_LIMITS) -> Iterator[tuple[PILImage, Animation | None]]:
    """Pillow's image of a file that is whole and within its limits, not yet decoded, and its frames if several.

    Raises:
        MediaError: the file is missing, cut off, damaged, no picture, or too large to be one; what is done to the
            image within the ``with`` raises it too.
    """
    from PIL import Image

    path, size = check_file(path)
    with _named(path, limits):
        if size > limits.max_image_bytes:
            raise ValueError(f"its file has {size} bytes, but --max_image_bytes is {limits.max_image_bytes}")
        with open(path, "rb") as file:  # noqa: PTH123
            data = file.read()
        _check_head(data)
        animation = read_structure(data, limits)
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            limits.check_picture(*image.size)
            # The tiles of a TIFF may be larger than its picture, and are decoded whole.
            tags = getattr(image, "tag_v2", {})
            width, height = tags.get(_TILE_WIDTH, 1), tags.get(_TILE_LENGTH, 1)
            if isinstance(width, int) and isinstance(height, int):
                limits.check_picture(width, height)
            if animation is not None and image.format == "WEBP" and image.mode == "RGB":
                # Without a transparent frame; where no frame lies there is nothing, and Pillow makes it black.
                image.rawmode = image._mode = "RGBA"  # type: ignore[attr-defined]
            yield image, animation


def read_picture(path: str, limits: MediaLimits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """Read a picture as ``to_rgb`` gives it; of an animation the first one. A MediaError as from ``open_picture``."""
    with open_picture(path, limits) as (image, _):
        return to_rgb(image)


def read_image_size(path: str) -> tuple[int, int]:
    """The (height, width) that ``read_picture`` would give, from the header alone; a MediaError if there is none.

    A PNG that says its orientation behind its pixels counts as upright: to see it takes decoding.
    """
    from PIL import ExifTags, Image

    path, _ = check_file(path)
    with _named(path):
        with open(path, "rb") as file:  # noqa: PTH123
            _check_head(file.read(32))
        with Image.open(path, formats=_known_formats()) as image:
            width, height = image.size
            if image.format == "TIFF":
                # As stored: Pillow's releases differ on whether the size of a turned TIFF is turned too.
                tags = image.tag_v2  # type: ignore[attr-defined]
                width, height = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]
            # Not image.getexif(), which for a PNG decodes the pixels.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return (width, height) if orientation in _SIDEWAYS else (height, width)


def _check_head(head: bytes) -> None:
    """A ValueError for what Pillow must not open, or cannot without a plug-in that is not there."""
    if head.startswith(_POSTSCRIPT):
        raise ValueError("it is PostScript; turn it into a PNG or a JPEG first")
    if head[4:8] == b"ftyp" and is_heif(head):
        _load_plugin("AVIF" if head[8:12] in AVIF_BRANDS else "HEIC")


def _load_plugin(kind: str) -> None:
    """Let Pillow know the plug-in that reads AVIF or HEIC; a ValueError that names it where it is missing."""
    from PIL import Image, features

    Image.init()
    if kind == "AVIF" and "avif" in features.modules and features.check("avif"):
        return
    if kind == "HEIC" and "HEIF" in Image.OPEN:
        return
    try:
        if kind == "AVIF":
            import pillow_avif  # noqa: F401
        else:
            import pillow_heif

            pillow_heif.register_heif_opener()
    except ImportError as error:
        package = "pillow-avif-plugin" if kind == "AVIF" else "pillow-heif"
        raise ValueError(
            f"it is {kind}, which Pillow reads with a plug-in only; pip install {package}, or turn it into a JPEG"
        ) from error


def _known_formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def to_rgb(image: PILImage) -> NDArray[np.uint8]:
    """The pixels of an opened image, upright and on white, as uint8 (height, width, 3).

    Gray of 16 bits is cut to its upper 8 (of 12 bits likewise). Integers of 32 bits and floats are taken as they are
    if all are whole numbers from 0 to 255, as shares of white if they are floats from 0 to 1, and are stretched from
    their least to their largest otherwise. Numbers that are not finite are black, or white where they are infinite.
    """
    from PIL import ImageOps

    _scale_transparency(image)
    image.load()
    _check_zero_filled(image)
    tags = dict(getattr(image, "tag_v2", {}))
    upright = ImageOps.exif_transpose(image)
    if upright.mode in (*_SIXTEEN_BITS, "I", "F"):
        return _deep_gray(upright, image.format, tags)
    if upright.has_transparency_data:
        return _on_white(upright)
    return np.array(upright.convert("RGB"))


def _on_white(image: PILImage) -> NDArray[np.uint8]:
    from PIL import Image

    if image.mode == "La":
        image = image.convert("LA")
    layer = image.convert("RGBA")
    return np.array(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))


def _scale_transparency(image: PILImage) -> None:
    """Bring the transparent colour of a PNG, which it gives in its own depth, to the depth that Pillow decodes to."""
    transparent = image.info.get("transparency")
    if image.format != "PNG" or not image.tile:  # type: ignore[attr-defined]
        return
    args = image.tile[0][3]  # type: ignore[attr-defined]
    rawmode = args if isinstance(args, str) else args[0]
    if isinstance(transparent, int) and rawmode in ("L;2", "L;4"):
        image.info["transparency"] = transparent * (85 if rawmode == "L;2" else 17)
    elif isinstance(transparent, tuple) and rawmode == "RGB;16B":
        image.info["transparency"] = tuple(channel >> 8 for channel in transparent)


def _deep_gray(image: PILImage, file_format: str | None, tags: dict[int, Any]) -> NDArray[np.uint8]:
    """Gray of more than 8 bits as RGB."""
    values = np.asarray(image)
    if image.mode in _SIXTEEN_BITS or file_format in ("PNG", "PPM"):
        bits = tags.get(_BITS_PER_SAMPLE, (16,))
        gray = (values >> max(min(bits[0] if isinstance(bits, tuple) else bits, 16) - 8, 0)).clip(0, 255)
        gray = gray.astype(np.uint8)
    else:
        sample_format = tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))
        if image.mode == "I" and tags.get(_BITS_PER_SAMPLE) == (32,) and sample_format[0] == _UNSIGNED:
            values = values.view(np.uint32)
        gray = map_by_range(values)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        gray = 255 - gray
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray = np.where(values == transparent, np.uint8(255), gray)
    return np.repeat(gray[..., None], 3, axis=-1)


def map_by_range(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Bring numbers of any range to 0 to 255, see ``to_rgb``; a ValueError if none of them is finite."""
    finite = np.isfinite(values)
    known = values if finite.all() else values[finite]
    if not known.size:
        raise ValueError("none of its numbers is finite")
    low, high = float(known.min()), float(known.max())
    if low >= 0 and high <= 1 and values.dtype.kind == "f":
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255 and (known == np.floor(known)).all():
        low, high = 0.0, 255.0
    elif low == high:
        # One colour has no range of its own.
        low, high = min(low, 0.0), next((most for most in (255.0, 65535.0) if high <= most), high)
    shares = (np.nan_to_num(values, nan=low, posinf=high, neginf=low).astype(np.float64) - low) / (high - low)
    return np.rint(shares * 255).astype(np.uint8)


def _check_zero_filled(image: PILImage) -> None:
    """A ValueError for pixels without compression that end in the midst of a row, all behind being zeros.

    Dark areas end with the row, or at an edge that goes on in the row before.
    """
    uncompressed = image.info.get("compression", "raw") in ("raw", 0, 3)  # 3: a BMP with masks
    if image.format not in ("BMP", "TIFF", "PPM", "TGA") or not uncompressed:
        return
    pixels: NDArray[Any] = np.asarray(image)
    if image.format == "BMP" or (image.format == "TGA" and image.info.get("orientation") == -1):
        pixels = pixels[::-1]  # from the bottom, as in the file
    filled: NDArray[Any] = np.asarray(pixels.any(-1) if pixels.ndim == 3 else pixels != 0)
    rows = np.flatnonzero(filled.any(1))
    if not len(rows) or rows[-1] >= len(filled) - 2 or rows[-1] == 0:
        return
    before, last = filled[rows[-1] - 1], filled[rows[-1]]
    width = int(np.flatnonzero(last)[-1]) + 1
    if width <= len(last) - 4 and before.mean() > 0.9 and last[:width].mean() > 0.9:
        raise ValueError("its pixels end in the midst of a row, and zeros follow: it was not written in full")


# Clips that are pictures: an animated GIF, PNG, WebP or AVIF, a folder of frames, a list of them.

_NOT_LISTED = ("thumbs.db", "desktop.ini")


def is_picture_file(path: str) -> bool:
    """Whether a file is a picture by its content; a MediaError if it cannot be read."""
    path, _ = check_file(path)
    with open(path, "rb") as file:  # noqa: PTH123
        return is_picture(file.read(32))


class FrameFiles:
    """A clip whose frames are files of their own.

    Attributes:
        fps: frames a second; 1 where it is not known.
        times: seconds of each frame from the first one.
    """

    def __init__(self, paths: Sequence[str], fps: float = 0.0, limits: MediaLimits = DEFAULT_LIMITS) -> None:
        limits.check_length(len(paths))
        self._paths, self._limits = paths, limits
        self.fps = fps or 1.0
        self.times = [i / self.fps for i in range(len(paths))]
        self.duration = len(paths) / self.fps

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Frames at ascending indices, as ``Video.read`` gives them; a ValueError if they differ in size."""
        height, width = read_image_size(self._paths[indices[0]])
        self._limits.check_frames(len(indices), width, height)

        def read(index: int) -> NDArray[np.uint8]:
            pixels = read_picture(self._paths[index], self._limits)
            if pixels.shape[:2] != (height, width):
                raise ValueError(
                    f"its frames differ in size: {os.path.basename(self._paths[indices[0]])} is {width} x {height}, "
                    f"{os.path.basename(self._paths[index])} is {pixels.shape[1]} x {pixels.shape[0]}"
                )
            return pixels

        return _stack(indices, read)


def _stack(indices: Sequence[int], read: Callable[[int], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Frames at ascending indices, one that repeats read once, as (frames, height, width, 3)."""
    frames = {index: read(index) for index in dict.fromkeys(indices)}
    return np.stack([frames[index] for index in indices])


class AnimatedPicture:
    """A clip that is one animated picture; attributes as those of ``FrameFiles``, from the delays in the file."""

    def __init__(self, image: PILImage, animation: Animation | None, limits: MediaLimits) -> None:
        self._image, self._limits = image, limits
        animation = animation or self._read_delays()
        if animation is None:
            raise ValueError(
                'it is one still picture and no clip; give it as "image", or the frames of a clip as a list or a folder'
            )
        self._first = animation.first
        *starts, self.duration = accumulate(animation.seconds, initial=0.0)
        self.times: list[float] = starts
        self.fps = len(starts) / self.duration

    def _read_delays(self) -> Animation | None:
        """Of a sequence whose delays only the decoder knows (AVIF)."""
        count = getattr(self._image, "n_frames", 1)
        if self._image.format != "AVIF" or count < 2:
            return None
        self._limits.check_length(count)
        seconds = []
        for index in range(count):
            self._image.seek(index)
            self._image.load()
            seconds.append(self._image.info.get("duration", 0) / 1000 or 0.1)
        return Animation(tuple(seconds))

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Frames at ascending indices, as ``Video.read`` gives them."""
        size = self._image.size
        self._limits.check_frames(len(indices), *size)

        def read(index: int) -> NDArray[np.uint8]:
            self._image.seek(self._first + index)
            if self._image.size != size:
                raise ValueError(f"its frame {index} is larger than its first")
            return to_rgb(self._image)

        return _stack(indices, read)


def list_frames(folder: str) -> list[str]:
    """The pictures of a folder in the order of the numbers in their names.

    A MediaError if there are none, if something else lies among them, or if two of them have one place.
    """
    names = [name for name in os.listdir(folder) if not name.startswith(".") and name.lower() not in _NOT_LISTED]
    others = sorted(name for name in names if not is_picture_name(name))
    if others or not names:
        why = f"{others[0]} is none" if others else "it is empty"
        raise MediaError(
            f"{folder}: a folder, not a file; a clip may be a folder of pictures and nothing else, but {why}"
        )
    places: dict[tuple[tuple[str, int], ...], str] = {}
    for name in names:
        place = _place(name.rpartition(".")[0])
        if (other := places.setdefault(place, name)) != name:
            raise MediaError(
                f"{folder}: its pictures {min(name, other)} and {max(name, other)} have one place in a clip"
            )
    return [os.path.join(folder, places[place]) for place in sorted(places)]


def _place(name: str) -> tuple[tuple[str, int], ...]:
    """Sorts names by their words and by the value of their numbers: ``f2`` before ``f10``."""
    pieces = re.split(r"(\d+)", name.lower())
    return tuple((word, int(number)) for word, number in zip(pieces[::2], [*pieces[1::2], "-1"], strict=True))
