"""What an evaluation counts and how it collects predictions, and what training counts of cut samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from accelerate.utils import gather, gather_object, recursively_apply, reduce
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from llava.data.chunking import RearrangedDataset
from llava.data.dataset import SupervisedDataset
from llava.data.dataset_stats import count_cut_tokens, count_media
from llava.model.grad_sync import is_distributed
from llava.model.loss import RowCounts
from llava.train.loader_workers import explaining_ends
from llava.train.throughput import count_targets
from llava.types import BadSample

Rows = TypeVar("Rows")
"""Tensors of (rows, ...), or tuples and dictionaries of them."""

EXACT_MATCH = "exact_match"
_BUILT_IN = ("loss", EXACT_MATCH, "runtime", "samples_per_second", "steps_per_second")
"""Metrics that every evaluation has."""
MODALITIES = ("text", "image", "video")
"""The kinds of samples that have a loss of their own; one with an image and a video counts as one with a video."""

NOT_PREDICTIONS = ("past_key_values", "cache", "hidden_states", "attentions", "aux_loss", "router_logits")
"""What a model returns beside loss and logits; predictions are the logits alone."""


class EvaluationLoader(DataLoader, DataLoaderStateMixin):
    """A loader that tells accelerate, and so ``compute_metrics`` with ``--batch_eval_metrics``, its last batch."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.gradient_state = GradientState()
        # As accelerate's own loaders do; ours is none of them, since those add samples to the last batch.
        self.begin()
        try:
            # One batch is held back, so that of each it is known whether it is the last.
            batches = explaining_ends(super().__iter__())
            upcoming = next(batches, None)
            while upcoming is not None:
                batch, upcoming = upcoming, next(batches, None)
                self.end_of_dataloader = upcoming is None
                yield batch
        finally:
            self.end()


