"""What a run would cost: steps, operations and time of an epoch, the disk that its checkpoints take, and memory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from llava.data.module import RunDataset
from llava.inspect.batches import SampledExample
from llava.inspect.findings import Findings
from llava.inspect.passes import count_operations
from llava.inspect.run import InspectedRun
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.train.arguments import TrainingArguments
from llava.train.data_order import build_order, count_steps
from llava.train.memory import describe_memory, estimate_memory, find_largest_batch, show_bytes

_TIMED = 4
_MOST_FAST = 10_000
"""Samples whose lengths are measured for an estimate of memory with ``--fast``."""
_GPUS = {"an H100": 989e12, "an A100": 312e12, "an RTX 4090": 165e12}
"""bf16 operations a second by NVIDIA's data sheets."""
_USED = 0.3
"""Share of them that small models come to, see docs/performance.md."""
_GIB = 2**30
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CERTAIN = 1.25
"""How much more than there is an estimate must be for an error: it is one of the most that a step takes."""


@dataclass
class Costs:
    """What a run would cost.

    Attributes:
        samples, steps, epoch_steps: of an epoch, of the run, and steps of an epoch.
        operations: of an epoch.
        loading: seconds that one process takes to decode and tokenise a sample.
        workers: processes that do so.
        checkpoint, model: bytes of a checkpoint and of a saved model.
        checkpoints, milestones: how many of each are on the disk at most.
        free: bytes on the disk of the output folder.
        memory: of a step, in words; "" where it was not estimated.
    """

    samples: int
    steps: int
    epoch_steps: int
    operations: float
    loading: float
    workers: int
    checkpoint: int
    model: int
    checkpoints: int
    milestones: int
    free: int
    memory: str = ""

    @property
    def disk(self) -> int:
        """Bytes that the run's folder takes at most; while one checkpoint is written, its forerunner is still there."""
        return self.checkpoint * (self.checkpoints + bool(self.checkpoints)) + self.model * (self.milestones + 1)

    def lines(self) -> list[str]:
        """For people."""
        hours = ", ".join(
            f"{describe_seconds(self.operations / (_USED * peak))} on {name}" for name, peak in _GPUS.items()
        )
        lines = [
            f"steps: {self.steps:,}, of which an epoch of {self.samples:,} samples has {self.epoch_steps:,}",
            f"an epoch: {self.operations:.2g} operations; at {_USED:.0%} of the peak {hours}",
        ]
        if self.loading:
            epoch = self.samples * self.loading / max(self.workers, 1)
            lines.append(
                f"reading and decoding on this machine: {1000 * self.loading:.1f} ms a sample, "
                f"{describe_seconds(epoch)} an epoch with {self.workers} workers (--dataloader_num_workers)"
            )
        what = f"{self.checkpoints} checkpoints of {show_bytes(self.checkpoint)}"
        if self.milestones:
            what += f", {self.milestones} milestones"
        lines.append(
            f"disk: up to {show_bytes(self.disk)} ({what}, a model of {show_bytes(self.model)}); free: "
            f"{show_bytes(self.free)}"
        )
        return [*lines, self.memory] if self.memory else lines


