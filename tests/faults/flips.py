"""Single bits that flip in a run, once: what memory or arithmetic does that has failed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

NAME = "transformer.h.1.mlp.c_fc.weight"


def flip(tensor: torch.Tensor, place: int = 7, bit: int = 3) -> None:
    """Flip a bit of a float32, in place."""
    with torch.no_grad():
        tensor.view(-1)[place : place + 1].view(torch.int32).bitwise_xor_(1 << bit)


class Flip(TrainerCallback):
    """Flips a bit of a parameter, a moment or a gradient in a step."""

    def __init__(self, what: str, step: int) -> None:
        self.what, self.step = what, step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step != self.step - 1:
            return
        parameter = dict(model.named_parameters())[NAME]
        if self.what == "parameter":
            flip(parameter.data)
        elif self.what == "moment":
            flip(kwargs["optimizer"].state[parameter]["exp_avg"])
        elif self.what == "gradient":

            def hook(gradient: torch.Tensor) -> torch.Tensor:
                handle.remove()
                changed = gradient.clone()
                flip(changed)
                return changed

            handle = parameter.register_hook(hook)
        elif self.what == "output":

            def change(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
                handle.remove()
                changed = output.clone()
                flip(changed)
                return changed

            handle = dict(model.named_modules())[NAME.removesuffix(".weight")].register_forward_hook(change)
        elif self.what == "tower":
            flip(next(model.get_vision_tower().parameters()).data)

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.what == "summed gradient" and state.global_step == self.step - 1:
            flip(dict(model.named_parameters())[NAME].grad)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.what == "exchanged gradient" and state.global_step == self.step - 1:
            flip(dict(model.named_parameters())[NAME].grad)


def flip_in(what: str, step: int) -> None:
    """Let every trainer of this process have such a callback, before those that verify."""
    from llava.train.trainer import LlavaTrainer

    prepare = LlavaTrainer._prepare_for_training

    def prepared(self: Any, *words: Any, **named: Any) -> Any:
        self.callback_handler.callbacks.insert(0, Flip(what, step))
        return prepare(self, *words, **named)

    LlavaTrainer._prepare_for_training = prepared  # type: ignore[method-assign]
