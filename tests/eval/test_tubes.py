"""STVG and SVG: tubes in answers, and their scores computed by hand, the odd cases among them."""

from __future__ import annotations

import numpy as np
import pytest

from llava.config import GroundingConfig
from llava.eval.metrics import parse_tube, score_stvg, score_svg
from llava.geometry import Box, TimeSpan, Tube
from llava.grounding.syntax import parse_places, strip_coordinates

GROUNDING = GroundingConfig()
ALL, LEFT, RIGHT = Box(0.0, 0.0, 1.0, 1.0), Box(0.0, 0.0, 0.5, 1.0), Box(0.5, 0.0, 1.0, 1.0)


def frames(first: float, last: float) -> TimeSpan:
    """From one of the 100 frames to another."""
    return TimeSpan(first / 99, last / 99)


def box_text(*bins: int) -> str:
    return "[" + "".join(f"<{axis}-{i:03d}>" for axis, i in zip(["WIDTH", "HEIGHT"] * 2, bins, strict=True)) + "]"


def span_text(first: int, last: int) -> str:
    return f"{{<TEMP-{first:03d}><TEMP-{last:03d}>}}"


def main_scores(scores: dict[str, float]) -> list[float]:
    return [scores[name] for name in ("tIoU", "sIoU", "vIoU")]


def test_boxes_are_interpolated_evenly_over_the_span() -> None:
    tube = Tube(TimeSpan(0.2, 0.6), (LEFT, ALL, RIGHT))
    assert tube.box_at(0.2) == LEFT
    assert tube.box_at(0.3) == pytest.approx((0.0, 0.0, 0.75, 1.0))
    assert tube.box_at(0.4) == pytest.approx(ALL)
    assert tube.box_at(0.5) == pytest.approx((0.25, 0.0, 1.0, 1.0))
    assert tube.box_at(0.6) == RIGHT
    assert tube.box_at(0.19) is None
    assert tube.box_at(0.61) is None


def test_a_single_box_stays_and_a_moment_has_the_first() -> None:
    assert Tube(TimeSpan(0.2, 0.6), (LEFT,)).box_at(0.5) == LEFT
    moment = Tube(TimeSpan(0.4, 0.4), (LEFT, RIGHT))
    assert moment.box_at(0.4) == LEFT
    assert moment.box_at(0.5) is None
    assert Tube(TimeSpan(0.6, 0.2), (LEFT,)).box_at(0.4) is None


def test_a_tube_needs_a_box() -> None:
    with pytest.raises(ValueError, match="no box"):
        Tube(TimeSpan(0.0, 1.0), ())


def test_places_come_in_reading_order() -> None:
    text = f"a {box_text(0, 0, 99, 99)} b {span_text(0, 99)} c {box_text(99, 0, 99, 0)} [<WIDTH-001>]"
    assert parse_places(text, GROUNDING) == [ALL, TimeSpan(0.0, 1.0), Box(1.0, 0.0, 1.0, 0.0)]
    assert strip_coordinates(text) == "a b c [ ]"
    assert strip_coordinates("a [<WIDTH-OUTPUT>] {<TEMP-001><TEMP-002>}<HEIGHT-003>b") == "a [ ] b"


@pytest.mark.parametrize(
    ("text", "tube"),
    [
        (span_text(0, 99) + box_text(0, 0, 99, 99), Tube(TimeSpan(0, 1), (ALL,))),
        (f"at {span_text(9, 18)} it is {box_text(0, 0, 99, 99)} then {box_text(0, 0, 0, 99)}.",
         Tube(TimeSpan(9 / 99, 18 / 99), (ALL, Box(0, 0, 0, 1)))),
        # A box before the span, and another tube after it, are not of it.
        (box_text(0, 0, 0, 0) + span_text(0, 99) + box_text(0, 0, 99, 99) + span_text(1, 2) + box_text(0, 0, 0, 0),
         Tube(TimeSpan(0, 1), (ALL,))),
        # What is no whole box or span is passed over.
        (f"{{<TEMP-001>}} {span_text(0, 99)} [<WIDTH-000>] {box_text(0, 0, 99, 99)}", Tube(TimeSpan(0, 1), (ALL,))),
        ("", None),
        ("the star", None),
        (span_text(0, 99), None),
        (box_text(0, 0, 99, 99), None),
        (box_text(0, 0, 99, 99) + span_text(0, 99), None),
        (span_text(0, 99) + span_text(0, 99) + box_text(0, 0, 99, 99), None),
    ],
)  # fmt: skip
def test_tube_of_an_answer(text, tube) -> None:
    assert parse_tube(text, GROUNDING) == tube


