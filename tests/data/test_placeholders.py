"""Golden: what the placeholders expand to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llava.constants import PLACEHOLDER, VISUAL_TOKENS
from llava.data.placeholders import (
    expand_placeholders,
    placeholder_kinds,
    preprocess_multimodal,
)
from llava.types import Turn

IMAGE = "<im_start>" + 254 * "<im_patch>" + "<im_end>"
VIDEO = (
    "<vid_start>" + 34 * "<vid_patch>" + "<vid_end>" + "<slow_vid_start>" + 322 * "<vid_patch>" + "<slow_vid_end>"
)  # fmt: skip


def expand_text(text: str, *args, **kwargs) -> str:
    return expand_placeholders([Turn("user", text)], *args, **kwargs)[0].text


def test_video_of_italian_recipe(italian_vision, visual_tokenizer):
    text = expand_text("<video>", italian_vision)
    assert text == VIDEO
    ids = visual_tokenizer(text, add_special_tokens=False)["input_ids"]
    start, patch, end, slow_start, slow_end = (
        visual_tokenizer.convert_tokens_to_ids(token) for token in VISUAL_TOKENS[3:]
    )
    assert ids == [start, *34 * [patch], end, slow_start, *322 * [patch], slow_end]
    assert len(ids) == 360 == italian_vision.layout.num_tokens("video", 4)


def test_image_of_16_by_16_patches(italian_vision):
    assert expand_text("<image>", italian_vision) == IMAGE
    assert italian_vision.layout.num_tokens("image") == 256


def test_resampled_image_has_as_many_tokens_as_latents(italian_vision):
    vision = replace(italian_vision, resample_images=True)
    assert expand_text("<image>", vision) == "<im_start>" + 79 * "<im_patch>" + "<im_end>"


def test_video_without_resampler_is_one_span(italian_vision):
    vision = replace(italian_vision, resampler_type=None)
    assert expand_text("<video>", vision, [2]) == "<vid_start>" + 510 * "<vid_patch>" + "<vid_end>"


def test_slow_frames_shorten_only_the_slow_span(italian_vision):
    fast, slow = replace(italian_vision, slow_frames=2).layout.spans("video", 4)
    assert (fast.length, slow.length) == (36, 162)
    fast, slow = replace(italian_vision, slow_frames=8).layout.spans("video", 4)
    assert (fast.length, slow.length) == (36, 324)


def test_reading_order_is_kept(italian_vision):
    text = "prima <image> poi <video>, infine <image>."
    assert placeholder_kinds(text) == ["image", "video", "image"]
    assert PLACEHOLDER.split(text) == ["prima ", " poi ", ", infine ", "."]
    assert expand_text(text, italian_vision) == f"prima {IMAGE} poi {VIDEO}, infine {IMAGE}."


def test_each_video_has_its_own_number_of_frames(italian_vision):
    turns = [Turn("user", "<video> e <video>"), Turn("assistant", "ciao"), Turn("user", "<image><video>")]
    expanded = expand_placeholders(turns, italian_vision, [1, 2, 3])
    counts = [turn.text.count("<vid_patch>") + 4 * turn.text.count("<vid_start>") for turn in expanded]
    assert counts == [90 + 180, 0, 270]
    assert [turn.role for turn in expanded] == ["user", "assistant", "user"]


def test_default_number_of_frames_is_the_most_that_are_sampled(italian_vision):
    vision = replace(italian_vision, video_fps=2.0, frames_upbound=6)
    assert expand_text("<video>", vision) == expand_text("<video>", vision, [6])


@pytest.mark.parametrize("counts", [[], [4], [4, 4, 4]])
def test_wrong_number_of_videos_is_an_error(italian_vision, counts):
    with pytest.raises(ValueError, match=f"2 <video>, but {len(counts)} videos"):
        expand_text("<video> e <video>", italian_vision, counts)


def test_placeholder_for_a_model_without_vision_is_an_error():
    assert expand_placeholders([Turn("user", "ciao")], None) == [Turn("user", "ciao")]
    with pytest.raises(ValueError, match="--vision_tower"):
        expand_placeholders([Turn("user", "<image>")], None)


def test_raw_conversations_of_either_spelling(italian_vision):
    source = [{"from": "human", "value": "<image>"}, {"role": "assistant", "content": "un gatto"}]
    before = [dict(turn) for turn in source]
    assert preprocess_multimodal([source], italian_vision) == [
        [{"from": "human", "value": IMAGE}, {"role": "assistant", "content": "un gatto"}]
    ]
    assert source == before
