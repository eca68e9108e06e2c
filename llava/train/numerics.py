"""Stops a run whose loss or gradient is no longer a number, before the step that would spoil the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from llava.train.agreement import AgreedError
from llava.train.bad_step import MODEL_FOLDER, RankBatch, RunSettings, random_states, write_batch, write_run

logger = logging.getLogger(__name__)

MOST_OVERFLOWS = 50
"""Steps in a row that fp16 may skip. A loss scale of 2^16 is 2^-34 by then: it is not the scale's fault."""


class BadNumbersError(ValueError):
    """The loss or the gradient of a step is NaN or infinite; the message names step and samples."""


class NumberGuard:
    """Looks at every loss of a step, and at the norm of its gradient before the optimizer uses it.

    Losses stay on the device until then: a step costs one look at a flag (one wait for the device) and, with
    several ranks, one all-reduce of two numbers. In exchange transformers' ``logging_nan_inf_filter`` is off,
    which waits twice for each micro-batch. Random states are copied once a step, from host memory.

    fp16 with a loss scale overflows on purpose while it looks for its scale. There a gradient that is not
    finite is counted (its step is skipped anyway), and only ``MOST_OVERFLOWS`` in a row stop the run.

    Args:
        output_dir: where the folder of a bad step goes.
        rank: of this process.
        device: of this rank.
        settings: what a replay must know.
        scales_loss: whether this is such a run in fp16.
        save_model: writes the model's weights to a folder; all ranks call it.
    """

    def __init__(
        self,
        output_dir: str,
        rank: int,
        device: torch.device,
        settings: RunSettings,
        scales_loss: bool,
        save_model: Callable[[str], Any],
    ) -> None:
        self.output_dir, self.rank, self.device, self.settings = Path(output_dir), rank, device, settings
        self.scales_loss, self.save_model = scales_loss, save_model
        self.overflows = 0
        self._overflows_in_a_row = 0
        self._batches: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        self._num_items: Any = None
        self._random_states: dict[str, Tensor] = {}

    def begin_step(self, micro_batches: Sequence[Mapping[str, Any]], num_items: Any) -> None:
        """Remember what a step is made of; the batches are kept alive by the trainer until its end."""
        self._batches = [dict(batch) for batch in micro_batches]
        self._losses, self._num_items = [], num_items

    def begin_micro_batch(self) -> None:
        """Before each forward pass."""
        if not self._losses:
            self._random_states = random_states(self.device)

    def add_loss(self, loss: Tensor) -> None:
        """After each backward pass; waits for nothing."""
        self._losses.append(loss.detach())

    def check(self, grad_norm: Tensor | float | None, step: int) -> None:
        """Before the optimizer's step: let it happen, or stop the run on all ranks.

        Args:
            grad_norm: of the global batch.
            step: number of the step, the first being 1.

        Raises:
            BadNumbersError: on every rank, if a loss of any rank or the gradient is not finite.
        """
        bad_loss, bad_gradient = self._look(grad_norm)
        if self.scales_loss:
            bad_gradient = self._count_overflow(bad_gradient, step)
        if bad_loss or bad_gradient:
            self._stop(grad_norm, step)
        self._batches, self._losses, self._random_states = [], [], {}

    def _look(self, grad_norm: Tensor | float | None) -> tuple[bool, bool]:
        """Whether any rank has a loss, and whether the gradient has a norm, that is no finite number."""
        losses = torch.stack(self._losses).float()
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, dtype=torch.float32, device=losses.device)
        # DeepSpeed says -1 where a norm is not finite.
        bad = torch.stack([~losses.isfinite().all(), ~(norm.isfinite() & (norm >= 0))]).float()
        if self.settings.world_size > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        bad_loss, bad_gradient = bad.tolist()
        return bad_loss > 0, bad_gradient > 0

    def _count_overflow(self, overflow: bool, step: int) -> bool:
        """Count a step that the loss scale lets overflow; True once there were too many in a row."""
        self._overflows_in_a_row = self._overflows_in_a_row + 1 if overflow else 0
        if overflow:
            self.overflows += 1
        if overflow and self.rank == 0:
            logger.info("step %d: fp16 gradients overflowed and were left out, %d so far", step, self.overflows)
        return self._overflows_in_a_row > MOST_OVERFLOWS

    def _stop(self, grad_norm: Tensor | float | None, step: int) -> None:
        norm = None if grad_norm is None else float(grad_norm)
        num_items = None if self._num_items is None else float(self._num_items)
        losses = [float(loss) for loss in self._losses]
        batch = RankBatch(step, self.rank, self._batches, losses, norm, num_items, self._random_states)
        folder = self.output_dir / f"bad_step-{step}"
        remedy = self._leave(folder, batch)
        ranks: list[Any] = [(losses, batch.sample_ids)]
        if self.settings.world_size > 1:
            ranks *= self.settings.world_size
            dist.all_gather_object(ranks, (losses, batch.sample_ids))
        shown = range(len(ranks)) if self.rank == 0 else [self.rank]
        samples = "; ".join(describe_samples(ranks[r][1], r) for r in shown)
        raise BadNumbersError(
            f"step {step}: {describe_numbers([losses for losses, _ in ranks], norm)}. "
            f"Samples of the global batch{'' if self.rank == 0 else ' on this rank'}: {samples}. "
            f"The weights are those before this step. {remedy}; --stop_on_bad_numbers false goes on regardless"
        )

    def _leave(self, folder: Path, batch: RankBatch) -> str:
        """Write the batch and the model, and say what to do with them; all ranks come through here together."""
        # A full disk must not keep a rank from the others, which wait for it to save a sharded model.
        trouble: Exception | None = None
        try:
            micro_batches = [_without_bad_samples(micro_batch) for micro_batch in batch.micro_batches]
            write_batch(folder, RankBatch(**{**vars(batch), "micro_batches": micro_batches}))
            if batch.rank == 0:
                write_run(folder, self.settings)
        except (OSError, SafetensorError) as error:
            trouble = error
        try:
            self.save_model(str(folder / MODEL_FOLDER))
        except (OSError, SafetensorError, AgreedError) as error:
            trouble = error
        if trouble is not None:
            return f"The batch could not be written to {folder}: {trouble}"
        return f"The batch is in {folder}; replay it with: python -m llava.train.replay {folder}"


