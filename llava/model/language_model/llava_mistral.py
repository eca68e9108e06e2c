"""Mistral with vision."""

from __future__ import annotations

from transformers import MistralConfig, MistralForCausalLM, MistralModel

from llava.model.backbones import FamilyDefaults, register_backbone
from llava.model.backbones import find_class as __getattr__  # noqa: F401  (variants and classifiers by name)
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMistralConfig(FamilyDefaults, MistralConfig):
    """Mistral's configuration, with the ``mm_`` entries of ``VisionConfig``."""

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    config_class = LlavaMistralConfig


@register_backbone
class LlavaMistralForCausalLM(LlavaMetaForCausalLM, MistralForCausalLM):
    config_class = LlavaMistralConfig
    decoder_class = LlavaMistralModel
