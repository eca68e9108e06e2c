"""Tiny vision models, one of each kind of tower, and what transformers says their hidden states are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SIDE, PATCH, WIDTH, LAYERS = 32, 8, 24, 3
GRID = SIDE // PATCH

_VIT = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "patch_size": PATCH,
    "image_size": SIDE, "layer_norm_eps": 1e-6,
}  # fmt: skip
_PAIR = _VIT | {"intermediate_size": 40}
_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
_TIMM = {"img_size": SIDE, "patch_size": PATCH, "depth": LAYERS, "embed_dim": WIDTH, "num_heads": 2}
_NAFLEX = {key: value for key, value in _PAIR.items() if key != "image_size"} | {"num_patches": GRID * GRID}

TINY_TOWERS: dict[str, dict[str, Any]] = {
    "dinov2": _VIT | {"mlp_ratio": 2},
    "dinov2_with_registers": _VIT | {"mlp_ratio": 2, "num_register_tokens": 3},
    "dinov3_vit": _PAIR | {"num_register_tokens": 2},
    "clip_vision_model": _PAIR,
    "siglip_vision_model": _PAIR,
    "siglip2_vision_model": _NAFLEX,
    "timm_wrapper": {"architecture": "vit_tiny_patch16_224", "model_args": _TIMM | {"reg_tokens": 2}},
}
"""Settings by model type: 3 layers of width 24 that see 32 pixels as 4 x 4 patches."""

TWO_TOWERS: dict[str, dict[str, Any]] = {
    "clip": {"vision_config": _PAIR, "text_config": _TEXT},
    "siglip": {"vision_config": _PAIR, "text_config": _TEXT},
    "siglip2": {"vision_config": _NAFLEX, "text_config": _TEXT},
}
"""Models of images and text whose vision half is one of the towers."""

ROTARY_TIMM = {"architecture": "vit_small_patch16_dinov3", "model_args": _TIMM}
"""A timm model whose rotary positions are buffers that no checkpoint holds."""


def need_timm() -> None:
    pytest.importorskip("timm", reason="timm is not installed (pip install 'llava-babylm[timm]')", exc_type=ImportError)


def write_tower(
    folder: Path, model_type: str, settings: dict[str, Any], processor: dict[str, Any] | None = None
) -> Path:
    """Save a model with random weights, and the processor's configuration where one is given."""
    from transformers import AutoConfig, AutoModel

    if model_type == "timm_wrapper":
        need_timm()
    torch.manual_seed(4)
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **settings))
    # Some parameters begin as zeros, which would hide what they do.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@torch.no_grad()
def read_hidden_states(folder: Path, pixels: Tensor) -> list[Tensor | None]:
    """All hidden states of the whole model in ``folder``, (frames, tokens, width) each, prefix tokens included.

    timm has no entry for the embeddings: None stands in its place.
    """
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    model = getattr(model, "vision_model", model)
    if model.config.model_type == "timm_wrapper":
        maps = model(pixels, output_hidden_states=True).hidden_states
        return [None, *(features.flatten(2).transpose(1, 2) for features in maps)]
    if model.config.model_type == "siglip2_vision_model":
        from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

        patches = [torch.from_numpy(convert_image_to_patches(frame.numpy(), PATCH)) for frame in pixels]
        inputs = {
            "pixel_values": torch.stack(patches),
            "pixel_attention_mask": torch.ones(len(pixels), GRID * GRID, dtype=torch.int32),
            "spatial_shapes": torch.tensor([[GRID, GRID]] * len(pixels)),
        }
    else:
        inputs = {"pixel_values": pixels}
    return list(model(**inputs, output_hidden_states=True).hidden_states)
