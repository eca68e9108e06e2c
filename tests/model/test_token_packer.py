"""The TokenPacker: token counts, gradients, locality, and equality with a window-by-window reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.config import VisionConfig
from llava.model.multimodal_resampler import build_resampler
from llava.model.multimodal_resampler.token_packer import (
    TokenPacker,
    WindowAttention,
    axis_windows,
    grid_windows,
    pool_space,
    pool_time,
    window_index,
)

WIDTH, INNER, HEADS = 12, 16, 4


def make_vision(side: int = 16, latents: int = 81, fast: int = 9, **changes) -> VisionConfig:
    settings = {"resampler_type": "fast_slow_resampler", "resampler_width": INNER, "resampler_heads": HEADS} | changes
    return VisionConfig(
        vision_tower="none", vision_config={"model_type": "dinov2"}, hidden_size=8, image_size=14 * side,
        patches_per_side=side, perceiver_latents=latents, perceiver_latents_fast=fast, **settings,
    )  # fmt: skip


def make_packer(**changes) -> TokenPacker:
    torch.manual_seed(0)
    packer = build_resampler(make_vision(**changes), WIDTH)
    assert isinstance(packer, TokenPacker)
    return packer


def make_attention() -> WindowAttention:
    torch.manual_seed(1)
    attention = WindowAttention(WIDTH, INNER, HEADS)
    for norm in (attention.ln_q, attention.ln_k, attention.ln_v):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    return attention


# Token counts.


@pytest.mark.parametrize("frames", [1, 2, 4, 7])
@pytest.mark.parametrize("slow_frames", [0, 1, 5])
@pytest.mark.parametrize(("side", "latents", "fast"), [(16, 81, 9), (4, 16, 4), (5, 9, 4)])
def test_video_tokens_are_as_many_as_the_configuration_says(
    side: int, latents: int, fast: int, frames: int, slow_frames: int
) -> None:
    packer = make_packer(side=side, latents=latents, fast=fast, slow_frames=slow_frames)
    tokens = packer(torch.randn(2, frames, side * side, WIDTH), "video")
    assert tokens.shape == (2, packer.vision.layout.num_tokens("video", frames), WIDTH)


@pytest.mark.parametrize(("resample", "expected"), [(False, 256), (True, 81)])
def test_image_tokens_are_as_many_as_the_configuration_says(resample: bool, expected: int) -> None:
    packer = make_packer(resample_images=resample)
    patches = torch.randn(2, 1, 256, WIDTH)
    tokens = packer(patches, "image")
    assert tokens.shape == (2, expected, WIDTH)
    assert packer.vision.layout.num_tokens("image") == expected
    if not resample:
        assert torch.equal(tokens, patches[:, 0])


def test_the_fast_span_stands_before_the_slow_one() -> None:
    packer = make_packer(slow_frames=2)
    features = torch.randn(1, 4, 256, WIDTH)
    tokens = packer(features, "video")
    torch.nn.init.zeros_(packer.fast.to_out.weight)
    difference = (packer(features, "video") - tokens).abs().sum(-1)[0]
    assert (difference[:36] > 0).all()
    assert (difference[36:] == 0).all()


# Gradients.


@pytest.mark.parametrize("slow_frames", [0, 2, 3])
def test_every_parameter_gets_a_gradient(slow_frames: int) -> None:
    packer = make_packer(slow_frames=slow_frames)
    tokens = packer(torch.randn(2, 4, 256, WIDTH), "video")
    (tokens * torch.randn_like(tokens)).sum().backward()
    # With one frame a window there is nothing to weigh: query and key have no say, by construction.
    weighing = ("slow.to_q", "slow.to_k", "slow.ln_q", "slow.ln_k", "slow.q_proj", "slow.k_proj")
    for name, parameter in packer.named_parameters():
        assert parameter.grad is not None, name
        idle = slow_frames == 0 and name.startswith(weighing)
        # A bias of the keys moves all scores of a window alike, which a softmax does not see.
        if idle or name.endswith(("ln_k.bias", "k_proj.bias")):
            torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), atol=1e-4, rtol=0)
        else:
            assert parameter.grad.abs().max() > 1e-4, name


def test_gradients_reach_the_features_of_every_patch() -> None:
    packer = make_packer()
    features = torch.randn(1, 4, 256, WIDTH, requires_grad=True)
    tokens = packer(features, "video")
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert (features.grad.abs().sum(-1) > 0).all()


def test_a_window_of_one_position_equals_full_attention_over_it() -> None:
    """The short cut gives what the general way gives: the position twice, one of them masked."""
    attention = make_attention()
    queries, keys = torch.randn(3, 4, WIDTH), torch.randn(3, 4, WIDTH)
    short = attention(queries, keys, tuple((i,) for i in range(4)))
    # A fifth window, of two positions, makes the others be padded.
    padded = attention(torch.cat([queries, queries[:, :1]], dim=1), keys, ((0,), (1,), (2,), (3,), (0, 1)))
    torch.testing.assert_close(short, padded[:, :4])


@pytest.mark.parametrize("slow_frames", [0, 2])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_no_media_give_zero_gradients_and_not_none(slow_frames: int, kind: str) -> None:
    packer = make_packer(slow_frames=slow_frames, resample_images=True)
    frames = 4 if kind == "video" else 1
    tokens = packer(torch.zeros(0, frames, 256, WIDTH), kind)
    assert tokens.shape == (0, packer.vision.layout.num_tokens(kind, frames), WIDTH)
    tokens.sum().backward()
    for name, parameter in packer.named_parameters():
        if kind == "image" and name.startswith("fast."):
            continue  # An image has no fast span; ranks without media run an empty video.
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name


# Locality: an output may depend on its window, and on the support of its query's resize.


def resize_support(length: int, new_length: int) -> Tensor:
    """Bool (new_length, length): which positions a linear resize of an axis mixes into a query."""
    impulses = torch.eye(length).unsqueeze(1)
    return F.interpolate(impulses, size=new_length, mode="linear", align_corners=False)[:, 0].T > 0


def allowed_on_axis(length: int, new_length: int) -> tuple[Tensor, Tensor]:
    """Window and resize support of each cell of an axis, as bool (new_length, length)."""
    window = torch.zeros(new_length, length, dtype=torch.bool)
    for i in range(new_length):
        window[i, math.floor(i * length / new_length) : math.ceil((i + 1) * length / new_length)] = True
    return window, resize_support(length, new_length)


def allowed_on_grid(side: int, new_side: int) -> Tensor:
    """Bool (new_side^2, side^2): what a cell's output may depend on."""
    window, support = allowed_on_axis(side, new_side)
    either = [torch.einsum("ay,bx->abyx", axis.int(), axis.int()) for axis in (window, support)]
    return (either[0] + either[1] > 0).flatten(2).flatten(0, 1)


