"""The blind check: items shown with others' pictures. A model that scores as well then does not look at them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llava.eval.choices import Choice
from llava.eval.metrics import find_interval, resample_means
from llava.types import Media

T = TypeVar("T")
_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class BlindCheck:
    """How much a score falls when each item is shown with another one's picture.

    Attributes:
        score: with its own; the mean over items, times 100.
        other_score: with another one's.
        drop: the difference, of the same items.
        low, high: its interval at 95 %, by drawing items anew.
        is_blind: whether the score does not fall: the interval reaches down to 0.
    """

    score: float
    other_score: float
    drop: float
    low: float
    high: float
    is_blind: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self, name: str) -> str:
        """A line for people."""
        what = (
            f"{name}: {self.score:.1f} with its own pictures or clips, {self.other_score:.1f} with other items' (falls "
            f"by {self.drop:.1f}, 95 % interval {self.low:.1f} to {self.high:.1f})"
        )
        return f"{what}: BLIND, the score is not seen to fall with what others are shown" if self.is_blind else what


def swap(shown: Sequence[T], key: Callable[[T], object], seed: int) -> list[T] | None:
    """What each item is shown in place of its own: that of another item, never the same; a seeded choice.

    Where none is shown for more than half of the items, each is given away once; else some are given several times.

    Args:
        shown: of each item.
        key: tells whether two are the same.

    Returns:
        One for each item; None where all are shown the same.
    """
    groups: dict[object, list[int]] = {}
    for index, one in enumerate(shown):
        groups.setdefault(key(one), []).append(index)
    if len(groups) < 2:
        return None
    names = list(groups)
    generator = random.Random(seed)
    # By lot: neighbours in a file may be alike.
    generator.shuffle(names)
    order = [index for name in names for index in generator.sample(groups[name], len(groups[name]))]
    # In this order items with the same stand together: a step as long as the largest such group leads away from it.
    step = max(map(len, groups.values()))
    swapped: list[T] = list(shown)
    # Then a step never comes round to the same picture again.
    if 2 * step <= len(order):
        for place, index in enumerate(order):
            swapped[index] = shown[order[(place + step) % len(order)]]
        return swapped
    for name in names:
        others = [index for other in names if other != name for index in groups[other]]
        for index in groups[name]:
            swapped[index] = shown[generator.choice(others)]
    return swapped


def swap_media(choices: Sequence[Choice], seed: int) -> list[Choice] | None:
    """Choices with the media of others; None where there are no others."""
    shown = swap([choice.media for choice in choices], media_key, seed)
    return None if shown is None else [replace(c, media=m) for c, m in zip(choices, shown, strict=True)]


def media_key(media: tuple[Media, ...]) -> object:
    """What tells whether two samples are shown the same."""
    return tuple((one.path, one.frames) for one in media)


def check_blindness(own: NDArray[np.float64], other: NDArray[np.float64], seed: int = 0) -> BlindCheck:
    """Compare the scores of items, float64 (items,), with their own pictures and with others'."""
    differences = own - other
    generator = np.random.default_rng(seed)
    low, high = find_interval(resample_means(differences, generator, _NUM_RESAMPLES))
    return BlindCheck(
        # Not 0 itself: means of equal numbers differ in their last bits.
        float(own.mean()),
        float(other.mean()),
        float(differences.mean()),
        low,
        high,
        is_blind=low <= 1e-12,
    )
