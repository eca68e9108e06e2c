"""The contract of projectors, for every registered one and for names of the MLP patterns."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from llava.config import VisionConfig
from llava.model.loading import load_model
from llava.model.multimodal_projector.projectors import PROJECTORS, build_projector

NAMES = [*PROJECTORS.names(), "mlp1x_gelu", "mlp3x_gelu", "mlp1x_res1x_gelu", "mlp2x_res3x_gelu"]
WIDTH = 10


def make_vision(name: str, side: int = 4, tower_width: int = WIDTH, **changes) -> VisionConfig:
    return VisionConfig(
        vision_tower="none", vision_config={}, hidden_size=tower_width, image_size=14 * side, patches_per_side=side,
        projector_type=name, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("side", [1, 4, 5])
@pytest.mark.parametrize(
    ("name", "tower_width"),
    [(name, width) for name in NAMES for width in (7, WIDTH) if (name, width) != ("identity", 7)],
)
def test_features_have_the_models_width_and_the_counted_grid(name: str, tower_width: int, side: int) -> None:
    vision = make_vision(name, side, tower_width)
    projector = build_projector(vision, WIDTH)
    for frames in (3, 0):
        features = torch.randn(frames, vision.patches_per_side**2, tower_width)
        assert projector(features).shape == (frames, vision.layout.grid_patches, WIDTH)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    projector = build_projector(make_vision(name, 5), WIDTH)
    features = torch.randn(2, 25, WIDTH, requires_grad=True)
    output = projector(features)
    (output * torch.randn_like(output)).sum().backward()
    assert features.grad is not None
    assert (features.grad.abs().sum(-1) > 0).all(), "no patch is left out"
    for key, parameter in projector.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 1e-6, key


@pytest.mark.parametrize("side", [4, 5])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_finite_near_fp32_and_stays_bf16(name: str, side: int) -> None:
    torch.manual_seed(0)
    projector = build_projector(make_vision(name, side), WIDTH)
    features = torch.randn(2, side**2, WIDTH).bfloat16()
    expected = projector(features.float())
    output = projector.bfloat16()(features)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("resampler", ["none", "fast_slow_resampler", "spatial_pool", "masked_drop"])
@pytest.mark.parametrize("name", ["identity", "pooler", "mlp1x_res1x_gelu"])
def test_a_model_saves_and_reloads_exactly(load_tiny, tmp_path: Path, name: str, resampler: str) -> None:
    loaded = load_tiny(
        projector_type=name, resampler_type=None if resampler == "none" else resampler, perceiver_latents=4
    )
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    media = [torch.randint(0, 255, (n, 3, 56, 56), dtype=torch.uint8) for n in (1, 2)]
    features = [model.model.eval().get_model().encode_media(media, ["image", "video"]) for model in (loaded, again)]
    for one, other, kind, frames in zip(*features, ("image", "video"), (1, 2), strict=True):
        assert torch.equal(one, other)
        assert len(one) == again.vision.layout.num_tokens(kind, frames)


@pytest.mark.parametrize("name", ["pooler", "mlp2x_res2x_gelu"])
def test_new_parameters_of_a_plain_model_are_filled_sensibly(load_tiny, name: str) -> None:
    projector = load_tiny(projector_type=name, perceiver_latents=4).model.get_model().mm_projector
    for key, parameter in projector.named_parameters():
        if parameter.ndim > 1:
            assert 0.01 < parameter.std() < 0.03, key
        else:
            assert (parameter == (0.0 if key.endswith("bias") else 1.0)).all(), key


@pytest.mark.parametrize(
    "name", ["mlp", "mlp0x_gelu", "mlp2x_relu", "mlp2x_res0x_gelu", "mlp2x_res_gelu", "Linear", ""]
)
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    known = r"identity, linear, pooler, mlpNx_gelu, mlpNx_resMx_gelu \(N, M >= 1\)"
    with pytest.raises(ValueError, match=f"unknown --mm_projector_type '{name}'; known: {known}"):
        build_projector(make_vision(name), WIDTH)


def test_identity_names_widths_that_differ() -> None:
    with pytest.raises(ValueError, match="the tower is 7 wide and the language model 10; use linear or mlp2x_gelu"):
        build_projector(make_vision("identity", tower_width=7), WIDTH)


@pytest.mark.parametrize("name", ["linear", "mlp1x_gelu", "pooler"])
def test_a_width_needs_layers_to_lie_between(name: str) -> None:
    with pytest.raises(ValueError, match=f"--mm_projector_width is 20, but --mm_projector_type {name} has no layers"):
        build_projector(replace(make_vision(name), projector_width=20), WIDTH)


def test_a_width_lies_between_all_layers_and_not_in_the_blocks() -> None:
    projector = build_projector(replace(make_vision("mlp3x_res1x_gelu"), projector_width=20), WIDTH)
    assert [(layer.in_features, layer.out_features) for layer in projector if isinstance(layer, nn.Linear)] == [
        (WIDTH, 20), (20, 20), (20, WIDTH)
    ]  # fmt: skip
    assert projector(torch.randn(2, 16, WIDTH)).shape == (2, 16, WIDTH)


def test_identity_changes_nothing() -> None:
    features = torch.randn(2, 16, WIDTH)
    assert torch.equal(build_projector(make_vision("identity"), WIDTH)(features), features)


@pytest.mark.parametrize(("name", "linears", "norms"), [("mlp1x_res1x_gelu", 3, 1), ("mlp2x_res3x_gelu", 8, 3)])
def test_an_mlp_with_residual_blocks(name: str, linears: int, norms: int) -> None:
    projector = build_projector(make_vision(name, tower_width=7), WIDTH)
    assert sum(isinstance(module, nn.Linear) for module in projector.modules()) == linears
    assert sum(isinstance(module, nn.LayerNorm) for module in projector.modules()) == norms


def test_a_residual_block_adds_to_what_it_has_normed() -> None:
    torch.manual_seed(0)
    projector = build_projector(make_vision("mlp1x_res1x_gelu"), WIDTH)
    weights = dict(projector.named_parameters())
    assert set(weights) == {
        *itertools.chain.from_iterable(
            (f"{key}.weight", f"{key}.bias") for key in ("0", "1.pre_norm", "1.proj.0", "1.proj.2")
        )
    }
    features = torch.randn(2, 16, WIDTH)
    normed = nn.functional.layer_norm(features @ weights["0.weight"].T + weights["0.bias"], (WIDTH,))
    inner = nn.functional.gelu(normed @ weights["1.proj.0.weight"].T + weights["1.proj.0.bias"])
    expected = normed + inner @ weights["1.proj.2.weight"].T + weights["1.proj.2.bias"]
    torch.testing.assert_close(projector(features), expected)


@pytest.mark.parametrize("side", [4, 5])
def test_the_pooler_takes_two_by_two_patches(side: int) -> None:
    torch.manual_seed(0)
    vision = make_vision("pooler", side, tower_width=7)
    projector = build_projector(vision, WIDTH)
    assert {key for key, _ in projector.named_parameters()} == {
        "conv_pool.weight", "conv_pool.bias", "proj.1.weight", "proj.1.bias",
    }  # fmt: skip
    features = torch.randn(1, side**2, 7)
    grid = features.view(side, side, 7)
    output = projector(features).view(vision.grid_side, vision.grid_side, WIDTH)
    for y, x in itertools.product(range(vision.grid_side), repeat=2):
        rows, columns = ([min(2 * i + j, side - 1) for j in (0, 1)] for i in (y, x))
        window = grid[rows][:, columns]
        pooled = torch.einsum("yxc,dcyx->d", window, projector.conv_pool.weight) + projector.conv_pool.bias
        torch.testing.assert_close(output[y, x], projector.proj(pooled))
