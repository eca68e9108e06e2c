"""The models: backbones, vision modules, loading.

Nothing heavy is imported until a name of ``AVAILABLE_MODELS`` (or ``load_model``) is asked for. transformers' Auto
classes know all of them from here on (see ``backbones``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from llava.model import backbones

BACKBONES = {
    "llava_gemma": "LlavaGemma",
    "llava_gpt2": "LlavaGPT2",
    "llava_gpt_neox": "LlavaGPTNeoX",
    "llava_llama": "LlavaLlama",
    "llava_mistral": "LlavaMistral",
    "llava_mixtral": "LlavaMixtral",
    "llava_mpt": "LlavaMpt",
    "llava_opt": "LlavaOPT",
    "llava_qwen": "LlavaQwen",
    "llava_qwen_moe": "LlavaQwenMoe",
}
"""Model types, which are also names of files in ``language_model``, and how their classes' names begin."""

VARIANTS = {"base": "", "alternating": "Alternating", "alternating_cross": "AlternatingCross"}
"""Kinds of attention, and what the class names of each have before their ending; see ``alternating``."""

AVAILABLE_MODELS: dict[str, tuple[str, str, str]] = {}
"""Model types and their classes: configuration, decoder, language model with head.

``load_model`` wraps a checkpoint of model type "gpt2" with the classes of "llava_gpt2".
``register_backbone`` adds a newcomer's.
"""

_MODULES = {
    "load_model": "llava.model.loading",
    "register_backbone": "llava.model.language_model.registration",
}


def variant_type(backbone: str, variant: str) -> str:
    """The model type of a backbone with one of the ``VARIANTS`` of attention."""
    return backbone if variant == "base" else f"{backbone}_with_{variant}_attn"


def split_type(model_type: str) -> tuple[str, str]:
    """The backbone and the variant of a model type: the inverse of ``variant_type``."""
    for variant in VARIANTS:
        suffix = variant_type("", variant)
        if suffix and model_type.endswith(suffix):
            return model_type.removesuffix(suffix), variant
    return model_type, "base"


def list_names(names: Sequence[str], module: str) -> None:
    """Let the three classes of a model type, and its two text classifiers, be found here."""
    prefix = names[2].removesuffix("ForCausalLM")
    endings = (backbones.SEQUENCE_CLASSIFICATION, backbones.TOKEN_CLASSIFICATION)
    _MODULES.update(dict.fromkeys([*names, *(prefix + ending for ending in endings)], module))


def this_module() -> ModuleType:
    return sys.modules[__name__]


for _backbone, _prefix in BACKBONES.items():
    for _variant, _infix in VARIANTS.items():
        _names = (f"{_prefix}{_infix}Config", f"{_prefix}{_infix}Model", f"{_prefix}{_infix}ForCausalLM")
        AVAILABLE_MODELS[variant_type(_backbone, _variant)] = _names
        list_names(_names, f"llava.model.language_model.{_backbone}")
        backbones.register(variant_type(_backbone, _variant), _names, this_module())


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
