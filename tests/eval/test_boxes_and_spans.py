"""REC and TVG: cases computed by hand, the odd ones among them, and what always holds."""

from __future__ import annotations

import itertools

import pytest

from llava.eval.metrics import score_rec, score_tvg
from llava.geometry import Box, TimeSpan, box_iou, span_iou

UNIT = Box(0.0, 0.0, 1.0, 1.0)


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
