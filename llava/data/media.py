"""The media of a record as the tower sees them: an image opened or a video sampled, then brought to its square.

What the decoder process imports (``decoding``, ``images``, ``video``) takes no torch; this module turns its arrays into
tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.config import BLACK_PADDING, VisionConfig
from llava.data.decoding import FrameRequest, decode_frames, decode_within
from llava.data.images import read_picture
from llava.data.media_files import DEFAULT_LIMITS, MediaError, MediaLimits, local_path
from llava.geometry import Letterbox
from llava.types import Media, VisualInput

if TYPE_CHECKING:
    from llava.data.feature_cache.run import RunFeatures


@dataclass(frozen=True)
class SampledVideo:
    """Frames sampled from a clip.

    Attributes:
        frames: uint8 (frames, height, width, 3).
        indices: their positions in the clip.
        times: their seconds from the first frame of the clip.
        duration: seconds that all of the clip lasts.
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
    features: RunFeatures | None = None,
) -> VisualInput:
    """Load an image or sample a video, fitted to the tower's square, or an image cut into such squares.

    Args:
        media: what to load.
        vision: how many frames, and what square or tiles.
        split, timeout, limits: as for ``sample_video``.
        features: of the tower, which take the place of the pixels where there are any.

    Raises:
        MediaError: the file is missing, empty, too large, outside its folder, or cannot be decoded.
    """
    is_frames = media.kind == "video" and (media.frames or os.path.isdir(media.path))
    if is_frames and vision.add_time_instruction and not media.fps:
        raise MediaError(
            f"{media.path}: is given as frames without their rate, and --add_time_instruction is set; give meta.fps"
        )
    if features is not None:
        check_links(media)  # Also of a file that is not opened.
        return features.load(media, split, lambda: load_media(media, vision, split, timeout, limits))
    sampling = (vision.num_frames, vision.video_fps, vision.frames_upbound)
    decoded = decode_media(media, *sampling, split, timeout, limits)
    frames, size = decoded.frames, (decoded.frames.shape[1], decoded.frames.shape[2])
    if media.kind == "image":
        # Under anyres the frames are the views of one picture: (1 + tiles, 3, side, side).
        views = fit_frames(frames, vision) if vision.anyres is None else cut_views(frames[0], vision)
        return VisualInput("image", views, size, (0.0,))
    return VisualInput("video", fit_frames(frames, vision), size, decoded.times, decoded.duration)