def test_tube_of_an_answer_whose_span_the_question_gives() -> None:
    given = TimeSpan(0.25, 0.75)
    boxes = box_text(0, 0, 99, 99) + box_text(0, 0, 0, 99)
    tube = Tube(given, (ALL, Box(0, 0, 0, 1)))
    assert parse_tube(boxes, GROUNDING, span=given) == tube
    assert parse_tube(span_text(0, 99) + boxes, GROUNDING, span=given) == tube
    assert parse_tube(span_text(0, 99), GROUNDING, span=given) is None
    assert parse_tube("", GROUNDING, span=given) is None


def test_tube_takes_the_positions_that_are_known_better() -> None:
    positions = [0.1, 0.9, 0.2, 0.3, 0.4, 0.5]
    tube = parse_tube(span_text(10, 89) + box_text(20, 30, 40, 50), GROUNDING, positions)
    assert tube == Tube(TimeSpan(0.1, 0.9), (Box(0.2, 0.3, 0.4, 0.5),))


def test_stvg_by_hand() -> None:
    # Frames 20 to 59 against 40 to 79: 20 in both, 60 in either. Of the reference's box the answer has half.
    scores = score_stvg(Tube(frames(20, 59), (LEFT,)), Tube(frames(40, 79), (ALL,)))
    assert scores == pytest.approx(
        {
            "tIoU": 20 / 60,
            "sIoU": 20 * 0.5 / 20,
            "vIoU": 20 * 0.5 / 60,
            **{"tIoU>=0.3": 1, "tIoU>=0.5": 0, "tIoU>=0.7": 0},
            **{"sIoU>=0.3": 1, "sIoU>=0.5": 1, "sIoU>=0.7": 0},
            **{"vIoU>=0.3": 0, "vIoU>=0.5": 0, "vIoU>=0.7": 0},
            "unparsable": 0,
        }
    )


def test_stvg_of_a_box_that_grows() -> None:
    # From nothing to all of the reference's box: in frame i it has i / 99 of it, and the mean of these is a half,
    # which the sum over the frames must reach however it is rounded.
    growing = Tube(TimeSpan(0.0, 1.0), (Box(0.0, 0.0, 0.0, 1.0), ALL))
    scores = score_stvg(growing, Tube(TimeSpan(0.0, 1.0), (ALL,)))
    assert main_scores(scores) == pytest.approx([1.0, 0.5, 0.5])
    assert [scores["vIoU>=0.3"], scores["vIoU>=0.5"], scores["vIoU>=0.7"]] == [1, 1, 0]


def test_stvg_follows_both_tubes_in_time() -> None:
    # The reference moves from left to right in all of the clip. The answer has its second half alone, and there
    # the box that the reference has at its end: in frame i (50 to 99) they share i / 99 of a width of 0.5.
    reference = Tube(TimeSpan(0.0, 1.0), (LEFT, RIGHT))
    shared = [0.5 * i / 99 for i in range(50, 100)]
    ious = sum(width / (1 - width) for width in shared)
    scores = score_stvg(Tube(frames(50, 99), (RIGHT,)), reference)
    assert main_scores(scores) == pytest.approx([50 / 100, ious / 50, ious / 100])


