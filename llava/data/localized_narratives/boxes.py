"""A Narrative -> its utterances, each with its box in the image and its place in the caption, and samples of these."""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from operator import attrgetter
from typing import Any, TypeVar

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.localized_narratives.rows import Finding, Narrative, Point, Utterance
from llava.geometry import Box
from llava.grounding.syntax import box_text
from llava.types import Coordinates

T = TypeVar("T")


def _flag(default: T, about: str) -> T:
    return field(default=default, metadata={"help": about})


@dataclass(frozen=True)
class BoxSettings:
    """How a box is formed of the points of a trace; each is a flag of the command, ``docs`` argue the defaults."""

    padding: float = _flag(0.25, "seconds before and after an utterance in which points of the trace still count")
    quantile: float = _flag(0.05, "share of the points that may lie beyond each edge of a box")
    min_points: int = _flag(1, "fewest points in the image that make a box")
    min_size: float = _flag(0.05, "least width and height of a box, as a fraction of the image's")
    decimals: int = _flag(3, "digits behind the point of a box's edges")

    def __post_init__(self) -> None:
        _check("padding", self.padding, 0.0, 10.0)
        _check("quantile", self.quantile, 0.0, 0.4)
        _check("min_points", self.min_points, 1, 1000)
        _check("decimals", self.decimals, 1, 6)
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
    """The two edges of a box on one axis."""
    ordered = sorted(positions)
    # Not minimum and maximum: a pointer on its way to the next thing leaves what is spoken of.
    low, high = compute_quantile(ordered, settings.quantile), compute_quantile(ordered, 1 - settings.quantile)
    if high - low < settings.min_size:
        # Around the middle, but within the image.
        low = min(max((low + high - settings.min_size) / 2, 0.0), 1 - settings.min_size)
        high = low + settings.min_size
    return round(low, settings.decimals), round(high, settings.decimals)


