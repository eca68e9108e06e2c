"""The training data of a run: every sample once an epoch on any number of ranks, and where the run stands in them.

A run that is resumed goes on at the very sample that it would have come to, without looking at what it skips.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import seed_worker

from llava import progress
from llava.data.collator import SupervisedCollator
from llava.data.samplers import BY_LENGTH, BY_MODALITY, SEQUENTIAL, DataOrder, RankBatchSampler
from llava.train.arguments import TrainingArguments
from llava.train.elastic import advise
from llava.train.evaluation import EvaluationLoader
from llava.train.loader_workers import end_without_batches, explaining_ends

logger = logging.getLogger(__name__)

DATA_STATE = "data_state.json"
"""File of a checkpoint: the place in the data, and what their order was made from."""

# What makes an order, in the words of an error: what it is, and the flag that changes it.
_MADE_FROM = {
    "samples": ("number of samples", "--data_path"),
    "ids": ("the ids of the samples", "--data_path"),
    "lengths": ("the samples' lengths in tokens", "--data_path, the tokenizer or a flag that changes visual tokens"),
    "strategy": ("sampling strategy", "--train_sampling_strategy"),
    "seed": ("seed", "--data_seed or --seed"),
    "step_size": (
        "samples of a step",
        "--per_device_train_batch_size, --gradient_accumulation_steps or the number of ranks; their product counts",
    ),
    "drop_last": ("whether incomplete steps are left out", "--dataloader_drop_last"),
    "pack_length": ("tokens of a pack (0: none)", "--packing or --model_max_length"),
    "max_tokens": ("tokens of a batch (0: any number)", "--max_tokens_per_batch"),
}


class DataPosition(NamedTuple):
    """Where training stands: the epoch, from 0, and how many of its steps are done."""

    epoch: int
    step: int


class TrainingLoader(DataLoader):
    """A loader whose workers may stay from epoch to epoch without a random number of training being another."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.persistent_workers and self._iterator is not None:
            # As torch draws one where it starts workers: a run that is resumed here starts them, and must go on alike.
            torch.empty((), dtype=torch.int64).random_()
        return explaining_ends(super().__iter__())


def _start_worker(notes: Path | None, num_workers: int, rank: int, number: int) -> None:
    end_without_batches()
    # Without it the workers of all ranks would draw the same random numbers.
    seed_worker(number, num_workers=num_workers, rank=rank)
    progress.begin_worker(notes, "training", number)


def _start_evaluation_worker(notes: Path | None, number: int) -> None:
    end_without_batches()
    progress.begin_worker(notes, "evaluation", number)


