"""How well boxes in pictures are found (REC)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llava.coordinates import Box
from llava.eval.thresholds import reaches


def box_ious(boxes: ArrayLike, others: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of boxes and others, pair by pair.

    Args:
        boxes, others: (..., 4), each x1, y1, x2, y2, in one unit of any kind; they broadcast.

    Returns:
        (...), in [0, 1]. A reversed box (x1 > x2 or y1 > y2) holds nothing, and two boxes without any area
        have 0, even where they are equal.
    """
    boxes, others = np.asarray(boxes, dtype=np.float64), np.asarray(others, dtype=np.float64)
    upper_left = np.maximum(boxes[..., :2], others[..., :2])
    lower_right = np.minimum(boxes[..., 2:], others[..., 2:])
    shared = _areas(upper_left, lower_right)
    union = _areas(boxes[..., :2], boxes[..., 2:]) + _areas(others[..., :2], others[..., 2:]) - shared
    ious = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return np.minimum(ious, 1.0)  # Of boxes that are equal but for rounding it may come out a hair above.


def box_iou(box: Box, other: Box) -> float:
    """Intersection over union of two boxes; see ``box_ious``."""
    return float(box_ious(box, other))


def score_rec(boxes: Sequence[Box], reference: Box) -> dict[str, float]:
    """Score the answer to "where is it?" in a picture; a report has the means over all samples.

    Args:
        boxes: of the answer, in its order. The first counts; without any the answer is unparsable and scores 0.
        reference: in the unit of the boxes.
    """
    iou = box_iou(boxes[0], reference) if boxes else 0.0
    return {"mIoU": iou, "IoU>=0.5": float(reaches(iou, 0.5)), "unparsable": float(not boxes)}


def _areas(upper_left: NDArray[np.float64], lower_right: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.prod(np.maximum(lower_right - upper_left, 0.0), axis=-1)
