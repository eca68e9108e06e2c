"""Coordinates: what is no number of the picture is refused; what is one keeps its place in text, bins and squares."""

from __future__ import annotations

import math

import pytest
import torch
from fuzzing import attempt, cases, names
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import any_texts, json_values, numbers, plain_texts

from llava.config import GroundingConfig, VisionConfig
from llava.geometry import Box, Letterbox, TimeSpan, Tube, box_iou, parse_pinpoints, span_iou
from llava.grounding.samples import move_to_square, parse_variables
from llava.grounding.syntax import (
    LOCATIONS,
    bin_token,
    box_text,
    count_bins,
    find_placeholders,
    parse_places,
    span_text,
    stand_in_bins,
    strip_coordinates,
    write_numbers,
)
from llava.model.coordinates import expected_positions, locate
from llava.types import Coordinates, Turn

shares = st.floats(0, 1)
wild = st.one_of(st.floats(), st.sampled_from((math.nan, math.inf, -math.inf, -0.0, 1.0, 2.0, 1e308, 5e-324)))
sides = st.one_of(st.integers(1, 2000), st.sampled_from((1, 2, 13, 14, 55, 56, 57, 100_000)))
sizes = st.tuples(sides, sides)
places = st.sampled_from(tuple(LOCATIONS))


@cases(offline=500, in_ci=60)
@given(
    st.lists(st.one_of(places, plain_texts), max_size=6).map("".join),
    st.one_of(
        json_values,
        st.dictionaries(
            st.sampled_from((*LOCATIONS.values(), "other")), st.lists(st.one_of(shares, numbers), max_size=3)
        ),
    ),
)
def test_variables_are_refused_or_there_is_one_for_each_placeholder(text, variables):
    found = attempt(parse_variables, variables, text, "sample 'a'")
    wanted = {name: text.count(placeholder) for placeholder, name in LOCATIONS.items()}
    given_lists = variables if isinstance(variables, dict) else {}
    if isinstance(found, ValueError):
        assert names(found, "sample 'a'")
        is_right = variables is None or (
            isinstance(variables, dict)
            and all(isinstance(given_lists.get(name) or [], list) for name in wanted)
            and all(
                isinstance(n, float | int) and not isinstance(n, bool) and 0 <= n <= 1
                for name in wanted
                for n in given_lists.get(name) or []
            )
            and not any(value for name, value in given_lists.items() if name not in wanted)
            and all(len(given_lists.get(name) or []) == count for name, count in wanted.items())
        )
        assert not is_right or (any(wanted.values()) and variables is None)
        return
    for name, count in wanted.items():
        assert list(getattr(found, name)) == [float(number) for number in given_lists.get(name) or []]
        assert len(getattr(found, name)) == count
    assert Coordinates.from_variables(found.to_variables()) == found


def bins_of(numbers_in_order: list[float], axes: list[str], grounding: GroundingConfig) -> str:
    return "".join(
        bin_token(axis, round(number * (grounding.num_bins(axis) - 1)))
        for number, axis in zip(numbers_in_order, axes, strict=True)
    )


@cases(offline=500, in_ci=50)
@given(
    st.lists(st.one_of(st.tuples(shares, shares, shares, shares), st.tuples(shares, shares), plain_texts), max_size=5),
    st.integers(2, 1000),
    st.integers(2, 1000),
)
def test_boxes_and_spans_are_read_as_they_were_written(pieces, num_temporal, num_spatial):
    grounding = GroundingConfig("lape", num_temporal, num_spatial)
    text, expected, exact = "", [], []
    for piece in pieces:
        if isinstance(piece, str):
            text += piece.replace("[", "(").replace("{", "(")
        elif len(piece) == 4:
            text += f"[{bins_of(list(piece), ['WIDTH', 'HEIGHT'] * 2, grounding)}]"
            expected.append(Box(*piece))
            exact += piece
        else:
            text += f"{{{bins_of(list(piece), ['TEMP'] * 2, grounding)}}}"
            expected.append(TimeSpan(*piece))
            exact += piece
    found = parse_places(text, grounding)
    assert [type(place) for place in found] == [type(place) for place in expected]
    for place, wanted in zip(found, expected, strict=True):
        step = 1 / ((num_spatial if isinstance(place, Box) else num_temporal) - 1)
        assert all(abs(a - b) <= step / 2 + 1e-9 for a, b in zip(place, wanted, strict=True))
    assert count_bins(text) == len(exact)
    assert parse_places(text, grounding, exact) == expected
    boxes = [place for place in found if isinstance(place, Box)]
    written = write_numbers(text, boxes, [place for place in found if isinstance(place, TimeSpan)])
    assert count_bins(written) == 0
    assert not count_bins(strip_coordinates(text))


