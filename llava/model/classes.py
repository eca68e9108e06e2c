"""Which classes a checkpoint is loaded with, by its model type and the kind of attention, and its configuration."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from llava.model.backbones import AVAILABLE_MODELS, PLAIN_TYPES, find_class, known_types, split_type, variant_type
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.pretrained import foreign_code_note, read_config
from llava.registry import PLUGIN_HINT


def choose_classes(
    model_type: str, path: str, variant: str | None = None
) -> tuple[type[PretrainedConfig], type[LlavaMetaForCausalLM]]:
    """Configuration and model class for a model type and, where one is asked for, a variant."""
    # "gpt2" is loaded as "llava_gpt2"; a type of this library is itself.
    name = PLAIN_TYPES.get(model_type, model_type)
    if name not in AVAILABLE_MODELS:
        raise ValueError(
            f"{path!r} has the unknown model_type {model_type!r}; known: {', '.join(known_types())}"
            f"{foreign_code_note(read_config(path)) or '; ' + PLUGIN_HINT}"
        )
    if variant is not None:
        name = variant_type(split_type(name)[0], variant)
    config_name, _, model_name = AVAILABLE_MODELS[name]
    return find_class(config_name), find_class(model_name)


def build_config(config_class: type[PretrainedConfig], settings: dict[str, Any], path: str) -> PretrainedConfig:
    """A configuration of a ``config.json``'s entries; a ValueError, beginning with ``path``, if they do not fit."""
    try:
        # A copy, which transformers may change.
        return config_class.from_dict(dict(settings))
    except (TypeError, AttributeError, KeyError, ZeroDivisionError, StrictDataclassError) as error:
        raise ValueError(f"{path}: its config.json does not fit {config_class.__name__}: {error}") from error
