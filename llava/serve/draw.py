"""Pictures of answers: an image or the frames of a video, with the boxes drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from llava.config import VisionConfig
from llava.data.media import load_image, load_media
from llava.geometry import frame_picture
from llava.grounding.syntax import Box, TimeSpan
from llava.serve.generate import Answer
from llava.types import Media

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

_COLOURS = ("#ffd400", "#00b4d8", "#ef476f", "#06d6a0", "#b388ff", "#ff8c42")
_WHOLE_CLIP = TimeSpan(0.0, 1.0)


def draw_answer(answer: Answer, medium: Media, vision: VisionConfig) -> PILImage:
    """An image with the boxes of an answer, or the sampled frames of a video side by side, each with its own.

    The boxes of a video are taken as a tube: evenly spaced in time over the answer's first span, or over the
    clip if it has none; each is drawn on the frame that is nearest in time.

    Raises:
        ValueError: the file cannot be read.
    """
    from PIL import Image

    if medium.kind == "image":
        picture = Image.fromarray(load_image(medium.path).numpy())
        _draw_boxes(picture, enumerate(answer.boxes))
        return picture
    frames = _show_frames(medium, vision)
    times = _spread(answer.spans[0] if answer.spans else _WHOLE_CLIP, len(answer.boxes))
    for i, (box, time) in enumerate(zip(answer.boxes, times, strict=True)):
        _draw_boxes(frames[round(time * (len(frames) - 1))], [(i, box)])
    width, height = frames[0].size
    strip = Image.new("RGB", (width * len(frames), height))
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * width, 0))
    return strip


def _show_frames(medium: Media, vision: VisionConfig) -> list[PILImage]:
    """The sampled frames of a video as the model saw them, brought back to their shape; black where they were cut."""
    from PIL import Image

    video = load_media(medium, vision)
    height, width = video.original_size
    framing = frame_picture((height, width), vision)
    corners = (framing.left, framing.top, framing.left + framing.width, framing.top + framing.height)
    squares = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video.frames]
    return [square.crop(corners).resize((width, height)) for square in squares]


def _spread(span: TimeSpan, number: int) -> list[float]:
    """Times evenly spaced over a span, its ends included; of a single one the start."""
    return [span.start + (span.end - span.start) * i / max(number - 1, 1) for i in range(number)]


def _draw_boxes(picture: PILImage, boxes: Iterable[tuple[int, Box]]) -> None:
    """Draw numbered boxes on a picture; corners in the wrong order are put right."""
    from PIL import ImageDraw

    width, height = picture.size
    for i, box in boxes:
        (x1, x2), (y1, y2) = sorted((box.x1, box.x2)), sorted((box.y1, box.y2))
        corners = (x1 * (width - 1), y1 * (height - 1), x2 * (width - 1), y2 * (height - 1))
        line = max(2, min(width, height) // 150)
        ImageDraw.Draw(picture).rectangle(corners, outline=_COLOURS[i % len(_COLOURS)], width=line)
