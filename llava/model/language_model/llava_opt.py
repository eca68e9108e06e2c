"""OPT with vision."""

from __future__ import annotations

from transformers import OPTConfig, OPTForCausalLM, OPTModel

from llava.model.backbones import FamilyDefaults, register_backbone
from llava.model.backbones import find_class as __getattr__  # noqa: F401  (variants and classifiers by name)
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaOPTConfig(FamilyDefaults, OPTConfig):
    """OPT's configuration, with the ``mm_`` entries of ``VisionConfig``."""

    model_type = "llava_opt"


class LlavaOPTModel(LlavaMetaModel, OPTModel):
    config_class = LlavaOPTConfig


@register_backbone
class LlavaOPTForCausalLM(LlavaMetaForCausalLM, OPTForCausalLM):
    config_class = LlavaOPTConfig
    decoder_class = LlavaOPTModel
