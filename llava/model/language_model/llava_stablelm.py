"""StableLM with vision."""

from __future__ import annotations

from transformers import StableLmConfig, StableLmForCausalLM, StableLmModel

from llava.model.backbones import FamilyDefaults, register_backbone
from llava.model.backbones import find_class as __getattr__  # noqa: F401  (variants and classifiers by name)
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaStableLmConfig(FamilyDefaults, StableLmConfig):
    """StableLM's configuration, with the ``mm_`` entries of ``VisionConfig``."""

    model_type = "llava_stablelm"


class LlavaStableLmModel(LlavaMetaModel, StableLmModel):
    config_class = LlavaStableLmConfig
    layers_hand_down = False


@register_backbone
class LlavaStableLmForCausalLM(LlavaMetaForCausalLM, StableLmForCausalLM):
    config_class = LlavaStableLmConfig
    decoder_class = LlavaStableLmModel
