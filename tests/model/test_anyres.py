"""Anyres in the model: features are merged as counted, the newline learns, is saved and is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES
from test_visual import batch_of

from llava.data.media import cut_views
from llava.geometry import AnyRes, parse_pinpoints
from llava.model import llava_arch
from llava.model.loading import load_model
from llava.model.transfer import load_adapter
from llava.model.visual import ViewMerger
from llava.token_layout import RESAMPLER_SETTINGS
from llava.train.parts import part_of

FLAT = {"image_aspect_ratio": "anyres"}
UNPADDED = {**FLAT, "patch_merge_type": "spatial_unpad"}
LIMITED = {**UNPADDED, "image_aspect_ratio": "anyres_max_2"}


def random_sizes(number: int, seed: int = 1) -> list[tuple[int, int]]:
    logs = torch.rand(number, 2, generator=torch.Generator().manual_seed(seed)) * math.log(300)
    return [(height, width) for height, width in logs.exp().int().tolist()]


def picture(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


RESAMPLED = [{**FLAT, "resample_images": True, "resampler_type": name} for name in RESAMPLER_SETTINGS.names()]
POOLED = {**UNPADDED, "projector_type": "pooler", "perceiver_latents": 4}


@pytest.mark.parametrize("settings", [FLAT, UNPADDED, LIMITED, POOLED, *RESAMPLED], ids=str)
def test_features_are_as_many_as_counted(load_tiny, settings: dict) -> None:
    model = load_tiny(**settings).model.eval()
    sizes = [*random_sizes(50), (1, 1), (1, 300), (300, 1)]
    views = [cut_views(picture(*size), model.vision) for size in sizes]
    with torch.no_grad():
        features = model.get_model().encode_media(views, ["image"] * len(views), sizes)
    counted = [model.vision.layout.num_tokens("image", image_size=size) for size in sizes]
    assert [len(f) for f in features] == counted
    assert len(set(counted)) > 2
    assert max(counted) <= model.vision.layout.most_image_tokens


@pytest.mark.parametrize("limit", [None, 4, 9])
def test_merging_equals_transformers(limit: int | None) -> None:
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    anyres = AnyRes(28, 4, 16, parse_pinpoints("(1x1),...,(4x4)", 28), "spatial_unpad", limit)
    newline = torch.randn(6)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=28, patch_size=7),
        image_grid_pinpoints=[list(anyres.canvas(grid)) for grid in anyres.grids],
    )
    theirs, manner = LlavaNextModel, {"vision_feature_select_strategy": "full"}
    if limit is not None:
        theirs, manner = LlavaOnevisionModel, {"vision_aspect_ratio": f"anyres_max_{limit}"}
    # Of a picture that is thinner than a patch theirs leaves nothing.
    for size in [size for size in random_sizes(60) if 1 / 4 <= size[0] / size[1] <= 4]:
        views = torch.randn(anyres.num_views(size), 16, 6)
        packed, _ = theirs.pack_image_features(
            SimpleNamespace(config=config), image_features=[views], image_sizes=[list(size)], image_newline=newline,
            **manner,
        )  # fmt: skip
        torch.testing.assert_close(ViewMerger(anyres, newline)(views, size), packed[0], msg=str(size))


def test_each_patch_lands_in_its_place() -> None:
    anyres = AnyRes(14, 2, 4, parse_pinpoints("(2x2)", 14), "spatial_unpad")
    views = torch.arange(20.0).view(5, 4, 1)
    newline = torch.tensor([-1.0])
    merged = ViewMerger(anyres, newline)(views, (28, 28)).flatten().int().tolist()
    assert merged == [0, 1, 2, 3, *[4, 5, 8, 9, -1], *[6, 7, 10, 11, -1], *[12, 13, 16, 17, -1], *[14, 15, 18, 19, -1]]
    # Half as high: the first and the last row are padding.
    merged = ViewMerger(anyres, newline)(views, (14, 28)).flatten().int().tolist()
    assert merged == [0, 1, 2, 3, *[6, 7, 10, 11, -1], *[12, 13, 16, 17, -1]]


@pytest.mark.parametrize("resampled", [False, True])
def test_flat_views_are_encoded_as_images_of_their_own(load_tiny, resampled: bool) -> None:
    settings = {"resample_images": resampled, "resampler_type": "fast_slow_resampler"}
    tiled, plain = (load_tiny(**settings, **more).model.eval().get_model() for more in (FLAT, {}))
    sizes = [(60, 90), (20, 100)]
    views = [cut_views(picture(*size), tiled.vision) for size in sizes]
    together = tiled.encode_media(views, ["image", "image"], sizes)
    alone = plain.encode_media([view for stack in views for view in stack])
    torch.testing.assert_close(torch.cat(together), torch.cat(alone), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", [FLAT, UNPADDED], ids=str)
def test_image_video_and_text_in_one_batch(load_tiny, mixed_data: Path, settings: dict) -> None:
    loaded = load_tiny(**settings)
    model = loaded.model
    rows = [0, 2, 4, 5]  # a video, an image, both, a text
    batch = batch_of(loaded, mixed_data, rows)
    assert [len(frames) for frames in batch["images"]] == [3, 5, 3, 5]
    loss = model(**batch).loss
    loss.backward()
    newline = model.get_model().image_newline
    assert (newline is None) == (settings == FLAT)
    assert newline is None or newline.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        together = model(**{**batch, "labels": None}).logits
        for row, i in enumerate(rows):
            single = batch_of(loaded, mixed_data, [i])
            length = single["input_ids"].shape[1]
            alone = model(**{**single, "labels": None}).logits
            torch.testing.assert_close(together[row : row + 1, :length], alone, atol=1e-5, rtol=1e-4)


def test_a_rank_without_images_gives_the_newline_a_gradient_of_zero(load_tiny, mixed_data, monkeypatch) -> None:
    loaded = load_tiny(**UNPADDED)
    monkeypatch.setattr(llava_arch, "is_distributed", lambda: True)
    loaded.model.train()(**batch_of(loaded, mixed_data, [0, 5])).loss.backward()
    assert torch.equal(loaded.model.get_model().image_newline.grad, torch.zeros(32))


def test_only_merging_in_rows_has_a_newline(load_tiny) -> None:
    for settings in ({}, FLAT):
        assert not [name for name, _ in load_tiny(**settings).model.named_parameters() if "image_newline" in name]
    loaded = load_tiny(**UNPADDED)
    (name,) = [name for name, _ in loaded.model.named_parameters() if "image_newline" in name]
    assert part_of(name) == "mm_mlp_adapter"
    assert name in loaded.new_parameters


@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_newline_has_the_length_one_and_is_kept(load_tiny, mixed_data: Path, tmp_path: Path, name: str) -> None:
    loaded = load_tiny(name, **UNPADDED, image_grid_pinpoints="(1x1),...,(2x2)")
    newline = loaded.model.get_model().image_newline
    built = type(loaded.model)(loaded.model.config).get_model().image_newline
    for filled in (newline, built):
        assert filled.shape == (loaded.model.get_input_embeddings().embedding_dim,)
        assert 0.5 < float(filled.detach().norm()) < 1.6
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert again.new_parameters == []
    assert again.vision == loaded.model.vision
    stored, read = (model.state_dict() for model in (loaded.model, again.model))
    assert [key for key in stored if not torch.equal(stored[key], read[key])] == []
    batch = batch_of(loaded, mixed_data, [2, 4])
    with torch.no_grad():
        one, other = (model.eval()(**batch, return_logits=True).logits for model in (loaded.model, again.model))
    # Weights read from a file may lie at addresses that kernels round otherwise for.
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_the_manner_of_merging_stays_a_checkpoints(load_tiny, tmp_path: Path) -> None:
    loaded = load_tiny(**FLAT)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--mm_patch_merge_type 'spatial_unpad' was given, but the checkpoint"):
        load_model(str(tmp_path), patch_merge_type="spatial_unpad")
    assert load_model(str(tmp_path), image_grid_pinpoints="(1x2)").vision.anyres.grids == ((2, 1),)


def test_an_adapter_brings_its_newline_or_leaves_it_new(load_tiny, tmp_path: Path) -> None:
    source, target, plain = load_tiny(**UNPADDED).model, load_tiny(**UNPADDED).model, load_tiny().model
    with torch.no_grad():
        source.get_model().image_newline.fill_(7.0)
    for model, folder in ((source, "rows"), (plain, "plain")):
        model.save_pretrained(tmp_path / folder)
    assert "image_newline" not in load_adapter(target, str(tmp_path / "plain"))
    assert "image_newline" in load_adapter(target, str(tmp_path / "rows"))
    assert (target.get_model().image_newline == 7).all()
    with pytest.raises(ValueError, match=r"weights unknown here: \['image_newline'\]"):
        load_adapter(plain, str(tmp_path / "rows"))


def test_sizes_that_are_missing_or_of_other_images_are_an_error(load_tiny, mixed_data: Path) -> None:
    loaded = load_tiny(**UNPADDED)
    batch = batch_of(loaded, mixed_data, [2])
    with pytest.raises(ValueError, match="1 images or videos came with none image_sizes"):
        loaded.model(**{**batch, "image_sizes": None})
    with pytest.raises(ValueError, match="1 images or videos came with 2 image_sizes"):
        loaded.model(**{**batch, "image_sizes": [(60, 90)] * 2})
    with pytest.raises(ValueError, match=r"an image of 30 x 300 .* came as 5 views, but is cut into 4"):
        loaded.model(**{**batch, "image_sizes": [(30, 300)]})
    video = batch_of(loaded, mixed_data, [0])
    assert loaded.model(**{**video, "image_sizes": None}).loss > 0


def test_cached_generation_equals_uncached(load_tiny, mixed_data: Path) -> None:
    loaded = load_tiny(**UNPADDED)
    model = loaded.model.eval()
    batch = batch_of(loaded, mixed_data, [4])
    media = {name: batch[name] for name in ("images", "modalities", "image_sizes")}
    ids = batch["input_ids"]
    cached, uncached = (
        model.generate(ids, attention_mask=torch.ones_like(ids), **media, max_new_tokens=8, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)
