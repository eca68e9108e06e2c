"""Attention of an answer's tokens, handed back to the patches of frames."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TINY_VISION, TinyBackbones
from test_anyres import FLAT, LIMITED, POOLED, UNPADDED, picture
from test_resamplers import NAMES, make, make_features

from llava.data.media import cut_views
from llava.model.loading import load_model
from llava.model.multimodal_resampler.base import Resampler
from llava.model.patch_attention import attribute_to_patches, read_attention, split_by_media
from llava.types import VisualInput

MAPPED = [name for name in NAMES if name != "qformer"]


def influences(resampler: Resampler, features: torch.Tensor, token: int) -> torch.Tensor:
    """Which patches, (frames, patches), change a token of a video at all."""
    features = features.clone().requires_grad_()
    resampler(features, "video")[0, token].square().sum().backward()
    return features.grad[0].abs().sum(-1) > 0


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("name", MAPPED)
def test_weights_go_to_patches_that_made_the_token_and_nothing_is_lost(name: str, frames: int) -> None:
    resampler = make(name)
    features = make_features(1, frames, resampler)
    num_tokens = resampler.vision.layout.num_tokens("video", frames)
    with torch.no_grad():
        for token in range(0, num_tokens, 3):
            weights = torch.zeros(num_tokens)
            weights[token] = 0.5
            shares = resampler.attribute(features, "video", weights)
            assert shares.shape == (frames, 25)
            assert (shares >= 0).all()
            assert shares.sum() == pytest.approx(0.5, abs=1e-5)
            with torch.enable_grad():
                seen = influences(resampler, features, token)
            assert not (shares > 0)[~seen].any()
            assert (shares > 0).any()
        several = torch.rand(num_tokens)
        assert resampler.attribute(features, "video", several).sum() == pytest.approx(float(several.sum()), rel=1e-4)


@pytest.mark.parametrize("mode", ["average", "max", "bilinear"])
def test_a_pooled_cell_is_its_window(mode: str) -> None:
    resampler = make("spatial_pool", spatial_pool_mode=mode)
    weights = torch.zeros(2, 3, 3)
    weights[1, 0, 0], weights[1, 2, 2] = 1.0, 2.0  # The last window of 5 patches holds one.
    shares = resampler.attribute(make_features(1, 2, resampler), "video", weights.flatten()).view(2, 5, 5)
    assert shares[0].sum() == 0
    if mode != "bilinear":
        assert shares[1, :2, :2].flatten().tolist() == pytest.approx([0.25] * 4)
        assert shares[1, 4, 4] == pytest.approx(2.0)
    assert shares.sum() == pytest.approx(3.0)


def test_a_perceiver_gives_a_latent_to_the_patches_that_it_attends_to() -> None:
    resampler = make("perceiver", perceiver_depth=1, resampler_heads=1)
    features = make_features(1, 2, resampler)
    weights = torch.zeros(2, 9)
    weights[1, 4] = 1.0
    with torch.no_grad():
        shares = resampler.attribute(features, "video", weights.flatten())
        attention, latents = resampler.layers[0].attention, resampler.latents.weight.expand(2, -1, -1)
        weighed = attention.weigh(latents, features[0])  # (frames, latents, patches + latents)
        seen = torch.cat([attention.ln_features(features[0]), attention.ln_latents(latents)], 1)
        # What it says it attends to is what it attends to: with one head there is no mean.
        gathered = attention.o_proj(weighed @ attention.v_proj(seen))
        assert torch.allclose(gathered, attention(latents, features[0]), atol=1e-6)
    assert shares[0].sum() == 0
    expected = weighed[1, 4, :25]
    assert torch.allclose(shares[1], expected / expected.sum(), atol=1e-6)


def test_a_resampler_without_a_mapping_says_so(load_tiny) -> None:
    frames = torch.zeros(3, 3, 56, 56, dtype=torch.uint8)
    model = load_tiny(resampler_type="qformer", qformer_latents=2, qformer_depth=1).model.eval()
    shares, is_told = attribute_to_patches(model, frames, "video", (56, 56), torch.arange(6.0))
    assert is_told is False
    assert shares.sum((1, 2)).tolist() == pytest.approx([1.0, 5.0, 9.0])
    assert shares[2].min() == shares[2].max()


@pytest.mark.parametrize("settings", [FLAT, UNPADDED, LIMITED, POOLED], ids=str)
def test_tiles_are_put_onto_the_picture(load_tiny, settings: dict) -> None:
    model = load_tiny(**settings).model.eval()
    size = (56, 112)
    views = cut_views(picture(*size), model.vision)
    num_tokens, side = model.vision.layout.num_tokens("image", image_size=size), model.vision.grid_side
    whole = torch.zeros(num_tokens)
    whole[0] = 1.0  # The first token is the upper left patch of the whole picture.
    shares, is_told = attribute_to_patches(model, views, "image", size, whole)
    assert (shares.shape, is_told) == ((1, side, side), True)
    assert shares[0, 0, 0] == pytest.approx(1.0)
    tiles = torch.zeros(num_tokens)
    tiles[side**2] = 1.0  # That of the tiles: the upper left, and less than a patch of the whole picture.
    shares, _ = attribute_to_patches(model, views, "image", size, tiles)
    assert shares[0, 0, 0] > 0.9
    assert shares.sum() == pytest.approx(1.0, abs=1e-4)


def test_features_of_a_cache_do_as_frames(load_tiny) -> None:
    model = load_tiny().model.eval()
    frames = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8)
    with torch.no_grad():
        features = model.get_vision_tower()(frames)[:, None]
    weights = torch.rand(12 + 27)
    live, _ = attribute_to_patches(model, frames, "video", (56, 56), weights)
    kept, _ = attribute_to_patches(model, features, "video", (56, 56), weights)
    assert torch.equal(live, kept)


# The attention itself.


@pytest.fixture(scope="module")
def models(backbone_dirs, tower_dir: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    deep = TinyBackbones(tmp_path_factory.mktemp("deep"), tokenizer_dir, 4)

    def load(name: str, variant: str | None):
        folders = backbone_dirs if variant is None and name not in ("llava_gemma2", "llava_gemma3") else deep
        torch.manual_seed(3)
        options = {} if variant is None else {"variant": variant}
        return load_model(str(folders[name]), vision_tower=str(tower_dir), **TINY_VISION, **options)

    return load


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("llava_gpt2", None), ("llava_mpt", None), ("llava_qwen", None), ("llava_phi3", None), ("llava_gemma2", None),
        ("llava_gemma3", None), ("llava_gpt2", "alternating"), ("llava_llama", "alternating_cross"),
    ],
)  # fmt: skip
def test_it_is_that_of_one_eager_pass_over_everything(models, name: str, variant: str | None) -> None:
    loaded = models(name, variant)
    model, vision = loaded.model.eval(), loaded.vision
    video = VisualInput("video", torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8), (56, 56))
    spans = loaded.tokenizer(vision.layout.text("video", 3)).input_ids
    words = loaded.tokenizer("Un uomo con una maglia nera").input_ids
    ids = torch.tensor([[*words, *spans, *words]])
    before = model.get_model().config._attn_implementation
    media = ([video.frames], ["video"], [(56, 56)])
    found = read_attention(model, ids, len(words) + len(spans), *media)
    assert model.get_model().config._attn_implementation == before
    eager = before.replace("sdpa", "eager")
    model.get_model().config._attn_implementation = eager
    with torch.no_grad():
        images = dict(zip(("images", "modalities", "image_sizes"), media, strict=True))
        layers = model(input_ids=ids, output_attentions=True, return_dict=True, **images).attentions
    model.get_model().config._attn_implementation = before
    whole = torch.stack([layer[0].mean(0) for layer in layers]).mean(0)  # (length, length)
    assert torch.allclose(found, whole[-len(words) - 1 : -1, :-1], atol=1e-5)
    assert torch.allclose(found.sum(1), torch.ones(len(words)), atol=1e-4)
    (on_video,) = split_by_media(found, ids[0].tolist(), vision.visual_token_ids, [len(spans)])
    assert torch.equal(on_video, found[:, len(words) : len(words) + len(spans)])


def test_a_prompt_of_one_token_has_nothing_to_keep(models) -> None:
    loaded = models("llava_gpt2", None)
    video = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8)
    ids = torch.tensor([[5, *loaded.tokenizer(loaded.vision.layout.text("video", 3)).input_ids, 6, 7]])
    found = read_attention(loaded.model.eval(), ids, 1, [video], ["video"])
    assert found.shape == (ids.shape[1] - 1, ids.shape[1] - 1)
    assert found[0, 0] == pytest.approx(1.0)
