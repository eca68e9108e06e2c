"""REC and TVG: cases computed by hand, the odd ones among them, and what always holds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llava.eval.metrics import score_rec, score_tvg
from llava.geometry import Box, TimeSpan, box_iou, box_ious, span_iou

UNIT = Box(0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("box", "other", "iou"),
    [
        # Two squares of side 2, shifted by 1 both ways: 1 shared of 4 + 4 - 1.
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        # The left half of a box.
        ((0, 0, 0.5, 1), (0, 0, 1, 1), 0.5),
        # One inside of the other: 0.2 * 0.5 of 1.
        ((0.2, 0.3, 0.4, 0.8), (0, 0, 1, 1), 0.1),
        # Side by side, with an edge in common, and apart.
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0),
        ((0, 0, 1, 1), (5, 5, 6, 6), 0.0),
        # Reversed in x, in y, in both: nothing is inside.
        ((1, 0, 0, 1), (0, 0, 1, 1), 0.0),
        ((0, 1, 1, 0), (0, 0, 1, 1), 0.0),
        ((1, 1, 0, 0), (0, 0, 1, 1), 0.0),
        ((1, 1, 0, 0), (1, 1, 0, 0), 0.0),
        # Without area: a line, a point, and the same point twice.
        ((0, 0.5, 1, 0.5), (0, 0, 1, 1), 0.0),
        ((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), 0.0),
    ],
)
def test_iou_of_boxes(box, other, iou) -> None:
    assert box_iou(Box(*box), Box(*other)) == pytest.approx(iou, abs=1e-12)
    assert box_iou(Box(*other), Box(*box)) == pytest.approx(iou, abs=1e-12)


def test_ious_of_any_boxes_are_shares_and_symmetric() -> None:
    generator = np.random.default_rng(0)
    boxes, others = generator.uniform(-0.2, 1.2, (2, 2000, 4))  # Three in four are reversed.
    ious = box_ious(boxes, others)
    np.testing.assert_array_equal(ious, box_ious(others, boxes))
    assert ious.min() == 0.0
    assert 0.5 < ious.max() <= 1.0
    proper = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
    np.testing.assert_array_equal(box_ious(proper, proper), 1.0)
    assert box_ious(proper, proper + 1e-16).max() <= 1.0


def test_iou_of_boxes_is_the_share_of_a_fine_grid() -> None:
    """Against counting points, which knows nothing of corners."""
    points = (np.arange(100) + 0.5) / 100
    generator = np.random.default_rng(1)
    for _ in range(20):
        corners = np.sort(generator.integers(0, 101, (2, 2, 2)) / 100, axis=1)
        inside = [
            ((points > box[0, 0]) & (points < box[1, 0]))[:, None] & ((points > box[0, 1]) & (points < box[1, 1]))
            for box in corners
        ]
        either = (inside[0] | inside[1]).sum()
        expected = (inside[0] & inside[1]).sum() / either if either else 0.0
        assert box_iou(Box(*corners[0].ravel()), Box(*corners[1].ravel())) == pytest.approx(expected)


def test_rec_counts_the_first_box() -> None:
    half, none = Box(0.0, 0.0, 0.5, 1.0), Box(2.0, 2.0, 3.0, 3.0)
    assert score_rec([half], UNIT) == {"mIoU": 0.5, "IoU>=0.5": 1.0, "unparsable": 0.0}
    assert score_rec([none, UNIT], UNIT) == {"mIoU": 0.0, "IoU>=0.5": 0.0, "unparsable": 0.0}
    assert score_rec([UNIT, none], UNIT) == {"mIoU": 1.0, "IoU>=0.5": 1.0, "unparsable": 0.0}


def test_rec_counts_an_unparsable_answer_as_0() -> None:
    assert score_rec([], UNIT) == {"mIoU": 0.0, "IoU>=0.5": 0.0, "unparsable": 1.0}


def test_rec_reaches_a_half_whatever_floating_point_makes_of_it() -> None:
    # 0.3 - 0.2 over 0.4 - 0.2 is a half; in floating point it is 0.4999...
    box, reference = Box(0.2, 0.0, 0.3, 1.0), Box(0.2, 0.0, 0.4, 1.0)
    assert box_iou(box, reference) < 0.5
    assert score_rec([box], reference)["IoU>=0.5"] == 1.0
    assert score_rec([Box(0.2, 0.0, 0.2999, 1.0)], reference)["IoU>=0.5"] == 0.0


@pytest.mark.parametrize(
    ("span", "other", "iou"),
    [
        ((0.0, 0.5), (0.0, 1.0), 0.5),
        ((0.2, 0.6), (0.4, 0.8), 1 / 3),  # 0.2 shared of 0.6.
        ((0.0, 0.2), (0.2, 0.4), 0.0),  # They only touch.
        ((0.0, 0.1), (0.8, 0.9), 0.0),
        ((0.6, 0.2), (0.0, 1.0), 0.0),  # Reversed.
        ((0.6, 0.2), (0.6, 0.2), 0.0),
        ((0.5, 0.5), (0.0, 1.0), 0.0),  # A moment.
        ((0.5, 0.5), (0.5, 0.5), 0.0),
        ((0.0, 0.4), (0.2, 1.4), 1 / 7),  # Beyond the clip's end: 0.2 of 1.4, as written.
    ],
)
def test_iou_of_spans(span, other, iou) -> None:
    assert span_iou(TimeSpan(*span), TimeSpan(*other)) == pytest.approx(iou)
    assert span_iou(TimeSpan(*other), TimeSpan(*span)) == pytest.approx(iou)


def test_ious_of_any_spans_are_shares() -> None:
    generator = np.random.default_rng(2)
    for numbers in generator.uniform(0, 1, (500, 4)).tolist():
        span, other = TimeSpan(*numbers[:2]), TimeSpan(*numbers[2:])
        assert 0.0 <= span_iou(span, other) == span_iou(other, span) <= 1.0
        assert span_iou(span, span) == (1.0 if span.start < span.end else 0.0)
        # A span is a box of height 1.
        boxes = [Box(start, 0.0, end, 1.0) for start, end in (span, other)]
        assert span_iou(span, other) == pytest.approx(box_iou(*boxes))


def test_tvg_recall_is_above_its_thresholds_not_at_them() -> None:
    clip = TimeSpan(0.0, 1.0)
    recalls = {}
    for tenths in (2, 3, 4, 5, 6, 7, 8):
        scores = score_tvg([TimeSpan(0.0, tenths / 10)], clip)
        assert scores["mIoU"] == pytest.approx(tenths / 10)
        recalls[tenths] = [scores[f"R@1 IoU>{threshold}"] for threshold in (0.3, 0.5, 0.7)]
    assert recalls == {
        2: [0, 0, 0],
        3: [0, 0, 0],
        4: [1, 0, 0],
        5: [1, 0, 0],
        6: [1, 1, 0],
        7: [1, 1, 0],
        8: [1, 1, 1],
    }


def test_tvg_is_not_above_a_half_by_rounding() -> None:
    # 0.1 of 0.2 is a half; in floating point it is 0.5000...01.
    span, reference = TimeSpan(0.1, 0.2), TimeSpan(0.1, 0.3)
    assert span_iou(span, reference) > 0.5
    assert score_tvg([span], reference)["R@1 IoU>0.5"] == 0.0


def test_tvg_counts_the_first_span_and_an_unparsable_answer_as_0() -> None:
    clip, elsewhere = TimeSpan(0.0, 1.0), TimeSpan(2.0, 3.0)
    names = ["mIoU", "R@1 IoU>0.3", "R@1 IoU>0.5", "R@1 IoU>0.7", "unparsable"]
    answers = [[clip, elsewhere], [elsewhere, clip], []]
    scores = [score_tvg(spans, clip) for spans in answers]
    assert [list(row) for row in scores] == [names] * 3
    assert [list(row.values()) for row in scores] == [[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]


def test_rows_of_a_task_have_the_same_names() -> None:
    for rows in (
        [score_rec(boxes, UNIT) for boxes in ([], [UNIT])],
        [score_tvg(spans, TimeSpan(0.0, 1.0)) for spans in ([], [TimeSpan(0.0, 1.0)])],
    ):
        assert all(list(row) == list(other) for row, other in itertools.pairwise(rows))
