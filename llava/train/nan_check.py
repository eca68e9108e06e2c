"""Stops a run whose loss or gradient is no longer a number, before the step that would spoil the weights."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

from llava.io import apply_umask
from llava.train.distributed import AgreedError, gather_from_ranks, max_over_ranks

logger = logging.getLogger(__name__)

MOST_OVERFLOWS = 50
"""Steps in a row that fp16 may skip. A loss scale of 2^16 is 2^-34 by then: it is not the scale's fault."""


class BadNumbersError(ValueError):
    """The loss or the gradient of a step is NaN or infinite; the message names step and samples."""


@dataclass
class NanCheck:
    """Looks at every loss of a step, and at the norm of its gradient before the optimizer uses it.

    Losses stay on the device until then: a step costs one look at a flag (one wait for the device) and, with
    several ranks, one all-reduce of two numbers. In exchange transformers' ``logging_nan_inf_filter`` is off,
    which waits twice for each micro-batch. Random states are copied once a step, from host memory.

    fp16 with a loss scale overflows on purpose while it looks for its scale. There a gradient that is not
    finite is counted (its step is skipped anyway), and only ``MOST_OVERFLOWS`` in a row stop the run.

    Attributes:
        output_dir: where the folder of a bad step goes.
        rank: of this process.
        device: of this rank.
        settings: what a replay must know.
        scales_loss: whether this is such a run in fp16.
        save_model: writes the model's weights to a folder; all ranks call it.
        overflows: steps of fp16 that were skipped.
    """

    output_dir: str
    rank: int
    device: torch.device
    settings: RunSettings
    scales_loss: bool
    save_model: Callable[[str], object]
    overflows: int = 0
    _overflows_in_a_row: int = 0
    _batches: list[dict[str, Any]] = field(default_factory=list)
    _losses: list[Tensor] = field(default_factory=list)
    _num_items: Tensor | float | None = None
    _random_states: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, micro_batch: Mapping[str, Any], num_items: Tensor | float | None) -> None:
        """Before each forward pass; the batches of a step are kept alive by the trainer until its end."""
        # The first micro-batch of a step: what dropout draws from here on, a replay has to draw again.
        if len(self._losses) == len(self._batches) == 0:
            self._random_states, self._num_items = random_states(self.device), num_items
        # A copy of the dictionary, whose entries the trainer replaces for a rank without samples; tensors are shared.
        self._batches.append(dict(micro_batch))

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
        losses = torch.stack(self._losses).float()  # (micro-batches,)
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, dtype=torch.float32, device=losses.device)
        # DeepSpeed says -1 where a norm is not finite.
        bad = torch.stack([~losses.isfinite().all(), ~(norm.isfinite() & (norm >= 0))]).float()  # (2,)
        # tolist() is the step's one wait for the device; after the all-reduce every rank stops, or none.
        bad_loss, bad_gradient = (value > 0 for value in max_over_ranks(bad).tolist())
        if self.scales_loss:
            bad_gradient = self._count_overflow(bad_gradient, step)
        if bad_loss or bad_gradient:
            self._stop(grad_norm, step)
        self._batches, self._losses, self._random_states = [], [], {}

    def _count_overflow(self, overflow: bool, step: int) -> bool:
        """Count a step that the loss scale lets overflow; True once there were too many in a row."""
        # torch's GradScaler begins at 2^16 and halves at each overflow.
        self._overflows_in_a_row = self._overflows_in_a_row + 1 if overflow else 0
        if overflow:
            self.overflows += 1
        if overflow and self.rank == 0:
            logger.info("step %d: fp16 gradients overflowed and were left out, %d so far", step, self.overflows)
        return self._overflows_in_a_row > MOST_OVERFLOWS

    def _stop(self, grad_norm: Tensor | float | None, step: int) -> None:
        # Here every rank comes, also one whose own losses are finite: its part of the batch belongs to the replay.
        norm = None if grad_norm is None else float(grad_norm)
        num_items = None if self._num_items is None else float(self._num_items)
        losses = [float(loss) for loss in self._losses]
        batch = RankBatch(step, self.rank, self._batches, losses, norm, num_items, self._random_states)
        remedy = self.leave(Path(self.output_dir, f"bad_step-{step}"), batch)
        ranks = gather_from_ranks((losses, batch.sample_ids))
        # The first rank names everybody's samples, the others their own: the logs of ranks may be files apart.
        shown = range(len(ranks)) if self.rank == 0 else [self.rank]
        samples = "; ".join(describe_samples(ranks[r][1], r) for r in shown)
        raise BadNumbersError(
            f"step {step}: {describe_numbers([losses for losses, _ in ranks], norm)}. "
            f"Samples of the global batch{'' if self.rank == 0 else ' on this rank'}: {samples}. "
            f"The weights are those before this step. {remedy}; --stop_on_bad_numbers false goes on regardless"
        )

    def leave(self, folder: Path, batch: RankBatch) -> str:
        """Write the batch and the model, and say what to do with them; all ranks come through here together."""
        # A full disk must not keep a rank from the others, which wait for it to save a sharded model.
        trouble: Exception | None = None
        try:
            write_batch(folder, batch)
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


