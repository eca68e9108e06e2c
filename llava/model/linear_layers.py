"""The linear layers of a language model, found by structure: what carries adapters and may be held in k bits."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llava.model.visual import vision_module_of


def find_linear_layers(model: Any) -> list[str]:
    """Names of the linear layers of a model's decoder: ``nn.Linear``, its kin in k bits, GPT-2's ``Conv1D``.

    Vision modules, embeddings and head are not among them; nor are the routers and experts of a
    mixture, which transformers holds as bare parameters and not as layers.

    Args:
        model: a language model with head, of any backbone.
    """
    return [
        f"{model.decoder_attribute}.{name}"
        for name, module in model.get_model().named_modules()
        if isinstance(module, nn.Linear | Conv1D) and vision_module_of(name) is None
    ]
