"""What happens between steps, beside training itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from llava.train.preemption import EvaluationStopped, StopRequest
from llava.train.sharding import whole

FIRST_STEPS = 10
"""Steps that are logged one by one, whatever ``--logging_steps`` says."""


def is_logged(args: TrainingArguments, state: TrainerState, step: int) -> bool:
    """Whether the loss of a step is logged, but for what only its end tells (that of an epoch, a signal)."""
    if args.logging_strategy == IntervalStrategy.NO:
        return False
    in_steps = args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0
    return in_steps or step <= FIRST_STEPS or step >= state.max_steps


class FirstStepsCallback(TrainerCallback):
    """Logs every one of the first steps, whose losses show at once whether a run learns, and the last one.

    In between it is as the flags ask.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        control.should_log |= is_logged(args, state, state.global_step)


GRAD_NORM = "grad_norm"


class GradNorms(TrainerCallback):
    """The norm of the gradient of each part, at the steps that are logged, beside that of all together.

    They are of the gradient before it is clipped, as the whole norm is. A step that is logged reads its gradients once
    more for it, and the device is waited for when the line is written, not before. Nothing is said where a single part
    trains, and under DeepSpeed, where no rank has a gradient as a whole.
    """

    def __init__(self) -> None:
        self._norms: dict[str, torch.Tensor] = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._norms = {}

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        if args.deepspeed or optimizer is None or not is_logged(args, state, state.global_step + 1):
            return
        gradients: dict[str, list[torch.Tensor]] = {}
        for group in optimizer.param_groups:
            own = gradients.setdefault(group.get("part", ""), [])
            own += [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        if len(gradients) > 1:
            self._norms = {part: whole(torch.nn.utils.get_total_norm(own)) for part, own in gradients.items() if own}

    def add_to(self, logs: dict[str, float]) -> None:
        """Add the norms of the newest step to the line of its loss."""
        if "loss" not in logs or not self._norms:
            return
        norms = dict(zip(self._norms, torch.stack(list(self._norms.values())).tolist(), strict=True))
        clipped = math.hypot(*norms.values())
        # What clipping has taken off all parts alike is put back; a norm of 0, NaN or infinity stays what it is.
        scale = logs.get(GRAD_NORM, clipped) / clipped if 0 < clipped < math.inf else 1.0
        logs |= {f"{GRAD_NORM}/{part}": float(f"{norm * scale:.6g}") for part, norm in sorted(norms.items())}
        self._norms = {}


@dataclass(eq=False)
class StopCallback(TrainerCallback):
    """Asks the ranks, after every step and within evaluations, whether to stop.

    A run that stops saves a checkpoint and leaves out the evaluation that was due.
    """

    request: StopRequest

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # After its last step a run ends anyway, in less time than it takes to start again.
        if state.global_step < state.max_steps and self.request.agree(args.device):
            control.should_save = control.should_training_stop = True
            self._leave_out_evaluation(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not self.request.agreed:
            return
        if not float(state.epoch or 0).is_integer():  # Broken off in its midst: what its end is due is not due yet.
            control.should_evaluate = False
        elif control.should_evaluate:  # The step above was the last of its epoch.
            control.should_save = True
            self._leave_out_evaluation(control)

    def _leave_out_evaluation(self, control: TrainerControl) -> None:
        self.request.evaluation_due |= control.should_evaluate
        control.should_evaluate = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step < state.max_steps and self.request.agree(args.device):
            raise EvaluationStopped
