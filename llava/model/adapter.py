"""Weights of projector, image newline and resampler from another checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llava.model.foreign_code import NOT_JUST_TENSORS, UNSAFE_WEIGHTS

_MODULES = ("mm_projector", "image_newline", "vision_resampler")

# Names in LLaVA-ST checkpoints (left) of what is called otherwise here.
_RENAMED = (
    ("vision_resampler.token_packer_slow.devide_attention.", "vision_resampler.slow."),
    ("vision_resampler.token_packer_fast.devide_attention.", "vision_resampler.fast."),
    ("vision_resampler.token_packer.devide_attention.", "vision_resampler.main."),
    (".attn.out_proj.", ".o_proj."),
)


def load_adapter(model: Any, path: str) -> list[str]:
    """Copy the weights of projector, image newline and resampler of a checkpoint into a model.

    What the checkpoint lacks of them stays as it is: a newline may be new to a projector that is not.

    Args:
        model: a language model with vision modules.
        path: a checkpoint folder, or a ``.safetensors`` or ``.bin`` file (the latter is read without
            unpickling anything but tensors). Names may have any prefix before ``mm_projector``,
            ``image_newline`` or ``vision_resampler``; those of LLaVA-ST's resampler are translated.

    Returns:
        The names that were copied.

    Raises:
        ValueError: no such file, no such weights in it, or weights of another shape.
    """
    weights = _translate(_read_weights(path))
    decoder = model.get_model()
    own = {name: p for name, p in decoder.named_parameters() if name.split(".")[0] in _MODULES}
    wrong = [
        f"{name} {tuple(weights[name].shape)} (here {tuple(own[name].shape)})"
        for name in weights
        if name in own and weights[name].shape != own[name].shape
    ]
    unknown = sorted(set(weights) - set(own))
    if not weights or wrong or unknown:
        what = (
            f"other shapes: {wrong[:3]}"
            if wrong
            else f"weights unknown here: {unknown[:3]}"
            if unknown
            else "no projector"
        )
        raise ValueError(f"--pretrain_mm_mlp_adapter {path!r} has {what}; it must come from the same kind of model")
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    return sorted(weights)


def _read_weights(path: str) -> dict[str, Tensor]:
    files = sorted(Path(path).glob("*.safetensors")) if os.path.isdir(path) else [Path(path)]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"--pretrain_mm_mlp_adapter {path!r}: no such file, or a folder without .safetensors")
    weights: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            weights |= load_file(file)
            continue
        try:
            weights |= torch.load(file, map_location="cpu", weights_only=True)
        except UNSAFE_WEIGHTS as error:
            raise ValueError(f"--pretrain_mm_mlp_adapter {path!r}: {NOT_JUST_TENSORS}") from error
    return weights


def _translate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep what belongs to projector, newline and resampler, under this library's names."""
    translated: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        start = next((i for i, part in enumerate(parts) if part in _MODULES), None)
        if start is None:
            continue
        name = ".".join(parts[start:])
        for theirs, ours in _RENAMED:
            name = name.replace(theirs, ours)
        if ".attn.in_proj_" in name:
            prefix, _, kind = name.partition(".attn.in_proj_")
            translated |= {f"{prefix}.{p}_proj.{kind}": t for p, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            translated[name] = tensor
    return translated
