"""Qwen2-MoE with vision."""

from __future__ import annotations

from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen2MoeModel

from llava.model.backbones import FamilyDefaults, register_backbone
from llava.model.backbones import find_class as __getattr__  # noqa: F401  (variants and classifiers by name)
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaQwenMoeConfig(FamilyDefaults, Qwen2MoeConfig):
    """Qwen2-MoE's configuration, with the ``mm_`` entries of ``VisionConfig``."""

    model_type = "llava_qwen_moe"


class LlavaQwenMoeModel(LlavaMetaModel, Qwen2MoeModel):
    config_class = LlavaQwenMoeConfig


@register_backbone
class LlavaQwenMoeForCausalLM(LlavaMetaForCausalLM, Qwen2MoeForCausalLM):
    config_class = LlavaQwenMoeConfig
    decoder_class = LlavaQwenMoeModel
