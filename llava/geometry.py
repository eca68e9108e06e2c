"""Where things lie in pictures and in time: boxes and spans, the tower's square, and the tiles of anyres.

A coordinate is a fraction, in [0, 1] of the picture's width or height or of the clip's length. Sizes are
(height, width); boxes are (x1, y1, x2, y2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


class Box(NamedTuple):
    """A box in a picture, each number in [0, 1]: (x1, y1) is its upper left corner, (x2, y2) its lower right."""

    x1: float
    y1: float
    x2: float
    y2: float


class TimeSpan(NamedTuple):
    """A stretch of a video, from start to end, each in [0, 1] of its length."""

    start: float
    end: float


def box_ious(boxes: ArrayLike, others: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of boxes and others, pair by pair.

    Args:
        boxes, others: (..., 4), each x1, y1, x2, y2, in one unit of any kind; they broadcast.

    Returns:
        (...), in [0, 1]. A reversed box (x1 > x2 or y1 > y2) holds nothing, and two boxes without any area
        have 0, even where they are equal.
    """
    import numpy as np

    def areas(upper_left: NDArray[np.float64], lower_right: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.prod(np.maximum(lower_right - upper_left, 0.0), axis=-1)

    boxes, others = np.asarray(boxes, dtype=np.float64), np.asarray(others, dtype=np.float64)  # (..., 4)
    shared = areas(np.maximum(boxes[..., :2], others[..., :2]), np.minimum(boxes[..., 2:], others[..., 2:]))
    union = areas(boxes[..., :2], boxes[..., 2:]) + areas(others[..., :2], others[..., 2:]) - shared
    ious = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return np.minimum(ious, 1.0)  # Of boxes that are equal but for rounding it may come out a hair above.


def box_iou(box: Box, other: Box) -> float:
    """Intersection over union of two boxes; see ``box_ious``."""
    return float(box_ious(box, other))


def span_iou(span: TimeSpan, other: TimeSpan) -> float:
    """Intersection over union of two stretches of time, in [0, 1].

    A reversed span (start > end) holds nothing, and two spans without any length have 0, even where they are equal.
    """
    # From the later start to the earlier end, if that is a stretch at all.
    shared = max(min(span.end, other.end) - max(span.start, other.start), 0.0)
    union = max(span.end - span.start, 0.0) + max(other.end - other.start, 0.0) - shared
    return min(shared / union, 1.0) if union > 0 else 0.0


SPAN_TOLERANCE = 1e-9
"""A frame at the edge of a span is in it, however the two were rounded."""


@dataclass(frozen=True)
class Tube:
    """A box that moves over a stretch of a video.

    Attributes:
        span: in [0, 1] of the clip.
        boxes: one or more, evenly spaced in time from the span's start to its end; between two of them the box is
            interpolated linearly. A single one stays all the time.
    """

    span: TimeSpan
    boxes: tuple[Box, ...]

    def __post_init__(self) -> None:
        if not self.boxes:
            raise ValueError(f"the tube over {tuple(self.span)} has no box; it needs one or more")

    def box_at(self, time: float) -> Box | None:
        """The box at a time in [0, 1] of the clip; None outside of the span."""
        if not self.span.start - SPAN_TOLERANCE <= time <= self.span.end + SPAN_TOLERANCE:
            return None
        return Box(*self.boxes_at([time])[0].tolist())

    def boxes_at(self, times: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
        """(len(times), 4): the boxes at times; before the span the first of them, after it the last."""
        import numpy as np

        corners = np.array(self.boxes)  # (boxes, 4)
        if self.span.start >= self.span.end:  # No time passes, in which it could move.
            return np.repeat(corners[:1], len(times), axis=0)
        known = np.linspace(self.span.start, self.span.end, len(corners))  # (boxes,)
        return np.stack([np.interp(times, known, column) for column in corners.T], axis=-1)


# The square that the tower sees.


@dataclass(frozen=True)
class Letterbox:
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

    @classmethod
    def fit(cls, size: tuple[int, int], side: int, *, pad: bool = False, resize: int | None = None) -> Letterbox:
        """Fit a picture to a square.

        Args:
            size: of the picture.
            side: of the square.
            pad: keeps all of the picture in the middle.
            resize: otherwise, length of its shorter side, before the centre is cut out; None stretches it.
        """
        height, width = size
        if pad:  # The longer side fills the square; above and below, or left and right, the same padding.
            height, width = _scaled(height, width, side / max(height, width))
            return cls(side, height, width, (side - height) // 2, (side - width) // 2)
        if resize is not None:
            height, width = _scaled(height, width, resize / min(height, width))
            if min(height, width) >= side:  # Else there is no whole square to cut out: it is stretched after all.
                return cls(side, height, width, -((height - side) // 2), -((width - side) // 2))
        return cls(side, side, side)

    def to_square(self, x: float, y: float) -> tuple[float, float]:
        """From a point of the picture to one of the square, both in [0, 1]; what was cut off goes to the edge."""
        return _clamp((self.left + x * self.width) / self.side), _clamp((self.top + y * self.height) / self.side)

    def from_square(self, x: float, y: float) -> tuple[float, float]:
        """From a point of the square to one of the picture; what lies in the padding goes to the edge."""
        return _clamp((x * self.side - self.left) / self.width), _clamp((y * self.side - self.top) / self.height)


def _scaled(height: int, width: int, scale: float) -> tuple[int, int]:
    # Cut, not rounded, as image processors of transformers do; a hair more against 0.999... of a pixel.
    return max(int(height * scale + 1e-6), 1), max(int(width * scale + 1e-6), 1)


def _clamp(value: float) -> float:
    return min(max(value, 0.0), 1.0)


# Anyres: how a picture of any size is cut into tiles, and how the tiles' features are put together.

ASPECT_RATIOS = ("square", "pad")
"""Ways to fit an image into a single square."""
ANYRES = "anyres"
FLAT = "flat"
SPATIAL_UNPAD = "spatial_unpad"
PATCH_MERGE_TYPES = (FLAT, SPATIAL_UNPAD)
DEFAULT_PINPOINTS = "(1x2),(2x1),(2x2),(3x1),(1x3)"

_PAIR = re.compile(r"[(\[]\s*(\d+)\s*([x,])\s*(\d+)\s*[)\]]")
_MOST_PINPOINTS = 1000
_LONGEST_PINPOINTS = 100_000
_ASPECT_RATIO = re.compile(rf"{ANYRES}(?:_max_([1-9]\d*))?")
_SHRINK_FROM = 1.1
"""LLaVA-OneVision shrinks a grid whose sides are more than this times too long; see ``AnyRes.without_excess``."""


class Size(NamedTuple):
    """Height and width, in the unit that its owner names."""

    height: int
    width: int

    @property
    def area(self) -> int:
        return self.height * self.width


class Window(NamedTuple):
    """A rectangle of a grid: its first row and column, and its size."""

    top: int
    left: int
    size: Size


def parse_aspect_ratio(aspect_ratio: str) -> tuple[bool, int | None]:
    """Whether ``--image_aspect_ratio`` asks for tiles, and the N of ``anyres_max_N`` (None without)."""
    match = _ASPECT_RATIO.fullmatch(aspect_ratio)
    return match is not None, int(match[1]) if match and match[1] else None


@cache
def parse_pinpoints(text: str, side: int) -> tuple[Size, ...]:
    """Read ``--image_grid_pinpoints``: the canvases that a picture may be laid on, in tiles.

    Args:
        text: each canvas as (width x height): ``(1x2),(2x1)`` in tiles, ``(1x1),...,(6x6)`` for all
            between two corners, or ``[[224, 448], [448, 224]]`` in pixels.
        side: pixels of a tile.

    Raises:
        ValueError: another form, an empty canvas, or pixels that are no multiple of ``side``.
    """
    if len(text) > _LONGEST_PINPOINTS:
        raise ValueError(
            f"--image_grid_pinpoints has {len(text):,} characters; at most {_MOST_PINPOINTS:,} canvases are tried"
        )
    # What is left of the text when each pair is a #: a list "#,#" or a range "#,...,#".
    shape = _PAIR.sub("#", re.sub(r"\s", "", text)).strip("[]()")
    pairs = [(int(width), int(height), unit) for width, unit, height in _PAIR.findall(text)]
    if re.fullmatch(r"#,\.\.\.,#", shape) and pairs[0][2] == pairs[1][2] == "x":
        # As LLaVA-NeXT counts them: the number of rows changes fastest, and of equal canvases the first is taken.
        (first, low, _), (last, high, _) = pairs
        _check_pinpoints(max(last + 1 - first, 0) * max(high + 1 - low, 0))
        grids = [Size(rows, columns) for columns in range(first, last + 1) for rows in range(low, high + 1)]
    elif re.fullmatch(r"#(,#)*,?", shape):
        _check_pinpoints(len(pairs))
        uneven = [(width, height) for width, height, unit in pairs if unit == "," and (width % side or height % side)]
        if uneven:
            raise ValueError(
                f"--image_grid_pinpoints has {uneven[0]} pixels, but a tile is {side} x {side}; "
                "give multiples of that, or numbers of tiles such as (1x2),(2x1)"
            )
        grids = [Size(h, w) if unit == "x" else Size(h // side, w // side) for w, h, unit in pairs]
    else:
        grids = []
    if not grids or not all(grid.area for grid in grids):
        raise ValueError(
            f"--image_grid_pinpoints is {text!r}; expected (width x height) in tiles such as {DEFAULT_PINPOINTS}, "
            "a range such as (1x1),...,(6x6), or pixels such as [[224, 448], [448, 224]]"
        )
    return tuple(grids)


def _check_pinpoints(number: int) -> None:
    if number > _MOST_PINPOINTS:
        raise ValueError(
            f"--image_grid_pinpoints stands for {number:.3g} canvases, of which each image would try every one; give "
            f"at most {_MOST_PINPOINTS:,}"
        )


def fit_into(picture: tuple[int, int], canvas: tuple[int, int], round_up: bool = False) -> Size:
    """The largest size of a picture's aspect ratio that a canvas holds, at least one each way.

    Args:
        picture, canvas: sizes in any one unit each.
        round_up: whether the side that does not fill the canvas is rounded up; else it is cut.
    """

    def divide(dividend: int, divisor: int) -> int:  # In whole numbers: a rounded ratio could be off by one.
        return max(-(-dividend // divisor) if round_up else dividend // divisor, 1)

    (height, width), (rows, columns) = picture, canvas
    if columns * height <= rows * width:
        return Size(divide(height * columns, width), columns)
    return Size(rows, divide(width * rows, height))


@dataclass(frozen=True)
class AnyRes:
    """The geometry of anyres images for one model.

    Attributes:
        side: pixels of a tile, which is the square that the tower sees.
        patches_per_side: side of one view's grid of features.
        view_tokens: features of one view.
        grids: canvases to choose from, in tiles.
        merge_type: ``flat`` (all features of all views, one after another) or ``spatial_unpad``
            (the whole picture's features, then one grid of all tiles without its padding, a newline
            behind each row).
        max_tiles: with ``spatial_unpad``, about how many tiles' worth of features the grid may keep; a
            larger one is shrunk. None sets no limit.
    """

    side: int
    patches_per_side: int
    view_tokens: int
    grids: tuple[Size, ...]
    merge_type: str = FLAT
    max_tiles: int | None = None

    def choose_grid(self, picture: tuple[int, int]) -> Size:
        """The canvas, in tiles, that keeps most of a picture's pixels and, of those, wastes least of itself."""
        # As transformers' select_best_resolution, which LLaVA-NeXT uses.
        original = Size(*picture).area

        def rank(grid: Size) -> tuple[int, int]:
            kept = min(fit_into(picture, self.canvas(grid)).area, original)  # Enlarging adds no detail.
            return -kept, self.canvas(grid).area - kept

        return min(self.grids, key=rank)

    def canvas(self, grid: Size) -> Size:
        """A canvas in pixels."""
        return Size(grid.height * self.side, grid.width * self.side)

    def place(self, picture: tuple[int, int]) -> tuple[Size, Size]:
        """A picture's canvas in tiles, and the pixels that the picture is resized to, for the middle of it."""
        grid = self.choose_grid(picture)
        return grid, fit_into(picture, self.canvas(grid), round_up=True)

    def num_views(self, picture: tuple[int, int]) -> int:
        """Views of a picture: the whole of it and its tiles."""
        return 1 + self.choose_grid(picture).area

    def patches_without_padding(self, picture: tuple[int, int]) -> Window:
        """The part of the tiles' common grid of patches that shows the picture.

        Padding is cut on both sides alike, so that an odd row or column of it stays.
        """
        # As LLaVA-NeXT's unpad_image, but that a picture thinner than a patch keeps one row or column.
        whole = self._whole(self.choose_grid(picture))
        shown = fit_into(picture, whole)
        top, left = (whole.height - shown.height) // 2, (whole.width - shown.width) // 2
        return Window(top, left, Size(whole.height - 2 * top, whole.width - 2 * left))

    def without_excess(self, patches: Size) -> Size:
        """The size that a grid of patches is resized to where ``max_tiles`` asks for it, else its own."""
        if self.max_tiles is None:
            return patches
        # Of all sides alike, so that the picture keeps its shape.
        ratio = math.sqrt(patches.area / (self.max_tiles * self.patches_per_side**2))
        if ratio <= _SHRINK_FROM:
            return patches
        return Size(max(int(patches.height // ratio), 1), max(int(patches.width // ratio), 1))

    def num_tokens(self, picture: tuple[int, int]) -> int:
        """Features of a picture, those of all its views and the newlines."""
        if self.merge_type == FLAT:
            return self.num_views(picture) * self.view_tokens
        return self._count_merged(self.patches_without_padding(picture).size)

    @property
    def most_views(self) -> int:
        """Views of the picture that has most of them."""
        return 1 + max(grid.area for grid in self.grids)

    @property
    def most_tokens(self) -> int:
        """What no picture has more features than."""
        if self.merge_type == FLAT:
            return self.most_views * self.view_tokens
        # Not of full canvases alone: one that is just small enough not to be shrunk can have more.
        return max(self._count_merged(patches) for grid in self.grids for patches in _cuts(self._whole(grid)))

    def _whole(self, grid: Size) -> Size:
        return Size(grid.height * self.patches_per_side, grid.width * self.patches_per_side)

    def _count_merged(self, patches: Size) -> int:
        rows, columns = self.without_excess(patches)
        return self.view_tokens + rows * (columns + 1)  # A newline ends each row.


def _cuts(whole: Size) -> Iterator[Size]:
    """Every size that a grid can have when its padding is cut off."""
    yield from (Size(rows, whole.width) for rows in range(whole.height, 0, -2))
    yield from (Size(whole.height, columns) for columns in range(whole.width, 0, -2))