def decode_media(
    media: Media,
    num_frames: int,
    fps: float,
    max_frames: int,
    split: tuple[int, int] | None = None,
    timeout: float = 0.0,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> SampledVideo:
    """The frames of a record's video, or its image as a single frame, at their own size.

    The arguments and errors are those of ``sample_video``; a link out of the folder of media is an error too.
    """
    check_links(media)
    if media.kind == "image":
        return SampledVideo(load_image(media.path, limits)[None], (0,), (0.0,), 0.0)
    return sample_video(
        media.path,
        num_frames,
        fps=fps,
        max_frames=max_frames,
        split=split,
        timeout=timeout,
        limits=limits,
        frame_files=media.frames,
        frame_rate=media.fps,
    )


def check_links(media: Media) -> None:
    """A MediaError for a file that symbolic links put outside the folder it may not leave.

    The path alone was judged when its record was read, see ``media_files.find_media``.
    """
    if not media.root:
        return
    root = media.path[: media.root]
    # Every frame is a file that may be a link.
    paths = list(media.frames) or [media.path]
    if media.kind == "video" and not media.frames and os.path.isdir(media.path):
        with os.scandir(media.path) as entries:
            paths += [entry.path for entry in entries if entry.is_symlink()]
    for path in paths:
        # Both sides resolved: the folder itself may be reached by a link.
        real = os.path.realpath(path)
        if Path(os.path.realpath(root)) not in Path(real).parents:
            raise MediaError(
                f"{path}: is a link to {real}, which lies outside the folder {root}; give the folder that has it "
                f"with --{media.kind}_folder, or allow it with --allow_outside_paths"
            )


def load_image(path: str, limits: MediaLimits = DEFAULT_LIMITS) -> Tensor:
    """Read an image upright and on white as uint8 (height, width, 3); a MediaError as from ``images.open_picture``."""
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
        timeout: seconds that decoding may take; then it is done in a process of its own, and a decoder
            that crashes is an error as one that hangs. 0 sets no limit and decodes here.
        path, num_frames and the others: which frames of what, see ``FrameRequest``.

    Raises:
        MediaError: the file is missing, broken, cut off, too large or no video, ends before ``split`` does, or takes
            too long.
    """
    request = FrameRequest(
        local_path(path), num_frames, fps, max_frames, split, limits, tuple(map(local_path, frame_files)), frame_rate
    )
    # The process that decodes costs a copy of the frames; without a limit there is no need of it.
    frames = decode_within(request, timeout) if timeout > 0 else decode_frames(request)
    return SampledVideo(torch.from_numpy(frames.pixels), frames.indices, frames.times, frames.duration)


# Images and frames brought to the tower's square, on uint8 pixels; where they lie in it is for ``geometry`` to say.

_MOST_RESIZED = 8
"""Squares' worth of pixels that a picture is resized to as a whole. A longer one would take memory for what is cut off:
a line of 60,000 pixels becomes 11 GB."""


def fit_frames(frames: Tensor, vision: VisionConfig) -> Tensor:
    """Bring frames to the square that the tower sees.

    Args:
        frames: uint8 (frames, height, width, 3).
        vision: side and manner: ``square`` with ``image_resize_size`` resizes the shorter side and
            cuts out the centre, without it stretches; ``pad`` keeps all of the picture and fills up
            as ``image_padding`` says. Under ``anyres`` frames (of videos) are fitted as under ``square``.

    Returns:
        uint8 (frames, 3, side, side).
    """
    # The same letterbox moves coordinates, so that a box stays on its thing.
    box = vision.letterbox((frames.shape[1], frames.shape[2]))
    is_cut = max(box.height, box.width) > box.side
    if is_cut and box.height * box.width > _MOST_RESIZED * box.side**2:
        return torch.stack([_resize_centre(frame, box) for frame in frames])
    fitted = resize(frames.permute(0, 3, 1, 2), box.height, box.width)  # (frames, 3, box.height, box.width)
    if is_cut:
        return fitted[..., -box.top : box.side - box.top, -box.left : box.side - box.left].contiguous()
    return fitted if fitted.shape[-2:] == (box.side, box.side) else _pad_around(fitted, box.side, box.side, vision)


def _resize_centre(picture: Tensor, letterbox: Letterbox) -> Tensor:
    """The square in the middle of a resized picture, made from that part of it alone.

    Args:
        picture: uint8 (height, width, 3).
        letterbox: with negative ``top`` or ``left``.

    Returns:
        uint8 (3, side, side), within a level or two of what ``resize`` gives and a cut leaves.
    """
    from PIL import Image

    # The square in pixels of the picture as it is stored.
    rows, columns = picture.shape[0] / letterbox.height, picture.shape[1] / letterbox.width
    top, left = -letterbox.top, -letterbox.left
    box = (left * columns, top * rows, (left + letterbox.side) * columns, (top + letterbox.side) * rows)
    image = Image.fromarray(picture.numpy())
    square = image.resize((letterbox.side, letterbox.side), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def cut_views(picture: Tensor, vision: VisionConfig) -> Tensor:
    """Cut an image into the views of anyres, see ``geometry.AnyRes``.

    Args:
        picture: uint8 (height, width, 3).
        vision: with an ``anyres`` aspect ratio.

    Returns:
        uint8 (1 + tiles, 3, side, side): all of the picture stretched to the square, then the tiles of
        its canvas, row by row, padded as ``image_padding`` says.
    """
    assert vision.anyres is not None
    side = vision.image_size
    pixels = picture.permute(2, 0, 1)[None]  # (1, 3, height, width)
    grid, fitted = vision.anyres.place((picture.shape[0], picture.shape[1]))
    canvas = _pad_around(resize(pixels, *fitted), grid.height * side, grid.width * side, vision)
    tiles = canvas.view(3, grid.height, side, grid.width, side).permute(1, 3, 0, 2, 4)  # (rows, columns, 3, side, side)
    return torch.cat([resize(pixels, side, side), tiles.flatten(0, 1)])


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing; uint8 (frames, 3, height, width), 4-5 times faster than on floats."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)


def _pad_around(pixels: Tensor, height: int, width: int, vision: VisionConfig) -> Tensor:
    """Pixels (frames, 3, rows, columns) in the middle of (frames, 3, height, width) of ``vision.image_padding``."""
    # LLaVA's expand2square: int() cuts, as there.
    mean = [int(channel * 255) for channel in vision.image_mean]
    colour = torch.tensor([0, 0, 0] if vision.image_padding == BLACK_PADDING else mean, dtype=torch.uint8)
    padded = colour.view(1, 3, 1, 1).repeat(len(pixels), 1, height, width)
    top, left = (height - pixels.shape[-2]) // 2, (width - pixels.shape[-1]) // 2
    padded[..., top : top + pixels.shape[-2], left : left + pixels.shape[-1]] = pixels
    return padded