class CutCounter:
    """Samples whose text was cut to the context since the run was started or resumed, over all ranks.

    Args:
        dataset: trained on; one of which no sample can be too long is not counted.
    """

    def __init__(self, dataset: object) -> None:
        self.counts: dict[str, int] = {}  # what the log says of them; nothing where nothing was cut
        documents = dataset.documents if isinstance(dataset, RearrangedDataset) else dataset
        self._may_cut = isinstance(documents, SupervisedDataset) and _may_cut(documents)

    def add(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Take in the micro-batches of a step; all ranks call this together."""
        if not self._may_cut:
            return
        cut = [number for batch in batches for number in batch.get("num_cut", ()) if number]
        # One all-reduce a step. Every rank has the same data set, so all of them come here or none.
        counts = torch.tensor([len(cut), sum(cut)], device=PartialState().device)
        samples, tokens = reduce(counts, reduction="sum").tolist()  # type: ignore[union-attr]
        if samples or self.counts:
            self.counts = {
                "cut_samples": self.counts.get("cut_samples", 0) + samples,
                "cut_tokens": self.counts.get("cut_tokens", 0) + tokens,
            }


def _may_cut(dataset: SupervisedDataset) -> bool:
    """Whether a sample may be too long; of videos without a bound, or with their times, only decoding tells."""
    vision = dataset.vision
    if vision is not None and (vision.add_time_instruction or not vision.is_bounded):
        return bool(count_media(dataset.records)[1].any() or count_cut_tokens(dataset).any())
    return bool(count_cut_tokens(dataset).any())


@dataclass
class EvaluationMeter:
    """The mean loss over all tokens that an evaluation predicts, its samples, and the bad ones among them.

    However samples are split into batches and over ranks, the mean is the same; transformers' is one over batches,
    where one without any usable sample would count as a perfect zero.

    Attributes:
        num_rows: samples in the newest batch of this rank; an empty batch has a row of padding all the same.
        sample_ids: of this rank, batch after batch.
        row_counts: where ``counting_rows`` puts what the newest batch comes to, row by row.
        by_modality: float64 (modalities, 2), the sum of the losses and the number of predicted tokens.
        exact: float64 (2,), the samples whose predicted tokens are all the most probable ones, and all samples.
    """

    bad: list[BadSample] = field(default_factory=list)
    loss: float = 0.0
    num_tokens: int = 0
    num_rows: int = 0
    sample_ids: list[list[str]] = field(default_factory=list)
    row_counts: list[RowCounts] = field(default_factory=list)
    by_modality: Tensor = field(default_factory=lambda: torch.zeros(len(MODALITIES), 2, dtype=torch.float64))
    exact: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def add(self, batch: Mapping[str, Any], loss: Tensor) -> None:
        """Take in a batch and the mean loss of the tokens that it predicts."""
        num_tokens = count_targets(batch)
        self.bad += batch.get("bad_samples", ())
        self.num_tokens += num_tokens
        # A sum over tokens: ``loss`` is the mean over this batch.
        self.loss += float(loss) * num_tokens
        ids = batch.get("sample_ids", [""] * len(batch["labels"]))
        self.num_rows = len(ids)
        self.sample_ids.append(list(ids))
        self._add_rows(batch)

    def _add_rows(self, batch: Mapping[str, Any]) -> None:
        """Take in what the rows of the newest batch come to, if its loss was one that counts them."""
        if not self.row_counts:  # A program's own loss.
            return
        counts = self.row_counts[-1]
        self.row_counts.clear()
        has_target = counts.targets > 0
        exact = has_target & (counts.hits == counts.targets)
        self.exact += torch.tensor([int(exact.sum()), int(has_target.sum())])
        # Of an empty batch there are no exposures, and of samples of a program's own none either.
        for exposure, loss, targets in zip(batch.get("exposure", ()), counts.losses, counts.targets, strict=False):
            kind = "video" if exposure.videos else "image" if exposure.images else "text"
            self.by_modality[MODALITIES.index(kind)] += torch.stack([loss, targets.double()])

    def add_metrics(self, metrics: dict[str, Any], prefix: str) -> None:
        """Put the mean loss, that of each modality, and the share of exact matches among the metrics.

        All ranks call this together. Where there was no loss to count, nothing is changed.
        """
        name = f"{prefix}_loss"
        if name not in metrics:
            return
        metrics[name] = self.mean_loss()
        sums = torch.cat([self.by_modality.flatten(), self.exact])
        if is_distributed():
            sums = reduce(sums.to(PartialState().device), reduction="sum").cpu()  # type: ignore[union-attr]
        for kind, (loss, num_tokens) in zip(MODALITIES, sums[:-2].view(-1, 2).tolist(), strict=True):
            if num_tokens:
                metrics[f"{prefix}_{kind}_loss"] = loss / num_tokens
        num_exact, num_samples = sums[-2:].tolist()
        if num_samples:
            metrics[f"{prefix}_{EXACT_MATCH}"] = num_exact / num_samples

    def mean_loss(self) -> float:
        """The mean over the tokens of all ranks, which call this together; nan where there are none."""
        loss, num_tokens = self.loss, self.num_tokens
        if is_distributed():
            # In 64 bits: from 2^24 tokens on, 32 do not hold their number exactly.
            sums = torch.tensor([loss, num_tokens], dtype=torch.float64, device=PartialState().device)
            loss, num_tokens = reduce(sums, reduction="sum").tolist()  # type: ignore[union-attr]
        return loss / num_tokens if num_tokens else math.nan

    def gather_rows(self, values: Rows) -> Rows:
        """The rows of the newest batch, rank after rank, on all of them, without those of padding.

        Args:
            values: all but the number of rows is the same on every rank.
        """
        gathered: Rows = recursively_apply(self._gather, values)
        return gathered

    def _gather(self, rows: Tensor) -> Tensor:
        rows = rows[: self.num_rows]
        if not is_distributed():
            return rows
        # gather wants tensors of one shape from all ranks, so rows are padded to the most that a rank has.
        counts: Tensor = gather(torch.tensor([len(rows)], device=rows.device))  # (ranks,)
        longest = int(counts.max())
        padded = rows.new_zeros((longest, *rows.shape[1:]))  # (longest, ...)
        padded[: len(rows)] = rows
        if longest == 0:
            return padded
        together: Tensor = gather(padded)  # (ranks * longest, ...)
        pieces = zip(together.split(longest), counts.tolist(), strict=True)
        return torch.cat([piece[:count] for piece, count in pieces])

    def gather_sample_ids(self) -> list[str]:
        """The ids of all ranks' samples, in the order of the gathered rows; all ranks call this together."""
        ranks = gather_object([self.sample_ids])
        # Batch by batch, and within a batch rank by rank, as gather_rows joins rows.
        return [sample for batches in zip(*ranks, strict=True) for ids in batches for sample in ids]


def plan_evaluation(args: TrainingArguments, has_data: bool, computes_metrics: bool) -> None:
    """Decide whether there is an evaluation at the end, and refuse what asks for one that cannot be.

    Args:
        args: ``TrainingArguments``; ``do_eval`` becomes true or false.
        has_data: whether ``--eval_data_path`` is given.
        computes_metrics: whether a program's own metrics come to those of the library.

    Raises:
        ValueError: names the flag and the way on.
    """
    evaluates = args.eval_strategy != IntervalStrategy.NO
    for asked, flag in (
        (evaluates, f"--eval_strategy {IntervalStrategy(args.eval_strategy).value}"),
        (args.eval_on_start, "--eval_on_start"),
        (args.do_eval, "--do_eval"),
    ):
        if asked and not has_data:
            raise ValueError(f"{flag} asks for an evaluation, but there are no data for one; give --eval_data_path")
    # Not a second time at the end, where the steps or epochs have evaluations of their own.
    if args.do_eval is None:
        args.do_eval = has_data and (not evaluates or not args.do_train)
    if not args.do_train:
        _check_evaluation_alone(args)
    if args.metric_for_best_model is not None and not computes_metrics:
        name = args.metric_for_best_model.removeprefix("eval_")
        if name not in _BUILT_IN:
            raise ValueError(
                f"--metric_for_best_model is {args.metric_for_best_model!r}; evaluations give {', '.join(_BUILT_IN)}"
            )


def keeping_random_states(device: torch.device) -> AbstractContextManager[None]:
    """Within it random numbers may be drawn; afterwards the generators are as they were before."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else [])


def check_best_metric(trainer: Any) -> None:
    """Evaluate one batch, where only a program's ``compute_metrics`` knows whether ``--metric_for_best_model`` exists.

    Nothing is logged, and no random number that training draws is another. Under DeepSpeed, whose engine does not
    evaluate before it trains, the first evaluation tells.

    Raises:
        ValueError: it does not; names the metrics that there are.
    """
    args, data = trainer.args, trainer.eval_dataset
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if name in _BUILT_IN or trainer.compute_metrics is None or data is None or isinstance(data, dict):
        return
    if trainer.is_deepspeed_enabled:
        return
    # One batch of every rank, where there are so many: none is to come to the exchange of metrics without a sample.
    few = Subset(data, range(min(len(data), args.eval_batch_size * args.world_size)))
    with keeping_random_states(args.device):
        loader = trainer.get_eval_dataloader(few)
        metrics = trainer.evaluation_loop(loader, description="Metrics", metric_key_prefix="eval").metrics
    known = [*(metric.removeprefix("eval_") for metric in metrics), *_BUILT_IN[1:]]
    if name not in known:
        raise ValueError(f"--metric_for_best_model is {name!r}; evaluations give {', '.join(known)}")


def _check_evaluation_alone(args: TrainingArguments) -> None:
    if not args.do_eval:
        raise ValueError("--do_train false leaves nothing to do; give --eval_data_path and --do_eval true")
    if args.resume_from_checkpoint:
        raise ValueError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint} is for training, but --do_train is false; name "
            "the folder to evaluate with --model_name_or_path"
        )
    if args.deepspeed:
        raise ValueError("--deepspeed is for training, but --do_train is false; leave it out: ranks work without it")


def evaluate_last(trainer: Trainer) -> dict[str, Any]:
    """Evaluate the model as it is, print the metrics and write them to ``eval_results.json`` in the output folder.

    An evaluation of the last step that is in the log already is not done again.
    """
    state, args = trainer.state, trainer.args
    done = [entry for entry in state.log_history if "eval_loss" in entry and entry["step"] == state.global_step]
    # The best checkpoint's weights are in place by now, of which the last evaluation says nothing.
    changed = args.load_best_model_at_end and state.best_model_checkpoint is not None
    if args.do_train and done and not changed:
        metrics = {name: value for name, value in done[-1].items() if name != "step"}
    else:
        metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return metrics
