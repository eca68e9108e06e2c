"""ZeRO-3, which shares out the parameters themselves: what loading and the vision modules need to fit it.

Every rank loads the whole model and DeepSpeed shares it out afterwards: models of this library fit
into one rank's memory, and everything that touches weights while loading (a tower's file, rows of
new tokens, adapters) then works as without it.

DeepSpeed gathers a module's parameters when the module is called, on all ranks together, and takes
for granted that they all call the same modules in the same order. Vision modules are called by the
ranks that have media. So DeepSpeed leaves these alone: all of their parameters are gathered at once,
before the forward pass of the first micro-batch, on every rank alike, and shared out again, by
DeepSpeed itself, when the optimizer steps. So are tables of coordinates: their gradients are made of their
values, which must be there in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations import deepspeed as integration

from llava.model.coordinates import COORDINATES
from llava.model.visual import VISION_MODULES, is_added


@contextmanager
def loading_whole(training_args: Any) -> Iterator[None]:
    """Load models as without DeepSpeed, although ``training_args`` have announced it to transformers."""
    announced = getattr(training_args, "hf_deepspeed_config", None)
    if announced is None:
        yield
        return
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(announced)


def gather_added_together(model: Any) -> None:
    """Let every rank gather vision modules and coordinates before each forward pass, if DeepSpeed shares them out.

    Args:
        model: a language model with head. Without ZeRO-3, or for plain text, nothing changes.
    """
    decoder = model.get_model()
    names = [name for name, _ in decoder.named_parameters() if is_added(name)]

    @torch.no_grad()
    def gather(*args: Any) -> None:
        own = dict(decoder.named_parameters())
        shared: list[Any] = [own[name] for name in names if hasattr(own[name], "ds_status")]
        if not shared:
            return
        if not all(parameter.ds_persist for parameter in shared):
            _release_from_engine(decoder)
            for parameter in shared:
                # DeepSpeed's word for what stays whole from the first use to the optimizer's step.
                parameter.ds_persist = True
        # Does nothing for those that are whole; which ones these are is the same on every rank.
        shared[0].all_gather(param_list=shared)

    if names:
        model.register_forward_pre_hook(gather)


def _release_from_engine(decoder: nn.Module) -> None:
    """Remove the hooks that DeepSpeed has put on the modules that were added to the language model."""
    parts = (getattr(decoder, name, None) for name in (*VISION_MODULES, COORDINATES))
    modules = (module for part in parts if isinstance(part, nn.Module) for module in part.modules())
    for module in modules:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook.__module__.startswith("deepspeed.")]:
                del hooks[key]