def build_nan_check(trainer: Trainer) -> NanCheck:
    """The check of a trainer's run, once its model is on its device."""
    args: Any = trainer.args
    assert trainer.model is not None
    settings = RunSettings(
        world_size=args.world_size,
        # transformers' compute_loss multiplies by it, because DDP then averages gradients over ranks.
        loss_factor=args.world_size if args.average_tokens_across_devices else 1,
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        # DeepSpeed's engine holds the weights themselves in 16 bits; accelerate only casts operations.
        casts_weights=trainer.is_deepspeed_enabled,
        attn_implementation=args.attn_implementation,
        gradient_checkpointing=args.gradient_checkpointing,
        bits=args.bits,
        quant_type=args.quant_type,
        double_quant=args.double_quant,
        trainable=[name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad],
        label_smoothing=args.label_smoothing_factor,
        bf16_weights=args.bf16_weights,
        fused_gelu=args.fused_gelu,
        onednn=args.onednn,
    )
    return NanCheck(args.output_dir, args.process_index, args.device, settings, args.fp16, trainer.save_model)


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


# The batch of a step whose numbers went wrong, in files.

MODEL_FOLDER = "model"
BAD_STEP_RUN = "run.json"
_RANDOM = "random."


@dataclass(frozen=True)
class RunSettings:
    """What a replay must know of the run.

    Attributes:
        world_size: number of ranks.
        loss_factor: what the losses of ranks were multiplied by, because their gradients are averaged.
        precision: "fp32", "bf16" or "fp16".
        casts_weights: whether the weights themselves are held in that precision (DeepSpeed), rather than
            cast where they are used.
        attn_implementation: as ``--attn_implementation``.
        gradient_checkpointing: whether activations were computed again in the backward pass.
        bits, quant_type, double_quant: how frozen weights were held.
        trainable: names of the parameters that trained.
        label_smoothing: of the loss; earlier versions do not say it.
        bf16_weights, fused_gelu, onednn: as these flags; earlier versions had none.
    """

    world_size: int
    loss_factor: int
    precision: str
    casts_weights: bool
    attn_implementation: str | None
    gradient_checkpointing: bool
    bits: int
    quant_type: str
    double_quant: bool
    trainable: list[str]
    label_smoothing: float = 0.0
    bf16_weights: bool = False
    fused_gelu: bool = False
    onednn: bool = False


@dataclass(frozen=True)
class RankBatch:
    """One rank's part of a step.

    Attributes:
        step: number of the step, the first of a run being 1.
        rank: whose it is.
        micro_batches: what the collator returned, one for each backward pass; tensors may be on any device.
        losses: of the micro-batches.
        grad_norm: of the global batch; None where it was not computed.
        num_items: predicted labels of the global batch, which the losses were divided by; None where each
            is a mean of its own.
        random_states: by device type, before the first micro-batch.
    """

    step: int
    rank: int
    micro_batches: list[dict[str, Any]]
    losses: list[float]
    grad_norm: float | None
    num_items: float | None
    random_states: dict[str, Tensor]

    @property
    def sample_ids(self) -> list[list[str]]:
        """The ids of each micro-batch's samples."""
        return [list(batch.get("sample_ids", ())) for batch in self.micro_batches]


