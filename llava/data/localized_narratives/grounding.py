"""A narrative's utterances, each with the box of its place in the image and its place in the caption."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llava.coordinates import Box
from llava.data.localized_narratives.alignment import find_ends
from llava.data.localized_narratives.boxes import BoxSettings, form_box
from llava.data.localized_narratives.rows import Finding, Narrative, Point, Utterance

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
    """The utterances of a narrative, or groups of them, in order.

    Args:
        narrative: where.
        settings: how boxes are formed.
        words_per_box: see ``group_utterances``.
    """
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
    if len(group) == 1:
        return group[0]
    intervals = [part.interval for part in group if part.interval is not None]
    interval = (min(start for start, _ in intervals), max(end for _, end in intervals)) if intervals else None
    return Utterance(" ".join(part.text for part in group), interval)


def _ground(utterance: Utterance, end: int | None, points: Sequence[Point], settings: BoxSettings) -> GroundedUtterance:
    if end is None:
        return GroundedUtterance(utterance.text, lacks=NOT_IN_CAPTION)
    if utterance.interval is None:
        return GroundedUtterance(utterance.text, end, lacks=WITHOUT_TIME)
    first = bisect_left(points, utterance.interval[0] - settings.padding, key=_time_of)
    last = bisect_right(points, utterance.interval[1] + settings.padding, key=_time_of)
    taken = tuple(points[first:last])
    box = form_box(taken, settings)
    return GroundedUtterance(utterance.text, end, taken, box, lacks=WITHOUT_POINTS if box is None else "")


def _time_of(point: Point) -> float:
    return point.t


def find_ungrounded(utterances: Sequence[GroundedUtterance]) -> Iterator[Finding]:
    """A finding for each reason why utterances got no box."""
    for reason in (NOT_IN_CAPTION, WITHOUT_TIME, WITHOUT_POINTS):
        if texts := tuple(utterance.text for utterance in utterances if utterance.lacks == reason):
            yield Finding(reason, texts)
