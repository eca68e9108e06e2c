"""Opens images, decodes videos, samples frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llava.config import VisionConfig
from llava.data.image_ops import fit_frames
from llava.data.video_backends import DECODE_ERRORS, open_video
from llava.types import Media, VisualInput


class MediaError(ValueError):
    """A file that is missing, broken or not what it should be; the message names it."""


@dataclass(frozen=True)
class SampledVideo:
    """Frames sampled from a clip.

    ``frames`` is uint8 (frames, height, width, 3); ``indices`` are positions in the clip and
    ``times`` seconds from its first frame.
    """

    frames: Tensor
    indices: tuple[int, ...]
    times: tuple[float, ...]


def load_media(media: Media, vision: VisionConfig, split: tuple[int, int] | None = None) -> VisualInput:
    """Load an image or sample a video, fitted to the tower's square.

    Raises:
        MediaError: the file is missing, empty or cannot be decoded.
    """
    if media.kind == "image":
        pixels, times = load_image(media.path).unsqueeze(0), (0.0,)
    else:
        video = sample_video(
            media.path, vision.num_frames, fps=vision.video_fps, max_frames=vision.frames_upbound, split=split
        )
        pixels, times = video.frames, video.times
    height, width = pixels.shape[1:3]
    return VisualInput(media.kind, fit_frames(pixels, vision), (height, width), times)


def check_file(path: str) -> None:
    """A MediaError for what no decoder needs to be asked about."""
    file = Path(path)
    if not file.exists():
        raise MediaError(f"{path}: no such file")
    if not file.is_file():
        raise MediaError(f"{path}: not a file")
    if file.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty")


def load_image(path: str) -> Tensor:
    """Read an image upright (after its EXIF orientation) as uint8 (height, width, 3)."""
    from PIL import Image, ImageOps

    check_file(path)
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return torch.from_numpy(np.array(upright.convert("RGB")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: cannot be read as an image: {error}") from error


def sample_video(
    path: str, num_frames: int, *, fps: float = 0.0, max_frames: int = 32, split: tuple[int, int] | None = None
) -> SampledVideo:
    """Sample frames of a clip.

    Args:
        path: the file; one with several video streams gives its main one.
        num_frames: how many frames, evenly spread from the first to the last.
        fps: above zero, so many a second instead, at most ``max_frames``.
        max_frames: see ``fps``.
        split: first and last frame of the part to sample from; by default the whole clip.

    Raises:
        MediaError: the file cannot be decoded, or ends before ``split`` does.
    """
    check_file(path)
    try:
        with open_video(path) as video:
            indices = choose_frames(len(video), video.fps, num_frames, fps, max_frames, split)
            frames = video.read(indices)
            return SampledVideo(torch.from_numpy(frames), tuple(indices), tuple(i / video.fps for i in indices))
    except DECODE_ERRORS as error:
        raise MediaError(f"{path}: cannot be decoded as a video: {error}") from error


def choose_frames(
    length: int, clip_fps: float, num_frames: int, fps: float, max_frames: int, split: tuple[int, int] | None
) -> list[int]:
    """Indices of the frames to sample, ascending; a clip shorter than asked for repeats frames."""
    first, last = split or (0, length - 1)
    if not 0 <= first <= last < length:
        raise ValueError(f"its frames are 0 to {length - 1}, but meta.split asks for {first} to {last}")
    if fps > 0:
        num_frames = min(max(round((last - first + 1) / clip_fps * fps), 1), max_frames)
    return np.linspace(first, last, num_frames).round().astype(int).tolist()
