"""How a picture lies in the square that the tower sees: for its pixels, and for the coordinates in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava.config import VisionConfig


@dataclass(frozen=True)
class Framing:
    """The place of a resized picture in a square.

    Attributes:
        side: of the square, in pixels.
        height, width: of the resized picture, in pixels.
        top, left: where its corner lies in the square; negative where the picture is cut.
    """

    side: int
    height: int
    width: int
    top: int = 0
    left: int = 0

    def to_square(self, x: float, y: float) -> tuple[float, float]:
        """From a point of the picture to one of the square, both in [0, 1]; what was cut off goes to the edge."""
        return _clamp((self.left + x * self.width) / self.side), _clamp((self.top + y * self.height) / self.side)

    def from_square(self, x: float, y: float) -> tuple[float, float]:
        """From a point of the square to one of the picture; what lies in the padding goes to the edge."""
        return _clamp((x * self.side - self.left) / self.width), _clamp((y * self.side - self.top) / self.height)


def frame_picture(size: tuple[int, int], vision: VisionConfig) -> Framing:
    """How a picture of a size (height, width) is fitted to the square.

    ``pad`` keeps all of it in the middle; otherwise ``image_resize_size`` resizes the shorter side and cuts out
    the centre, and without it the picture is stretched. Under ``anyres`` this holds for the frames of videos.
    """
    height, width = size
    side = vision.image_size
    if vision.image_aspect_ratio == "pad":
        height, width = _scaled(height, width, side / max(height, width))
        return Framing(side, height, width, (side - height) // 2, (side - width) // 2)
    if vision.image_resize_size is not None:
        height, width = _scaled(height, width, vision.image_resize_size / min(height, width))
        if min(height, width) >= side:
            return Framing(side, height, width, -((height - side) // 2), -((width - side) // 2))
    return Framing(side, side, side)


def _scaled(height: int, width: int, scale: float) -> tuple[int, int]:
    # Cut, not rounded, as image processors of transformers do; a hair more against 0.999... of a pixel.
    return max(int(height * scale + 1e-6), 1), max(int(width * scale + 1e-6), 1)


def _clamp(value: float) -> float:
    return min(max(value, 0.0), 1.0)
