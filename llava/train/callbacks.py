"""What happens between steps, beside training itself."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from llava.train.preemption import EvaluationStopped, StopRequest

logger = logging.getLogger(__name__)

FIRST_STEPS = 10
"""Steps that are logged one by one, whatever ``--logging_steps`` says."""


class ThroughputCallback(TrainerCallback):
    """Logs samples a second, over all ranks, and the peak of this process's memory.

    Args:
        log_steps: how many steps each line is about.
    """

    def __init__(self, log_steps: int) -> None:
        if log_steps < 1:
            raise ValueError(f"--throughput_log_steps is {log_steps}; it must be at least 1, or leave it out")
        self.log_steps = log_steps
        self._since: tuple[int, float] | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._since is None:
            # From the first step on: its batches are there by then, so the start of the workers does not count.
            self._since = (state.global_step, time.perf_counter())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._since is None or state.global_step % self.log_steps:
            return
        (first, start), now = self._since, time.perf_counter()
        self._since = (state.global_step, now)
        if state.is_world_process_zero:
            # train_batch_size is that of a micro-batch on one rank.
            samples = (state.global_step - first) * args.train_batch_size * args.gradient_accumulation_steps
            rate = samples * args.world_size / (now - start)
            logger.info("step %d: %.1f samples/s, %s", state.global_step, rate, describe_memory())


class FirstStepsCallback(TrainerCallback):
    """Logs every one of the first steps, whose losses show at once whether a run learns; then as the flags ask."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step <= FIRST_STEPS and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True


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


def describe_memory() -> str:
    """The most memory that this process has held so far: of its GPU, where it has one, else of the machine."""
    if torch.cuda.is_available():
        return f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    try:
        import resource
    except ImportError:  # Windows
        return f"peak memory {psutil.Process().memory_info().peak_wset / 2**30:.2f} GiB"
    # ru_maxrss is in KiB, but on macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 2**10
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"
