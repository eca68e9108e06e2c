"""Numbers of words as flags spell them, and the milestones of BabyLM's tracks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_NUMBER = re.compile(r"(\d[\d_]*(?:\.\d+)?)([kKmMgGbB]?)")
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
_MILLION = 10**6

TRACKS = {
    "strict_small": [n * _MILLION for n in (*range(1, 10), *range(10, 101, 10))],
    "strict": [n * _MILLION for n in (*range(1, 10), *range(10, 100, 10), *range(100, 1001, 100))],
}
"""The words of each track's milestones."""


def parse_words(text: str, flag: str) -> int:
    """A number of words: 10M, 2.5M, 200k, 1_000_000.

    Raises:
        ValueError: it is none; names the flag.
    """
    match = _NUMBER.fullmatch(text.strip())
    # Exact: 1.1M as a float times a million is a little less.
    whole, _, fraction = match[1].replace("_", "").partition(".") if match else ("0", "", "")
    factor = _FACTORS[match[2].lower()] if match else 1
    number, rest = divmod(int(whole + fraction) * factor, 10 ** len(fraction))
    if not match or rest or number < 1:
        raise ValueError(f"{flag} is {text!r}; expected a number of words, such as 10M, 200k or 1_000_000")
    return number


def parse_milestones(text: str) -> list[int]:
    """The words of milestones, ascending: those of a track, or of a list such as 1M,2M,500k; none of ``none``.

    Raises:
        ValueError: it is neither.
    """
    if text == "none":
        return []
    if text in TRACKS:
        return TRACKS[text]
    try:
        # A set: 1M and 1000k are one milestone.
        numbers = {parse_words(item, "--milestones") for item in text.split(",")}
    except ValueError as error:
        known = ", ".join(TRACKS)
        raise ValueError(f"{error}; or one of {known}, or several numbers with commas between, or none") from None
    return sorted(numbers)


def describe_words(number: int) -> str:
    """A number of words as short as it can be said exactly: 1M, 500k, 1234."""
    for suffix in ("M", "k"):
        if number % _FACTORS[suffix.lower()] == 0:
            return f"{number // _FACTORS[suffix.lower()]}{suffix}"
    return str(number)


def milestone_name(number: int) -> str:
    """The name of the folder of a milestone, and of its revision on the hub."""
    return f"chck_{describe_words(number)}"


@dataclass(frozen=True)
class Milestone:
    """A model that a run left on its way.

    Attributes:
        name: of its folder, such as ``chck_10M``.
        folder: complete; ``load_model`` reads it.
        step: behind which it was written.
        words: that the run has trained on by then, over all ranks: the milestone's number or a few more.
        number: of words that the milestone stands for.
    """

    name: str
    folder: Path
    step: int
    words: int
    number: int
