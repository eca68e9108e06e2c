"""The trainer: transformers' own, with groups for the parts, an exact order of the data and losses by token."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import torch
from torch import nn

from llava.constants import IGNORE_INDEX
from llava.data.collator import model_inputs
from llava.messages import list_names
from llava.model.grad_sync import UnusedVisionModules
from llava.model.lora import has_adapters, load_adapter_weights
from llava.train.bad_samples import BadSampleLog
from llava.train.callbacks import FirstStepsCallback
from llava.train.data_order import OrderedDataTrainer
from llava.train.distributed import gather_added_together
from llava.train.engines import check_engine
from llava.train.evaluation import NOT_PREDICTIONS, CutCounter, EvaluationMeter, check_best_metric
from llava.train.nan_check import NanCheck, build_nan_check
from llava.train.parts import build_optimizer
from llava.train.preemption import PreemptibleTrainer

logger = logging.getLogger(__name__)


class LlavaTrainer(OrderedDataTrainer, PreemptibleTrainer):
    """Trains a multimodal model.

    The loss is a mean over the predicted tokens of the global batch: over micro-batches of one step
    and over ranks alike; that of an evaluation is one over all its predicted tokens, without label smoothing.

    ``evaluate`` with ``compute_metrics``, and ``predict``, give the logits of every position, one row a sample in the
    order of the data: ``predictions[i, t]`` predicts ``label_ids[i, t + 1]``, which is -100 at visual positions, at
    prompts and behind the end of a row. The label of a coordinate is the bin nearest to it. ``predicted_ids`` has
    the samples' ids; bad samples that were skipped have no row.

    Args:
        bad_sample_log: where bad samples are written down; None where they are errors.
        *args, **kwargs: as for transformers' ``Trainer``.
    """

    model: Any
    predicted_ids: list[str] = []  # noqa: RUF012 - of the newest predictions; replaced, never added to
    _returns_logits = False

    def __init__(self, *args: Any, bad_sample_log: BadSampleLog | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_engine(self.accelerator.state)
        gather_added_together(self.model)
        # transformers' smoother takes the labels from the model: its loss knows neither that they are shifted, nor
        # coordinates, nor experts. compute_loss asks the model for a smoothed loss instead.
        self.label_smoother = None
        self.add_callback(FirstStepsCallback())
        self.bad_sample_log = bad_sample_log
        self.cut: CutCounter | None = None
        self.tally: EvaluationMeter | None = None
        if bad_sample_log is not None:
            self.add_callback(bad_sample_log)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, over groups with a learning rate for each part."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = build_optimizer(trained, self.args, optimizer_class, options)
            unused = UnusedVisionModules(self.model.get_model().used_vision_modules, self.args.device)
            self.optimizer.register_step_pre_hook(unused.before_optimizer_step)
            self.add_callback(unused)
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a best metric that no evaluation gives is found before the first step."""
        check_best_metric(self)
        return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step and their predicted tokens; their bad samples go into the log of these."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self.bad_sample_log is not None:
            num_good = sum(len(batch["sample_ids"]) for batch in batches)
            self.bad_sample_log.record(num_good, [bad for batch in batches for bad in batch.get("bad_samples", ())])
        if self.cut is None:
            self.cut = CutCounter(self.train_dataset)
        self.cut.add(batches)
        if self.nan_check is not None:
            self.nan_check.begin_step(batches, num_items)
        return batches, num_items

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss, smoothed in training, with logits only where they are predictions."""
        if self.compute_loss_func is None:  # One's own takes the labels away, and so gets logits.
            inputs = {**inputs, "return_logits": self._returns_logits}
            if self.args.label_smoothing_factor and model.training:
                inputs["smoothing"] = self.args.label_smoothing_factor
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """One batch of an evaluation: its loss, logits and labels; the tally remembers what was good and what bad."""
        ignored = list(NOT_PREDICTIONS) if ignore_keys is None else ignore_keys
        self._returns_logits = not prediction_loss_only
        try:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignored)
        finally:
            self._returns_logits = False
        if labels is not None:
            labels = self.model.target_ids(inputs["input_ids"].to(labels.device), labels, inputs.get("variables"))
        if self.tally is not None and loss is not None:
            self.tally.add(inputs, loss)
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the loss by token; skipped samples are logged and do not count."""
        self.tally = tally = EvaluationMeter()
        self.gather_function = tally.gather_rows
        try:
            output: Any = super().evaluation_loop(*args, **kwargs)
        finally:
            self.tally = None
        if output.predictions is not None:
            self.predicted_ids = tally.gather_sample_ids()
        if self.bad_sample_log is not None:
            self.bad_sample_log.add(tally.bad)
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if name in output.metrics:
            output.metrics[name] = tally.mean_loss()
        return output

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Name what a checkpoint lacks, or has too much; not the tower that lies elsewhere, nor a tied head."""
        model: Any = self.model
        meant = {*(model._keys_to_ignore_on_save or ()), *model.all_tied_weights_keys}
        missing = sorted(set(load_result.missing_keys) - meant)
        for what, names in (("lacks", missing), ("has too much", sorted(load_result.unexpected_keys))):
            if names:
                logger.warning("the checkpoint %s %d weights: %s", what, len(names), list_names(names))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the samples skipped and those cut to the context so far, where there are any."""
        if self.bad_sample_log is not None:
            logs["skipped_samples"] = len(self.bad_sample_log)
        if self.cut is not None:
            logs |= self.cut.counts()
        super().log(logs, *args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs(model_inputs(inputs))

    @cached_property
    def nan_check(self) -> NanCheck | None:
        """Stops the run where numbers go wrong; None with ``--stop_on_bad_numbers false``."""
        return build_nan_check(self) if self.args.stop_on_bad_numbers else None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.nan_check is None:
            return super().training_step(*args, **kwargs)
        self.nan_check.begin_micro_batch()
        loss = super().training_step(*args, **kwargs)
        self.nan_check.add_loss(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The last thing before the optimizer's step.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self.nan_check is not None:
            self.nan_check.check(grad_norm, self.state.global_step + 1)
        return grad_norm

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if self.tally is not None:
            return None  # In an evaluation the loss of a batch is its own mean, on every rank.
        # The first label of a row is predicted by nothing. transformers knows that only for the
        # model classes it knows, and older releases for none.
        counted = []
        for batch in batch_samples:
            labels = batch["labels"].clone()
            labels[:, 0] = IGNORE_INDEX
            counted.append({"labels": labels})
        return super()._get_num_items_in_batch(counted, device)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        # The row of padding that a rank without a sample trains on is no token of the data.
        if inputs.get("sample_ids") == []:
            inputs = {name: inputs[name][:0] for name in ("input_ids", "attention_mask")}
        super()._track_num_input_tokens(inputs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # transformers reads back only adapters of peft's own model class, and nothing that trained beside them.
        if has_adapters(self.model):
            load_adapter_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if has_adapters(self.model) and not self.is_deepspeed_enabled:
            load_adapter_weights(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()