@dataclass(eq=False)
class TrainingData(TrainerCallback):
    """The order of the training data, this rank's batches of them, and the position in them.

    The position counts steps that were trained, not batches that were fetched ahead.

    Attributes:
        dataset: trained on.
        args: of the run.
        batches: this rank's; None before there is a loader.
    """

    dataset: Any
    args: TrainingArguments
    batches: RankBatchSampler | None = None
    _place: DataPosition = field(default_factory=lambda: DataPosition(0, 0))
    _place_at: int = 0  # the global step there
    _in_epoch: bool = False
    _resumed: DataPosition | None = None
    _restarts_epoch: bool = False  # because the data are others than the checkpoint's

    def build_batches(self) -> RankBatchSampler:
        """This rank's batches, as indices of samples."""
        args = self.args
        self.batches = RankBatchSampler(
            build_order(self.dataset, args),
            units_of_batch(args),
            args.gradient_accumulation_steps,
            args.world_size,
            args.process_index,
        )
        return self.batches

    def build_loader(self, collate: Callable[..., Any]) -> DataLoader:
        """This rank's batches; accelerate neither shards nor pads them."""
        args = self.args
        # Not through accelerator.prepare, which fills the last batch up with samples that the epoch has had already.
        batches = self.build_batches()
        start_worker = partial(_start_worker, progress.own_path(), args.dataloader_num_workers, args.process_index)
        return TrainingLoader(
            self.dataset,
            worker_init_fn=start_worker,
            persistent_workers=args.dataloader_persistent_workers and args.dataloader_num_workers > 0,
            **loading_options(args, batches, collate),
        )

    def _order(self) -> DataOrder:
        return build_order(self.dataset, self.args) if self.batches is None else self.batches.order

    def describe_length(self) -> dict[str, Any]:
        """How many steps the run has, the flags that say so, and what the order of its data is made from."""
        args, order = self.args, self._order()
        steps = count_steps(args, order)
        flags = {"max_steps": args.max_steps, "num_train_epochs": args.num_train_epochs}
        flags |= {"word_limit": args.word_limit_number, "data_seed": data_seed(args)}
        if args.lasts_for_words:  # The flag was not given.
            flags["max_steps"] = -1
        return {"steps": steps, **flags, "order": self._fingerprint()}

    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint_of(self._order(), self.dataset)

    # The position: while training, in a checkpoint, and taken up from one.

    def begin(self, epoch: int, micro_batches: int, global_step: int) -> tuple[int, int]:
        """Begin a training at the place where the checkpoint of ``load_state`` stood, else where transformers would.

        Args:
            epoch, micro_batches: where the number of steps trained leads to; right for data that never changed.
            global_step: steps trained before.

        Returns:
            The epoch, and its micro-batches that are left out.
        """
        accumulation = self.args.gradient_accumulation_steps
        if self._restarts_epoch:
            micro_batches = 0
        elif self._resumed is not None and not self.args.ignore_data_skip:
            epoch, micro_batches = self._resumed.epoch, self._resumed.step * accumulation
        self._resumed, self._restarts_epoch = None, False
        self._place, self._place_at = DataPosition(epoch, micro_batches // accumulation), global_step
        self._in_epoch = False
        # transformers drops this many micro-batches of the epoch; the sampler gives empty ones there (see seek).
        return epoch, micro_batches

    def on_epoch_begin(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Lead the sampler to the epoch; in the first one, behind what a resumed run has trained of it."""
        assert self.batches is not None
        # The epoch before this one was trained to its end; the first of a training begins where ``begin`` has set it.
        if self._in_epoch:
            self._place, self._place_at = DataPosition(self._place.epoch + 1, 0), state.global_step
        self._in_epoch = True
        self.batches.seek(self._place.epoch, self._place.step * args.gradient_accumulation_steps)

    def position(self, global_step: int) -> DataPosition:
        """The position behind the last step that was trained."""
        epoch, step = self._place.epoch, self._place.step + global_step - self._place_at
        # The end of an epoch is the beginning of the next, so that no checkpoint stands behind the last step.
        if self.batches is not None and step >= self.batches.order.num_steps:
            return DataPosition(epoch + 1, 0)
        return DataPosition(epoch, step)

    def state(self, global_step: int) -> dict[str, Any]:
        """What ``load_state`` needs to go on from here, for ``data_state.json``."""
        return {**self.position(global_step)._asdict(), "order": self._fingerprint()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Let the next training go on from another run's position.

        The number of ranks may have changed, as long as a step has as many samples as before.

        Raises:
            ValueError: the order of this run's data is another one, so that the position means nothing. With
                ``--ignore_data_skip``, which starts the epoch anew, a warning.
        """
        changes = describe_changes(state["order"], self._fingerprint())
        if not changes:
            self._resumed = DataPosition(state["epoch"], state["step"])
        elif self.args.ignore_data_skip or self.args.resume_changed:
            # Neither the step nor the schedule begins anew, only the data of the epoch.
            self._restarts_epoch = True
            logger.warning("the checkpoint was trained on other data: %s", "; ".join(changes))
        else:
            raise ValueError(
                f"the checkpoint stands at step {state['step']} of epoch {state['epoch']} of other data: "
                f"{'; '.join(changes)}{self._advise(state['order']['step_size'])}. Give what it was trained with, or "
                "--ignore_data_skip true to start an epoch of the data as they are now"
            )

    def _advise(self, step_size: int) -> str:
        """Behind an error: with which values a step has so many samples; nothing where it has."""
        args = self.args
        if step_size == self._order().step_size:
            return ""
        by_tokens = bool(args.max_tokens_per_batch)
        return "; " + advise(step_size, args.world_size, args.per_device_train_batch_size, by_tokens)


def fingerprint_of(order: DataOrder, dataset: object) -> dict[str, Any]:
    """What the order of a data set was made from."""
    # A program's own data set, whose samples have no ids, is told by its length.
    records = getattr(dataset, "records", None)
    return order.fingerprint(lambda index: str(index if records is None else records[index].id))


def data_seed(args: TrainingArguments) -> int:
    """The seed of what is random about the data."""
    return args.seed if args.data_seed is None else args.data_seed


def count_steps(args: TrainingArguments, order: DataOrder) -> int:
    """The steps that a run is to have by its flags."""
    epochs: Any = args.num_train_epochs
    return args.max_steps if args.max_steps > 0 else math.ceil(epochs * order.num_steps)


def units_of_batch(args: TrainingArguments) -> int:
    """Samples of a rank's micro-batch, or packs; 1 where the batch is what counts."""
    return 1 if args.max_tokens_per_batch else args.train_batch_size


def build_order(dataset: Any, args: TrainingArguments) -> DataOrder:
    """The order of a run's training data."""
    return order_samples(
        dataset,
        # Those of a step over all ranks: with other ranks the order stays, as long as this product does.
        units_of_batch(args) * args.gradient_accumulation_steps * args.world_size,
        args.train_sampling_strategy,
        data_seed(args),
        args.dataloader_drop_last,
        pack_length=find_max_length(dataset, "--packing") if args.packing else 0,
        max_tokens=args.max_tokens_per_batch or 0,
    )


def order_samples(
    dataset: Any, step_size: int, strategy: str, seed: int, drop_last: bool, pack_length: int, max_tokens: int
) -> DataOrder:
    """The order of a data set's samples, see ``DataOrder``.

    Raises:
        ValueError: there are none, or one is longer than a batch may be.
    """
    has_units = bool(pack_length or max_tokens)
    lengths = read_lengths(dataset, strategy, has_units)
    if has_units:
        assert lengths is not None
        # As samples are when they come: text is cut to the context. A bad sample, which has no length, takes a place.
        most = pack_length or find_max_length(dataset, "--max_tokens_per_batch")
        lengths = np.where(lengths < 0, -1, 1) * np.clip(np.abs(lengths), 1, most)
        if max_tokens and (longest := int(np.abs(lengths).max(initial=0))) > max_tokens:
            raise ValueError(
                f"--max_tokens_per_batch is {max_tokens}, but the longest sample alone has {longest}; raise it, or "
                "lower --model_max_length"
            )
    return DataOrder(len(dataset), step_size, strategy, seed, lengths, drop_last, pack_length, max_tokens)


def choose_collator(collate: Any, dataset: Any, args: TrainingArguments) -> Any:
    """What makes batches of a run's training samples: ``collate`` or, with ``--packing``, one that packs."""
    if not args.packing:
        return collate
    if not isinstance(collate, SupervisedCollator):
        raise ValueError("--packing: this program's own collator does not put samples into rows; leave the flag out")
    return replace(collate, pack_length=find_max_length(dataset, "--packing"))


def find_max_length(dataset: Any, flag: str) -> int:
    """Most tokens of a sample; a ValueError for a program's own data set, which does not say it."""
    documents = getattr(dataset, "documents", dataset)
    if not hasattr(documents, "max_length"):
        raise ValueError(f"{flag} needs to know how long samples are, which this program's own data set does not tell")
    return int(documents.max_length)


def build_evaluation_loader(
    dataset: Any, args: TrainingArguments, collate: Callable[..., Any], strategy: str = SEQUENTIAL
) -> DataLoader:
    """This rank's batches of data to evaluate on, every sample once over all ranks."""
    order = DataOrder(
        len(dataset), args.eval_batch_size * args.world_size, strategy, lengths=read_lengths(dataset, strategy)
    )
    batches = RankBatchSampler(order, args.eval_batch_size, 1, args.world_size, args.process_index)
    start_worker = partial(_start_evaluation_worker, progress.own_path())
    return EvaluationLoader(dataset, worker_init_fn=start_worker, **loading_options(args, batches, collate))


def loading_options(args: TrainingArguments, batches: RankBatchSampler, collate: Callable[..., Any]) -> dict[str, Any]:
    """What every ``DataLoader`` of a run is given."""
    return {
        "batch_sampler": batches,
        "collate_fn": collate,
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and args.device.type != "cpu",  # which warns in every loader
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "prefetch_factor": args.dataloader_prefetch_factor,
    }


def read_lengths(dataset: Any, strategy: str, has_units: bool = False) -> NDArray[np.int32] | None:
    """What an order has to know of the samples' lengths; None where it is nothing.

    Args:
        has_units: whether samples come in packs or in batches by tokens.
    """
    # Lengths take a pass over all texts (kept in --data_cache_dir), which the other two strategies do not need.
    if strategy == BY_MODALITY:
        return dataset.modality_lengths
    return dataset.lengths if strategy == BY_LENGTH or has_units else None


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In which of the things that make an order two of them differ, each with the flag to look at."""
    changes = []
    for name, (meaning, flag) in _MADE_FROM.items():
        # Earlier versions had neither packs nor batches by tokens.
        was = before.get(name, 0)
        if was != now[name]:
            values = f" was {was}, is {now[name]}" if name not in ("ids", "lengths") else " differ"
            changes.append(f"{meaning}{values} ({flag})")
    return changes
