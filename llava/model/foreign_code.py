"""What a checkpoint may not bring along: Python code, compiled kernels, and pickles that hold more than tensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

from transformers import PretrainedConfig

from llava.messages import shorten

logger = logging.getLogger(__name__)

_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_LOCAL_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
"""What needs nothing but torch: for others (``org/repo``, flash attention that is not installed) transformers fetches
compiled code from the hub."""

UNSAFE_WEIGHTS = (UnpicklingError,)
"""What ``torch.load(..., weights_only=True)`` raises for a file that is no plain file of tensors."""

NOT_JUST_TENSORS = (
    "not a file of plain tensors; what else a pickle may hold is never loaded: store the weights as .safetensors"
)


def foreign_code_note(settings: Mapping[str, Any]) -> str:
    """The end of an error about a folder whose configuration (its JSON) names code of its own; else empty.

    transformers asks on the terminal whether to run such code unless ``trust_remote_code`` is given: give
    it, as False, to every ``Auto`` class, so that no job waits for an answer.
    """
    if "auto_map" not in settings:
        return ""
    return (
        "; it brings Python code of its own (auto_map), which is never run here: take a model whose type "
        "transformers knows, or register the class yourself with --plugins (docs/extending.md)"
    )


def drop_remote_kernels(settings: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The entries of a ``config.json`` without those, at any depth, that name an implementation to be fetched.

    Args:
        settings: the entries.
        path: where they stand, for the warning.
    """
    kept: dict[str, Any] = {}
    for name, value in settings.items():
        if name.strip("_").removesuffix("_internal") in _IMPLEMENTATIONS and not _is_local(value):
            logger.warning(
                "%s: its configuration asks for %s %s, which is not used: ask for it with --attn_implementation",
                path, name, shorten(value),
            )  # fmt: skip
            continue
        kept[name] = drop_remote_kernels(value, path) if isinstance(value, Mapping) else value
    return kept


def _is_local(value: Any) -> bool:
    names = value.values() if isinstance(value, Mapping) else [value]
    return all(name is None or name in _LOCAL_IMPLEMENTATIONS for name in names)


def forget_implementations(config: PretrainedConfig) -> PretrainedConfig:
    """A configuration, and those within it, that leaves the choice of an implementation to the loader."""
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))):
        for name in _IMPLEMENTATIONS:
            if getattr(part, f"_{name}", None) not in (None, *_LOCAL_IMPLEMENTATIONS):
                setattr(part, f"_{name}_internal", None)
    return config


def check_quantization(settings: Mapping[str, Any], path: str) -> None:
    """A ValueError for weights that were stored in fewer bits by another method than bitsandbytes'."""
    quantization = settings.get("quantization_config")
    method = quantization.get("quant_method", "bitsandbytes") if isinstance(quantization, Mapping) else None
    if method not in (None, "bitsandbytes"):
        raise ValueError(
            f"{path}: its weights are quantised by {shorten(method)}, which is not read here; take the model with "
            "plain weights (and --bits 4 or 8 to hold it in fewer)"
        )
