"""Opens images and samples videos, as squares for the tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llava.config import VisionConfig
from llava.data.decoder_process import decode_within
from llava.data.files import MediaError, check_file
from llava.data.frames import FrameRequest, decode_frames
from llava.data.image_ops import cut_views, fit_frames
from llava.data.limits import DEFAULT_LIMITS, MediaLimits
from llava.data.media_folder import check_links
from llava.types import Media, VisualInput

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

# EXIF orientations whose picture lies on its side in the file.
_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class SampledVideo:
    """Frames sampled from a clip.

    ``frames`` is uint8 (frames, height, width, 3); ``indices`` are positions in the clip and
    ``times`` seconds from its first frame; ``duration`` is the seconds that all of the clip lasts.
    """

    frames: Tensor
    indices: tuple[int, ...]
    times: tuple[float, ...]
    duration: float


def load_media(
    media: Media,
    vision: VisionConfig,
    split: tuple[int, int] | None = None,
    timeout: float = 0.0,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> VisualInput:
    """Load an image or sample a video, fitted to the tower's square, or an image cut into such squares.

    Args:
        media: what to load.
        vision: how many frames, and what square or tiles.
        split: first and last frame of the part of a video to sample from; by default all of it.
        timeout: seconds that decoding a video may take, see ``sample_video``.
        limits: how large it may be.

    Raises:
        MediaError: the file is missing, empty, too large, outside its folder, or cannot be decoded.
    """
    check_links(media)
    if media.kind == "image":
        picture = load_image(media.path, limits)
        views = fit_frames(picture.unsqueeze(0), vision) if vision.anyres is None else cut_views(picture, vision)
        return VisualInput("image", views, _size_of(picture), (0.0,))
    video = sample_video(
        media.path,
        vision.num_frames,
        fps=vision.video_fps,
        max_frames=vision.frames_upbound,
        split=split,
        timeout=timeout,
        limits=limits,
    )
    return VisualInput("video", fit_frames(video.frames, vision), _size_of(video.frames), video.times, video.duration)


def _size_of(pixels: Tensor) -> tuple[int, int]:
    """Height and width of (..., height, width, 3) pixels."""
    height, width = pixels.shape[-3:-1]
    return height, width


def load_image(path: str, limits: MediaLimits = DEFAULT_LIMITS) -> Tensor:
    """Read an image upright (after its EXIF orientation) as uint8 (height, width, 3).

    Transparency is dropped, as everywhere in the LLaVA family; of an animation the first picture is read.

    Raises:
        MediaError: the file is missing, broken, no image, or too large to be one.
    """
    from PIL import Image, ImageOps

    size = check_file(path)
    try:
        limits.check_image_file(size)
        with Image.open(path) as image:
            limits.check_picture(*image.size)
            _check_format(image)
            return torch.from_numpy(_to_rgb(ImageOps.exif_transpose(image)))
    except Image.DecompressionBombError as error:
        # Above what any --max_image_pixels can allow; Pillow says how large it is.
        raise MediaError(f"{path}: {error} --max_image_pixels is {limits.max_image_pixels}") from error
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:
        raise _unreadable(path, error) from error


def read_image_size(path: str) -> tuple[int, int]:
    """The (height, width) that ``load_image`` would give, from the file's header alone.

    A PNG that says its orientation behind its pixels counts as upright: to see it takes decoding.

    Raises:
        MediaError: the file is missing or no image.
    """
    from PIL import ExifTags, Image

    check_file(path)
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.format == "TIFF":
                # As stored: Pillow's releases differ on whether the size of a turned TIFF is turned too.
                tags = image.tag_v2  # type: ignore[attr-defined]
                width, height = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]
            # Not image.getexif(), which for a PNG decodes the pixels.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    return (width, height) if orientation in _SIDEWAYS else (height, width)


def _unreadable(path: str, error: Exception) -> MediaError:
    return MediaError(f"{path}: cannot be read as an image: {str(error).replace(repr(path), 'it')}")


def _check_format(image: PILImage) -> None:
    """A ValueError for a picture that is a program, which Pillow has another program run."""
    if image.format == "EPS":
        raise ValueError("it is PostScript; turn it into a PNG or a JPEG first")


def _to_rgb(image: PILImage) -> NDArray[np.uint8]:
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        # Gray of 16 bits, which Pillow would clip to white.
        gray = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=-1)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def sample_video(
    path: str,
    num_frames: int,
    *,
    fps: float = 0.0,
    max_frames: int = 32,
    split: tuple[int, int] | None = None,
    timeout: float = 0.0,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> SampledVideo:
    """Sample frames of a clip.

    Args:
        path, num_frames, fps, max_frames, split: which frames, see ``FrameRequest``.
        timeout: seconds that decoding may take; then it is done in a process of its own, and a decoder
            that crashes is an error as one that hangs. 0 sets no limit and decodes here.
        limits: how large the file and its frames may be.

    Raises:
        MediaError: the file is missing, broken, cut off, too large or no video, ends before ``split`` does, or takes
            too long.
    """
    request = FrameRequest(path, num_frames, fps, max_frames, split, limits)
    frames = decode_within(request, timeout) if timeout > 0 else decode_frames(request)
    return SampledVideo(torch.from_numpy(frames.pixels), frames.indices, frames.times, frames.duration)