def describe_seconds(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if seconds < 1:
        return "under a second"
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def estimate_costs(
    run: InspectedRun, sampled: Sequence[SampledExample], memory: float | None, fast: bool, findings: Findings
) -> Costs | None:
    """What the run would cost; None where nothing is trained on.

    Args:
        fast: whether to leave out what goes through all texts.
        memory: GiB of the device that it is to run on; None where it is not told.
    """
    assert run.loaded is not None
    assert run.data is not None
    dataset, args = run.data["train_dataset"], run.training_args
    if dataset is None or not args.do_train:
        return None
    order = build_order(dataset, args)
    examples = [s.example for s in sampled]
    operations = count_operations(run, examples) / max(len(examples), 1) * len(dataset)
    steps = count_steps(args, order)
    checkpoint, model = size_checkpoint(run)
    every = _steps_between(args.save_steps, steps)
    number = 0
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "epoch":
        number = max(round(steps / max(order.num_steps, 1)), 1)
    elif str(getattr(args.save_strategy, "value", args.save_strategy)) == "steps":
        number = steps // every
    if args.save_total_limit:
        number = min(number, args.save_total_limit)
    costs = Costs(
        samples=len(dataset), steps=steps, epoch_steps=order.num_steps, operations=operations,
        loading=time_loading(dataset, sampled), workers=args.dataloader_num_workers, checkpoint=checkpoint,
        model=model, checkpoints=number, milestones=len(args.milestone_numbers),
        free=free_space(str(args.output_dir)),
    )  # fmt: skip
    check_disk(costs, str(args.output_dir), findings)
    if not fast or len(dataset) <= _MOST_FAST:
        costs.memory = estimate_step(run, memory, findings)
    return costs


@dataclass(frozen=True)
class _OnCpu:
    """The precision that a run's flags ask for, on the CPU."""

    half: torch.dtype | None

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self.half is None else torch.autocast("cpu", self.half)


@dataclass
class _MeasuredRun:
    """A run as ``train.memory`` measures it."""

    model: LlavaMetaForCausalLM
    args: TrainingArguments
    train_dataset: RunDataset
    accelerator: _OnCpu


def estimate_step(run: InspectedRun, memory: float | None, findings: Findings) -> str:
    """The memory of the largest step, in words; "" where it cannot be told."""
    assert run.loaded is not None
    assert run.data is not None
    dataset = run.data["train_dataset"]
    if dataset is None or "deepspeed" in run.given:  # It holds weights and states in ways of its own.
        return ""
    half = next((dtype for name, dtype in _HALVES.items() if name in run.given), None)
    measured = _MeasuredRun(run.loaded.model, run.training_args, dataset, _OnCpu(half))
    batch = find_largest_batch(measured)
    if batch is None:
        return ""
    weights = sum(parameter.nbytes for parameter in run.loaded.model.parameters())
    estimate = estimate_memory(measured, batch)._replace(held=weights)
    text = describe_memory(estimate, batch, "of weights")
    if memory is not None and estimate.total > memory * _GIB:
        level = findings.error if estimate.total > _CERTAIN * memory * _GIB else findings.warn
        level(
            "memory",
            f"{text}, but --memory says {memory:g} GiB; lower --per_device_train_batch_size and raise "
            "--gradient_accumulation_steps, or give --gradient_checkpointing true or a smaller --model_max_length",
        )
    return text


def _steps_between(save_steps: float, steps: int) -> int:
    """Steps from one checkpoint to the next; below 1 it is a share of the run."""
    return max(int(save_steps if save_steps >= 1 else save_steps * steps), 1)


def size_checkpoint(run: InspectedRun) -> tuple[int, int]:
    """Bytes of a checkpoint, with the optimizer's state, and of a saved model."""
    assert run.loaded is not None
    model = run.loaded.model
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    stored = sum(p.nbytes for name, p in model.named_parameters() if name not in ignored)
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    # Adam's two moments, in 32 bits.
    return stored + 2 * trained, stored


def time_loading(dataset: RunDataset, sampled: Sequence[SampledExample]) -> float:
    """Seconds that a sample takes to be read, decoded and tokenised; 0 where it cannot be told."""
    places = list(range(min(_TIMED, len(dataset))))
    start = time.perf_counter()
    for place in places:
        try:
            dataset[place]
        except ValueError:
            return 0.0
    return (time.perf_counter() - start) / max(len(places), 1)


def free_space(folder: str) -> int:
    """Bytes that are free where a folder is, or would be made."""
    path = Path(folder).absolute()
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    return shutil.disk_usage(existing).free


def check_disk(costs: Costs, folder: str, findings: Findings) -> None:
    """Find checkpoints that would fill the disk."""
    least = costs.checkpoint + costs.model
    text = (
        f"the run's checkpoints and models take up to {show_bytes(costs.disk)}, and {show_bytes(costs.free)} are "
        f"free at --output_dir {folder}; give another folder, or a lower --save_total_limit"
    )
    if costs.free < least:
        findings.error("disk", text)
    elif costs.free < costs.disk:
        findings.warn("disk", text)
