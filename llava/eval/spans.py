"""How well stretches of a video are found (TVG)."""

from __future__ import annotations

from collections.abc import Sequence

from llava.coordinates import TimeSpan
from llava.eval.thresholds import THRESHOLDS, exceeds


def span_iou(span: TimeSpan, other: TimeSpan) -> float:
    """Intersection over union of two stretches of time, in [0, 1].

    A reversed span (start > end) holds nothing, and two spans without any length have 0, even where they are equal.
    """
    shared = _length(max(span.start, other.start), min(span.end, other.end))
    union = _length(*span) + _length(*other) - shared
    return min(shared / union, 1.0) if union > 0 else 0.0


def score_tvg(spans: Sequence[TimeSpan], reference: TimeSpan) -> dict[str, float]:
    """Score the answer to "when is it?" in a video; a report has the means over all samples.

    Args:
        spans: of the answer, in its order. The first counts (it is what R@1 recalls by); without any the answer
            is unparsable and scores 0.
        reference: in the unit of the spans.
    """
    iou = span_iou(spans[0], reference) if spans else 0.0
    recalls = {f"R@1 IoU>{threshold}": float(exceeds(iou, threshold)) for threshold in THRESHOLDS}
    return {"mIoU": iou, **recalls, "unparsable": float(not spans)}


def _length(start: float, end: float) -> float:
    return max(end - start, 0.0)
