"""The contract of resamplers, for every registered one, and what each of them promises beyond it."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.config import VisionConfig
from llava.model.loading import load_model
from llava.model.multimodal_resampler import RESAMPLERS, build_resampler
from llava.model.multimodal_resampler.base import Resampler
from llava.model.multimodal_resampler.perceiver import LatentAttention, PerceiverLayer
from llava.token_layout import RESAMPLER_SETTINGS

WIDTH, SIDE = 12, 5
NAMES = RESAMPLERS.names()
FRAME_BY_FRAME = ("masked_drop", "perceiver", "qformer", "spatial_pool")
PARAMETER_FREE = ("masked_drop", "spatial_pool")
# The side of 5 is no multiple of the stride or of the latents' side.
SETTINGS = {
    "perceiver_latents": 9, "perceiver_latents_fast": 4, "qformer_latents": 3, "qformer_depth": 2,
    "resampler_width": 16, "resampler_heads": 4, "spatial_pool_stride": 2, "mask_drop_ratio": 0.3,
}  # fmt: skip


def make_vision(name: str, **changes) -> VisionConfig:
    return VisionConfig(
        vision_tower="none", vision_config={}, hidden_size=8, image_size=14 * SIDE, resampler_type=name,
        **{"patches_per_side": SIDE, **SETTINGS, **changes},
    )  # fmt: skip


def make(name: str, **changes) -> Resampler:
    torch.manual_seed(0)
    resampler = build_resampler(make_vision(name, **changes), WIDTH)
    assert isinstance(resampler, Resampler)
    return resampler.eval()


def make_features(media: int, frames: int, resampler: Resampler, seed: int = 1) -> Tensor:
    shape = (media, frames, resampler.vision.layout.grid_patches, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_resampler_has_its_settings_and_all_settings_their_resampler() -> None:
    assert RESAMPLER_SETTINGS.names() == NAMES


@pytest.mark.parametrize("side", [4, 5])
@pytest.mark.parametrize("frames", [1, 2, 4, 7])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_videos_give_the_tokens_that_the_configuration_counts(
    name: str, training: bool, frames: int, side: int
) -> None:
    resampler = make(name, patches_per_side=side, video_fps=1.0, frames_upbound=7).train(training)
    tokens = resampler(make_features(2, frames, resampler), "video")
    assert tokens.shape == (2, resampler.vision.layout.num_tokens("video", frames), WIDTH)


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_images_are_resampled_if_they_are_to_be(name: str, resample: bool) -> None:
    resampler = make(name, resample_images=resample)
    features = make_features(3, 1, resampler)
    tokens = resampler(features, "image")
    assert tokens.shape == (3, resampler.vision.layout.num_tokens("image"), WIDTH)
    assert (tokens.shape[1] == SIDE**2) is not resample
    if not resample:
        assert torch.equal(tokens, features[:, 0])


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    # Two slow frames of four: with one frame a window the TokenPacker has nothing to weigh.
    resampler = make(name, slow_frames=2).train()
    features = make_features(2, 4, resampler).requires_grad_()
    tokens = resampler(features, "video")
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0
    assert (name in PARAMETER_FREE) is not bool(list(resampler.parameters()))
    for key, parameter in resampler.named_parameters():
        assert parameter.grad is not None, key
        # What is added to all keys alike moves all scores of a query alike, which a softmax does not see.
        if not key.endswith(("ln_k.bias", "k_proj.bias", "key.bias")):
            assert parameter.grad.abs().max() > 1e-6, key


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_finite_near_fp32_and_stays_bf16(name: str, autocast: bool) -> None:
    resampler = make(name, slow_frames=2)
    features = make_features(2, 4, resampler).bfloat16()
    expected = resampler(features.float(), "video")
    resampler = resampler if autocast else resampler.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens = resampler(features.requires_grad_(), "video")
        tokens.float().square().mean().backward()
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), expected, atol=0.1, rtol=0.1)
    assert all(torch.isfinite(parameter.grad).all() for parameter in resampler.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_media_do_not_touch_each_other(name: str) -> None:
    resampler = make(name)
    features = make_features(3, 4, resampler)
    together = resampler(features, "video")
    for i in range(3):
        torch.testing.assert_close(resampler(features[i : i + 1], "video")[0], together[i])


@pytest.mark.parametrize("name", FRAME_BY_FRAME)
def test_a_frame_changes_only_its_own_tokens(name: str) -> None:
    resampler = make(name)
    features = make_features(2, 4, resampler)
    changed = features.clone()
    changed[1, 2] = torch.randn_like(changed[1, 2])
    with torch.no_grad():
        difference = resampler(changed, "video") != resampler(features, "video")
    by_frame = difference.unflatten(1, (4, -1)).flatten(2).any(-1)
    assert by_frame.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_builds_the_same_resampler(name: str) -> None:
    one, other = make(name), make(name)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    # Directly built ones start as those that a model loads: small, and no latent like another.
    for key, parameter in one.named_parameters():
        if key in ("latents.weight", "queries.weight"):
            assert 0.01 < parameter.std() < 0.03
            assert len(parameter.unique(dim=0)) == len(parameter)


def test_a_resampler_that_makes_another_number_of_tokens_is_told() -> None:
    class Wrong(Resampler):
        def resample(self, features: Tensor, kind: str) -> Tensor:
            return features.flatten(1, 2)[:, 1:]

    with pytest.raises(ValueError, match=r"'perceiver' makes 49 tokens of one video of 2 frames, .* count 18"):
        Wrong(make_vision("perceiver"), WIDTH)(torch.randn(1, 2, 25, WIDTH), "video")


# In a model.


@pytest.mark.parametrize("name", NAMES)
def test_new_parameters_of_a_plain_model_are_filled_sensibly(load_tiny, name: str) -> None:
    """A plain checkpoint has none of them: they are made after the model, which is built without memory."""
    loaded, again = (load_tiny(resampler_type=name, perceiver_depth=1, qformer_depth=1) for _ in range(2))
    own = dict(loaded.model.get_model().vision_resampler.named_parameters())
    assert (not own) is (name in PARAMETER_FREE)
    for key, parameter in again.model.get_model().vision_resampler.named_parameters():
        assert torch.equal(own[key], parameter), key
        if parameter.ndim > 1:
            assert 0.01 < parameter.std() < 0.03, key
            assert len(parameter.unique(dim=0)) == len(parameter), key
        else:
            assert (parameter == (0.0 if key.endswith("bias") else 1.0)).all(), key


@pytest.mark.parametrize("name", NAMES)
def test_save_and_reload_are_exact(load_tiny, tmp_path: Path, name: str) -> None:
    loaded = load_tiny(resampler_type=name, resample_images=True, perceiver_depth=1, qformer_depth=1)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert again.new_parameters == []
    generator = torch.Generator().manual_seed(4)
    media = [torch.randint(0, 255, (n, 3, 56, 56), generator=generator, dtype=torch.uint8) for n in (1, 3, 2)]
    kinds = ["image", "video", "video"]
    features = [model.model.eval().get_model().encode_media(media, kinds) for model in (loaded, again)]
    for one, other, kind, frames in zip(*features, kinds, (1, 3, 2), strict=True):
        assert torch.equal(one, other)
        assert len(one) == again.vision.layout.num_tokens(kind, frames)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_a_model_in_bf16(load_tiny, name: str) -> None:
    loaded = load_tiny(resampler_type=name, dtype=torch.bfloat16, perceiver_depth=1, qformer_depth=1)
    model, vision = loaded.model.train(), loaded.vision
    text = "".join(span.text for span in vision.layout.spans("video", 3)) + "ciao"
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    frames = torch.randint(0, 255, (3, 3, 56, 56), dtype=torch.uint8)
    labels = torch.where(torch.isin(ids, torch.tensor(vision.visual_token_ids)), -100, ids)
    model(input_ids=ids, labels=labels, images=[frames], modalities=["video"]).loss.backward()
    parameters = [*model.get_model().vision_resampler.parameters(), *model.get_model().mm_projector.parameters()]
    assert all(parameter.dtype == torch.bfloat16 for parameter in parameters)
    assert all(torch.isfinite(parameter.grad).all() for parameter in parameters)


@pytest.mark.parametrize(
    ("name", "fixed", "free"),
    [
        ("fast_slow_resampler", {"resampler_width": 16}, {"perceiver_latents": 4, "num_frames": 2}),
        ("perceiver", {"perceiver_latents": 4}, {"num_frames": 5}),
        ("perceiver", {"perceiver_depth": 3}, {"qformer_depth": 9}),
        ("qformer", {"qformer_latents": 4}, {"perceiver_latents": 4}),
        ("qformer", {"resampler_heads": 8}, {"resample_images": True}),
        ("spatial_pool", {"projector_type": "linear"}, {"spatial_pool_stride": 3, "spatial_pool_mode": "max"}),
        ("masked_drop", {"resampler_type": "spatial_pool"}, {"mask_drop_ratio": 0.5}),
    ],
)
def test_settings_that_parameters_depend_on_stay(load_tiny, tmp_path: Path, name: str, fixed: dict, free: dict) -> None:
    loaded = load_tiny(resampler_type=name, perceiver_depth=1, qformer_depth=1)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    setting, value = next(iter(fixed.items()))
    with pytest.raises(ValueError, match=f"--mm_{setting} {value!r} was given, but the checkpoint was trained with"):
        load_model(str(tmp_path), **fixed)
    vision = load_model(str(tmp_path), **free).vision
    assert {setting: getattr(vision, setting) for setting in free} == free


def test_structure_names_settings_of_the_resampler() -> None:
    for name in NAMES:
        assert set(RESAMPLERS.get(name).structure) <= {field.name for field in fields(RESAMPLER_SETTINGS.get(name))}


# A newcomer's.

NEWCOMER = '''
from dataclasses import dataclass

from torch import Tensor, nn

from llava.config import VisionConfig
from llava.model.multimodal_resampler import RESAMPLERS, Resampler
from llava.token_layout import ResamplerSettings
from llava.types import MediaKind


@dataclass(frozen=True)
class RowMeanSettings(ResamplerSettings):
    layers: int = 1
    stride: int = 1

    def count_tokens(self, side: int, kind: MediaKind, num_frames: int) -> tuple[int, ...]:
        return (num_frames * side // self.stride,)


@RESAMPLERS.register("row_mean", RowMeanSettings)
class RowMean(Resampler):
    """Makes one token of so many rows of a frame's grid: the mean of their patches, through linear layers."""

    structure = ("layers",)
    settings: RowMeanSettings

    def __init__(self, vision: VisionConfig, hidden_size: int) -> None:
        super().__init__(vision, hidden_size)
        self.proj = nn.Sequential(*(nn.Linear(hidden_size, hidden_size) for _ in range(self.settings.layers)))

    def resample(self, features: Tensor, kind: MediaKind) -> Tensor:
        rows = features.unflatten(2, (-1, self.vision.grid_side * self.settings.stride))
        return self.proj(rows.mean(dim=3)).flatten(1, 2)