@pytest.mark.parametrize(
    ("span", "boxes", "reference_span", "expected"),
    [
        # Every frame is the reference's, the answer is one frame of them.
        (frames(5, 5), (ALL,), frames(0, 99), [1 / 100, 1.0, 1 / 100]),
        # A reference of one frame, found; missed by one; and within an answer of three.
        (frames(5, 5), (ALL,), frames(5, 5), [1.0, 1.0, 1.0]),
        (frames(6, 6), (ALL,), frames(5, 5), [0.0, 0.0, 0.0]),
        (frames(4, 6), (LEFT,), frames(5, 5), [1 / 3, 0.5, 1 / 6]),
        # A reference between two frames has the nearer one; one between frames 5 and 6 that is nearer to 6.
        (frames(6, 6), (ALL,), frames(5.6, 5.7), [1.0, 1.0, 1.0]),
        (frames(6, 6), (ALL,), frames(5.1, 5.3), [0.0, 0.0, 0.0]),
        # No frame in both: one after the other.
        (frames(0, 49), (ALL,), frames(50, 99), [0.0, 0.0, 0.0]),
        # A frame at an end of the span is in it, however its time was rounded.
        (TimeSpan(0.33333333334, 0.66666666666), (ALL,), frames(33, 66), [1.0, 1.0, 1.0]),
        (frames(33, 66), (ALL,), TimeSpan(0.33333333334, 0.66666666666), [1.0, 1.0, 1.0]),
        # Reversed, and several boxes of it.
        (frames(59, 20), (ALL,), frames(20, 59), [0.0, 0.0, 0.0]),
        (frames(59, 20), (ALL, LEFT), frames(59, 20), [0.0, 0.0, 0.0]),
        # The part outside of the clip has no frames: 50 of 100 on the left, none beyond the end.
        (TimeSpan(-1.0, 49 / 99), (ALL,), frames(0, 99), [0.5, 1.0, 0.5]),
        (TimeSpan(1.2, 1.4), (ALL,), frames(0, 99), [0.0, 0.0, 0.0]),
        (TimeSpan(1.2, 1.2), (ALL,), frames(99, 99), [0.0, 0.0, 0.0]),
        # Boxes without area are of the right frames, and nothing else.
        (frames(0, 99), (Box(0.5, 0.5, 0.5, 0.5),), frames(0, 99), [1.0, 0.0, 0.0]),
    ],
)
def test_stvg_of_odd_tubes(span, boxes, reference_span, expected) -> None:
    scores = score_stvg(Tube(span, boxes), Tube(reference_span, (ALL,)))
    assert main_scores(scores) == pytest.approx(expected)
    assert scores["unparsable"] == 0.0


def test_stvg_counts_an_unparsable_answer_as_0() -> None:
    reference = Tube(TimeSpan(0.0, 1.0), (ALL,))
    scores = score_stvg(None, reference)
    assert scores.pop("unparsable") == 1.0
    assert set(scores.values()) == {0.0}
    assert scores.keys() | {"unparsable"} == score_stvg(reference, reference).keys()


def test_svg_takes_the_times_that_are_given() -> None:
    reference = Tube(frames(40, 79), (ALL,))
    for span in (frames(40, 79), frames(0, 3)):
        assert main_scores(score_svg(Tube(span, (LEFT,)), reference)) == pytest.approx([1.0, 0.5, 0.5])
    assert score_svg(None, reference) == score_stvg(None, reference)


def test_scores_of_any_tubes_are_shares_and_symmetric() -> None:
    generator = np.random.default_rng(0)

    def random_tube() -> Tube:
        corners = np.sort(generator.uniform(0, 1, (generator.integers(1, 6), 2, 2)), axis=1).reshape(-1, 4)
        start, end = np.sort(generator.uniform(0, 1, 2)).tolist()
        return Tube(TimeSpan(start, end), tuple(Box(*row) for row in corners.tolist()))

    for _ in range(200):
        tube, other = random_tube(), random_tube()
        scores = score_stvg(tube, other)
        assert scores == pytest.approx(score_stvg(other, tube))
        assert all(0.0 <= score <= 1.0 for score in scores.values())
        assert scores["vIoU"] == pytest.approx(scores["tIoU"] * scores["sIoU"])
        assert main_scores(score_stvg(tube, tube)) == pytest.approx([1.0, 1.0, 1.0])


def test_scores_are_those_of_the_definition_frame_by_frame() -> None:
    generator = np.random.default_rng(3)
    for _ in range(10):
        spans = generator.uniform([0.0, 0.5], [0.5, 1.0], (2, 2))
        corners = np.sort(generator.uniform(0, 1, (2, 3, 2, 2)), axis=2).reshape(2, 3, 4)
        tube, reference = (
            Tube(TimeSpan(*span), tuple(Box(*row) for row in rows))
            for span, rows in zip(spans.tolist(), corners.tolist(), strict=True)
        )
        both = either = overlap = 0.0
        for frame in range(100):
            box, other = tube.box_at(frame / 99), reference.box_at(frame / 99)
            both += box is not None and other is not None
            either += box is not None or other is not None
            if box is not None and other is not None:
                width = max(min(box.x2, other.x2) - max(box.x1, other.x1), 0)
                height = max(min(box.y2, other.y2) - max(box.y1, other.y1), 0)
                areas = [(b.x2 - b.x1) * (b.y2 - b.y1) for b in (box, other)]
                overlap += width * height / (sum(areas) - width * height)
        expected = [both / either, overlap / both if both else 0.0, overlap / either]
        assert main_scores(score_stvg(tube, reference)) == pytest.approx(expected)
