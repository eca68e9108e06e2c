"""Line charts: round numbers at the axes, and lines where their values are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llava.chart import Line, Point, _linear_ticks, _log_ticks, draw_chart, short_number
from llava.draw import choose_colour


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.9e6, 1.1e8, ["1M", "10M", "100M"]),
        (0.9e6, 1.2e7, ["1M", "2M", "5M", "10M"]),
        (0.9e6, 5e6, ["1M", "2M", "5M"]),
        (9.39e5, 9.81e5, ["940k", "950k", "960k", "970k", "980k"]),
        (1, 2e12, ["1", "100", "10k", "1M", "100M", "10G", "1000G"]),
    ],
)
def test_ticks_of_a_logarithmic_axis(low: float, high: float, ticks: list[str]) -> None:
    assert [short_number(tick) for tick in _log_ticks(low, high)] == ticks


def test_ticks_of_a_linear_axis() -> None:
    assert _linear_ticks(48.2, 75.4) == (50, 55, 60, 65, 70, 75)
    assert np.allclose(_linear_ticks(-0.13, 0.12), [-0.1, -0.05, 0, 0.05, 0.1])


def test_a_line_goes_through_its_points() -> None:
    points = [Point(1e6, 50.0, 45.0, 55.0), Point(1e7, 60.0), Point(1e8, 70.0)]
    picture = np.asarray(draw_chart([Line("blimp", points)], "t", "words", "%", log_x=True, levels=[(50, "chance")]))
    colour = np.abs(picture.astype(int) - choose_colour(0)).sum(2) < 60
    plot = colour[:, :850]  # The legend has the colour too.
    columns = np.flatnonzero(plot.any(0))
    middle = (columns[0] + columns[-1]) // 2
    rows = [np.flatnonzero(plot[:, column]).mean() for column in (columns[0] + 4, middle, columns[-1] - 4)]
    # On a logarithmic axis these three points are a straight line, upwards to the right.
    assert rows[0] > rows[1] > rows[2]
    assert rows[1] == pytest.approx((rows[0] + rows[2]) / 2, abs=3)


@pytest.mark.parametrize("point", [Point(0, 1), Point(1, math.nan), None])
def test_what_cannot_be_drawn_is_an_error(point: Point | None) -> None:
    with pytest.raises(ValueError, match="a chart needs points"):
        draw_chart([Line("blimp", [point] if point else [])], "t", "words", "%", log_x=True)
