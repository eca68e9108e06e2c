"""A picture of clips with what the model says about them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from llava.demo.evaluation import CaptionedClip

_FRAME_SIDE = 96
_FRAMES_SHOWN = 4
_GAP = 8
_MARGIN = 32
_ROW_GAP = 22
_HEADER_HEIGHT = 88
_TEXT_WIDTH = 560

_PAPER = (250, 249, 246)
_INK = (32, 33, 36)
_FAINT = (128, 130, 136)
_RIGHT = (24, 128, 72)
_WRONG = (188, 52, 44)
_LINE = (226, 224, 218)


def write_picture(path: Path, clips: Sequence[CaptionedClip]) -> None:
    """Draw one row a clip, its frames beside its captions, as a PNG file."""
    strip_width = _FRAMES_SHOWN * _FRAME_SIDE + (_FRAMES_SHOWN - 1) * _GAP
    width = 2 * _MARGIN + strip_width + _MARGIN + _TEXT_WIDTH
    row_height = _FRAME_SIDE + _ROW_GAP
    image = Image.new("RGB", (width, _HEADER_HEIGHT + len(clips) * row_height + _MARGIN - _ROW_GAP), _PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, 22), "Clips that training never saw, and what the model says about them", _INK, _font(22))
    draw.text((_MARGIN, 54), "Their pairs of shape and colour are new to it, too.", _FAINT, _font(15))
    for row, clip in enumerate(clips):
        top = _HEADER_HEIGHT + row * row_height
        if row:
            draw.line((_MARGIN, top - _ROW_GAP // 2, width - _MARGIN, top - _ROW_GAP // 2), _LINE)
        _draw_frames(image, top, read_frames(clip.video, _FRAMES_SHOWN))
        _draw_captions(draw, 2 * _MARGIN + strip_width, top, clip)
    image.save(path, optimize=True)


def read_frames(video: str, num_frames: int) -> NDArray[np.uint8]:
    """Frames evenly spread over a clip, as the model sees them: uint8 (num_frames, height, width, 3)."""
    from llava.data.media import sample_video

    return sample_video(video, num_frames).frames.numpy()


def _draw_frames(image: Image.Image, top: int, frames: NDArray[np.uint8]) -> None:
    for column, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize((_FRAME_SIDE, _FRAME_SIDE), Image.Resampling.LANCZOS)
        image.paste(picture, (_MARGIN + column * (_FRAME_SIDE + _GAP), top))


def _draw_captions(draw: ImageDraw.ImageDraw, left: int, top: int, clip: CaptionedClip) -> None:
    right = clip.caption == clip.reference
    lines = (
        ("reference", clip.reference, _INK),
        ("the model", clip.caption, _RIGHT if right else _WRONG),
        ("shown another clip", clip.other_caption, _FAINT),
    )
    for number, (label, text, colour) in enumerate(lines):
        y = top + 8 + number * 30
        draw.text((left, y + 2), label, _FAINT, _font(13))
        draw.text((left + 132, y), text, colour, _font(17))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
