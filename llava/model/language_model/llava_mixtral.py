"""Mixtral with vision."""

from __future__ import annotations

from transformers import MixtralConfig, MixtralForCausalLM, MixtralModel

from llava.model.backbones import FamilyDefaults, register_backbone
from llava.model.backbones import find_class as __getattr__  # noqa: F401  (variants and classifiers by name)
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMixtralConfig(FamilyDefaults, MixtralConfig):
    """Mixtral's configuration, with the ``mm_`` entries of ``VisionConfig``."""

    model_type = "llava_mixtral"


class LlavaMixtralModel(LlavaMetaModel, MixtralModel):
    config_class = LlavaMixtralConfig


@register_backbone
class LlavaMixtralForCausalLM(LlavaMetaForCausalLM, MixtralForCausalLM):
    config_class = LlavaMixtralConfig
    decoder_class = LlavaMixtralModel
