"""Text classifiers on the language model of a checkpoint: its weights without the vision modules, and a fresh head.

They are transformers' own classes for the plain model, ``GPT2ForSequenceClassification`` for ``llava_gpt2``, reached
through ``AutoModelForSequenceClassification`` and ``AutoModelForTokenClassification``. Alternating attention is plain
causal attention where there is no image and no video, and so are they.
"""

from __future__ import annotations

import copy
import re
from typing import Any, ClassVar

import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from llava.compat import WITHOUT_SDPA, supports_sdpa
from llava.config import GroundingConfig, VisionConfig
from llava.model.backbones import SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, plain_class
from llava.model.coordinates import COORDINATES
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.visual import VISION_MODULES


class TokenClassification(GenericForTokenClassification):
    """transformers' general classifier of tokens, on states that may be narrower than the layers, as OPT's are."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        embeddings: nn.Embedding = self.get_input_embeddings()  # type: ignore[attr-defined]
        self.score = nn.Linear(embeddings.embedding_dim, self.num_labels)


_GENERIC = {SEQUENCE_CLASSIFICATION: GenericForSequenceClassification, TOKEN_CLASSIFICATION: TokenClassification}
"""For families of which transformers has no classifier, as OPT has none of tokens."""


class TextClassifier:
    """Mixin for a classifier of transformers; put it first. It takes a checkpoint's configuration, and sees nothing."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [
        rf"(^|\.)({'|'.join(map(re.escape, (*VISION_MODULES, COORDINATES)))})(\.|$)",
        r"^(lm_head|embed_out)\.",
    ]

    def __init__(self, config: PretrainedConfig, *args: object, **kwargs: object) -> None:
        super().__init__(text_config(config), *args, **kwargs)  # type: ignore[call-arg]


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """A model's configuration without the entries of vision and coordinates."""
    text = copy.deepcopy(config)
    for part in (VisionConfig.from_model_config(config), GroundingConfig.from_model_config(config)):
        for name in {} if part is None else part.to_model_config():
            if hasattr(text, name):
                delattr(text, name)
    return text


def make_classifiers(backbone: type[LlavaMetaForCausalLM]) -> list[type[Any]]:
    """The classifier of texts and that of tokens on a language model with head."""
    plain = plain_class(backbone.decoder_class)
    classifiers = []
    for ending, generic in _GENERIC.items():
        # transformers' own classifier of the family where it has one, else its general one on the family's base class.
        own = getattr(transformers, plain.__name__.removesuffix("Model") + ending, None)
        bases = (generic, plain.__mro__[1]) if own is None else (own,)
        attributes = {
            "__module__": "llava.model",
            "__doc__": f"Text alone: ``{bases[0].__name__}`` on a checkpoint's language model.",
            "config_class": backbone.config_class,
            **({} if supports_sdpa(backbone) else WITHOUT_SDPA),
        }
        name = backbone.__name__.removesuffix("ForCausalLM") + ending
        classifiers.append(type(name, (TextClassifier, *bases), attributes))
    return classifiers
