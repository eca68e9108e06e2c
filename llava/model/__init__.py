"""The models: backbones, vision modules, loading.

Nothing heavy is imported until a name of ``AVAILABLE_MODELS`` (or ``load_model``) is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_BACKBONES = {
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

AVAILABLE_MODELS = {
    name: (f"{prefix}Config", f"{prefix}Model", f"{prefix}ForCausalLM") for name, prefix in _BACKBONES.items()
}
"""Model types and their classes: configuration, decoder, language model with head.

``load_model`` wraps a checkpoint of model type "gpt2" with the classes of "llava_gpt2".
``register_backbone`` adds a newcomer's.
"""

_MODULES = {name: f"llava.model.language_model.{key}" for key, names in AVAILABLE_MODELS.items() for name in names}
_MODULES["load_model"] = "llava.model.loading"
_MODULES["register_backbone"] = "llava.model.backbones"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
