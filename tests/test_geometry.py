"""Geometry: coordinates in the tower's square say what its pixels say, the tiles of anyres, and boxes that overlap.

Anyres is golden by hand, in parity with transformers' LLaVA-NeXT, and held to what always holds.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from llava.data.media import fit_frames
from llava.geometry import (
    DEFAULT_PINPOINTS,
    AnyRes,
    Box,
    Size,
    TimeSpan,
    box_iou,
    box_ious,
    fit_into,
    parse_aspect_ratio,
    parse_pinpoints,
    span_iou,
)

DEFAULT = [(2, 1), (1, 2), (2, 2), (1, 3), (3, 1)]


def random_sizes(number: int, seed: int = 0) -> list[tuple[int, int]]:
    """Heights and widths from 1 to some 3,000, small ones as often as large ones."""
    logs = torch.rand(number, 2, generator=torch.Generator().manual_seed(seed)) * math.log(3000)
    return [(height, width) for height, width in logs.exp().int().tolist()]


@pytest.fixture
def anyres() -> AnyRes:
    """Tiles of 224 pixels and 16 x 16 patches."""
    return AnyRes(224, 16, 256, parse_pinpoints(DEFAULT_PINPOINTS, 224), "spatial_unpad")


# Canvas in tiles; size on the canvas; window of patches; tokens with spatial_unpad.
GOLDEN = {
    (448, 224): ((2, 1), (448, 224), (0, 0, (32, 16)), 256 + 32 * 17),
    (448, 448): ((2, 2), (448, 448), (0, 0, (32, 32)), 256 + 32 * 33),
    (480, 640): ((2, 2), (336, 448), (4, 0, (24, 32)), 256 + 24 * 33),
    (640, 480): ((2, 2), (448, 336), (0, 4, (32, 24)), 256 + 32 * 25),
    (100, 300): ((1, 2), (150, 448), (3, 0, (10, 32)), 256 + 10 * 33),
    (100, 50): ((2, 1), (448, 224), (0, 0, (32, 16)), 256 + 32 * 17),
    (224, 224): ((2, 1), (224, 224), (8, 0, (16, 16)), 256 + 16 * 17),
    (1, 2000): ((1, 3), (1, 672), (7, 0, (2, 48)), 256 + 2 * 49),
    (2000, 1): ((3, 1), (672, 1), (0, 7, (48, 2)), 256 + 48 * 3),
    (1, 1): ((2, 1), (224, 224), (8, 0, (16, 16)), 256 + 16 * 17),
}


@pytest.mark.parametrize("size", GOLDEN, ids=str)
def test_golden_geometry(anyres: AnyRes, size: tuple[int, int]) -> None:
    grid, fitted, window, tokens = GOLDEN[size]
    assert anyres.place(size) == (grid, fitted)
    assert anyres.patches_without_padding(size) == window
    assert anyres.num_tokens(size) == tokens
    assert anyres.num_views(size) == 1 + grid[0] * grid[1]
    assert replace(anyres, merge_type="flat").num_tokens(size) == 256 * (1 + grid[0] * grid[1])


def test_of_canvases_that_keep_as_much_the_least_wasteful_is_taken(anyres: AnyRes) -> None:
    either = replace(anyres, grids=(Size(2, 2), Size(1, 1)))
    assert either.choose_grid((100, 100)) == (1, 1)
    assert either.choose_grid((300, 300)) == (2, 2)


def test_a_canvas_of_one_tile_still_has_the_whole_picture_before_it(anyres: AnyRes) -> None:
    single = replace(anyres, grids=(Size(1, 1),))
    assert single.num_views((300, 300)) == 2
    assert single.num_tokens((300, 300)) == 256 + 16 * 17


def test_a_limit_shrinks_larger_grids_only(anyres: AnyRes) -> None:
    limited = replace(anyres, grids=parse_pinpoints("(1x1),...,(6x6)", 224), max_tiles=4)
    assert limited.num_tokens((448, 448)) == 256 + 32 * 33
    # 96 x 96 patches are 9 tiles' worth, 1.5 times too many each way.
    assert limited.num_tokens((1344, 1344)) == 256 + 32 * 33
    assert replace(limited, max_tiles=None).num_tokens((1344, 1344)) == 256 + 96 * 97
    # 32 x 38 patches are 1.09 times too many each way, which passes.
    assert limited.without_excess(Size(32, 38)) == (32, 38)
    assert limited.without_excess(Size(32, 39)) == (28, 35)


def test_most_tokens_bound_all_pictures_and_are_reached(anyres: AnyRes) -> None:
    wide = replace(anyres, grids=parse_pinpoints("(1x1),...,(4x4)", 224))
    for each in (anyres, wide, replace(wide, max_tiles=3), replace(wide, merge_type="flat")):
        counts = [each.num_tokens(size) for size in random_sizes(100) + [each.canvas(grid) for grid in each.grids]]
        assert max(counts) <= each.most_tokens
        assert each.max_tiles is not None or max(counts) == each.most_tokens
    assert wide.most_views == 17
    # With a limit a partly filled canvas can have more than a full one, which is shrunk.
    small = AnyRes(8, 3, 9, parse_pinpoints("(1x1),...,(3x3)", 8), "spatial_unpad", max_tiles=2)
    counts = [small.num_tokens((height, width)) for height in range(1, 60) for width in range(1, 60)]
    assert max(counts) == small.most_tokens


def test_pictures_stay_within_their_canvas_and_keep_their_shape(anyres: AnyRes) -> None:
    for size in random_sizes(200):
        grid, fitted = anyres.place(size)
        canvas = anyres.canvas(grid)
        assert 1 <= fitted.height <= canvas.height
        assert 1 <= fitted.width <= canvas.width
        assert fitted.height == canvas.height or fitted.width == canvas.width
        assert abs(fitted.height * size[1] - fitted.width * size[0]) <= max(size)
        top, left, shown = anyres.patches_without_padding(size)
        assert top == 0 or left == 0
        assert top + shown.height + top == grid.height * 16
        assert left + shown.width + left == grid.width * 16


def test_canvas_and_window_equal_transformers(anyres: AnyRes) -> None:
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    canvases = [tuple(anyres.canvas(grid)) for grid in anyres.grids]
    # Of a picture that is thinner than a patch theirs leaves nothing.
    sizes = [size for size in random_sizes(400) if 1 / 16 <= size[0] / size[1] <= 16]
    assert len(sizes) > 200
    for size in sizes:
        grid = anyres.choose_grid(size)
        assert tuple(anyres.canvas(grid)) == select_best_resolution(size, canvases), size
        whole = torch.arange(grid.area * 256).view(1, grid.height * 16, grid.width * 16)
        theirs = unpad_image(whole, size)
        top, left, shown = anyres.patches_without_padding(size)
        assert torch.equal(whole[:, top : top + shown.height, left : left + shown.width], theirs), size


@pytest.mark.parametrize(
    ("picture", "canvas", "cut", "rounded"),
    [((2, 3), (4, 4), (2, 4), (3, 4)), ((3, 2), (4, 4), (4, 2), (4, 3)), ((1, 100), (5, 5), (1, 5), (1, 5))],
)
def test_fitting_rounds_the_other_side(picture, canvas, cut, rounded) -> None:
    assert fit_into(picture, canvas) == cut
    assert fit_into(picture, canvas, round_up=True) == rounded


@pytest.mark.parametrize(
    ("text", "grids"),
    [
        (DEFAULT_PINPOINTS, DEFAULT),
        ("(1x1),...,(2x3)", [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)]),
        ("[(2x1)]", [(1, 2)]),
        ("[[224, 448], [448, 224], [448,448]]", [(2, 1), (1, 2), (2, 2)]),
        ("[(672, 224)]", [(1, 3)]),
    ],
)
def test_pinpoints(text: str, grids: list[tuple[int, int]]) -> None:
    assert list(parse_pinpoints(text, 224)) == grids


@pytest.mark.parametrize(
    "text",
    ["", "1x2", "(0x2)", "(1x2)...(2x2)", "(1x1),...", "(2x2),...,(1x1)", "[[224, 448],...,[448, 448]]", "(1x2) a"],
)
def test_pinpoints_of_another_form_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"--image_grid_pinpoints is .* expected"):
        parse_pinpoints(text, 224)


def test_pinpoints_must_be_whole_tiles() -> None:
    with pytest.raises(ValueError, match=r"--image_grid_pinpoints has \(224, 300\) pixels, but a tile is 224 x 224"):
        parse_pinpoints("[[448, 224], [224, 300]]", 224)


def test_aspect_ratios() -> None:
    assert parse_aspect_ratio("pad") == (False, None)
    assert parse_aspect_ratio("anyres") == (True, None)
    assert parse_aspect_ratio("anyres_max_9") == (True, 9)
    assert parse_aspect_ratio("anyres_max_0") == parse_aspect_ratio("anyres_max_") == (False, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid_pinpoints": "1x2"}, "--image_grid_pinpoints is '1x2'"),
        ({"patch_merge_type": "spatial"}, "--mm_patch_merge_type is 'spatial'; known: flat, spatial_unpad"),
        ({"image_aspect_ratio": "anyres_max_4"}, "anyres_max_4 shrinks the grid that --mm_patch_merge_type"),
        ({"image_aspect_ratio": "pad", "patch_merge_type": "spatial_unpad"}, "needs --image_aspect_ratio anyres"),
        ({"resample_images": True, "patch_merge_type": "spatial_unpad"}, "--mm_resample_images takes the grid away"),
    ],
)
def test_settings_that_contradict_one_another(italian_vision, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(italian_vision, **{"image_aspect_ratio": "anyres", **changes})


def test_counts_of_a_vision_config(italian_vision) -> None:
    flat = replace(italian_vision, image_aspect_ratio="anyres")
    assert flat.layout.num_tokens("image", image_size=(480, 640)) == flat.layout.most_image_tokens == 5 * 256
    assert replace(flat, resample_images=True).layout.num_tokens("image", image_size=(480, 640)) == 5 * 81
    unpadded = replace(flat, patch_merge_type="spatial_unpad")
    (span,) = unpadded.layout.spans("image", image_size=(480, 640))
    assert (span.start, span.length) == ("<im_start>", 256 + 24 * 33)
    assert unpadded.layout.num_tokens("video", 4) == italian_vision.layout.num_tokens("video", 4)
    pooled = replace(unpadded, projector_type="pooler", perceiver_latents=64)
    assert pooled.layout.num_tokens("image", image_size=(480, 640)) == 64 + 12 * 17
    square = italian_vision.layout
    assert square.num_tokens("image", image_size=(480, 640)) == square.most_image_tokens == 256
    assert pickle.loads(pickle.dumps(unpadded)) == unpadded
    with pytest.raises(ValueError, match="depends on its size"):
        flat.layout.num_tokens("image")


# The square.


@pytest.mark.parametrize("manner", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("size", [(120, 200), (200, 120), (160, 160), (57, 300)])
def test_a_mark_lies_where_its_coordinates_say(manner: str, size: tuple[int, int], tiny_vision) -> None:
    vision = replace(
        tiny_vision,
        image_aspect_ratio="pad" if manner == "pad" else "square",
        image_resize_size=64 if manner == "crop" else None,
        image_mean=(0.0, 0.0, 0.0),
    )
    height, width = size
    # A mark in the middle third, a little above and left of the centre: no crop cuts it off.
    top, left, tall, wide = int(height * 0.4), int(width * 0.42), max(height // 10, 8), max(width // 10, 8)
    picture = torch.zeros(height, width, 3, dtype=torch.uint8)
    picture[top : top + tall, left : left + wide] = 255
    square = fit_frames(picture[None], vision)[0].float().mean(0)
    mass = square / square.sum()
    side = vision.image_size
    centres = (torch.arange(side) + 0.5) / side
    found = float((mass.sum(0) * centres).sum()), float((mass.sum(1) * centres).sum())

    letterbox = vision.letterbox(size)
    point = (left + wide / 2) / width, (top + tall / 2) / height
    assert letterbox.to_square(*point) == pytest.approx(found, abs=0.75 / side)
    assert letterbox.from_square(*letterbox.to_square(*point)) == pytest.approx(point)


def test_what_is_cut_off_goes_to_the_edge(tiny_vision) -> None:
    letterbox = replace(tiny_vision, image_resize_size=64).letterbox((100, 300))
    assert letterbox.left < 0
    assert letterbox.to_square(0.0, 0.5)[0] == 0.0
    assert letterbox.to_square(1.0, 0.5)[0] == 1.0
    padded = replace(tiny_vision, image_aspect_ratio="pad").letterbox((100, 300))
    assert padded.from_square(0.5, 0.0) == (0.5, 0.0)
    assert padded.from_square(0.5, 1.0) == (0.5, 1.0)


# Intersection over union.


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
