"""What happens between steps, beside training itself."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from llava.train.preemption import EvaluationStopped, StopRequest

FIRST_STEPS = 10
"""Steps that are logged one by one, whatever ``--logging_steps`` says."""


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
