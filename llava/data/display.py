"""How the frames of a video are shown: upright, not mirrored, with square pixels, all of one size."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_STRETCH = 16
"""A pixel that is said to be so many times as wide as high, or more, is a damaged header."""
_AS_STORED = (1, 0, 0, 1)

Turn = tuple[int, int, int, int]
"""Where a stored pixel at (x, y) is shown: at (a x + c y, b x + d y), each of a, b, c, d being -1, 0 or 1."""


class Display:
    """How one clip is shown.

    Orientation comes with frames, from the container (MP4, MOV, Matroska) or from the stream (H.264 and HEVC, where
    only the first frame of a group may carry it, and it holds on). The shape of pixels is that of the stored picture.

    Attributes:
        size: width and height of a frame as it is shown.
    """

    def __init__(self, first: Any, pixel_ratio: Any) -> None:
        self._stored = (first.width, first.height)
        self._width = first.width
        if pixel_ratio:
            if not 1 / _MOST_STRETCH <= pixel_ratio <= _MOST_STRETCH:
                raise ValueError(f"its pixels are said to be {float(pixel_ratio):g} times as wide as high")
            self._width = max(round(first.width * float(pixel_ratio)), 1)
        self._is_start = True
        self._first_turn = self._turn = read_turn(first) or _AS_STORED
        self.size = (self._width, first.height)
        if self._turn[0] == 0:
            self.size = self.size[::-1]

    @property
    def is_plain(self) -> bool:
        """Whether frames are shown as they are stored."""
        return self._first_turn == _AS_STORED and self._width == self._stored[0]

    @property
    def is_turned(self) -> bool:
        """Whether frames are turned, but neither mirrored nor stretched."""
        a, b, c, d = self._first_turn
        return a * d - b * c == 1 and self._width == self._stored[0]

    def begin(self, place: int) -> None:
        """Say that frames follow from a place of the clip on, where decoding begins."""
        self._turn, self._is_start = self._first_turn, place == 0

    def follow(self, frame: Any, index: int) -> None:
        """Look at a frame, in the order in which they are decoded; a ValueError if it is damaged or of another size."""
        if frame.is_corrupt and not self._is_start:
            raise ValueError(f"frame {index} is damaged: the file was cut off there, or not copied as it was")
        # A recording that begins in the middle begins with pictures that lack what came before.
        self._is_start = self._is_start and frame.is_corrupt
        size = (frame.width, frame.height)
        if size != self._stored:
            raise ValueError(
                f"its picture changes size on the way, from {self._stored[0]} x {self._stored[1]} to {size[0]} x "
                f"{size[1]} at frame {index}; re-encode it to one size"
            )
        self._turn = read_turn(frame) or self._turn
        if (self._turn[0] == 0) != (self._first_turn[0] == 0):
            raise ValueError(f"its picture is turned to its side on the way, at frame {index}; cut it into two clips")

    def show(self, frame: Any) -> NDArray[np.uint8]:
        """The frame that was followed last, as (height, width, 3)."""
        if self._width != self._stored[0]:
            frame = frame.reformat(width=self._width, height=self._stored[1], format="rgb24", interpolation="BICUBIC")
        pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
        a, b, c, d = self._turn
        if a == 0:
            pixels = pixels.swapaxes(0, 1)
        # Rows run along y, columns along x; the sign that is not zero says which way.
        return pixels[:: b + d, :: a + c]


def read_turn(frame: Any) -> Turn | None:
    """How a frame is to be shown, to the nearest quarter turn; None where it does not say."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d = (int(number) for number in np.frombuffer(bytes(data), np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (_sign(a), 0, 0, _sign(d)) if a and d else None
    return 0, _sign(b), _sign(c), 0


def _sign(number: int) -> int:
    return 1 if number >= 0 else -1