def compute_quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile of ordered numbers, interpolated linearly (numpy's default, type 7 of Hyndman and Fan).

    Not numpy's own, whose rounding differs between releases: the same rows are to give the same bytes.
    """
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


# Where in a caption the utterances stand of which it was written down.

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_APOSTROPHE = re.compile("['’]")

LEAST_LIKENESS = 0.5
"""Share of the letters of two words, in order, that must be the same ones for a misspelling of each other."""


def find_ends(caption: str, utterances: Sequence[str]) -> list[int | None]:
    """How many characters of the caption lead up to the end of each utterance; None for one that is not in it.

    Words are compared without case, punctuation and apostrophes, and all utterances are aligned with the caption
    at once, so that a word which returns is found where it was said. Between words that agree, two that are spelt
    alike (``LEAST_LIKENESS``) stand for each other; others are aligned with nothing.

    An utterance ends behind the last of its words that is aligned, and behind the punctuation that the caption has
    there if the utterance has it, too. Ends of later utterances are further on.
    """
    written = list(_WORD.finditer(caption))
    spoken = [(owner, word) for owner, utterance in enumerate(utterances) for word in _WORD.finditer(utterance)]
    ends: list[int | None] = [None] * len(utterances)
    owners = [owner for owner, _ in spoken]
    # Pairs come in order, so the last aligned word of an utterance is what remains as its end.
    for i, j in _align([_fold(word) for _, word in spoken], [_fold(word) for word in written]):
        owner, word = spoken[i]
        is_last = i + 1 == len(spoken) or owners[i + 1] != owner
        behind = utterances[owner][word.end() :].strip() if is_last else ""
        end = written[j].end()
        ends[owner] = end + len(os.path.commonprefix([caption[end:], behind]))  # noqa: RUF071 (characters are meant)
    return ends


def _align(spoken: Sequence[str], written: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of words, by their numbers, that stand for each other, in order."""
    for kind, i, i_end, j, j_end in SequenceMatcher(None, spoken, written, autojunk=False).get_opcodes():
        if kind == "equal":
            yield from zip(range(i, i_end), range(j, j_end), strict=True)
        elif kind == "replace":
            for behind_i, behind_j in _pair_alike(spoken[i:i_end], written[j:j_end]):
                yield i + behind_i, j + behind_j


def _pair_alike(spoken: Sequence[str], written: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of words that are spelt alike, in order, with the largest sum of likenesses."""
    likeness = [[_compare(a, b) for b in written] for a in spoken]  # (spoken, written)
    # best[i][j]: the largest sum of likenesses that the words from i on, and from j on, can have (an edit distance).
    best = [[0.0] * (len(written) + 1) for _ in range(len(spoken) + 1)]
    for i in reversed(range(len(spoken))):
        for j in reversed(range(len(written))):
            best[i][j] = max(best[i + 1][j], best[i][j + 1], best[i + 1][j + 1] + likeness[i][j])
    i = j = 0
    while best[i][j]:  # Walk the table again: where a step aside loses nothing, the word stands for none.
        if best[i][j] == best[i + 1][j]:
            i += 1
        elif best[i][j] == best[i][j + 1]:
            j += 1
        else:
            yield i, j
            i, j = i + 1, j + 1


def _compare(first: str, second: str) -> float:
    """The share of letters that two words have in common, 0 if it is too small to mean anything."""
    likeness = SequenceMatcher(None, first, second, autojunk=False).ratio()
    return likeness if likeness >= LEAST_LIKENESS else 0.0


def _fold(word: re.Match[str]) -> str:
    return _APOSTROPHE.sub("", word.group()).casefold()


# A narrative's utterances, each with the box of its place in the image and its place in the caption.

NOT_IN_CAPTION = "utterances that were not found in the caption"
WITHOUT_TIME = "utterances without a start_time and an end_time behind it"
WITHOUT_POINTS = "utterances without enough points of the trace in the image"

_ENDS_A_PHRASE = (".", ",", ";", ":", "!", "?")


@dataclass(frozen=True)
class GroundedUtterance:
    """What was said, and what shows where.

    Attributes:
        text: of the utterance.
        end: how many characters of the caption lead up to its end.
        points: of the trace while it was said.
        box: in the image; None if it has none, and then ``lacks`` says why.
        lacks: one of the reasons above, or "".
    """

    text: str
    end: int = 0
    points: tuple[Point, ...] = ()
    box: Box | None = None
    lacks: str = ""


def ground_utterances(narrative: Narrative, settings: BoxSettings, words_per_box: int = 1) -> list[GroundedUtterance]:
    """The utterances of a narrative, or groups of so many words, in order, each with its box and its place."""
    utterances = list(group_utterances(narrative.utterances, words_per_box))
    ends = find_ends(narrative.caption, [utterance.text for utterance in utterances])
    return [
        _ground(utterance, end, narrative.points, settings) for utterance, end in zip(utterances, ends, strict=True)
    ]


def group_utterances(utterances: Sequence[Utterance], words_per_box: int) -> Iterator[Utterance]:
    """Join utterances to the next one until they have so many words together, or a phrase ends with punctuation."""
    group: list[Utterance] = []
    for utterance in utterances:
        group.append(utterance)
        num_words = sum(len(part.text.split()) for part in group)
        if num_words >= words_per_box or utterance.text.endswith(_ENDS_A_PHRASE):
            yield _join(group)
            group = []
    if group:
        yield _join(group)


def _join(group: Sequence[Utterance]) -> Utterance:
    # From the first start to the last end; a part without a time does not spoil those that have one.
    intervals = [part.interval for part in group if part.interval is not None]
    interval = (min(start for start, _ in intervals), max(end for _, end in intervals)) if intervals else None
    return Utterance(" ".join(part.text for part in group), interval)


def _ground(utterance: Utterance, end: int | None, points: Sequence[Point], settings: BoxSettings) -> GroundedUtterance:
    if end is None:
        return GroundedUtterance(utterance.text, lacks=NOT_IN_CAPTION)
    if utterance.interval is None:
        return GroundedUtterance(utterance.text, end, lacks=WITHOUT_TIME)
    # The points are in order of time.
    first = bisect_left(points, utterance.interval[0] - settings.padding, key=attrgetter("t"))
    last = bisect_right(points, utterance.interval[1] + settings.padding, key=attrgetter("t"))
    # People point a little before they speak and go on behind it: hence the padding.
    taken = tuple(points[first:last])
    box = form_box(taken, settings)
    return GroundedUtterance(utterance.text, end, taken, box, lacks=WITHOUT_POINTS if box is None else "")


def find_ungrounded(utterances: Sequence[GroundedUtterance]) -> Iterator[Finding]:
    """A finding for each reason why utterances got no box."""
    for reason in (NOT_IN_CAPTION, WITHOUT_TIME, WITHOUT_POINTS):
        if texts := tuple(utterance.text for utterance in utterances if utterance.lacks == reason):
            yield Finding(reason, texts)


# A narrative's samples: its text, its text with the image, its text with the image and boxes.

TEXT, IMAGE, GROUNDED = "t", "ti", "tim"
"""What is behind the names of the three files."""


@dataclass(frozen=True)
class NarrativeSample:
    """What the samples of a narrative are made of.

    Attributes:
        identity: the id that they share.
        narrative: whose they are.
        image: the file of the image, None for text alone in all three files.
        utterances: in the order of the caption; none without an image.
    """

    identity: str
    narrative: Narrative
    image: str | None = None
    utterances: Sequence[GroundedUtterance] = ()

    def build(self) -> dict[str, dict[str, Any]]:
        """The sample of each of the three files, in the format of ``docs/data.md``."""
        caption = self.narrative.caption
        text = _build_sample(self.identity, caption, None)
        if self.image is None:
            return {TEXT: text, IMAGE: text, GROUNDED: text}
        grounded = _build_sample(self.identity, insert_boxes(caption, self.utterances), self.image)
        grounded["variables"] = collect_coordinates(self.utterances).to_variables()
        return {TEXT: text, IMAGE: _build_sample(self.identity, caption, self.image), GROUNDED: grounded}


def _build_sample(identity: str, caption: str, image: str | None) -> dict[str, Any]:
    question = "" if image is None else DEFAULT_IMAGE_TOKEN
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
    return {"id": identity, **({"image": image} if image is not None else {}), "conversations": turns}


def insert_boxes(caption: str, utterances: Sequence[GroundedUtterance]) -> str:
    """The caption with the placeholders of a box, after a space, behind every utterance that has one."""
    pieces, start = [], 0
    for utterance in utterances:
        if utterance.box is not None:  # Ends are ascending: each piece goes on where the last one ended.
            pieces.append(f"{caption[start : utterance.end]} {box_text()}")
            start = utterance.end
    return "".join([*pieces, caption[start:]])


def collect_coordinates(utterances: Sequence[GroundedUtterance]) -> Coordinates:
    """The numbers of the boxes, in the order in which ``insert_boxes`` puts their placeholders."""
    boxes = [utterance.box for utterance in utterances if utterance.box is not None]
    return Coordinates(
        spatial_height_output_locations=tuple(edge for box in boxes for edge in (box.y1, box.y2)),
        spatial_width_output_locations=tuple(edge for box in boxes for edge in (box.x1, box.x2)),
    )
