"""Checkpoint folders as the LLaVA family writes them, made from small models of this library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PACKER = (("main", "token_packer"), ("slow", "token_packer_slow"), ("fast", "token_packer_fast"))
TABLES = (
    *((f"temporal_{way}", f"temporal_{way}_embeddings.weight") for way in ("input", "output")),
    *(
        (f"{axis}_{way}", f"spatial_{axis}_{way}_embeddings.weight")
        for axis in ("height", "width")
        for way in ("input", "output")
    ),
)


def to_family_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of this library under the names of LLaVA-ST, which joins queries, keys and values."""
    old: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        for ours, theirs in PACKER:
            name = name.replace(f"vision_resampler.{ours}.", f"vision_resampler.{theirs}.devide_attention.")
        for ours, theirs in TABLES:
            name = name.replace(f"coordinates.{ours}", theirs)
        old[name.replace(".o_proj.", ".attn.out_proj.") if "devide" in name else name] = tensor
    for kind in ("weight", "bias"):
        for name in [name for name in old if "devide" in name and name.endswith(f".q_proj.{kind}")]:
            start = name.removesuffix(f"q_proj.{kind}")
            joined = torch.cat([old.pop(f"{start}{letter}_proj.{kind}") for letter in "qkv"])
            old[f"{start}attn.in_proj_{kind}"] = joined
    return old


def write_family(loaded: Any, folder: Path, tower: Path, **entries: object) -> Path:
    """Write a model as the fork writes it: a config with ``mm_vision_tower`` and no ``mm_vision_config``, old names.

    Args:
        loaded: with a frozen tower.
        folder: to be written.
        tower: the folder that ``mm_vision_tower`` names; None puts its weights into the file too.
        entries: of ``config.json`` that differ; None takes one out.
    """
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in settings.items() if not name.startswith("mm_")}
    kept |= {
        "mm_vision_tower": str(tower), "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": "fast_slow_resampler", "mm_perceiver_latents": 9,
        "mm_perceiver_latents_fast": 4, "mm_perceiver_ff_mult": 4, "mm_patch_merge_type": "flat", "mm_hidden_size": 32,
        "mm_use_im_start_end": False, "image_aspect_ratio": "square", "use_mm_proj": True, "tune_mm_mlp_adapter": False,
    }  # fmt: skip
    kept = {name: value for name, value in (kept | entries).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    state = to_family_names(load_file(folder / "model.safetensors"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
