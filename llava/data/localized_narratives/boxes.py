"""From where a pointer was to a box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llava.coordinates import Box
from llava.data.localized_narratives.rows import Point

_MOST_DECIMALS = 6


@dataclass(frozen=True)
class BoxSettings:
    """How a box is formed of the points of a trace; each is a flag of the command, ``docs`` argue the defaults.

    Attributes:
        padding: seconds before and after an utterance whose points still count.
        quantile: share of the points that may lie beyond each edge of the box.
        min_points: fewer points than these make no box.
        min_size: least width and height of a box, as fractions of the image's.
        decimals: digits behind the point to which the edges are rounded.
    """

    padding: float = 0.25
    quantile: float = 0.05
    min_points: int = 1
    min_size: float = 0.05
    decimals: int = 3

    def __post_init__(self) -> None:
        _check("padding", self.padding, 0.0, 10.0)
        _check("quantile", self.quantile, 0.0, 0.4)
        _check("min_points", self.min_points, 1, 1000)
        _check("decimals", self.decimals, 1, _MOST_DECIMALS)
        # Below the last digit a box could be rounded to a line.
        _check("min_size", self.min_size, 10.0**-self.decimals, 1.0)


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"--{name} is {value:g}; it must be {least:g} to {most:g}")


def form_box(points: Sequence[Point], settings: BoxSettings) -> Box | None:
    """The box that holds most of the points; None if there are too few.

    Points outside of the image are dropped. On either axis the edges are the quantiles ``quantile`` and
    1 - ``quantile`` of the rest. A box that is smaller than ``min_size`` grows around its middle, and moves into
    the image where it would reach out of it.
    """
    inside = [point for point in points if 0 <= point.x <= 1 and 0 <= point.y <= 1]
    if len(inside) < settings.min_points:
        return None
    x1, x2 = _find_edges([point.x for point in inside], settings)
    y1, y2 = _find_edges([point.y for point in inside], settings)
    return Box(x1, y1, x2, y2)


def _find_edges(positions: Sequence[float], settings: BoxSettings) -> tuple[float, float]:
    ordered = sorted(positions)
    low, high = compute_quantile(ordered, settings.quantile), compute_quantile(ordered, 1 - settings.quantile)
    if high - low < settings.min_size:
        low = min(max((low + high - settings.min_size) / 2, 0.0), 1 - settings.min_size)
        high = low + settings.min_size
    return round(low, settings.decimals), round(high, settings.decimals)


def compute_quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile of ordered numbers, interpolated linearly (numpy's default, type 7 of Hyndman and Fan)."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
