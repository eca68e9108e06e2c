"""Generation: cached, batched, beamed, and without visual tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava.constants import VISUAL_TOKENS
from llava.data.media import load_media
from llava.serve.generate import Captioner, Request
from llava.types import Media
from tests.conftest import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def captioner(request, load_tiny) -> Captioner:
    """A model whose next token really depends on its media: larger random weights than at the start."""
    loaded = load_tiny(request.param)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    return Captioner(loaded, "cpu")


def requests_of(media_dir: Path) -> list[Request]:
    return [
        Request([Media("video", str(media_dir / "a.mp4"))], "Un uomo"),
        Request([Media("image", str(media_dir / "a.png")), Media("video", str(media_dir / "b.mp4"))]),
        Request([], "Il gatto dorme"),
    ]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_cache_changes_nothing(captioner: Captioner, media_dir: Path, options: dict) -> None:
    requests = requests_of(media_dir)
    cached = captioner.generate(requests, max_new_tokens=12, **options)
    assert captioner.generate(requests, max_new_tokens=12, use_cache=False, **options) == cached
    assert all(cached)


def test_batched_equals_single(captioner: Captioner, media_dir: Path) -> None:
    requests = requests_of(media_dir)
    together = captioner.generate(requests, max_new_tokens=12)
    assert together == [captioner.generate([request], max_new_tokens=12)[0] for request in requests]


def test_answers_depend_on_the_media(captioner: Captioner, media_dir: Path) -> None:
    videos = [Request([Media("video", str(media_dir / name))]) for name in ("a.mp4", "b.mp4")]
    one, other = captioner.generate(videos, max_new_tokens=12)
    assert one != other
    assert captioner.generate(videos[::-1], max_new_tokens=12) == [other, one]


def test_visual_tokens_are_never_produced(
    captioner: Captioner, media_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, vision = captioner.model, captioner.vision
    head = model.get_output_embeddings()
    likely = torch.nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        likely.bias.zero_()
        likely.bias[vision.visual_token_ids] = 100.0
    monkeypatch.setitem(model._modules, "lm_head", likely)
    video = load_media(Media("video", str(media_dir / "a.mp4")), vision)
    for do_sample in (False, True):
        prompt = torch.tensor([captioner.prompts.write(Request([video])).ids])
        output = model.generate(
            prompt, images=[video.frames], modalities=["video"], max_new_tokens=10, do_sample=do_sample
        )
        assert not set(output[0, prompt.shape[1] :].tolist()) & set(vision.visual_token_ids)
    assert not any(token in captioner.generate([Request([video])], max_new_tokens=5)[0] for token in VISUAL_TOKENS)


def test_prompt_with_places_but_no_media_is_an_error(captioner: Captioner) -> None:
    prompt = torch.tensor([captioner.vision.visual_token_ids])
    with pytest.raises(ValueError, match="no images were given"):
        captioner.model.generate(prompt)


def test_prompt_longer_than_the_context_is_an_error(captioner: Captioner, media_dir: Path) -> None:
    with pytest.raises(ValueError, match="context is 512"):
        captioner.generate([Request([Media("video", str(media_dir / "a.mp4"))] * 14)])
