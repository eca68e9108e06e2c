"""Families that are a row of the table in ``llava.model.backbones`` and nothing else."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from llava.compat import WITHOUT_SDPA
from llava.model.backbones import FamilyDefaults
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


def make_family(prefix: str, model_type: str, plain_type: str) -> type[Any]:
    """The language model with head of a family; it names its configuration and its decoder.

    Args:
        prefix: how the names of the three classes begin.
        model_type: of the family.
        plain_type: of transformers' classes that they are made from.
    """

    def derive(name: str, *bases: type, **attributes: object) -> Any:
        doc = f"``{bases[-1].__name__}`` with vision."
        return type(prefix + name, bases, {"__module__": "llava.model", "__doc__": doc, **attributes})

    plain_config = CONFIG_MAPPING[plain_type]
    plain_decoder: Any = MODEL_MAPPING[plain_config]
    plain_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[plain_config]
    config_class = derive("Config", FamilyDefaults, plain_config, model_type=model_type)
    shared: dict[str, object] = {"config_class": config_class}
    if getattr(plain_config, "attn_logit_softcapping", None) is not None:  # Gemma 2's default.
        shared |= WITHOUT_SDPA
    decoder = derive("Model", LlavaMetaModel, plain_decoder, **shared)
    return derive("ForCausalLM", LlavaMetaForCausalLM, plain_model, decoder_class=decoder, **shared)
