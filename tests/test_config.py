"""VisionConfig: the counts, the way through a model's configuration, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llava.config import VisionConfig
from llava.constants import VISUAL_TOKENS


@pytest.mark.parametrize(
    ("changes", "kind", "frames", "lengths"),
    [
        ({}, "video", 4, [36, 324]),
        ({}, "video", 1, [9, 81]),
        ({}, "image", 1, [256]),
        ({"resample_images": True}, "image", 1, [81]),
        ({"resampler_type": None}, "image", 1, [256]),
        ({"resampler_type": None, "resample_images": True}, "image", 1, [256]),
        ({"resampler_type": None}, "video", 3, [768]),
        ({"slow_frames": 2}, "video", 4, [36, 162]),
        ({"slow_frames": 2}, "video", 1, [9, 81]),
        ({"patches_per_side": 27, "perceiver_latents": 729}, "video", 2, [18, 1458]),
    ],
)
def test_lengths_of_spans(italian_vision, changes, kind, frames, lengths):
    vision = replace(italian_vision, **changes)
    spans = vision.layout.spans(kind, frames)
    assert [span.length for span in spans] == lengths
    assert vision.layout.num_tokens(kind, frames) == sum(lengths)
    for span in spans:
        assert span.text.startswith(span.start)
        assert span.text.endswith(span.end)
        assert span.text.count("<") == span.length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perceiver_latents": 80}, "--mm_perceiver_latents is 80, which is not a square; .* 64 and 81"),
        ({"perceiver_latents": 82}, "--mm_perceiver_latents is 82, which is not a square; .* 81 and 100"),
        ({"perceiver_latents": 0}, "--mm_perceiver_latents is 0"),
        ({"perceiver_latents_fast": 8}, "--mm_perceiver_latents_fast is 8, which is not a square; .* 4 and 9"),
        ({"perceiver_latents": 289}, r"289 \(17 x 17\), finer than the 16 x 16 grid .* at most 256"),
        ({"perceiver_latents_fast": 100}, r"100 \(10 x 10\), finer than the 9 x 9 grid .* at most 81"),
        ({"resampler_width": 100, "resampler_heads": 8}, "--mm_resampler_width 100 is no multiple of"),
        ({"image_aspect_ratio": "tiles"}, "--image_aspect_ratio is 'tiles'; known: square, pad, anyres, anyres_max_N"),
        ({"image_aspect_ratio": "anyres_max_0"}, "--image_aspect_ratio is 'anyres_max_0'; known: "),
        ({"num_frames": 0}, "--num_frames is 0"),
        ({"frames_upbound": -1}, "--frames_upbound is -1; it must be at least 0"),
        ({"video_fps": -1.0}, "--video_fps must not be negative"),
    ],
)
def test_settings_that_cannot_be(italian_vision, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(italian_vision, **changes)


def test_latents_of_other_resamplers_need_not_be_squares(italian_vision):
    assert replace(italian_vision, resampler_type=None, perceiver_latents=80).perceiver_latents == 80


def test_span_without_room_for_its_markers(italian_vision):
    vision = replace(italian_vision, perceiver_latents_fast=1)
    assert vision.layout.num_tokens("video", 2) == 2 + 162
    with pytest.raises(ValueError, match=r"<vid_start>\.\.\.<vid_end> would have 1 token"):
        vision.layout.num_tokens("video", 1)


def test_most_frames_of_a_video(italian_vision):
    assert italian_vision.max_frames == 4
    assert replace(italian_vision, video_fps=1.0, frames_upbound=7).max_frames == 7
    unbounded = replace(italian_vision, video_fps=1.0, frames_upbound=0)
    assert (unbounded.max_frames, unbounded.is_bounded) == (32, False)
    assert unbounded.ways_to_shorten({"video"})[0] == "set --frames_upbound"


def test_model_config_and_back(italian_vision):
    token_ids = {token: 100 + i for i, token in enumerate(VISUAL_TOKENS)}
    vision = replace(
        italian_vision,
        vision_config={"model_type": "dinov2"},
        token_ids=token_ids,
        image_mean=(0.5, 0.4, 0.3),
        image_padding="black",
    )
    entries = json.loads(json.dumps(vision.to_model_config()))
    assert all(name.startswith("mm_") for name in entries)
    assert VisionConfig.from_model_config(SimpleNamespace(**entries)) == vision
    assert vision.visual_token_ids == list(range(100, 108))
    assert "mm_image_padding" not in italian_vision.to_model_config()  # As in checkpoints from before it.
    with pytest.raises(ValueError, match="mm_image_padding is 'grey'; known: mean, black"):
        replace(vision, image_padding="grey")


def test_model_without_vision():
    assert VisionConfig.from_model_config(SimpleNamespace(vocab_size=10)) is None


def test_missing_token_ids_are_named(italian_vision):
    with pytest.raises(ValueError, match="no id for <im_start>"):
        _ = italian_vision.visual_token_ids
