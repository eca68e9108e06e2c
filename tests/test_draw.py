"""Pictures of cases, by their pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import write_video
from PIL import Image

from llava.data.media import sample_video
from llava.draw import ANSWER_COLOUR, REFERENCE_COLOUR, draw_case
from llava.eval.report import _frames
from llava.eval.store import EvalSample, Reference
from llava.geometry import Box, TimeSpan, Tube
from llava.types import Media

GREY = (90, 90, 90)
MARGIN, WIDTH, SIDE = 20, 920, 640
"""A square picture is 640 wide; what a test draws on it begins at the margin."""
STRIP_SIDE, STRIP_STEP = 224, 232


def grey(width: int = 64, height: int = 64, mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (width, height), GREY).convert(mode)


def places_of(case: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """(n, 2): the x and y of a colour's pixels."""
    ys, xs = np.nonzero((np.asarray(case) == colour).all(axis=-1))
    return np.stack([xs, ys], axis=-1)


def bounds(case: Image.Image, colour: tuple[int, int, int]) -> list[int]:
    """Left, top, right and bottom of a colour's pixels."""
    places = places_of(case, colour)
    return [*places.min(axis=0).tolist(), *places.max(axis=0).tolist()]


def test_boxes_of_an_image_lie_where_they_are() -> None:
    case = draw_case([grey()], [Box(0.25, 0.0, 0.75, 0.5)], [Box(0.5, 0.5, 1.0, 1.0)])
    assert case.mode == "RGB"
    assert case.size == (WIDTH + 2 * MARGIN, SIDE + 2 * MARGIN)
    at = [MARGIN + round(share * (SIDE - 1)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert bounds(case, REFERENCE_COLOUR) == pytest.approx([at[1], at[0], at[3], at[2]], abs=1)
    assert bounds(case, ANSWER_COLOUR) == pytest.approx([at[2], at[2], at[4], at[4]], abs=1)
    # Lines, with the picture inside of them.
    assert case.getpixel((at[2], (at[0] + at[2]) // 2)) == GREY
    assert case.getpixel(((at[2] + at[4]) // 2, at[3])) == GREY


def test_an_answer_on_its_reference_leaves_both_to_be_seen() -> None:
    box = Box(0.2, 0.2, 0.8, 0.8)
    case = draw_case([grey()], [box], [box])
    assert len(places_of(case, REFERENCE_COLOUR)) > len(places_of(case, ANSWER_COLOUR)) > 0
    assert bounds(case, REFERENCE_COLOUR)[0] > bounds(case, ANSWER_COLOUR)[0]


def test_boxes_keep_to_a_picture_that_is_not_square() -> None:
    case = draw_case([grey(200, 100)], [Box(0.0, 0.0, 1.0, 1.0)])
    assert bounds(case, REFERENCE_COLOUR) == [MARGIN, MARGIN, MARGIN + 919, MARGIN + 459]


def test_several_boxes_and_boxes_outside_of_the_picture() -> None:
    case = draw_case([grey()], [], [Box(0.1, 0.1, 0.2, 0.2), Box(0.8, 0.8, 1.3, 1.3), Box(2.0, 2.0, 3.0, 3.0)])
    left, top, right, bottom = bounds(case, ANSWER_COLOUR)
    assert left == top == pytest.approx(MARGIN + 64, abs=1)
    assert right == bottom == MARGIN + SIDE - 1


def test_a_reversed_box_has_a_diagonal_and_one_without_area_is_a_line() -> None:
    middle = (MARGIN + SIDE // 2,) * 2
    for box, seen in ((Box(0.25, 0.25, 0.75, 0.75), GREY), (Box(0.75, 0.75, 0.25, 0.25), ANSWER_COLOUR)):
        case = draw_case([grey()], [], [box])
        assert bounds(case, ANSWER_COLOUR)[0] == pytest.approx(MARGIN + SIDE // 4, abs=2)
        assert case.getpixel(middle) == seen
    left, _, right, _ = bounds(draw_case([grey()], [], [Box(0.5, 0.2, 0.5, 0.8)]), ANSWER_COLOUR)
    assert right - left <= 2


def test_a_tube_is_in_the_frames_of_its_span_and_moves() -> None:
    tube = Tube(TimeSpan(1 / 3, 1.0), (Box(0.0, 0.0, 0.5, 0.5), Box(0.5, 0.5, 1.0, 1.0)))
    case = draw_case([grey()] * 4, [tube])
    seen = places_of(case, REFERENCE_COLOUR)
    seen = seen[seen[:, 1] < MARGIN + STRIP_SIDE]
    lefts = []
    for number in range(4):
        start = MARGIN + number * STRIP_STEP
        inside = seen[(seen[:, 0] >= start) & (seen[:, 0] < start + STRIP_SIDE)]
        lefts.append((inside[:, 0].min() - start) / STRIP_SIDE if len(inside) else None)
    assert lefts[0] is None
    assert lefts[1:] == pytest.approx([0.0, 0.25, 0.5], abs=0.01)


def test_times_of_frames_say_what_a_tube_is_in() -> None:
    tube = Tube(TimeSpan(0.5, 0.6), (Box(0.0, 0.0, 1.0, 1.0),))
    for times, seen in (([0.55, 0.9], True), ([0.1, 0.9], False)):
        case = draw_case([grey()] * 2, [tube], times=times)
        assert (case.getpixel((MARGIN, MARGIN + 100)) == REFERENCE_COLOUR) is seen


def test_frames_go_on_in_a_second_row() -> None:
    case = draw_case([grey()] * 5)
    assert case.height == 2 * MARGIN + STRIP_SIDE + STRIP_STEP
    assert case.getpixel((MARGIN + 3 * STRIP_STEP + 5, MARGIN + 5)) == GREY
    assert case.getpixel((MARGIN + 5, MARGIN + STRIP_STEP + 5)) == GREY
    assert case.getpixel((MARGIN + STRIP_STEP + 5, MARGIN + STRIP_STEP + 5)) != GREY


def test_spans_are_stretches_of_a_bar() -> None:
    case = draw_case([grey()] * 4, [TimeSpan(0.25, 0.5)], [TimeSpan(0.4, 1.0)])
    reference, answer = bounds(case, REFERENCE_COLOUR), bounds(case, ANSWER_COLOUR)
    at = [MARGIN + round(share * (WIDTH - 1)) for share in (0.25, 0.4, 0.5, 1.0)]
    assert [reference[0], answer[0], reference[2], answer[2]] == at
    assert reference[1] > MARGIN + STRIP_SIDE
    assert reference[3] < answer[1]
    # Full, but for one that is reversed.
    assert case.getpixel((at[2], (answer[1] + answer[3]) // 2)) == ANSWER_COLOUR
    reverse = draw_case([grey()] * 4, [TimeSpan(0.25, 0.5)], [TimeSpan(1.0, 0.4)])
    assert bounds(reverse, ANSWER_COLOUR) == answer
    assert reverse.getpixel((at[2], (answer[1] + answer[3]) // 2)) != ANSWER_COLOUR


def test_no_bar_without_a_span() -> None:
    assert draw_case([grey()] * 4).height == 2 * MARGIN + STRIP_SIDE


def test_texts_stand_below_in_their_colours() -> None:
    bare = draw_case([grey()])
    texts = {"question": "where is the star?", "reference": "here", "answer": "there: è qui", "score": "IoU 0.12"}
    case = draw_case([grey()], texts=texts)
    assert case.height == bare.height + MARGIN + 4 * 22
    reference, answer = bounds(case, REFERENCE_COLOUR), bounds(case, ANSWER_COLOUR)
    assert bare.height - MARGIN < reference[1] < reference[3] < answer[1]
    assert len(places_of(case, (32, 33, 36))) > 50


@pytest.mark.parametrize("text", ["word " * 80, "<WIDTH-001>" * 40])
def test_long_texts_are_broken_into_lines(text) -> None:
    one_line = draw_case([grey()], texts={"answer": "word"})
    case = draw_case([grey()], texts={"answer": text})
    assert case.height > one_line.height
    assert (np.asarray(case)[:, WIDTH + MARGIN :] == (250, 249, 246)).all(), "text in the margin"


def test_accented_letters_are_drawn_bare() -> None:
    cases = [
        draw_case([grey()], texts={"risposta è": text}) for text in ("la città è più in là", "la citta e piu in la")
    ]
    assert cases[0].tobytes() == cases[1].tobytes()


def test_endless_texts_are_cut() -> None:
    assert draw_case([grey()], texts={"answer": "word " * 5000}).height <= SIDE + 3 * MARGIN + 8 * 22


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_frames_of_any_mode_stay_as_they_are(mode) -> None:
    frame = grey(mode=mode)
    before = frame.copy()
    case = draw_case([frame], [Box(0.0, 0.0, 1.0, 1.0)])
    assert case.getpixel((MARGIN, MARGIN)) == REFERENCE_COLOUR
    assert frame.mode == mode
    assert frame.tobytes() == before.tobytes()


def test_same_case_same_pixels() -> None:
    cases = [draw_case([grey()] * 3, [TimeSpan(0.1, 0.2)], [], {"score": "0"}) for _ in range(2)]
    assert cases[0].tobytes() == cases[1].tobytes()


def test_cases_without_frames_or_times_are_refused() -> None:
    with pytest.raises(ValueError, match="no frame"):
        draw_case([])
    with pytest.raises(ValueError, match="2 frames, but 1 times"):
        draw_case([grey()] * 2, times=[0.0])


@pytest.mark.parametrize(("num_frames", "shown"), [(3, 3), (20, 16)])
def test_pictures_show_the_frames_that_the_model_saw(tiny_vision, tmp_path, num_frames: int, shown: int) -> None:
    clip = write_video(tmp_path / "a.mp4", num_frames=40)
    vision = replace(tiny_vision, num_frames=num_frames)
    seen = sample_video(str(clip), num_frames)
    sample = EvalSample("a", "a.json", (Media("video", str(clip)),), Reference())
    frames, times = _frames(sample, vision)
    assert len(frames) == len(times) == shown
    chosen = [round(i * (num_frames - 1) / (shown - 1)) for i in range(shown)]
    assert all((np.asarray(frame) == seen.frames[i].numpy()).all() for frame, i in zip(frames, chosen, strict=True))
    assert (times[0], times[-1]) == (0.0, 1.0)
    assert times == sorted(times)
    assert len(_frames(sample, None)[0]) == 8
