"""What a model made of a request: frames, heat maps and likelihoods."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageColor
from test_web_engine import make_captioner

from llava.data.video import open_video
from llava.eval.likelihood import Candidate, Choice, LikelihoodScorer
from llava.geometry import Box, TimeSpan
from llava.model.loading import LoadedModel
from llava.serve.explain import (
    BOX_COLOURS,
    draw_heat_maps,
    draw_places,
    heat_maps,
    look_again,
    perplexity,
    score_sentence,
    shown_frames,
)
from llava.serve.generate import Answer, Captioner, Request
from llava.types import Media

SENTENCE = "Una ragazza con un maglione giallo"


@pytest.fixture(scope="module")
def captioner(load_tiny) -> Captioner:
    return make_captioner(load_tiny)


@pytest.fixture(scope="module")
def media(media_dir: Path) -> list[Media]:
    return [Media("image", str(media_dir / "a.png")), Media("video", str(media_dir / "a.mp4"))]


def test_frames_are_those_that_the_tower_saw_with_their_times(captioner: Captioner, media: list[Media]) -> None:
    prompt = captioner.prompts.write(Request(media))
    shown = shown_frames(prompt.media)
    assert [label for _, label in shown] == ["1: picture", "2: 0.00 s", "2: 0.75 s", "2: 1.38 s"]
    assert np.array_equal(np.asarray(shown[1][0]), prompt.media[1].frames[0].permute(1, 2, 0).numpy())
    with open_video(media[1].path) as video:
        assert [video.times[i] for i in (0, 6, 11)] == pytest.approx([0.0, 0.75, 1.375])
    assert [label for _, label in shown_frames(prompt.media[1:])] == ["0.00 s", "0.75 s", "1.38 s"]


def test_where_it_looked(captioner: Captioner, media: list[Media]) -> None:
    prompt = captioner.prompts.write(Request(media, "Un uomo"))
    answer = captioner.tokenizer(" con una maglia").input_ids
    attention = look_again(captioner, prompt, answer)
    assert "".join(attention.tokens) == " con una maglia"
    for token in range(len(answer)):
        maps, note = heat_maps(captioner, attention, token)
        assert [tuple(shares.shape) for shares in maps] == [(1, 4, 4), (3, 4, 4)]
        assert note == ""
        assert sum(float(shares.sum()) for shares in maps) == pytest.approx(attention.share(token), abs=1e-4)
        assert 0 < attention.share(token) < 1
    # The brightest patch of all is the one with the largest share.
    maps = [torch.zeros(1, 4, 4), torch.zeros(3, 4, 4)]
    maps[1][2, 0, 3] = 0.1
    *dark, bright = draw_heat_maps(prompt.media, maps)
    assert [label for _, label in [*dark, bright]] == [label for _, label in shown_frames(prompt.media)]
    glow = np.asarray(bright[0]).astype(int)
    is_orange = glow[..., 0] - glow[..., 2] > np.asarray(dark[-1][0]).astype(int).max() - 255
    assert glow[:14, 42:].mean() > glow[14:].mean() + 20
    assert is_orange[:14, 42:].mean() > 0.5
    with pytest.raises(ValueError, match="nowhere to look"):
        look_again(captioner, captioner.prompts.write(Request([], "Un uomo")), answer)
    with pytest.raises(ValueError, match="has no token"):
        look_again(captioner, prompt, [])


def test_a_resampler_that_cannot_tell_is_named(load_tiny, media: list[Media]) -> None:
    captioner = make_captioner(load_tiny, resampler_type="qformer", qformer_latents=2, qformer_depth=1)
    attention = look_again(captioner, captioner.prompts.write(Request(media[1:])), [5, 6])
    _, note = heat_maps(captioner, attention, 1)
    assert note.startswith("the resampler 'qformer' does not tell which patches")


@pytest.mark.parametrize("text_format", ["plain_lm", "plain", "v1"])
def test_a_sentence_is_as_likely_as_evaluation_finds_it(load_tiny, media: list[Media], text_format: str) -> None:
    captioner = make_captioner(load_tiny)
    captioner.model.config.llava_format = text_format
    captioner = Captioner(LoadedModel(captioner.model, captioner.tokenizer, captioner.vision, []), "cpu")
    found = score_sentence(captioner, Request(captioner.prompts.write(Request(media[1:])).media), SENTENCE)
    scorer = LikelihoodScorer(captioner.model, captioner.tokenizer)
    choice = Choice("0", (Candidate(SENTENCE, 0),), media=(media[1],))
    assert found.logprob == pytest.approx(scorer.score([choice])[0][0], abs=1e-3)
    assert [word.text for word in found.words] == [word.text for word in found.blind_words] == SENTENCE.split()
    assert found.logprob != pytest.approx(found.blind_logprob, abs=1e-3)
    assert perplexity(found.words) > 1


def test_a_sentence_without_a_picture_and_what_cannot_be_scored(captioner: Captioner) -> None:
    found = score_sentence(captioner, Request([], "Un uomo"), "con <image> una maglia")
    assert found.blind_words is None
    assert [word.text for word in found.words] == ["con", "<image>", "una", "maglia"]
    with pytest.raises(ValueError, match="no sentence to score"):
        score_sentence(captioner, Request(), "  ")
    with pytest.raises(ValueError, match="only images and videos are made of"):
        score_sentence(captioner, Request(), "a <im_patch>")
    with pytest.raises(ValueError, match="context is 512; shorten it"):
        score_sentence(captioner, Request(), "gatto " * 600)


def test_places_are_drawn_where_they_are_shown(captioner: Captioner, media: list[Media]) -> None:
    image, video = captioner.prompts.write(Request(media)).media
    box, span = Box(0.25, 0.5, 0.75, 1.0), TimeSpan(0.0, 0.5)
    assert draw_places(Answer("a"), image, captioner.vision) is None
    drawn = np.asarray(draw_places(Answer("a", [box]), image, captioner.vision)).astype(int)
    assert drawn.shape == (427, 640, 3)  # 90 x 60, as large as it is shown
    yellow = (np.abs(drawn - np.array(ImageColor.getrgb(BOX_COLOURS[0]))) < 4).all(-1)
    rows, columns = yellow.nonzero()
    assert (rows.min(), columns.min(), columns.max()) == pytest.approx((213, 160, 479), abs=2)
    frames = np.asarray(draw_places(Answer("a", [box, box], [span]), video, captioner.vision)).astype(int)
    yellow = (np.abs(frames - np.array(ImageColor.getrgb(BOX_COLOURS[0]))) < 8).all(-1)
    assert yellow[:, 20:240].sum() > 300, "the first box lies on the first frame"
    assert yellow[:, 250:].sum() == 0
