"""The trainer: transformers' own, with an exact order of the data, losses by token and checkpoints that are complete.

What a run owns beside transformers' trainer are plain objects, to which the trainer hands the events of the loop::

    data           data_order.py    which samples come next, and where in them the run stands
    checkpoints    saving.py        a folder has its name only when it is complete
    stop_request   preemption.py    a signal ends the run after its step
    nan_check      nan_check.py     a NaN or an infinity stops it before the optimizer's step
    bad_sample_log bad_samples.py   what was skipped
    feature_log    feature_cache.py what was read from a feature cache, and is added to it
    exposure       exposure_log.py  what batches have presented to the model
    throughput     throughput.py    samples and tokens a second, the wait for data, memory, MFU
    word_budget    budget.py        ends the run with its words, leaves milestones and calls hooks at each

Public methods are overridden where there are any. The six private ones come last in the class, each with its reason.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from llava import progress
from llava.data.collator import model_inputs
from llava.data.samplers import GROUPED, SEQUENTIAL
from llava.model.grad_sync import UnusedVisionModules, trains_vision_alone
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loss import counting_rows
from llava.model.pretrained import quiet_transformers
from llava.train.arguments import TrainingArguments
from llava.train.bad_samples import BadSampleLog
from llava.train.budget import WordBudget, counting_flag
from llava.train.callbacks import FirstStepsCallback, GradNorms, StopCallback
from llava.train.checkpoint import find_best
from llava.train.data_order import TrainingData, build_evaluation_loader, choose_collator
from llava.train.distributed import broadcast_from_rank0, gather_added_together
from llava.train.engines import check_engine, choose_products, compile_decoder
from llava.train.evaluation import (
    NOT_PREDICTIONS,
    CutCounter,
    EvaluationMeter,
    check_best_metric,
    keeping_random_states,
)
from llava.train.exposure_log import ExposureLog
from llava.train.feature_cache import FeatureLog
from llava.train.flops import find_peak
from llava.train.identity import Differences, check_resumed
from llava.train.nan_check import NanCheck, build_nan_check
from llava.train.parts import build_optimizer
from llava.train.preemption import EvaluationStopped, ScoringStopped, StopRequest
from llava.train.resuming import ResumeCallback, check_weights, load_optimizer, load_weights, say_finished
from llava.train.saving import CheckpointWriter
from llava.train.sharding import prepare_sharding, whole, whole_states
from llava.train.throughput import ThroughputMeter, count_targets
from llava.train.verification import add_verification
from llava.train.zero_shares import load_other_ranks

logger = logging.getLogger(__name__)


class LlavaTrainer(Trainer):
    """Trains a multimodal model.

    The loss is a mean over the predicted tokens of the global batch: over micro-batches of one step
    and over ranks alike; that of an evaluation is one over all its predicted tokens, without label smoothing.

    ``evaluate`` with ``compute_metrics``, and ``predict``, give the logits of every position, one row a sample in the
    order of the data: ``predictions[i, t]`` predicts ``label_ids[i, t + 1]``, which is -100 at visual positions, at
    prompts and behind the end of a row. The label of a coordinate is the bin nearest to it. ``predicted_ids`` has
    the samples' ids; bad samples that were skipped have no row.

    Args:
        bad_sample_log: where bad samples are written down; None where they are errors.
        feature_log: of a run with a feature cache.
        *args, **kwargs: as for transformers' ``Trainer``.

    Attributes:
        predicted_ids: of the newest predictions.
    """

    model: LlavaMetaForCausalLM
    args: TrainingArguments

    def __init__(
        self,
        *args: Any,
        bad_sample_log: BadSampleLog | None = None,
        feature_log: FeatureLog | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_engine(self.accelerator.state, self.args.fsdp)
        if self.is_fsdp_enabled:
            prepare_sharding(self)
        compile_decoder(self)
        if self.is_deepspeed_enabled:
            gather_added_together(self.model)
            load_other_ranks()
        # transformers' smoother takes the labels from the model: its loss knows neither that they are shifted, nor
        # coordinates, nor experts. compute_loss asks the model for a smoothed loss instead.
        self.label_smoother = None
        self.predicted_ids: list[str] = []
        self.data = TrainingData(self.train_dataset, self.args)
        self.stop_request = StopRequest()
        self.exposure = ExposureLog(self.train_dataset, Path(str(self.args.output_dir)), self.stop_request)
        self.checkpoints = CheckpointWriter(self, self.data, self.stop_request, self.exposure)
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        peak = find_peak(self.args.peak_flops, self.args.device, dtype)
        self.throughput = ThroughputMeter(self.model, self.args.dataloader_num_workers, peak)
        self.word_budget = WordBudget(self.exposure, self.checkpoints.write_milestone, self.throughput.paused)
        self.bad_sample_log, self.feature_log = bad_sample_log, feature_log
        self.nan_check: NanCheck | None = None
        self.cut: CutCounter | None = None
        self.meter: EvaluationMeter | None = None  # of the evaluation that is under way
        self._returns_logits = False
        self.grad_norms = GradNorms()
        self._changes: Differences | None = None  # from the run that is gone on with
        # Behind transformers' DefaultFlowCallback, which has set should_log, should_save and should_evaluate by then.
        own = (self.throughput, self.data, self.exposure, self.word_budget, StopCallback(self.stop_request))
        logs = [log for log in (bad_sample_log, feature_log) if log is not None]
        for callback in (*own, self.grad_norms, FirstStepsCallback(), *logs):
            self.add_callback(callback)
        self.verifier = add_verification(self, self.args.verify_steps) if self.args.verify_steps else None

    # Data.

    def get_train_dataloader(self) -> DataLoader:
        """This rank's batches of the training data, in their exact order."""
        return self.data.build_loader(choose_collator(self.data_collator, self.train_dataset, self.args))

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        """This rank's batches of the evaluation data, every sample once over all ranks.

        With ``compute_metrics`` they come in the order of the data, which is that of its predictions.
        """
        named: Any = self.eval_dataset
        dataset = named if eval_dataset is None else eval_dataset
        # transformers evaluates several data sets by their names in a dictionary.
        if isinstance(dataset, str):
            dataset = named[dataset]
        if dataset is None:
            raise ValueError("there are no data to evaluate on; give --eval_data_path")
        strategy = self.args.train_sampling_strategy
        grouped = strategy in GROUPED and self.compute_metrics is None
        return build_evaluation_loader(dataset, self.args, self.data_collator, strategy if grouped else SEQUENTIAL)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """This rank's batches of data to predict, in their order."""
        return build_evaluation_loader(test_dataset, self.args, self.data_collator)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The micro-batches of a step and how many tokens they predict, over all ranks.

        Bad samples among them go into the log of bad samples, and those cut to the context are counted.
        """
        progress.begin_step(self.state.global_step + 1)
        # All micro-batches of the step at once: the loss of each is divided by the number of tokens of all of them.
        with self.throughput.waiting():
            batches = list(islice(epoch_iterator, num_batches))
        progress.note_batches(progress.COUNTING, batches)
        if self.bad_sample_log is not None:
            num_used = sum(len(batch["sample_ids"]) for batch in batches)
            self.bad_sample_log.record(num_used, [bad for batch in batches for bad in batch.get("bad_samples", ())])
        if self.cut is None:
            self.cut = CutCounter(self.train_dataset)
        self.cut.add(batches)
        self.exposure.add(batches)
        if not batches:
            return batches, None
        # Counted here: transformers does it only for the model classes it knows, and older releases for none.
        targets = [count_targets(batch) for batch in batches]
        self.throughput.add(batches, targets)
        num_items = torch.tensor(sum(targets), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            num_items = self.accelerator.gather(num_items).sum()
        return batches, num_items.float()

    # A step.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, over groups with a learning rate for each part."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = build_optimizer(
                trained, self.args.part_learning_rates(), self.args.weight_decay, optimizer_class, options
            )
            # AdamW moves a parameter by its moments and its decay even where the gradient is an exact zero.
            decoder = self.model.get_model()
            unused = UnusedVisionModules(decoder.used_vision_modules, trains_vision_alone(decoder), self.args.device)
            self.optimizer.register_step_pre_hook(unused.before_optimizer_step)
            self.add_callback(unused)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward pass of a micro-batch, checked for NaN and infinity."""
        if self.nan_check is not None:
            self.nan_check.begin(inputs, num_items_in_batch)
        train = super().training_step
        with choose_products(self.args.onednn):
            if self.verifier is None:
                loss = train(model, inputs, num_items_in_batch)
            else:
                loss = self.verifier.compute(train, model, inputs, num_items_in_batch)
        if self.nan_check is not None:
            self.nan_check.add_loss(loss)
        if inputs.get("sample_ids") == []:
            # A rank without a sample trains on a row of padding, which transformers is about to count as tokens seen.
            inputs |= {name: inputs[name][:0] for name in ("input_ids", "attention_mask")}
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss, smoothed in training, with logits only where they are predictions."""
        progress.note_batches(progress.FORWARD if self.meter is None else progress.EVALUATING, [inputs])
        if self.feature_log is not None:
            self.feature_log.begin(inputs)
        inputs = model_inputs(inputs)
        if self.compute_loss_func is None:  # One's own takes the labels away, and so gets logits.
            inputs["return_logits"] = self._returns_logits
            if self.args.label_smoothing_factor and model.training:
                inputs["smoothing"] = self.args.label_smoothing_factor
        if self.meter is not None:
            num_items_in_batch = None  # In an evaluation the loss of a batch is its own mean, on every rank.
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers, with throughput, and the samples skipped and those cut so far, where there are any."""
        if self.bad_sample_log is not None:
            logs["skipped_samples"] = len(self.bad_sample_log)
        for counted in (self.cut, self.feature_log):
            logs |= {} if counted is None else counted.counts
        self.throughput.add_to(logs)
        self.grad_norms.add_to(logs)
        if "train_runtime" in logs:
            # The last line of a training. What transformers does next, where one checkpoint is to be kept, is remove
            # all but the best one, and with the newest the end of the run; our own rotation keeps both.
            self.args.save_total_limit = None
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a micro-batch; transformers would count a tower's weights for each token of the text."""
        return int(self.throughput.count_flops(inputs)) if len(inputs["input_ids"]) else 0

    # Evaluation.

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers; the random numbers that it draws are not taken from those of training."""
        with self.throughput.paused(), keeping_random_states(self.args.device):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the loss by token; skipped samples are logged and do not count."""
        # While there is a meter, compute_loss takes means of batches and prediction_step adds to it.
        self.meter = meter = EvaluationMeter()
        self.gather_function = meter.gather_rows
        try:
            with counting_rows(meter.row_counts), progress.doing(progress.EVALUATING):
                output: Any = super().evaluation_loop(*args, **kwargs)
        finally:
            self.meter = None
        if output.predictions is not None:
            self.predicted_ids = meter.gather_sample_ids()
        if self.bad_sample_log is not None:
            self.bad_sample_log.add(meter.bad)
        meter.add_metrics(output.metrics, kwargs.get("metric_key_prefix", "eval"))
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """One batch of an evaluation: its loss, logits and labels; the meter remembers what was good and what bad."""
        ignored = list(NOT_PREDICTIONS) if ignore_keys is None else ignore_keys
        self._returns_logits = not prediction_loss_only
        try:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignored)
        finally:
            self._returns_logits = False
        if labels is not None:
            # In training a coordinate is learned as two bins with weights; metrics compare ids: the nearest bin's.
            labels = self.model.target_ids(inputs["input_ids"].to(labels.device), labels, inputs.get("variables"))
        if self.meter is not None and loss is not None:
            self.meter.add(inputs, loss)
        return loss, logits, labels

    # A run: from a checkpoint, to a checkpoint.

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: object = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in transformers; what would fail at the end, or goes on with another run, fails before the first step.

        Raises:
            ValueError: the checkpoint is not this run's, nothing can be saved, or no evaluation gives the best metric.
        """
        if self.compute_metrics is not None:
            check_best_metric(self)
        self.word_budget.check(self.args)
        length, writer = self.data.describe_length(), self.checkpoints
        if writer.identity is not None:
            writer.identity = replace(writer.identity, length=length)
        self._changes = None
        if isinstance(resume_from_checkpoint, str):
            # Before try_writing, which takes away the mark of a finished run: one that is refused here must keep it.
            self._changes = check_resumed(
                writer.identity, Path(resume_from_checkpoint), self.args, self.data, self.is_deepspeed_enabled
            )
            self.exposure.load_checkpoint(Path(resume_from_checkpoint), counting_flag(self.args))
        writer.try_writing(length["steps"])
        if self.args.stop_on_bad_numbers:
            self.nan_check = build_nan_check(self)
        limit = self.args.save_total_limit
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except EvaluationStopped:
            return self._leave_evaluation()
        except ScoringStopped:  # Before the first step: the checkpoint that is gone on from has everything.
            return self._leave()
        finally:
            self.args.save_total_limit = limit  # see log

    def _leave_evaluation(self) -> TrainOutput:
        """End the run in the midst of an evaluation, which the next start makes up for."""
        self.stop_request.evaluation_due = True
        if self.state.global_step:
            # The exception has left transformers' loop, whose last calls of callbacks are made up for here.
            self.checkpoints.write_checkpoint()
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return self._leave()

    def _leave(self) -> TrainOutput:
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, math.nan, {})

    def take_final_model(self, folder: Path) -> None:
        """Be as after the last step of a run whose final model lies in a folder."""
        if not self.is_deepspeed_enabled:
            self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        say_finished(self.args.output_dir, self.state.max_steps)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model in a folder, where an older one stays whole until this one is."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
        else:
            self.checkpoints.write_model(Path(str(output_dir or self.args.output_dir)))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: transformers' draft, written before ``push_to_hub`` sends a folder, would replace the card there."""

    def save_state(self) -> None:
        """Write ``trainer_state.json`` in the output folder, whole or not at all."""
        self.checkpoints.write_state()

    # Private methods of transformers, where no callback and no public method is given what is needed.

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: object,
    ) -> tuple[int, int]:
        # transformers takes the place in the data from the number of steps alone, which is wrong once they changed.
        quiet = contextlib.nullcontext() if resume_from_checkpoint is None else quiet_transformers()
        with quiet:  # It looks where the best one was, and warns of changes that are checked elsewhere.
            epoch, micro_batches = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
            )
        self.pop_callback(ResumeCallback)
        if resume_from_checkpoint is not None:
            # transformers goes on logging, saving and evaluating as often as the checkpoint's run did.
            self.state.compute_steps(self.args, max_steps)
            named, self.state.best_model_checkpoint = find_best(resume_from_checkpoint)
            if named is not None and self.state.best_model_checkpoint is None:
                logger.warning(
                    "the best checkpoint so far, %s, is gone; the best one is looked for among those to come", named
                )
                self.state.best_metric = self.state.best_global_step = None
            if (best := self.state.best_model_checkpoint) and self.args.load_best_model_at_end:
                # It is read when all steps are done, which is late to hear that it does not fit.
                broadcast_from_rank0(lambda: check_weights(self.model, best))
            if self.word_budget.begin(self.args, self.state.global_step):
                self.state.max_steps = self.state.global_step
            if self.state.global_step >= self.state.max_steps:
                say_finished(self.args.output_dir, self.state.max_steps)
                return num_train_epochs, 0  # No epoch is left; transformers would take one step more.
            self.add_callback(ResumeCallback(self, resume_from_checkpoint))
        else:
            self.word_budget.begin(self.args)
        return self.data.begin(epoch, micro_batches, self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # transformers goes on with what a checkpoint lacks as it was begun with, and knows no adapters of ours.
        load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        # The same, at the end of the run. DeepSpeed reads its own files, and is strict.
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_weights(self.model, str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Settings that flags have changed since then are to be in force, not the checkpoint's.
        if checkpoint is not None:
            with whole_states(self, to_save=False):
                load_optimizer(self, checkpoint, self._changes, super()._load_optimizer_and_scheduler)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        # The last thing before the optimizer's step, and the only one that is given the norm.
        grad_norm = whole(super()._get_grad_norm(model, grad_norm))
        if self.nan_check is not None:
            self.nan_check.check(grad_norm, self.state.global_step + 1)
        return grad_norm

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        # transformers writes in place, and ends in the midst of it where a disk is full.
        with self.throughput.paused():
            self.checkpoints.write_checkpoint()