_BITS = st.sampled_from(
    ("[", "]", "{", "}", " ", "<WIDTH-INPUT>", "<HEIGHT-OUTPUT>", box_text(), span_text("INPUT"), "<WIDTH-0", "00>")
)
_NUMBERS = st.sampled_from(("000", "042", "099", "100", "700", "999", "٠٠١", "0000", "1"))


def _bins(*axes: str) -> st.SearchStrategy[str]:
    return st.tuples(*(_NUMBERS.map(lambda number, axis=axis: f"<{axis}-{number}>") for axis in axes)).map("".join)


_PLACES = st.one_of(
    _bins("WIDTH", "HEIGHT", "WIDTH", "HEIGHT").map("[{}]".format), _bins("TEMP", "TEMP").map("{{{}}}".format),
    _bins("WIDTH"), _bins("TEMP", "HEIGHT"), _BITS,
)  # fmt: skip


@cases(offline=400, in_ci=50)
@example("[<WIDTH-000><HEIGHT-000><WIDTH-000><HEIGHT-100>]")  # of 100 bins: it lay below the picture
@example("{<TEMP-٠٠١><TEMP-٠٠٢>}")
@given(st.one_of(any_texts, st.lists(_PLACES, max_size=8).map("".join)))
def test_whatever_a_model_writes_is_read_as_places_in_the_picture_or_not_at_all(text):
    grounding = GroundingConfig()
    found = parse_places(text, grounding)
    assert all(0 <= number <= 1 for place in found for number in place)
    assert parse_places(stand_in_bins(text), grounding) or not parse_places(text, grounding)
    boxes, spans = ([place for place in found if isinstance(place, kind)] for kind in (Box, TimeSpan))
    write_numbers(text, boxes, spans)
    stripped = strip_coordinates(text)
    assert not find_placeholders(stripped)
    assert not count_bins(stripped)


@cases(offline=300, in_ci=40)
@given(sizes, st.integers(1, 448), st.sampled_from(("pad", "cut", "stretch")), st.integers(1, 512), shares, shares)
def test_a_point_of_a_picture_comes_back_from_the_square(size, side, way, resize, x, y):
    box = Letterbox.fit(size, side, pad=way == "pad", resize=resize if way == "cut" else None)
    square = box.to_square(x, y)
    assert all(0 <= number <= 1 for number in square)
    back = box.from_square(*square)
    assert all(0 <= number <= 1 for number in back)
    inside = [0 <= at + n * length <= side for at, n, length in ((box.left, x, box.width), (box.top, y, box.height))]
    if inside[0]:
        assert back[0] == pytest.approx(x, abs=1e-6)
    if inside[1]:
        assert back[1] == pytest.approx(y, abs=1e-6)
    if way != "cut":
        assert all(inside)
        assert 0 <= box.top <= side - box.height
        assert 0 <= box.left <= side - box.width
    else:  # What is cut is cut on both sides alike, and the square is full.
        assert box.top + box.height >= side
        assert box.left + box.width >= side


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # infinity less infinity
@cases(offline=300, in_ci=40)
@given(st.lists(st.one_of(shares, wild), min_size=8, max_size=8))
def test_overlap_is_a_share_and_the_same_both_ways(numbers):
    box, other = Box(*numbers[:4]), Box(*numbers[4:])
    span, second = TimeSpan(*numbers[:2]), TimeSpan(*numbers[2:4])
    for overlap in (box_iou(box, other), box_iou(box, box), span_iou(span, second), span_iou(span, span)):
        assert 0 <= overlap <= 1
    assert box_iou(box, other) == box_iou(other, box)
    assert span_iou(span, second) == pytest.approx(span_iou(second, span))
    if (
        box.x1 < box.x2
        and box.y1 < box.y2
        and (box.x2 - box.x1) * (box.y2 - box.y1) > 1e-300
        and math.isfinite(sum(box))
    ):
        assert box_iou(box, box) == pytest.approx(1) or not all(abs(n) <= 1 for n in box)
    if span.start < span.end and all(0 <= n <= 1 for n in span):
        assert span_iou(span, span) == 1


@cases(offline=200, in_ci=30)
@given(st.lists(shares, min_size=1, max_size=8), st.integers(2, 1000))
def test_a_position_among_bins_says_where_it_was(positions, num_bins):
    lower, upper, fraction = locate(torch.tensor(positions, dtype=torch.float64), num_bins)
    assert (lower >= 0).all()
    assert (upper < num_bins).all()
    back = (lower + fraction * (upper - lower).clamp(min=0)) / (num_bins - 1)
    assert torch.allclose(back, torch.tensor(positions, dtype=torch.float64), atol=1e-12)
    # What a model answers with as it was taught, two bins that share, is read as the position again.
    grounding = GroundingConfig("lape", num_bins, 2, first_bin=3)
    logits = torch.full((len(positions), 3 + grounding.total_bins), -40.0)
    for row, (low, up, share) in enumerate(zip(lower.tolist(), upper.tolist(), fraction.tolist(), strict=True)):
        logits[row, 3 + low] = math.log(max(1 - share, 1e-12))
        logits[row, 3 + up] = math.log(max(share if up != low else 1.0, 1e-12))
    tokens = logits.argmax(-1, keepdim=True)
    read = expected_positions(tokens, [logits], grounding).squeeze(1)
    assert torch.allclose(read, torch.tensor(positions), atol=2e-4)