def dependence(function, inputs: Tensor) -> Tensor:
    """Bool (outputs, inputs): whether exchanging one input's features changes an output's bits.

    ``function`` maps (rows, inputs, width) to (rows, outputs, width); each row has another input
    exchanged.
    """
    count = inputs.shape[0]
    rows = inputs.expand(count, -1, -1).clone()
    rows[torch.arange(count), torch.arange(count)] = torch.randn(count, WIDTH) * 3
    with torch.no_grad():
        # Twice the same rows, so that a difference in bits can come from nothing but the exchange.
        plain = function(inputs.expand(count, -1, -1).contiguous())
        return (function(rows) != plain).any(-1).T


@pytest.mark.parametrize(("side", "new_side"), [(16, 9), (27, 9), (9, 3), (5, 3), (4, 4)])
def test_a_patch_changes_only_the_cells_whose_window_holds_it(side: int, new_side: int) -> None:
    attention = make_attention()
    torch.manual_seed(2)
    found = dependence(lambda x: pool_space(attention, x, side, new_side), torch.randn(side * side, WIDTH))
    allowed = allowed_on_grid(side, new_side)
    assert not (found & ~allowed).any()
    assert found.sum() == allowed.sum()


@pytest.mark.parametrize(("frames", "length"), [(4, 4), (4, 2), (4, 3), (5, 2), (8, 4), (1, 1)])
def test_a_frame_changes_only_the_times_whose_window_holds_it(frames: int, length: int) -> None:
    attention = make_attention()
    torch.manual_seed(3)

    def pool_one_cell(x: Tensor) -> Tensor:
        return pool_time(attention, x.unsqueeze(2), length).squeeze(2)

    found = dependence(pool_one_cell, torch.randn(frames, WIDTH))
    window, support = allowed_on_axis(frames, length)
    assert torch.equal(found, window | support)


