"""Gemma with vision."""

from __future__ import annotations

from transformers import GemmaConfig, GemmaForCausalLM, GemmaModel

from llava.model.backbones import FamilyDefaults, register_backbone
from llava.model.backbones import find_class as __getattr__  # noqa: F401  (variants and classifiers by name)
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaGemmaConfig(FamilyDefaults, GemmaConfig):
    """Gemma's configuration, with the ``mm_`` entries of ``VisionConfig``."""

    model_type = "llava_gemma"


class LlavaGemmaModel(LlavaMetaModel, GemmaModel):
    config_class = LlavaGemmaConfig


@register_backbone
class LlavaGemmaForCausalLM(LlavaMetaForCausalLM, GemmaForCausalLM):
    config_class = LlavaGemmaConfig
    decoder_class = LlavaGemmaModel
