"""Token counts behind each resampler: the spans, the settings that are refused, and their way into other processes."""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import pytest

from llava.config import VisionConfig
from llava.token_layout import PROJECTOR_SETTINGS, RESAMPLER_SETTINGS, ProjectorSettings, ResamplerSettings, TokenLayout

NEWCOMER = """
from dataclasses import dataclass

from llava.token_layout import RESAMPLER_SETTINGS, ResamplerSettings

@RESAMPLER_SETTINGS.register("one_in_ten")
@dataclass(frozen=True)
class OneInTen(ResamplerSettings):
    share: int = 10
    perceiver_depth: int = 0
    ratio: float = 1.0
    names: list = None
    shorten = ("lower --num_frames",)

    def count_tokens(self, side, kind, num_frames):
        return (num_frames * side**2 // self.share,)
"""


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """Settings in a file of their own, known in this process for one test only."""
    for registry in (RESAMPLER_SETTINGS, PROJECTOR_SETTINGS):
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))
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
def test_lengths_of_spans(italian_vision, name, changes, image, video):
    vision = replace(italian_vision, resampler_type=name, resample_images=True, **changes)
    assert vision.layout.count_tokens("image") == image
    assert vision.layout.count_tokens("video", 3) == video


@pytest.mark.parametrize("name", RESAMPLER_SETTINGS.names())
def test_spans_have_the_lengths_that_are_counted(italian_vision, name):
    vision = replace(italian_vision, resampler_type=name)
    spans = vision.layout.spans("video", 3)
    assert tuple(span.length for span in spans) == vision.layout.count_tokens("video", 3)
    assert [span.start for span in spans] == ["<vid_start>", "<slow_vid_start>"][: len(spans)]
    assert [span.length for span in vision.layout.spans("image")] == [256], "images keep one token a patch"


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", RESAMPLER_SETTINGS.names())
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
        assert changed.layout.num_tokens(kind, frames) < vision.layout.num_tokens(kind, {"image": 1, "video": 4}[kind])


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
    assert PROJECTOR_SETTINGS.names() == ["pooler"]
    for side, expected in ((16, 8), (27, 14), (1, 1)):
        vision = replace(italian_vision, resampler_type=None, projector_type="pooler", patches_per_side=side)
        assert (vision.patches_per_side, vision.grid_side) == (side, expected)
        assert vision.layout.grid_patches == expected**2


@pytest.mark.parametrize("name", [None, *RESAMPLER_SETTINGS.names()])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda vision: pickle.loads(pickle.dumps(vision))])
def test_copies_are_equal(italian_vision, name, duplicate):
    vision = replace(italian_vision, resampler_type=name, token_ids={"<im_start>": 7})
    assert duplicate(vision) == vision
    assert duplicate(vision) is not vision


def test_a_newcomer_counts_in_a_process_that_shares_no_memory(italian_vision, newcomer):
    vision = replace(italian_vision, resampler_type="one_in_ten")
    assert vision.layout.num_tokens("video", 4) == 102
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(TokenLayout.num_tokens, vision.layout, "video", 4).result() == 102
        assert pool.submit(VisionConfig.ways_to_shorten, vision, ["video"]).result() == ["lower --num_frames"] * 2


def test_a_name_is_taken_once(newcomer):
    assert RESAMPLER_SETTINGS.get("one_in_ten") is newcomer.OneInTen
    with pytest.raises(ValueError, match="the resampler 'one_in_ten' is registered twice"):
        RESAMPLER_SETTINGS.register("one_in_ten")(newcomer.OneInTen)


@pytest.mark.parametrize(("kind", "lengths"), [("image", (4, 4)), ("video", (4, 4, 4)), ("video", ())])
def test_counts_of_spans_that_have_no_markers(italian_vision, newcomer, kind, lengths):
    @RESAMPLER_SETTINGS.register("odd")
    @dataclass(frozen=True)
    class Odd(ResamplerSettings):
        def count_tokens(self, side, kind, num_frames):
            return lengths

    vision = replace(italian_vision, resampler_type="odd", resample_images=True)
    with pytest.raises(ValueError, match=f"'odd' counts {len(lengths)} spans for one {kind}"):
        vision.layout.spans(kind, 2)


# Settings of a part's own.


def test_own_settings_are_kept_whole(italian_vision, newcomer):
    vision = replace(italian_vision, resampler_type="one_in_ten")
    assert vision.resampler_args == {"share": 10, "ratio": 1.0, "names": None}
    fewer = replace(vision, resampler_args={"share": 32, "ratio": 2}, perceiver_depth=7)
    assert fewer.layout.num_tokens("video", 4) == 32
    assert fewer.resampler == newcomer.OneInTen(share=32, perceiver_depth=7, ratio=2.0)
    assert fewer.resampler_args == {"share": 32, "ratio": 2.0, "names": None}
    assert fewer != vision
    assert pickle.loads(pickle.dumps(fewer)) == fewer


def test_a_projector_of_ones_own_may_pool_the_grid(italian_vision, newcomer):
    @PROJECTOR_SETTINGS.register("coarse")
    @dataclass(frozen=True)
    class Coarse(ProjectorSettings):
        times: int = 4

        def pooled_side(self, side):
            return side // self.times

    vision = replace(italian_vision, projector_type="coarse", resampler_type="spatial_pool", resample_images=True)
    assert (vision.grid_side, vision.layout.num_tokens("image")) == (4, 4)
    finer = replace(vision, projector_args={"times": 2})
    assert (finer.grid_side, finer.layout.num_tokens("image"), finer.projector) == (8, 16, Coarse(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resampler_args": {"stride": 3}}, "--mm_resampler_args has the unknown setting 'stride'; known: share,"),
        ({"resampler_args": {"perceiver_depth": 3}}, "it has a flag of its own, --mm_perceiver_depth"),
        ({"resampler_args": {"share": "3"}}, "--mm_resampler_args has share '3'; expected a value such as 10"),
        ({"resampler_args": {"share": True}}, "--mm_resampler_args has share True; expected a value such as 10"),
        ({"resampler_args": {"share": 0.5}}, "--mm_resampler_args has share 0.5; expected a value such as 10"),
        ({"resampler_args": {"ratio": "x"}}, "--mm_resampler_args has ratio 'x'; expected a value such as 1.0"),
        ({"resampler_type": "perceiver", "resampler_args": {"share": 3}}, "unknown setting 'share'; known: none"),
        ({"resampler_type": None, "resampler_args": {"share": 3}}, "--mm_resampler_args needs --mm_resampler_type"),
        ({"projector_args": {"depth": 3}}, "'mlp2x_gelu' has no settings of its own; .* once its file is imported"),
        ({"projector_type": "pooler", "projector_args": {"stride": 3}}, "--mm_projector_args .* 'stride'; known: none"),
    ],
)  # fmt: skip
def test_own_settings_that_cannot_be(italian_vision, newcomer, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(italian_vision, **{"resampler_type": "one_in_ten", **changes})


def test_settings_that_are_not_declared_well(italian_vision, newcomer):
    @RESAMPLER_SETTINGS.register("demanding")
    @dataclass(frozen=True)
    class Demanding(ResamplerSettings):
        tokens: int

    @RESAMPLER_SETTINGS.register("bare")
    class Bare(ResamplerSettings):
        tokens: int = 3

    with pytest.raises(ValueError, match="--mm_resampler_args lacks 'tokens', which has no default"):
        replace(italian_vision, resampler_type="demanding")
    with pytest.raises(TypeError, match=r"Bare .* decorator @dataclass\(frozen=True\)"):
        replace(italian_vision, resampler_type="bare")
