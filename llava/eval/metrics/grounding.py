"""How well boxes in pictures, stretches of time and moving boxes are found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llava.config import GroundingConfig
from llava.geometry import SPAN_TOLERANCE, Box, TimeSpan, Tube, box_iou, box_ious, span_iou
from llava.grounding.syntax import parse_places

THRESHOLDS = (0.3, 0.5, 0.7)


def _compared(score: float) -> float:
    """A score as thresholds see it: 0.1 / (0.3 - 0.1) is no half in floating point, yet it is one to its reader."""
    return round(score, 9)


def score_rec(boxes: Sequence[Box], reference: Box) -> dict[str, float]:
    """Score the answer to "where is it?" in a picture; a report has the means over all samples.

    Args:
        boxes: of the answer, in its order. The first counts; without any the answer is unparsable and scores 0.
        reference: in the unit of the boxes.
    """
    iou = box_iou(boxes[0], reference) if boxes else 0.0
    return {"mIoU": iou, "IoU>=0.5": float(_compared(iou) >= 0.5), "unparsable": float(not boxes)}


def score_tvg(spans: Sequence[TimeSpan], reference: TimeSpan) -> dict[str, float]:
    """Score the answer to "when is it?" in a video; a report has the means over all samples.

    Args:
        spans: of the answer, in its order. The first counts (it is what R@1 recalls by); without any the answer
            is unparsable and scores 0.
        reference: in the unit of the spans.
    """
    iou = span_iou(spans[0], reference) if spans else 0.0
    recalls = {f"R@1 IoU>{threshold}": float(_compared(iou) > threshold) for threshold in THRESHOLDS}
    return {"mIoU": iou, **recalls, "unparsable": float(not spans)}


# Moving boxes (STVG, SVG): the answer and the reference are a tube each.

NUM_FRAMES = 100

_FRAME_TIMES = np.arange(NUM_FRAMES) / (NUM_FRAMES - 1)
"""The first frame lies at 0 and the last at 1: where the bins of time lie, when there are 100 of them too."""


def parse_tube(
    text: str, grounding: GroundingConfig, positions: Sequence[float] | None = None, span: TimeSpan | None = None
) -> Tube | None:
    """The tube that an answer tells, or None where it tells none.

    It is the first span of time and the boxes after it, up to a second span, which would be another tube's.

    Args:
        text, grounding, positions: see ``llava.grounding.syntax.parse_places``.
        span: where the question gives it (SVG). The answer is then boxes alone: all of them count, and a span
            that it tells nevertheless is passed over.
    """
    return find_tube(parse_places(text, grounding, positions), span)


def find_tube(places: Sequence[Box | TimeSpan], span: TimeSpan | None = None) -> Tube | None:
    """The tube that the boxes and spans of an answer make up, in its order; see ``parse_tube``."""
    boxes = []
    if span is not None:
        boxes = [place for place in places if isinstance(place, Box)]
    else:
        for place in places:
            if isinstance(place, Box):
                # A box before any span of time belongs to none.
                boxes += [place] if span is not None else []
            elif span is None:
                span = place
            else:
                break
    return Tube(span, tuple(boxes)) if span is not None and boxes else None


def frames_in(span: TimeSpan) -> NDArray[np.bool_]:
    """(100,): which of the video's 100 uniform frames lie in a span, its ends included.

    A span so short that it falls between two frames has the one nearest to its middle, so that it can be found at
    all. A reversed span has none, nor has one that lies wholly outside of [0, 1].
    """
    times = _FRAME_TIMES
    inside = (times >= span.start - SPAN_TOLERANCE) & (times <= span.end + SPAN_TOLERANCE)
    if not inside.any() and 0 <= span.start <= span.end <= 1:
        # Bins of 1/99 are as far apart as frames: a span within one bin would have none.
        inside[np.abs(times - (span.start + span.end) / 2).argmin()] = True
    return inside


def score_stvg(tube: Tube | None, reference: Tube) -> dict[str, float]:
    """Score the answer to "where and when is it?" in a video; a report has the means over all samples.

    Of 100 frames evenly spread over the clip, with "both" those in the answer's span and in the reference's, and
    "either" those in one of the two at least:

    - ``tIoU`` = both / either;
    - ``sIoU`` = sum over both of the boxes' IoU / both, and 0 without a frame in both;
    - ``vIoU`` = sum over both of the boxes' IoU / either, which is ``tIoU`` times ``sIoU``;
    - for each of the three, whether it is at least 0.3, 0.5 and 0.7.

    Args:
        tube: of the answer; None for an unparsable one, which scores 0.
        reference: its span and boxes in the units of the tube.
    """
    temporal = spatial = volume = 0.0
    if tube is not None:
        answered, wanted = frames_in(tube.span), frames_in(reference.span)
        both, either = answered & wanted, int((answered | wanted).sum())
        if both.any():
            # Only frames in both spans have two boxes to compare.
            times = _FRAME_TIMES[both]
            overlap = float(box_ious(tube.boxes_at(times), reference.boxes_at(times)).sum())
            temporal, spatial, volume = len(times) / either, overlap / len(times), overlap / either
    scores = {"tIoU": temporal, "sIoU": spatial, "vIoU": volume}
    # A copy: the loop adds to what it goes through.
    for name, score in tuple(scores.items()):
        scores |= {f"{name}>={threshold}": float(_compared(score) >= threshold) for threshold in THRESHOLDS}
    return {**scores, "unparsable": float(tube is None)}


def score_svg(tube: Tube | None, reference: Tube) -> dict[str, float]:
    """Score the answer to "where is it?" over a given time: ``score_stvg``, the answer's span being the reference's."""
    return score_stvg(None if tube is None else Tube(reference.span, tube.boxes), reference)
