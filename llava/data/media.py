"""Opens images and samples videos, as squares for the tower."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.config import VisionConfig
from llava.data.decoder_process import decode_within
from llava.data.files import MediaError, local_path
from llava.data.frames import FrameRequest, decode_frames
from llava.data.image_ops import cut_views, fit_frames
from llava.data.images import read_image_size, read_picture
from llava.data.limits import DEFAULT_LIMITS, MediaLimits
from llava.data.media_folder import check_links
from llava.types import Media, VisualInput

__all__ = ["MediaError", "SampledVideo", "load_image", "load_media", "read_image_size", "sample_video"]


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
    if vision.add_time_instruction and not media.fps and (media.frames or os.path.isdir(media.path)):
        raise MediaError(
            f"{media.path}: is given as frames without their rate, and --add_time_instruction is set; give meta.fps"
        )
    video = sample_video(
        media.path,
        vision.num_frames,
        fps=vision.video_fps,
        max_frames=vision.frames_upbound,
        split=split,
        timeout=timeout,
        limits=limits,
        frame_files=media.frames,
        frame_rate=media.fps,
    )
    return VisualInput("video", fit_frames(video.frames, vision), _size_of(video.frames), video.times, video.duration)


def _size_of(pixels: Tensor) -> tuple[int, int]:
    """Height and width of (..., height, width, 3) pixels."""
    height, width = pixels.shape[-3:-1]
    return height, width


def load_image(path: str, limits: MediaLimits = DEFAULT_LIMITS) -> Tensor:
    """Read an image upright and on white as uint8 (height, width, 3), see ``images.read_picture``.

    Raises:
        MediaError: the file is missing, cut off, damaged, no image, or too large to be one.
    """
    return torch.from_numpy(read_picture(path, limits))


def sample_video(
    path: str,
    num_frames: int,
    *,
    fps: float = 0.0,
    max_frames: int = 32,
    split: tuple[int, int] | None = None,
    timeout: float = 0.0,
    limits: MediaLimits = DEFAULT_LIMITS,
    frame_files: Sequence[str] = (),
    frame_rate: float = 0.0,
) -> SampledVideo:
    """Sample frames of a clip: a video, an animated picture, or a folder or list of pictures.

    Args:
        path, num_frames, fps, max_frames, split: which frames, see ``FrameRequest``.
        timeout: seconds that decoding may take; then it is done in a process of its own, and a decoder
            that crashes is an error as one that hangs. 0 sets no limit and decodes here.
        limits: how large the file and its frames may be.
        frame_files, frame_rate: a clip that is given as its frames, and how many a second they are, see
            ``FrameRequest``.

    Raises:
        MediaError: the file is missing, broken, cut off, too large or no video, ends before ``split`` does, or takes
            too long.
    """
    request = FrameRequest(
        local_path(path), num_frames, fps, max_frames, split, limits, tuple(map(local_path, frame_files)), frame_rate
    )
    frames = decode_within(request, timeout) if timeout > 0 else decode_frames(request)
    return SampledVideo(torch.from_numpy(frames.pixels), frames.indices, frames.times, frames.duration)