'''


def test_a_newcomer_is_one_file(load_tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (RESAMPLER_SETTINGS, RESAMPLERS):
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    (tmp_path / "row_mean.py").write_text(NEWCOMER)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"unknown --mm_resampler_type 'row_mean'; .* once its file is imported"):
        load_tiny(resampler_type="row_mean")
    importlib.import_module("row_mean")
    loaded = load_tiny(resampler_type="row_mean", resample_images=True)
    assert loaded.new_parameters == sorted(
        f"transformer.{key}" for key, _ in loaded.model.get_model().named_parameters()
        if key.startswith(("mm_projector", "vision_resampler"))
    )  # fmt: skip
    media = [torch.randint(0, 255, (n, 3, 56, 56), dtype=torch.uint8) for n in (1, 3)]
    features = loaded.model.eval().get_model().encode_media(media, ["image", "video"])
    assert [len(tokens) for tokens in features] == [4, 12]
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path)).model.eval().get_model().encode_media(media, ["image", "video"])
    assert all(torch.equal(one, other) for one, other in zip(features, again, strict=True))

    changed = load_model(str(tmp_path), resampler_args={"stride": 2})
    assert changed.new_parameters == []
    assert changed.vision.resampler_args == {"layers": 1, "stride": 2}
    assert changed.vision.layout.num_tokens("video", 3) == 6
    changed.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mm_resampler_args"] == {"layers": 1, "stride": 2}
    assert load_model(str(tmp_path)).vision == changed.vision
    with pytest.raises(ValueError, match="--mm_resampler_args has layers 2, but the checkpoint was trained with 1"):
        load_model(str(tmp_path), resampler_args={"layers": 2})
    with pytest.raises(ValueError, match="--mm_resampler_args has the unknown setting 'rows'; known: layers, stride"):
        load_model(str(tmp_path), resampler_args={"rows": 2})
    sys.modules.pop("row_mean")


# The perceiver and the Q-Former.


def test_latents_attend_to_features_and_to_each_other() -> None:
    torch.manual_seed(2)
    attention = LatentAttention(WIDTH, 16, 4)
    latents, features = torch.randn(2, 3, WIDTH), torch.randn(2, 25, WIDTH)
    normed = attention.ln_latents(latents)
    seen = torch.cat([attention.ln_features(features), normed], dim=1)
    heads = []
    for head in range(4):
        rows = slice(4 * head, 4 * head + 4)
        q, k, v = (F.linear(x, projection.weight[rows]) for x, projection in (
            (normed, attention.q_proj), (seen, attention.k_proj), (seen, attention.v_proj)))  # fmt: skip
        heads.append((q @ k.transpose(1, 2) / 2).softmax(-1) @ v)
    torch.testing.assert_close(attention(latents, features), attention.o_proj(torch.cat(heads, dim=-1)))


def test_a_perceiver_layer_adds_to_its_latents_twice() -> None:
    """Latents plus what they gather, then plus what the MLP makes of the sum; worked out by hand."""
    torch.manual_seed(2)
    layer = PerceiverLayer(WIDTH, 16, 4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
    latents, features = torch.randn(2, 3, WIDTH), torch.randn(2, 25, WIDTH)
    gathered = latents + layer.attention(latents, features)
    norm, first, _, second = layer.mlp
    centred = gathered - gathered.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    inner = normed @ first.weight.T
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(layer(latents, features), gathered + inner @ second.weight.T)


@pytest.mark.parametrize("name", ["perceiver", "qformer"])
def test_every_patch_reaches_every_token_of_its_frame(name: str) -> None:
    resampler = make(name)
    features = make_features(1, 1, resampler).requires_grad_()
    tokens = resampler(features, "video")
    # A sum over the width would be blind: a layer norm at the end makes it constant.
    for i in range(tokens.shape[1]):
        (gradient,) = torch.autograd.grad((tokens[0, i] * torch.arange(WIDTH)).sum(), features, retain_graph=True)
        assert (gradient.abs().sum(-1) > 0).all()


# The spatial pool.


def pool_by_windows(grid: Tensor, stride: int, mode: str) -> Tensor:
    """(side, side, width) to (new side, new side, width), window by window, the last ones as large as what remains."""
    starts = range(0, len(grid), stride)
    reduce = (lambda w: w.mean((0, 1))) if mode == "average" else (lambda w: w.amax((0, 1)))
    rows = [[reduce(grid[y : y + stride, x : x + stride]) for x in starts] for y in starts]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("mode", ["average", "max"])
@pytest.mark.parametrize(("side", "stride"), [(4, 2), (5, 2), (5, 3), (6, 3), (5, 1), (5, 5), (5, 9)])
def test_pooling_equals_pooling_window_by_window(side: int, stride: int, mode: str) -> None:
    pool = make("spatial_pool", patches_per_side=side, spatial_pool_stride=stride, spatial_pool_mode=mode)
    features = make_features(1, 1, pool)
    expected = pool_by_windows(features.view(side, side, WIDTH), stride, mode)
    torch.testing.assert_close(pool(features, "video")[0], expected.flatten(0, 1))


@pytest.mark.parametrize(("side", "stride"), [(4, 2), (5, 2), (5, 3), (6, 3), (5, 1)])
def test_bilinear_pooling_is_interpolation_to_the_side_rounded_up(side: int, stride: int) -> None:
    pool = make("spatial_pool", patches_per_side=side, spatial_pool_stride=stride)
    features = make_features(2, 3, pool)
    images = features.view(6, side, side, WIDTH).permute(0, 3, 1, 2)
    expected = F.interpolate(images, size=-(-side // stride), mode="bilinear").permute(0, 2, 3, 1)
    torch.testing.assert_close(pool(features, "video"), expected.reshape(2, -1, WIDTH))


@pytest.mark.parametrize("mode", ["average", "max", "bilinear"])
@pytest.mark.parametrize("patch", range(SIDE**2))
def test_a_patch_changes_only_the_token_whose_window_holds_it(mode: str, patch: int) -> None:
    pool = make("spatial_pool", spatial_pool_mode=mode, patches_per_side=6, spatial_pool_stride=2)
    features = make_features(1, 1, pool)
    changed = features.clone()
    changed[0, 0, patch] += 9
    difference = (pool(changed, "video") != pool(features, "video")).any(-1)[0]
    y, x = divmod(patch, 6)
    assert difference.nonzero().flatten().tolist() == [y // 2 * 3 + x // 2]


# The masked drop.


def kept_positions(resampler: Resampler, frames: int = 4) -> Tensor:
    """Which patches come through, (frames, kept): each carries its own position."""
    features = torch.arange(25.0).view(1, 1, 25, 1).expand(1, frames, 25, WIDTH)
    return resampler(features, "video")[0, :, 0].view(frames, -1).long()


def test_patches_are_kept_at_random_while_training_and_in_their_order() -> None:
    resampler = make("masked_drop").train()
    torch.manual_seed(5)
    draws = torch.stack([kept_positions(resampler) for _ in range(200)]).flatten(0, 1)
    assert draws.shape == (800, 8)
    assert (draws.diff(dim=-1) > 0).all()
    assert len(draws.unique(dim=0)) > 700, "every frame has a draw of its own"
    shares = draws.flatten().bincount(minlength=25) / 800
    assert (shares - 8 / 25).abs().max() < 0.08, "no patch is preferred"


def test_patches_are_kept_evenly_otherwise() -> None:
    resampler = make("masked_drop")
    kept = kept_positions(resampler)
    assert torch.equal(kept, kept_positions(resampler))
    assert kept.unique(dim=0).tolist() == [[1, 4, 7, 10, 14, 17, 20, 23]]


@pytest.mark.parametrize("training", [False, True])
def test_a_ratio_of_one_keeps_everything(training: bool) -> None:
    resampler = make("masked_drop", mask_drop_ratio=1.0).train(training)
    features = make_features(2, 3, resampler)
    assert torch.equal(resampler(features, "video"), features.flatten(1, 2))
