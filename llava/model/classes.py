"""Which classes a checkpoint is loaded with, by model type and kind of attention, and whether it fits them."""

from __future__ import annotations

import logging
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from llava.model.backbones import AVAILABLE_MODELS, PLAIN_TYPES, find_class, known_types, split_type, variant_type
from llava.model.coordinates import COORDINATES
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.pretrained import foreign_code_note, read_config
from llava.model.visual import is_added, vision_module_of
from llava.registry import PLUGIN_HINT

logger = logging.getLogger(__name__)


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


def check_loaded(info: dict[str, Any], path: str) -> list[str]:
    """Names of the new parameters; anything but vision modules missing or left over is an error."""
    # Vision modules may be new to a checkpoint, words and layers may not; nothing of it may be left over.
    missing = sorted(info["missing_keys"])
    foreign = [name for name in missing if not is_added(name)]
    unexpected = sorted(info["unexpected_keys"])
    if info["mismatched_keys"]:
        name, there, here = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"{path} does not fit its config.json in {len(info['mismatched_keys'])} shapes: {name} is "
            f"{tuple(there)} in the file and {tuple(here)} by the configuration; the two are of different models"
        )
    if foreign or unexpected:
        what = f"lacks {foreign[:5]}" if foreign else f"has {unexpected[:5]}, which its model type does not know"
        raise ValueError(f"{path} does not fit its config.json: it {what}")
    if missing:
        modules = ", ".join(sorted({vision_module_of(name) or COORDINATES for name in missing}))
        logger.info("new parameters, not in %s: %d tensors of %s", path, len(missing), modules)
    return missing