def test_time_is_pooled_cell_by_cell() -> None:
    attention = make_attention()
    cells = torch.randn(2, 4, 9, WIDTH)
    changed = cells.clone()
    changed[1, 2, 5] += 1
    with torch.no_grad():
        difference = (pool_time(attention, changed, 2) != pool_time(attention, cells, 2)).any(-1)
    assert difference.nonzero().tolist() == [[1, 1, 5]]


@pytest.mark.parametrize("patch", [0, 17, 100, 255])
def test_a_patch_reaches_only_its_own_frame_and_cells_of_a_video(patch: int) -> None:
    packer = make_packer()
    features = torch.randn(2, 4, 256, WIDTH)
    changed = features.clone()
    changed[1, 2, patch] += 1
    with torch.no_grad():
        difference = (packer(changed, "video") != packer(features, "video")).any(-1)
    fast, slow = difference[:, :36].unflatten(1, (4, 9)), difference[:, 36:].unflatten(1, (4, 81))
    main = allowed_on_grid(16, 9)[:, patch]
    expected_slow = torch.zeros_like(slow)
    expected_slow[1, 2] = main
    assert torch.equal(slow, expected_slow)
    expected_fast = torch.zeros_like(fast)
    expected_fast[1, 2] = allowed_on_grid(9, 3)[:, main].any(1)
    assert torch.equal(fast, expected_fast)


# Equality with a reference that walks the windows one by one.


def attend_window(attention: WindowAttention, query: Tensor, window: Tensor) -> Tensor:
    """Multi-head attention of one query (width) over one window (positions, width), by PyTorch."""
    q = attention.ln_q(attention.to_q(query))[None, None]
    k = attention.ln_k(attention.to_k(window))[:, None]
    v = attention.ln_v(attention.to_v(window))[:, None]
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    output, _ = F.multi_head_attention_forward(
        q, k, v, INNER, HEADS, None, torch.cat([p.bias for p in projections]), None, None, False, 0.0,
        attention.o_proj.weight, attention.o_proj.bias, use_separate_proj_weight=True,
        q_proj_weight=projections[0].weight, k_proj_weight=projections[1].weight, v_proj_weight=projections[2].weight,
    )  # fmt: skip
    return query + attention.to_out(output[0, 0])


def pool_space_by_loops(attention: WindowAttention, frame: Tensor, side: int, new_side: int) -> Tensor:
    """(side^2, width) to (new_side^2, width), with the windows of adaptive pooling."""
    grid = frame.view(side, side, WIDTH)
    resized = F.interpolate(grid.permute(2, 0, 1)[None], size=(new_side, new_side), mode="bilinear")[0]

    def cut(i: int) -> slice:
        return slice(math.floor(i * side / new_side), math.ceil((i + 1) * side / new_side))

    return torch.stack(
        [
            attend_window(attention, resized[:, y, x], grid[cut(y), cut(x)].reshape(-1, WIDTH))
            for y in range(new_side)
            for x in range(new_side)
        ]
    )


def assert_equal_with_gradients(attention: WindowAttention, x: Tensor, ours, reference) -> None:
    x = x.requires_grad_()
    weights = None
    gradients = []
    for function in (ours, reference):
        output = function(x)
        weights = torch.randn_like(output) if weights is None else weights
        gradients.append((output, *torch.autograd.grad((output * weights).sum(), [x, *attention.parameters()])))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("side", "new_side"), [(27, 9), (9, 3), (6, 3), (16, 9), (7, 3), (3, 3)])
def test_space_equals_attention_window_by_window(side: int, new_side: int) -> None:
    attention = make_attention()
    assert_equal_with_gradients(
        attention,
        torch.randn(1, side * side, WIDTH),
        lambda x: pool_space(attention, x, side, new_side),
        lambda x: torch.stack([pool_space_by_loops(attention, frame, side, new_side) for frame in x]),
    )


