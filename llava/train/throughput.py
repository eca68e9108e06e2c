"""What the steps of a run achieve: samples and tokens a second, the wait for data, memory, and MFU, in every log line.

The clock runs from the first batch that is asked for to the newest line of the log, over all that a step is made of.
It stands still while a model is evaluated, scored or saved. Everything is counted on batches as they lie in memory:
nothing here waits for a device, but for what it still has to do before the clock is stopped.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.constants import IGNORE_INDEX
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.train.distributed import is_first_rank
from llava.train.flops import ModelFlops

logger = logging.getLogger(__name__)

LONG_WAIT = 0.1
"""Share of the time that a run may wait for data before it is told what to do about it."""

RATES = (
    "samples_per_second", "tokens_per_second", "supervised_tokens_per_second", "data_wait", "padding",
    "peak_memory_gib", "mfu",
)  # fmt: skip
"""What a line of the log says of throughput, by these names."""

_ADVICE_AFTER = 60.0  # seconds of training, so that the start of the workers does not count
_GIB = 2**30


class Totals(NamedTuple):
    """What was done up to a moment since the training began, over all ranks."""

    steps: float = 0
    samples: float = 0
    tokens: float = 0  # positions that are no padding, visual ones included
    targets: float = 0  # tokens that are predicted and learned
    positions: float = 0  # padding included
    flops: float = 0
    seconds: float = 0  # of the slowest rank
    waited: float = 0  # of the rank that waited longest
    memory: float = 0  # bytes, the most that a rank has held

    def rates(self, since: Totals, peak: float | None) -> dict[str, float]:
        """What a line of the log says of the time since another moment; nothing where no time has passed.

        Args:
            since: that moment.
            peak: operations a second of all ranks together; None says nothing of MFU.
        """
        done = Totals(*(now - before for now, before in zip(self, since, strict=True)))
        if done.seconds <= 0 or not done.steps:
            return {}
        values = [
            done.samples / done.seconds, done.tokens / done.seconds, done.targets / done.seconds,
            min(done.waited / done.seconds, 1.0), 1 - done.tokens / max(done.positions, 1), self.memory / _GIB,
            *([] if peak is None else [done.flops / done.seconds / peak]),
        ]  # fmt: skip
        return {name: float(f"{value:.4g}") for name, value in zip(RATES, values, strict=False)}


class ThroughputMeter(TrainerCallback):
    """Counts what a rank trains on, and the time that it takes.

    Args:
        model: that is trained.
        num_workers: that load data; for the advice to have more.
        peak: operations a second of this rank's device, which MFU is a share of; None leaves MFU out.
    """

    def __init__(self, model: LlavaMetaForCausalLM, num_workers: int, peak: float | None) -> None:
        self.model = model
        self.num_workers = num_workers
        self.peak = peak
        self._flops = ModelFlops(model)
        self._has_advised = False
        self._begin()

    def _begin(self) -> None:
        self._own = Totals()
        self._logged = Totals()
        self._started: float | None = None  # None before the first batch is asked for
        self._epoch_began = 0.0
        self._paused = 0.0
        self._pauses = 0

    # The clock.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._begin()  # A trainer may train twice.
        self._flops = ModelFlops(self.model)  # What trains is settled by now.

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """From here to the first batch: workers are started, or told of the new epoch."""
        self._epoch_began = time.perf_counter()
        if self._started is None:
            self._started = self._epoch_began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the batches of a step."""
        start, self._epoch_began = self._epoch_began or time.perf_counter(), 0.0
        yield
        self._own = self._own._replace(waited=self._own.waited + time.perf_counter() - start)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training: evaluating, scoring, saving."""
        if self._pauses == 0 and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # What the device still has to do is training; the pause would wait for it.
        start = time.perf_counter()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if self._pauses == 0 and self._started is not None:
                self._paused += time.perf_counter() - max(start, self._started)

    # The counts.

    def add(self, batches: Sequence[Mapping[str, Any]], targets: Sequence[int]) -> None:
        """Take in the micro-batches of a step, which are trained on right after, and the tokens that each predicts."""
        own = self._own
        samples = tokens = positions = flops = 0.0
        for batch, predicted in zip(batches, targets, strict=True):
            number = len(batch.get("sample_ids", batch["input_ids"]))
            if not number:  # One row of padding, in place of a sample.
                continue
            filled = count_tokens(batch)
            samples, tokens, positions = samples + number, tokens + filled, positions + batch["input_ids"].numel()
            flops += self._flops.count(batch, filled, predicted)
        self._own = own._replace(
            steps=own.steps + 1,
            samples=own.samples + samples,
            tokens=own.tokens + tokens,
            targets=own.targets + sum(targets),
            positions=own.positions + positions,
            flops=own.flops + flops,
        )

    def count_flops(self, batch: Mapping[str, Any]) -> float:
        """Floating point operations of a micro-batch, see ``flops.py``."""
        return self._flops.count(batch, count_tokens(batch), count_targets(batch))

    def totals(self) -> Totals:
        """What all ranks have done in this training so far; all ranks call this together."""
        seconds = 0.0 if self._started is None else time.perf_counter() - self._started - self._paused
        own = self._own._replace(seconds=seconds, memory=float(peak_memory()))
        if PartialState().num_processes == 1:
            return own
        device = PartialState().device
        kind = torch.float32 if device.type == "mps" else torch.float64
        ranks: Any = gather(torch.tensor([own], dtype=kind, device=device)).cpu()  # type: ignore[union-attr]
        summed, largest = Totals(*ranks.sum(0).tolist()), Totals(*ranks.max(0).values.tolist())
        return summed._replace(
            steps=largest.steps, seconds=largest.seconds, waited=largest.waited, memory=largest.memory
        )

    def measure(self, since: Totals) -> tuple[dict[str, float], Totals]:
        """The rates since a moment, and this moment; all ranks call this together."""
        now = self.totals()
        return now.rates(since, None if self.peak is None else self.peak * PartialState().num_processes), now

    # Lines.

    def add_to(self, logs: dict[str, float]) -> None:
        """Add to a line of the log what it is to say of throughput; all ranks call this together.

        The line of a loss gets the rates since the one before; the last line of a training those of all of it, with the
        prefix ``train_``, in place of transformers', which take evaluations and saves for training.
        """
        if "train_runtime" in logs:
            rates, totals = self.measure(Totals())
            if rates:
                logs |= {f"train_{name}": value for name, value in rates.items()}
                logs["train_steps_per_second"] = float(f"{totals.steps / totals.seconds:.4g}")
        elif "loss" in logs:
            rates, self._logged = self.measure(self._logged)
            logs |= rates
            self._advise()

    def _advise(self) -> None:
        """Once in a run: what to do about a long wait for data."""
        now = self._logged
        if self._has_advised or now.seconds < _ADVICE_AFTER:
            return
        self._has_advised = True
        if is_first_rank() and now.waited > LONG_WAIT * now.seconds:
            logger.warning("%s", advise(now.waited / now.seconds, self.num_workers, count_cores()))


class ThroughputLines(TrainerCallback):
    """A line of a program's own log every few steps, whatever ``--logging_steps`` says.

    Args:
        meter: of the trainer.
        log_steps: how many steps each line is about.
    """

    def __init__(self, meter: ThroughputMeter, log_steps: int) -> None:
        if log_steps < 1:
            raise ValueError(f"--throughput_log_steps is {log_steps}; it must be at least 1, or leave it out")
        self.meter, self.log_steps = meter, log_steps
        self._logged = Totals()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._logged = Totals()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step % self.log_steps:
            return
        rates, self._logged = self.meter.measure(self._logged)
        if state.is_world_process_zero:
            logger.info("step %d: %s", state.global_step, describe(rates))


def describe(rates: Mapping[str, float]) -> str:
    """Rates as a line of text."""
    memory = "GPU memory" if torch.cuda.is_available() else "memory"
    parts = [
        f"{rates['samples_per_second']:.1f} samples/s", f"{rates['tokens_per_second']:.0f} tokens/s",
        f"{rates['supervised_tokens_per_second']:.0f} supervised", f"{rates['data_wait']:.0%} waiting for data",
        f"peak {memory} {rates['peak_memory_gib']:.2f} GiB", *([f"MFU {rates['mfu']:.1%}"] if "mfu" in rates else []),
    ]  # fmt: skip
    return ", ".join(parts)


def advise(share: float, num_workers: int, num_cores: int) -> str:
    """What to do about a share of the time that was spent waiting for data, in one line.

    Args:
        share: of the time.
        num_workers: as they are.
        num_cores: that this rank has for itself.
    """
    wanted = max(2, 2 * num_workers)
    said = f"{share:.0%} of the time of training is spent waiting for data: "
    if wanted <= num_cores:
        return f"{said}give --dataloader_num_workers {wanted} (it is {num_workers})"
    return (
        f"{said}--dataloader_num_workers is {num_workers} and this rank has {num_cores} cores; have clips and images "
        "stored at the size that the vision tower sees"
    )


def count_cores() -> int:
    """Cores that this rank has for itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = PartialState().num_processes
    if torch.cuda.is_available():  # Those of this machine, which has a GPU for each.
        ranks = min(ranks, torch.cuda.device_count())
    return max(cores // ranks, 1)


def count_tokens(batch: Mapping[str, Any]) -> int:
    """Positions of a micro-batch that are no padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.count_nonzero())


def count_targets(batch: Mapping[str, Any]) -> int:
    """Tokens that a micro-batch predicts: the first label of a row is predicted by nothing."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def peak_memory() -> int:
    """The most bytes that this process has held so far: of its GPU, where it has one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows, which counts the peak itself.
        held = psutil.Process().memory_info()
        return getattr(held, "peak_wset", None) or held.rss
    # ru_maxrss is in KiB, but on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
