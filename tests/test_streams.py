"""Token counts behind each resampler: the laws, the settings they refuse, and their way into other processes."""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest

from llava.config import PROJECTOR_STRIDES, VisionConfig
from llava.token_layout import STREAM_LAWS, stream_law

NEWCOMER = """
from llava.token_layout import stream_law

@stream_law("one_in_ten", shorten=("lower --num_frames",))
def count_one_in_ten(vision, kind, num_frames):
    return (num_frames * vision.grid_patches // 10,)
"""


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A law in a file of its own, known in this process for one test only."""
    monkeypatch.setattr(STREAM_LAWS, "_parts", dict(STREAM_LAWS._parts))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "one_in_ten.py").write_text(NEWCOMER)
    yield importlib.import_module("one_in_ten")
    sys.modules.pop("one_in_ten", None)


@pytest.mark.parametrize(
    ("name", "changes", "image", "video"),
    [
        ("fast_slow_resampler", {}, (81,), (27, 243)),
        ("fast_slow_resampler", {"slow_frames": 2}, (81,), (27, 162)),
        ("fast_slow_resampler", {"projector_type": "pooler", "perceiver_latents": 64}, (64,), (27, 192)),
        ("perceiver", {"perceiver_latents": 7}, (7,), (21,)),
        ("qformer", {"qformer_latents": 5}, (5,), (15,)),
        ("spatial_pool", {}, (64,), (192,)),
        ("spatial_pool", {"spatial_pool_stride": 3}, (36,), (108,)),
        ("spatial_pool", {"spatial_pool_stride": 3, "projector_type": "pooler"}, (9,), (27,)),
        ("spatial_pool", {"spatial_pool_stride": 99}, (1,), (3,)),
        ("masked_drop", {}, (64,), (192,)),
        ("masked_drop", {"mask_drop_ratio": 1.0}, (256,), (768,)),
        ("masked_drop", {"mask_drop_ratio": 0.001}, (1,), (3,)),
        (None, {"projector_type": "pooler"}, (64,), (192,)),
        (None, {"projector_type": "pooler", "patches_per_side": 27}, (196,), (588,)),
    ],
)  # fmt: skip
def test_lengths_of_streams(italian_vision, name, changes, image, video):
    vision = replace(italian_vision, resampler_type=name, resample_images=True, **changes)
    assert vision.stream_lengths("image") == image
    assert vision.stream_lengths("video", 3) == video


@pytest.mark.parametrize("name", STREAM_LAWS.names())
def test_spans_have_the_lengths_of_the_streams(italian_vision, name):
    vision = replace(italian_vision, resampler_type=name)
    spans = vision.spans("video", 3)
    assert tuple(span.length for span in spans) == vision.stream_lengths("video", 3)
    assert [span.start for span in spans] == ["<vid_start>", "<slow_vid_start>"][: len(spans)]
    assert [span.length for span in vision.spans("image")] == [256], "images keep one token a patch"


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", STREAM_LAWS.names())
def test_what_an_error_recommends_makes_spans_shorter(italian_vision, name, kind):
    vision = replace(italian_vision, resampler_type=name, resample_images=True)
    ways = vision.ways_to_shorten({kind})
    assert len(ways) == (2 if kind == "video" else 1)
    for way in ways:
        verb, flag = way.split(" --")
        setting = flag.removeprefix("mm_")
        value = getattr(vision, setting)
        # 81 latents are a square, and so must be the fewer ones.
        less = 64 if setting == "perceiver_latents" else type(value)(value / 2)
        changed = replace(vision, **{setting: less if verb == "lower" else value * 2})
        frames = {"image": 1, "video": changed.max_frames}[kind]
        assert changed.num_tokens(kind, frames) < vision.num_tokens(kind, {"image": 1, "video": 4}[kind])


def test_what_shortens_spans_that_no_resampler_makes(italian_vision):
    vision = replace(italian_vision, resampler_type="perceiver")
    assert vision.ways_to_shorten({"image"}) == []
    assert vision.ways_to_shorten({"video"}) == ["lower --num_frames", "lower --mm_perceiver_latents"]
    assert replace(vision, resampler_type=None, video_fps=1.0).ways_to_shorten({"video"}) == ["lower --frames_upbound"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("fast_slow_resampler", {"resampler_heads": 0}, "--mm_resampler_heads is 0; it must be at least 1"),
        ("fast_slow_resampler", {"projector_type": "pooler"}, r"_latents is 81 .* 8 x 8 grid .* at most 64"),
        ("perceiver", {"perceiver_latents": 0}, "--mm_perceiver_latents is 0; it must be at least 1"),
        ("perceiver", {"perceiver_depth": 0}, "--mm_perceiver_depth is 0"),
        ("perceiver", {"resampler_width": 30}, "--mm_resampler_width 30 is no multiple of --mm_resampler_heads 8"),
        ("qformer", {"qformer_latents": 0}, "--mm_qformer_latents is 0"),
        ("qformer", {"qformer_depth": -1}, "--mm_qformer_depth is -1"),
        ("qformer", {"resampler_width": 0}, "--mm_resampler_width is 0"),
        ("spatial_pool", {"spatial_pool_stride": 0}, "--mm_spatial_pool_stride is 0"),
        ("spatial_pool", {"spatial_pool_mode": "conv"}, "_pool_mode is 'conv'; known: average, max, bilinear"),
        ("masked_drop", {"mask_drop_ratio": 0.0}, "--mm_mask_drop_ratio is 0.0"),
        ("masked_drop", {"mask_drop_ratio": 1.5}, "--mm_mask_drop_ratio is 1.5"),
        ("none_such", {}, "--mm_resampler_type 'none_such'; known: fast_slow_resampler, masked_drop, "),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(italian_vision, name, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(italian_vision, resampler_type=name, **changes)


def test_settings_of_other_resamplers_are_not_looked_at(italian_vision):
    replace(italian_vision, resampler_type="masked_drop", perceiver_latents=80, qformer_depth=0)


def test_every_pooling_projector_halves_the_side_rounded_up(italian_vision):
    assert PROJECTOR_STRIDES == {"pooler": 2}
    for side, expected in ((16, 8), (27, 14), (1, 1)):
        vision = replace(italian_vision, resampler_type=None, projector_type="pooler", patches_per_side=side)
        assert (vision.num_patches, vision.grid_side, vision.grid_patches) == (side**2, expected, expected**2)


@pytest.mark.parametrize("name", [None, *STREAM_LAWS.names()])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda vision: pickle.loads(pickle.dumps(vision))])
def test_copies_are_equal(italian_vision, name, duplicate):
    vision = replace(italian_vision, resampler_type=name, token_ids={"<im_start>": 7})
    assert duplicate(vision) == vision
    assert duplicate(vision) is not vision


def test_a_newcomers_law_counts_in_a_process_that_shares_no_memory(italian_vision, newcomer):
    vision = replace(italian_vision, resampler_type="one_in_ten")
    assert vision.num_tokens("video", 4) == 102
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(VisionConfig.num_tokens, vision, "video", 4).result() == 102


def test_a_law_is_a_function_that_stays_one(newcomer):
    assert STREAM_LAWS.get("one_in_ten").count is newcomer.count_one_in_ten
    with pytest.raises(ValueError, match="the resampler 'one_in_ten' is registered twice"):
        stream_law("one_in_ten")(newcomer.count_one_in_ten)


@pytest.mark.parametrize(("kind", "lengths"), [("image", (4, 4)), ("video", (4, 4, 4)), ("video", ())])
def test_a_law_with_streams_that_have_no_markers(italian_vision, newcomer, kind, lengths):
    stream_law("odd")(lambda vision, kind, num_frames: lengths)
    vision = replace(italian_vision, resampler_type="odd", resample_images=True)
    with pytest.raises(ValueError, match=f"'odd' counts {len(lengths)} streams for one {kind}"):
        vision.spans(kind, 2)
