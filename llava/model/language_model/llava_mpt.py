"""MPT with vision."""

from __future__ import annotations

from typing import ClassVar

from transformers import MptConfig, MptForCausalLM, MptModel

from llava.model.backbones import FamilyDefaults, register_backbone
from llava.model.backbones import find_class as __getattr__  # noqa: F401  (variants and classifiers by name)
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMptConfig(FamilyDefaults, MptConfig):
    """MPT's configuration, with the ``mm_`` entries of ``VisionConfig``."""

    model_type = "llava_mpt"
    # The data's token budget is read from max_position_embeddings.
    attribute_map: ClassVar = {**MptConfig.attribute_map, "max_position_embeddings": "max_seq_len"}


class LlavaMptModel(LlavaMetaModel, MptModel):
    config_class = LlavaMptConfig
    has_attention_interface = False  # MPT adds ALiBi biases to its scores itself.


@register_backbone
class LlavaMptForCausalLM(LlavaMetaForCausalLM, MptForCausalLM):
    config_class = LlavaMptConfig
    decoder_class = LlavaMptModel
