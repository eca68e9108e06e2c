"""GPT-2 with vision."""

from __future__ import annotations

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from llava.model.backbones import FamilyDefaults, register_backbone
from llava.model.backbones import find_class as __getattr__  # noqa: F401  (variants and classifiers by name)
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaGPT2Config(FamilyDefaults, GPT2Config):
    """GPT-2's configuration, with the ``mm_`` entries of ``VisionConfig``."""

    model_type = "llava_gpt2"


class LlavaGPT2Model(LlavaMetaModel, GPT2Model):
    config_class = LlavaGPT2Config

    # As in the LLaVA family, whose code reads model and embed_tokens of every backbone.
    @property
    def model(self) -> LlavaGPT2Model:
        return self

    @property
    def embed_tokens(self) -> nn.Embedding:
        return self.wte


@register_backbone
class LlavaGPT2ForCausalLM(LlavaMetaForCausalLM, GPT2LMHeadModel):
    config_class = LlavaGPT2Config
    decoder_class = LlavaGPT2Model

    @property
    def model(self) -> LlavaGPT2Model:
        return self.transformer