@pytest.mark.parametrize(("frames", "length"), [(4, 2), (6, 2), (5, 3), (3, 3)])
def test_time_equals_attention_window_by_window(frames: int, length: int) -> None:
    attention = make_attention()

    def by_loops(cells: Tensor) -> Tensor:
        resized = F.interpolate(cells.permute(1, 2, 0), size=length, mode="linear").permute(2, 0, 1)
        return torch.stack(
            [
                torch.stack(
                    [
                        attend_window(
                            attention,
                            resized[t, cell],
                            cells[math.floor(t * frames / length) : math.ceil((t + 1) * frames / length), cell],
                        )
                        for cell in range(cells.shape[1])
                    ]
                )
                for t in range(length)
            ]
        )

    assert_equal_with_gradients(
        attention,
        torch.randn(2, frames, 4, WIDTH),
        lambda x: pool_time(attention, x, length),
        lambda x: torch.stack([by_loops(cells) for cells in x]),
    )


# Windows.


@pytest.mark.parametrize(("length", "count"), [(16, 9), (27, 9), (9, 3), (7, 3), (37, 9), (5, 5), (4, 1), (4, 3)])
def test_windows_are_those_of_adaptive_pooling(length: int, count: int) -> None:
    pooled = F.adaptive_avg_pool1d(torch.eye(length).unsqueeze(1), count)[:, 0].T
    assert [tuple(row.nonzero().flatten().tolist()) for row in pooled] == list(axis_windows(length, count))


def test_windows_of_a_grid_are_those_of_adaptive_pooling() -> None:
    pooled = F.adaptive_avg_pool2d(torch.eye(256).view(256, 1, 16, 16), 9).view(256, 81).T
    assert [tuple(row.nonzero().flatten().tolist()) for row in pooled] == list(grid_windows(16, 9))


def test_short_windows_are_padded_and_masked() -> None:
    index, mask = window_index(((0, 1, 2), (2, 3)), torch.device("cpu"))
    assert mask is not None
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    assert index[mask].tolist() == [0, 1, 2, 2, 3]
    assert window_index(((0, 1), (2, 3)), torch.device("cpu"))[1] is None


# Precision and mistakes.


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_finite_and_near_fp32(autocast: bool) -> None:
    packer = make_packer(slow_frames=2)
    features = torch.randn(2, 4, 256, WIDTH)
    expected = packer(features, "video")
    packer = packer if autocast else packer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens = packer(features.bfloat16(), "video")
        tokens.float().square().mean().backward()
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), expected, atol=0.06, rtol=0.06)
    assert all(torch.isfinite(parameter.grad).all() for parameter in packer.parameters())


@pytest.mark.parametrize("large", [1e3, 3e4])
def test_large_features_do_not_overflow(large: float) -> None:
    packer = make_packer(slow_frames=2).bfloat16()
    assert torch.isfinite(packer((torch.randn(1, 4, 256, WIDTH) * large).bfloat16(), "video")).all()


@pytest.mark.parametrize(
    ("flag", "changes", "nearest"),
    [
        ("--mm_perceiver_latents", {"latents": 80}, "64 and 81"),
        ("--mm_perceiver_latents", {"latents": 82}, "81 and 100"),
        ("--mm_perceiver_latents_fast", {"fast": 8}, "4 and 9"),
        ("--mm_perceiver_latents_fast", {"fast": 0}, "1 and 4"),
    ],
)
def test_latents_that_are_no_square_are_an_error(flag: str, changes: dict[str, int], nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"{flag} is \d+, which is not a square; the nearest squares are {nearest}$"):
        make_vision(**changes)


@pytest.mark.parametrize(
    ("changes", "limit"), [({"side": 8, "latents": 81}, "at most 64"), ({"latents": 4, "fast": 9}, "at most 4")]
)
def test_latents_finer_than_their_grid_are_an_error(changes: dict[str, int], limit: str) -> None:
    with pytest.raises(ValueError, match=f"finer than .* use {limit}"):
        make_vision(**changes)


def test_a_width_that_the_heads_do_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match="--mm_resampler_width 10 is no multiple of --mm_resampler_heads 4"):
        make_vision(resampler_width=10)
