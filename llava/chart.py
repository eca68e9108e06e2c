"""Line charts, as pictures and as SVG: values against words or steps, with a legend, and levels such as chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava.draw import FAINT, INK, PAPER, Colour, blank_page, choose_colour, draw_legend, load_font, side_by_side, stack
from llava.html import Markup, paragraph, tag

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

_WIDTH, _HEIGHT = 760, 420
"""Of the area with the lines."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 24, 14, 52
_LEGEND_WIDTH = 240
_SCALE = 2
"""Lines are drawn so many times larger and made small again, which smooths their edges."""
_GRID: Colour = (228, 226, 220)
_FEWEST_TICKS, _MOST_TICKS = 3, 9
_DASH, _BREAK = 6, 5


@dataclass(frozen=True, slots=True)
class Point:
    """A value, and where given the ends of its interval."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart, whose points come from left to right."""

    name: str
    points: Sequence[Point]


def draw_chart(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    levels: Sequence[tuple[float, str]] = (),
    y_limits: tuple[float, float] = (-math.inf, math.inf),
) -> Image:
    """Draw lines over one axis, with a dot at each point and its interval as a bar through it.

    Args:
        lines: the legend names them in this order, each with its newest value.
        log_x: whether the x axis is logarithmic; all x are above 0 then.
        levels: values to mark by a dashed line across, each with what it is.
        y_limits: the least and the largest value that there can be: the y axis goes no further.

    Raises:
        ValueError: there is no point, or one that is not finite or not above 0 on a logarithmic axis.
    """
    points = [point for line in lines for point in line.points]
    bad = [p for p in points if not (math.isfinite(p.x) and math.isfinite(p.y)) or (log_x and p.x <= 0)]
    if not points or bad:
        raise ValueError(f"a chart needs points with finite values{' above 0' if log_x else ''}, not {bad or 'none'}")
    heights = [v for p in points for v in (p.y, p.low, p.high) if v is not None and math.isfinite(v)]
    across = Axis.around([p.x for p in points], log_x)
    upwards = Axis.around([*heights, *(value for value, _ in levels)], False, y_limits)
    width, height = _LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM
    page, draw = blank_page(width * _SCALE, height * _SCALE)
    area = _Area(draw, across, upwards)
    area.draw_axes(x_label, levels)
    for number, line in enumerate(lines):
        area.draw_line(line, choose_colour(number))
    entries: list[tuple[str, Colour | None]] = [
        (f"{line.name}: {line.points[-1].y:.4g}", choose_colour(number))
        for number, line in enumerate(lines)
        if line.points
    ]
    from PIL.Image import Resampling

    plot = page.resize((width, height), Resampling.LANCZOS)
    heading, on_heading = blank_page(max(width, math.ceil(load_font(20).getlength(title))), 30)
    on_heading.text((0, 0), title, INK, load_font(20))
    unit, on_unit = blank_page(width, 20)
    on_unit.text((0, 0), y_label, FAINT, load_font(14))
    chart = stack([heading, unit, plot], gap=0)
    legend = draw_legend("newest value", entries, _LEGEND_WIDTH)
    return stack([side_by_side([chart, stack([blank_page(1, 56)[0], legend], gap=0)], 12)], margin=20)


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from ``low`` to ``high``, of which ``ticks`` are named."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    @staticmethod
    def around(values: Sequence[float], log: bool, limits: tuple[float, float] = (-math.inf, math.inf)) -> Axis:
        """An axis on which all the values have room, within limits."""
        low, high = min(values), max(values)
        if log:
            # A single value stands in the middle of a range of a factor of four.
            margin = (high / low) ** 0.03 if high > low else 2.0
            low, high = low / margin, high * margin
            return Axis(low, high, True, _log_ticks(low, high))
        margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
        low, high = max(low - margin, limits[0]), min(high + margin, limits[1])
        if low == high:
            low, high = low - 1.0, high + 1.0
        return Axis(low, high, False, _linear_ticks(low, high))

    def share(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Round numbers between two, as many as can be told apart: decades, or 1, 2, 5, or all digits, or closer ones."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5), range(1, 10)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        inside = tuple(tick for tick in ticks if low <= tick <= high)
        if _FEWEST_TICKS <= len(inside) <= _MOST_TICKS:
            return inside
    if len(decades) > _MOST_TICKS:
        return tuple(
            10.0**decade for decade in decades[:: -(-len(decades) // _MOST_TICKS)] if low <= 10.0**decade <= high
        )
    return _linear_ticks(low, high)


def _linear_ticks(low: float, high: float) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten between two numbers, six or so."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return tuple(number * step for number in range(first, math.floor(high / step + 1e-9) + 1))


def short_number(value: float) -> str:
    """A number as an axis names it: 200, 50k, 1M, 2.5M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.6g}{letter}"
    return f"{value:.4g}"


@dataclass(frozen=True, slots=True)
class _Area:
    """The area with the lines, drawn ``_SCALE`` times larger."""

    draw: ImageDraw
    across: Axis
    upwards: Axis

    def _place(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a value on both axes."""
        left = _LEFT + self.across.share(x) * _WIDTH
        top = _TOP + (1 - self.upwards.share(y)) * _HEIGHT
        return left * _SCALE, top * _SCALE

    def draw_axes(self, x_label: str, levels: Sequence[tuple[float, str]]) -> None:
        """The frame, ticks with their numbers, and levels."""
        font, left, right = load_font(14 * _SCALE), _LEFT * _SCALE, (_LEFT + _WIDTH) * _SCALE
        top, bottom = _TOP * _SCALE, (_TOP + _HEIGHT) * _SCALE
        for tick in self.upwards.ticks:
            row = self._place(self.across.low, tick)[1]
            self.draw.line((left, row, right, row), _GRID, _SCALE)
            self.draw.text((left - 8 * _SCALE, row), f"{round(tick, 6):g}", FAINT, font, anchor="rm")
        for tick in self.across.ticks:
            column = self._place(tick, self.upwards.low)[0]
            self.draw.line((column, top, column, bottom), _GRID, _SCALE)
            self.draw.text((column, bottom + 6 * _SCALE), short_number(tick), FAINT, font, anchor="mt")
        self.draw.rectangle((left, top, right, bottom), outline=FAINT, width=_SCALE)
        middle = (left + right) / 2
        self.draw.text((middle, bottom + 28 * _SCALE), x_label, FAINT, font, anchor="mt")
        for value, name in levels:
            row = self._place(self.across.low, value)[1]
            for start in range(left, right, (_DASH + _BREAK) * _SCALE):
                self.draw.line((start, row, min(start + _DASH * _SCALE, right), row), INK, _SCALE)
            # With a stroke of paper it is read over the grid and over lines' ends.
            place = (right - 6 * _SCALE, row - 3 * _SCALE)
            self.draw.text(place, name, INK, font, anchor="rb", stroke_width=2 * _SCALE, stroke_fill=PAPER)

    def draw_line(self, line: Line, colour: Colour) -> None:
        """A line through its points, each a dot."""
        places = [self._place(point.x, point.y) for point in line.points]
        if len(places) > 1:
            self.draw.line(places, colour, 2 * _SCALE, joint="curve")
        for point, (x, y) in zip(line.points, places, strict=True):
            if point.low is not None and point.high is not None:
                ends = (self._place(point.x, point.low)[1], self._place(point.x, point.high)[1])
                self.draw.line((x, ends[0], x, ends[1]), colour, _SCALE)
            dot = 4 * _SCALE
            self.draw.ellipse((x - dot, y - dot, x + dot, y + dot), colour)


# The same as SVG, for pages.

_MOST_POINTS = 400
"""Of a line; of more, the lowest and the highest of each stretch are drawn."""
_MOST_DOTS = 40
"""A line of more points has none of them as a dot."""
_SVG_WIDTH, _SVG_HEIGHT, _SVG_LEFT, _SVG_RIGHT, _SVG_TOP, _SVG_BOTTOM = 480, 270, 58, 12, 10, 42


def draw_svg(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    log_y: bool = False,
    y_limits: tuple[float, float] = (-math.inf, math.inf),
) -> Markup:
    """Lines over one axis as SVG, with a legend; a value that is no number leaves a gap.

    Args:
        log_y: a logarithmic y axis, where all values are above 0.
        y_limits: as for ``draw_chart``.
    """
    points = [p for line in lines for p in line.points if math.isfinite(p.y)]
    if not points:
        return tag("div", tag("h3", title), paragraph("nothing yet", faint=True))
    across = Axis.around([p.x for p in points], False)
    up = Axis.around([p.y for p in points], log_y and min(p.y for p in points) > 0, y_limits)
    right, low = _SVG_WIDTH - _SVG_RIGHT, _SVG_HEIGHT - _SVG_BOTTOM
    drawn = []
    for tick in up.ticks:
        y = f"{low - up.share(tick) * (low - _SVG_TOP):.1f}"
        drawn.append(tag("path", d=f"M{_SVG_LEFT} {y}H{right}", stroke="#e4e2dc"))
        drawn.append(
            tag("text", short_number(tick), x=_SVG_LEFT - 6, y=y, text_anchor="end", dominant_baseline="middle")
        )
    for tick in across.ticks:
        x = f"{_SVG_LEFT + across.share(tick) * (right - _SVG_LEFT):.1f}"
        drawn.append(tag("path", d=f"M{x} {_SVG_TOP}V{low}", stroke="#e4e2dc"))
        drawn.append(tag("text", short_number(tick), x=x, y=low + 16, text_anchor="middle"))
    drawn.append(tag("text", x_label, x=(_SVG_LEFT + right) // 2, y=_SVG_HEIGHT - 6, text_anchor="middle"))
    keys = []
    for number, line in enumerate(lines):
        colour = "#{:02x}{:02x}{:02x}".format(*choose_colour(number))
        places = [
            None
            if not math.isfinite(p.y)
            else (_SVG_LEFT + across.share(p.x) * (right - _SVG_LEFT), low - up.share(p.y) * (low - _SVG_TOP), p)
            for p in _thin(line.points)
        ]
        drawn += _draw_line(places, colour)
        newest = next((f": {_name_value(p.y)}" for p in reversed(line.points) if math.isfinite(p.y)), "")
        keys.append(tag("span", line.name, newest, class_="key", style=f"--colour:{colour}"))
    picture = tag("svg", *drawn, viewBox=f"0 0 {_SVG_WIDTH} {_SVG_HEIGHT}", role="img", aria_label=title)
    return tag("div", tag("h3", title), picture, tag("div", *keys, class_="keys faint"))


def _name_value(value: float) -> str:
    return short_number(value) if abs(value) >= 1e4 else f"{value:.4g}"


def _draw_line(places: Sequence[tuple[float, float, Point] | None], colour: str) -> list[Markup]:
    path, pen_down, dots = "", False, []
    for place in places:
        if place is not None:
            path += f"{'L' if pen_down else 'M'}{place[0]:.1f} {place[1]:.1f}"
            if len(places) <= _MOST_DOTS:
                told = tag("title", f"{place[2].x:g}: {place[2].y:.4g}")
                dots.append(tag("circle", told, cx=f"{place[0]:.1f}", cy=f"{place[1]:.1f}", r=2.5, fill=colour))
        pen_down = place is not None
    return [tag("path", d=path, fill="none", stroke=colour, stroke_width=1.6, stroke_linejoin="round"), *dots]


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most ``_MOST_POINTS`` or so: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    stretch = -(-len(points) // (_MOST_POINTS // 2))
    kept = []
    for start in range(0, len(points), stretch):
        piece = [p for p in points[start : start + stretch] if math.isfinite(p.y)] or [points[start]]
        ends = {piece[0].x: piece[0]} | {p.x: p for p in (min(piece, key=_height), max(piece, key=_height))}
        kept += [ends[x] for x in sorted(ends)]
    return kept


def _height(point: Point) -> float:
    return point.y
