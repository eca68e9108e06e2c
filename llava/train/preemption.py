"""Being asked to stop: a signal ends the run after the step it is in, with a checkpoint to go on from."""

from __future__ import annotations

import logging
import signal
import threading
import time
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.train import stop_signals
from llava.train.distributed import is_any_rank
from llava.train.saving import CheckpointTrainer
from llava.train.stop_signals import PREEMPTED as PREEMPTED
from llava.train.stop_signals import SIGNALS

logger = logging.getLogger(__name__)


class Preempted(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop; its last checkpoint has everything."""


class EvaluationStopped(Exception):  # noqa: N818
    """An evaluation was given up, because the run was asked to stop."""


class StopRequest(AbstractContextManager):
    """Listens, while it is entered, for the signals that ask a run to stop.

    A signal only leaves a note: whatever the process is doing, a save included, goes on; so a second one
    changes nothing.

    Attributes:
        agreed: all ranks know that one of them was asked.
    """

    def __init__(self) -> None:
        self.agreed = False
        self._received: int | None = None
        self._listening = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._listening = True
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other.
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            self._received = stop_signals.must_stay()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening = False
        if not self.agreed:  # A process that is about to end for a signal is in no need of another.
            stop_signals.restore(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def agree(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; every rank must call it at the same place."""
        if self._listening and not self.agreed and is_any_rank(self._received is not None, device):
            self.agreed = True
            if self._received is not None:
                name = signal.Signals(self._received).name
                logger.warning("%s received: saving a checkpoint, then stopping", name)
        return self.agreed


class PreemptionCallback(TrainerCallback):
    """Asks the ranks, after every step and within evaluations, whether to stop.

    Attributes:
        first_step: where this training began; above zero for a resumed one.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.first_step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # After its last step a run ends anyway, in less time than it takes to start again.
        if state.global_step < state.max_steps and self.request.agree(args.device):
            control.should_save = control.should_training_stop = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < state.max_steps and self.request.agree(args.device):
            raise EvaluationStopped


class PreemptibleTrainer(CheckpointTrainer):
    """A trainer that a signal ends after its step, and that makes up for an evaluation lost that way."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop_request = StopRequest()
        self.preemption = PreemptionCallback(self.stop_request)
        self.add_callback(self.preemption)

    @property
    def preempted(self) -> bool:
        return self.stop_request.agreed

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Evaluating draws random numbers (a data loader's seed); training must not feel whether and when it was done.
        devices = [torch.cuda.current_device()] if self.args.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                return {} if self.preempted else super()._evaluate(*args, **kwargs)
        except EvaluationStopped:
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # transformers saves the best only, with --save_strategy best: but this save is to go on from.
        return self.preempted or super()._determine_best_metric(metrics, trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        model_only = self.args.save_only_model
        self.args.save_only_model = model_only and not self.preempted
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_only_model = model_only

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._make_up_for_evaluation(kwargs["model"], kwargs["trial"], kwargs["ignore_keys_for_eval"])
        super()._run_epoch(*args, **kwargs)

    def _make_up_for_evaluation(self, model: Any, trial: Any, ignore_keys: list[str] | None) -> None:
        """Evaluate first, where the checkpoint was saved in place of the evaluation that its step was due."""
        callbacks: Any = self.state.stateful_callbacks or {}
        saved = callbacks.get("TrainerControl", {})
        if self.state.global_step != self.preemption.first_step or not saved.get("args", {}).get("should_evaluate"):
            return
        saved["args"]["should_evaluate"] = False
        self.control.should_evaluate = True
        self._maybe_log_save_evaluate(
            self._tr_loss, None, model, trial, self.state.epoch or 0, ignore_keys, time.time()
        )