def build_guard(trainer: Any) -> NumberGuard:
    """The guard of a trainer's run, once its model is on its device."""
    args = trainer.args
    settings = RunSettings(
        world_size=args.world_size,
        loss_factor=args.world_size if args.average_tokens_across_devices else 1,
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        casts_weights=trainer.is_deepspeed_enabled,
        attn_implementation=args.attn_implementation,
        gradient_checkpointing=args.gradient_checkpointing,
        bits=args.bits,
        quant_type=args.quant_type,
        double_quant=args.double_quant,
        trainable=[name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad],
        label_smoothing=args.label_smoothing_factor,
    )
    return NumberGuard(args.output_dir, args.process_index, args.device, settings, args.fp16, trainer.save_model)


def _without_bad_samples(micro_batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in micro_batch.items() if name != "bad_samples"}


def describe_numbers(losses: Sequence[Sequence[float]], grad_norm: float | None) -> str:
    """Which numbers went wrong: "the loss of rank 1, micro-batch 0 is nan, the gradient norm is nan".

    Args:
        losses: of each rank's micro-batches.
        grad_norm: of the global batch.
    """
    wrong = [
        f"the loss of rank {rank}, micro-batch {i} is {loss}"
        for rank, own in enumerate(losses)
        for i, loss in enumerate(own)
        if not math.isfinite(loss)
    ]
    if grad_norm is not None and not (math.isfinite(grad_norm) and grad_norm >= 0):
        wrong.append(f"the gradient norm is {grad_norm}")
    return ", ".join(wrong)


def describe_samples(sample_ids: Sequence[Sequence[str]], rank: int) -> str:
    """The samples of a rank: "rank 0: 'a', 'b' | 'c'", micro-batches apart."""
    return f"rank {rank}: " + " | ".join(", ".join(map(repr, ids)) or "none" for ids in sample_ids)