def write_run(folder: Path, settings: RunSettings) -> None:
    """Write what all ranks share."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BAD_STEP_RUN).write_text(json.dumps(asdict(settings), indent=1), encoding="utf-8")


def read_run(folder: Path) -> RunSettings:
    """Read what all ranks share.

    Raises:
        ValueError: the folder is none that a stopped run has left.
    """
    try:
        return RunSettings(**json.loads((folder / BAD_STEP_RUN).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} is no folder bad_step-N of a stopped run: {error}") from error


# rank-0.safetensors names its tensors "0.input_ids" (of the first micro-batch), "0.images.2" (its third medium) and
# "random.cpu"; rank-0.json has the numbers, and what of a batch is no tensor, such as the samples' ids.
def write_batch(folder: Path, batch: RankBatch) -> None:
    """Write one rank's part."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{_RANDOM}{device}": state for device, state in batch.random_states.items()}
    plain = []
    for i, micro_batch in enumerate(batch.micro_batches):
        own_tensors, own_plain = _take_apart(micro_batch)
        tensors |= {f"{i}.{name}": tensor for name, tensor in own_tensors.items()}
        plain.append(own_plain)
    save_file({name: _own_copy(tensor) for name, tensor in tensors.items()}, _tensors(folder, batch.rank))
    apply_umask(folder)
    description = {
        "step": batch.step,
        "rank": batch.rank,
        "losses": [_as_json(loss) for loss in batch.losses],
        "grad_norm": _as_json(batch.grad_norm),
        "num_items": batch.num_items,
        "micro_batches": plain,
    }
    _json(folder, batch.rank).write_text(
        json.dumps(description, ensure_ascii=False, indent=1), "utf-8", "backslashreplace"
    )


def read_batch(folder: Path, rank: int) -> RankBatch:
    """Read one rank's part.

    Raises:
        ValueError: it is not there.
    """
    try:
        description = json.loads(_json(folder, rank).read_text(encoding="utf-8"))
        tensors = load_file(_tensors(folder, rank))
    except OSError as error:
        raise ValueError(f"{folder} has no batch of rank {rank}: {error}") from error
    grad_norm = description["grad_norm"]
    return RankBatch(
        step=description["step"],
        rank=description["rank"],
        micro_batches=[
            # With the dot, so that micro-batch 1 does not take what is of 10.
            _put_together(plain, {name: tensor for name, tensor in tensors.items() if name.startswith(f"{i}.")})
            for i, plain in enumerate(description["micro_batches"])
        ],
        losses=[float(loss) for loss in description["losses"]],
        grad_norm=None if grad_norm is None else float(grad_norm),
        num_items=description["num_items"],
        random_states={
            name.removeprefix(_RANDOM): state for name, state in tensors.items() if name.startswith(_RANDOM)
        },
    )


def _take_apart(micro_batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a batch by name, "images.2" for the third of a list, and the rest, which is JSON."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in micro_batch.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Sequence) and value and all(isinstance(item, Tensor) for item in value):
            tensors |= {f"{name}.{k}": tensor for k, tensor in enumerate(value)}
        elif name not in ("bad_samples", "feature_entries"):  # They are no part of the step.
            plain[name] = value
    return tensors, plain


def _put_together(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    micro_batch = dict(plain)
    lists: dict[str, dict[int, Tensor]] = {}
    for key, tensor in tensors.items():
        # "0.images.2": micro-batch, entry, place in a list.
        _, name, *place = key.split(".")
        if place:
            lists.setdefault(name, {})[int(place[0])] = tensor
        else:
            micro_batch[name] = tensor
    return micro_batch | {name: [members[k] for k in sorted(members)] for name, members in lists.items()}


def _own_copy(tensor: Tensor) -> Tensor:
    """A copy in main memory: safetensors stores no two names of one memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _as_json(number: float | None) -> float | str | None:
    """A number, in words where JSON has none for it."""
    return number if number is None or math.isfinite(number) else str(number)


def _tensors(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.safetensors"


def _json(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the random numbers that a step on a device draws; reading them waits for nothing."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go back to states that ``random_states`` gave, as far as this machine has the device."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
