"""A trainer that knows where in its data it is: every sample once an epoch on any number of ranks, and exact resume."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from llava.data.samplers import BY_LENGTH, BY_MODALITY, GROUPED, SEQUENTIAL, DataOrder, RankBatchSampler
from llava.train.evaluation import EvaluationLoader
from llava.train.saving import DATA_STATE

logger = logging.getLogger(__name__)

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
}


class DataPosition(NamedTuple):
    """Where training stands: the epoch, from 0, and how many of its steps are done."""

    epoch: int
    step: int


class OrderedDataTrainer(Trainer):
    """transformers' trainer, over data whose order and whose dealing to ranks are ``llava.data.samplers``'.

    The position counts steps that were trained, not batches that were fetched ahead. Whoever writes checkpoints
    puts ``data_state`` in them and hands it to ``load_data_state``; the run then goes on without looking at
    what it skips.
    """

    args: Any
    train_dataset: Any
    _train_batches: RankBatchSampler | None = None
    _position = DataPosition(0, 0)
    _position_at: int = 0  # the global step at which the run stood there
    _resumed_from: DataPosition | None = None
    _starts_epoch = False  # of other data than the checkpoint's

    def get_train_dataloader(self) -> DataLoader:
        """This rank's batches; accelerate neither shards nor pads them."""
        args = self.args
        self._train_batches = RankBatchSampler(
            self._make_order(),
            self._train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
            args.process_index,
        )
        start_worker = partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
        return self._load_batches(
            self.train_dataset,
            self._train_batches,
            worker_init_fn=start_worker,
            persistent_workers=args.dataloader_persistent_workers,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This rank's batches of the evaluation data, every sample once over all ranks.

        With ``compute_metrics`` they come in the order of the data, which is that of its predictions.
        """
        named: Any = self.eval_dataset
        dataset: Any = named if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = named[dataset]
        if dataset is None:
            raise ValueError("there are no data to evaluate on; give --eval_data_path")
        strategy = self.args.train_sampling_strategy
        return self._evaluation_loader(
            dataset, strategy if strategy in GROUPED and self.compute_metrics is None else SEQUENTIAL
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """This rank's batches of data to predict, in their order."""
        return self._evaluation_loader(test_dataset, SEQUENTIAL)

    def _evaluation_loader(self, dataset: Any, strategy: str) -> DataLoader:
        args = self.args
        order = DataOrder(
            len(dataset), args.eval_batch_size * args.world_size, strategy, lengths=read_lengths(dataset, strategy)
        )
        batches = RankBatchSampler(order, args.eval_batch_size, 1, args.world_size, args.process_index)
        return EvaluationLoader(dataset, **self._loading_options(batches))

    def _load_batches(self, dataset: Any, batches: RankBatchSampler, **options: Any) -> DataLoader:
        return DataLoader(dataset, **self._loading_options(batches), **options)

    def _loading_options(self, batches: RankBatchSampler) -> dict[str, Any]:
        args = self.args
        return {
            "batch_sampler": batches,
            "collate_fn": self.data_collator,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
            "prefetch_factor": args.dataloader_prefetch_factor,
        }

    def _make_order(self) -> DataOrder:
        args = self.args
        return DataOrder(
            len(self.train_dataset),
            self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            args.train_sampling_strategy,
            args.seed if args.data_seed is None else args.data_seed,
            read_lengths(self.train_dataset, args.train_sampling_strategy),
            args.dataloader_drop_last,
        )

    @property
    def data_position(self) -> DataPosition:
        """The position behind the last step that was trained."""
        epoch, step = self._position
        step += self.state.global_step - self._position_at
        if self._train_batches is not None and step >= self._train_batches.order.num_steps:
            return DataPosition(epoch + 1, 0)
        return DataPosition(epoch, step)

    def data_state(self) -> dict[str, Any]:
        """What ``load_data_state`` needs to go on from here, as JSON can hold it."""
        order = self._make_order() if self._train_batches is None else self._train_batches.order
        return {**self.data_position._asdict(), "order": order.fingerprint(self._id_of)}

    def load_data_state(self, state: dict[str, Any]) -> None:
        """Let the next ``train`` go on from another run's position.

        The number of ranks may have changed, as long as a step has as many samples as before.

        Raises:
            ValueError: the order of this run's data is another one, so that the position means nothing. With
                ``--ignore_data_skip``, which starts the epoch anew, a warning.
        """
        order = self._make_order() if self._train_batches is None else self._train_batches.order
        changes = describe_changes(state["order"], order.fingerprint(self._id_of))
        if not changes:
            self._resumed_from = DataPosition(state["epoch"], state["step"])
        elif self.args.ignore_data_skip or getattr(self.args, "resume_changed", False):
            self._starts_epoch = True
            logger.warning("the checkpoint was trained on other data: %s", "; ".join(changes))
        else:
            raise ValueError(
                f"the checkpoint stands at step {state['step']} of epoch {state['epoch']} of other data: "
                f"{'; '.join(changes)}. Give what it was trained with, or --ignore_data_skip true to start an epoch of "
                "the data as they are now"
            )

    def run_length(self) -> dict[str, Any]:
        """How many steps the run has, the flags that say so, and what the order of its data is made from."""
        args = self.args
        order = self._make_order() if self._train_batches is None else self._train_batches.order
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * order.num_steps)
        flags = {"max_steps": args.max_steps, "num_train_epochs": args.num_train_epochs}
        return {"steps": steps, **flags, "order": order.fingerprint(self._id_of)}

    def _id_of(self, index: int) -> str:
        # A program's own data set, whose samples have no ids, is told by its length.
        records = getattr(self.train_dataset, "records", None)
        return str(index if records is None else records[index].id)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """The epoch and the micro-batch to start from."""
        epoch, micro_batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None and not Path(resume_from_checkpoint, DATA_STATE).is_file():
            logger.warning(
                "%s has no %s: nothing tells whether the data are still its own", resume_from_checkpoint, DATA_STATE
            )
        resumed, self._resumed_from = self._resumed_from, None
        if self._starts_epoch:
            micro_batches, self._starts_epoch = 0, False
        if resumed is None or self.args.ignore_data_skip:
            return epoch, micro_batches
        return resumed.epoch, resumed.step * self.args.gradient_accumulation_steps

    def _run_epoch(self, *args: Any, **epoch: Any) -> None:
        """Train one epoch, or what is left of it."""
        assert self._train_batches is not None
        resumes = epoch["resume_from_checkpoint"] is not None and epoch["epoch"] == epoch["epochs_trained"]
        skipped = epoch["steps_trained_in_current_epoch"] if resumes else 0
        self._train_batches.seek(epoch["epoch"], skipped)
        self._position = DataPosition(epoch["epoch"], skipped // self.args.gradient_accumulation_steps)
        self._position_at = self.state.global_step
        super()._run_epoch(*args, **epoch)


def read_lengths(dataset: Any, strategy: str) -> NDArray[np.int32] | None:
    """What a strategy has to know of the samples' lengths; None where it is nothing."""
    if strategy == BY_LENGTH:
        return dataset.lengths
    return dataset.modality_lengths if strategy == BY_MODALITY else None


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In which of the things that make an order two of them differ, each with the flag to look at."""
    changes = []
    for name, (meaning, flag) in _MADE_FROM.items():
        if before[name] != now[name]:
            values = f" was {before[name]}, is {now[name]}" if name not in ("ids", "lengths") else " differ"
            changes.append(f"{meaning}{values} ({flag})")
    return changes
