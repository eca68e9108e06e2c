"""The models: backbones, vision modules, loading.

Nothing heavy is imported until a name of ``AVAILABLE_MODELS`` (or ``load_model``) is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

AVAILABLE_MODELS = {
    "llava_gpt2": ("LlavaGPT2Config", "LlavaGPT2Model", "LlavaGPT2ForCausalLM"),
    "llava_llama": ("LlavaLlamaConfig", "LlavaLlamaModel", "LlavaLlamaForCausalLM"),
}
"""Model types and their classes: configuration, decoder, language model with head.

``load_model`` wraps a checkpoint of model type "gpt2" with the classes of "llava_gpt2".
"""

_MODULES = {name: f"llava.model.language_model.{key}" for key, names in AVAILABLE_MODELS.items() for name in names}
_MODULES["load_model"] = "llava.model.loading"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
