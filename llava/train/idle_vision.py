"""Keeps the optimizer's hands off vision modules in steps in which no rank had media for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor
from transformers import TrainerCallback

from llava.model.visual import VISION_MODULES


class IdleVision(TrainerCallback):
    """Takes idle vision modules out of an optimizer's step.

    A gradient of zero is not none: AdamW decays weights and moments all the same, and counts a step.
    Ranks that wait for each other have zeros even where no sample of the global step had an image or
    a video. A module moves as a whole if any of its parameters was used by any micro-batch of any
    rank, and else not at all; so it is with one process and with every engine.

    Args:
        used: the model's ``used_vision_modules``, which the backward passes of the step fill.
        device: where the ranks' small collective runs, one for each step of the optimizer.
    """

    def __init__(self, used: set[str], device: torch.device) -> None:
        self.used = used
        self.device = device
        self._moving: set[str] | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.used.clear()
        self._moving = None

    def before_optimizer_step(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        """Hook for ``Optimizer.register_step_pre_hook``; groups say in ``vision_module`` what they hold.

        ZeRO steps group by group, with flat shares of the parameters in the groups.
        """
        if self._moving is None:
            self._moving = self._agree() if _has_ranks() else _modules_with_gradients(optimizer)
        for group in optimizer.param_groups:
            module = group["vision_module"]
            for parameter in group["params"] if module is not None else ():
                if module not in self._moving:
                    parameter.grad = None
                elif parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _agree(self) -> set[str]:
        """The modules that were used on any rank."""
        flags = torch.tensor([module in self.used for module in VISION_MODULES], dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return {module for module, flag in zip(VISION_MODULES, flags.tolist(), strict=True) if flag}


def _has_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _modules_with_gradients(optimizer: torch.optim.Optimizer) -> set[str]:
    def has_gradient(parameters: list[Tensor]) -> bool:
        return any(parameter.grad is not None for parameter in parameters)

    return {group["vision_module"] for group in optimizer.param_groups if has_gradient(group["params"])}
