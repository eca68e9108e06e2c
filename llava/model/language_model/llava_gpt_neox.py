"""GPT-NeoX with vision."""

from __future__ import annotations

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel

from llava.model.backbones import FamilyDefaults, register_backbone
from llava.model.backbones import find_class as __getattr__  # noqa: F401  (variants and classifiers by name)
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaGPTNeoXConfig(FamilyDefaults, GPTNeoXConfig):
    """GPT-NeoX's configuration, with the ``mm_`` entries of ``VisionConfig``."""

    model_type = "llava_gpt_neox"


class LlavaGPTNeoXModel(LlavaMetaModel, GPTNeoXModel):
    config_class = LlavaGPTNeoXConfig


@register_backbone
class LlavaGPTNeoXForCausalLM(LlavaMetaForCausalLM, GPTNeoXForCausalLM):
    config_class = LlavaGPTNeoXConfig
    decoder_class = LlavaGPTNeoXModel