@cases(offline=200, in_ci=25)
@given(
    st.lists(st.tuples(st.sampled_from(("<image>", *LOCATIONS)), shares), max_size=10),
    st.lists(sizes, min_size=1, max_size=11),
    st.sampled_from(("square", "pad")),
)
def test_coordinates_move_with_the_picture_before_them(pieces, media, ratio):
    vision = VisionConfig(
        vision_tower="t", vision_config={}, hidden_size=8, image_size=56, patches_per_side=4, image_aspect_ratio=ratio,
        image_resize_size=64,
    )  # fmt: skip
    numbers: dict[str, list[float]] = {}
    expected: dict[str, list[float]] = {}
    seen, shown = 0, media
    current = -1
    text = ""
    for piece, number in pieces:
        if piece == "<image>" and seen >= len(shown):
            continue
        text += piece
        if piece == "<image>":
            seen, current = seen + 1, current + 1
            continue
        name = LOCATIONS[piece]
        numbers.setdefault(name, []).append(number)
        square = vision.letterbox(shown[max(current, 0)])
        if "WIDTH" in piece:
            number = square.to_square(number, 0)[0]
        elif "HEIGHT" in piece:
            number = square.to_square(0, number)[1]
        expected.setdefault(name, []).append(number)
    moved = move_to_square([Turn("user", text)], Coordinates.from_variables(numbers), shown, vision)
    assert moved == Coordinates.from_variables(expected)


_PINPOINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=4).map(
    lambda pairs: ",".join(f"({width}x{height})" for width, height in pairs)
)


@cases(offline=200, in_ci=20)
@given(
    st.one_of(st.text("()[]x,. 0123456789", max_size=30), _PINPOINTS),
    sizes,
    st.sampled_from(("flat", "spatial_unpad")),
    st.sampled_from(("anyres", "anyres_max_1", "anyres_max_4")),
)  # fmt: skip
def test_tiles_are_as_many_as_are_counted(pinpoints, size, merge, ratio):
    from llava.data.media import cut_views

    def build() -> VisionConfig:
        return VisionConfig(
            vision_tower="t", vision_config={}, hidden_size=8, image_size=14, patches_per_side=2,
            image_aspect_ratio=ratio, image_grid_pinpoints=pinpoints, patch_merge_type=merge,
        )  # fmt: skip

    vision = attempt(build)
    if isinstance(vision, ValueError):
        assert names(vision, "--image_grid_pinpoints", "--mm_patch_merge_type", "--image_aspect_ratio")
        return
    tiles = vision.anyres
    assert tiles.num_tokens(size) <= tiles.most_tokens
    assert tiles.num_views(size) <= tiles.most_views
    assert tiles.choose_grid(size) in parse_pinpoints(pinpoints, 14)
    window = tiles.patches_without_padding(size)
    grid = tiles.choose_grid(size)
    assert 0 <= window.top <= grid.height * 2 - window.size.height
    assert 0 <= window.left <= grid.width * 2 - window.size.width
    if size[0] * size[1] < 50_000 and tiles.num_views(size) < 50:
        views = cut_views(torch.zeros(*size, 3, dtype=torch.uint8), vision)
        assert views.shape == (tiles.num_views(size), 3, 14, 14)


@cases(offline=100, in_ci=20)
@given(
    shares, shares, st.lists(st.tuples(shares, shares, shares, shares), min_size=1, max_size=4), st.one_of(shares, wild)
)
def test_a_tube_has_its_boxes_at_its_ends_and_none_outside(start, end, boxes, time):
    tube = Tube(TimeSpan(min(start, end), max(start, end)), tuple(Box(*box) for box in boxes))
    found = tube.box_at(time)
    if found is None:
        assert not tube.span.start < time < tube.span.end
        return
    for i, number in enumerate(found):
        corner = [box[i] for box in boxes]
        assert min(corner) - 1e-9 <= number <= max(corner) + 1e-9
    if start != end:
        assert tube.box_at(tube.span.start) == pytest.approx(boxes[0])
        assert tube.box_at(tube.span.end) == pytest.approx(boxes[-1])
