"""When the frames of a video are shown, in seconds, and which of them lie nearest to given times."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

_RESTART_SECONDS = 1.0
"""A time that is so much before the latest one begins another clip, which was joined to the one before it."""
_SAME_RATE, _ROUNDING = 0.01, 0.0011


def seconds_of(times: Sequence[int | None], unit: float, rate: float) -> list[float]:
    """Seconds of each frame from the first one, ascending.

    Frames without a time, or with one that was there already, lie evenly between their neighbours.

    Args:
        times: of frames in the order in which they are shown.
        unit: seconds that a time counts.
        rate: frames a second, for the frames before the first known time and behind the last; 0 where it is not known.
    """
    known = [time for time in times if time is not None]
    if len(known) == len(times) and all(a < b for a, b in pairwise(known)):
        return [float((time - known[0]) * unit) for time in known]
    gaps = np.diff(known)
    step = 1 / rate if rate else float(np.median(gaps[gaps > 0])) * unit if (gaps > 0).any() else 1.0
    places: list[int] = []
    seconds: list[float] = []
    shift = 0.0
    for place, time in enumerate(times):
        if time is None:
            continue
        second = time * unit + shift
        if seconds and second <= seconds[-1]:
            if seconds[-1] - second < _RESTART_SECONDS:
                continue
            shift += seconds[-1] + step * (place - places[-1]) - second
            second = time * unit + shift
        places.append(place)
        seconds.append(second)
    if not places:
        return [step * i for i in range(len(times))]
    before = [seconds[0] - step * (places[0] - i) for i in range(places[0])]
    after = [seconds[-1] + step * (i - places[-1]) for i in range(places[-1] + 1, len(times))]
    between = np.interp(range(places[0], places[-1] + 1), places, seconds).tolist()
    first, *others = [*before, *between, *after]
    return [0.0, *(second - first for second in others)]


def frame_rate(times: Sequence[float], declared: float) -> float:
    """Frames a second on average: what the container declares where the frames' times agree with it."""
    if len(times) < 2 or times[-1] <= times[0]:
        return declared or 1.0
    gaps, seconds = len(times) - 1, times[-1] - times[0]
    # Matroska rounds times to milliseconds.
    if declared and abs(gaps / declared - seconds) <= max(_SAME_RATE * seconds, _ROUNDING):
        return declared
    return gaps / seconds


def is_constant(times: Sequence[float]) -> bool:
    """Whether frames lie so evenly that counting them and looking at their times give the same frames."""
    if len(times) < 3:
        return True
    even = np.linspace(times[0], times[-1], len(times))
    step = (times[-1] - times[0]) / (len(times) - 1)
    return bool(np.abs(np.asarray(times) - even).max() <= step / 2)


def last_frame_seconds(times: Sequence[float], rate: float) -> float:
    """How long the last frame is shown: as an average one, or as the one before it where the frame rate varies."""
    return 1 / rate if is_constant(times) else times[-1] - times[-2]


def nearest(times: Sequence[float], wanted: Sequence[float]) -> list[int]:
    """For each wanted time the position of the nearest one; of two that are as near, the earlier."""
    known = np.asarray(times)
    after = np.searchsorted(known, wanted).clip(0, len(known) - 1)
    before = (after - 1).clip(0)
    is_before = np.asarray(wanted) - known[before] <= known[after] - np.asarray(wanted)
    return np.where(is_before, before, after).tolist()  # type: ignore[no-any-return]
