"""The batch of a step whose numbers went wrong, in files.

A folder ``bad_step-N`` holds, for each rank R, ``rank-R.safetensors`` (every tensor of its micro-batches,
and the random states before the first of them) and ``rank-R.json`` (sample ids, modalities, sizes, losses),
with ``run.json`` (precision and the like) and ``model`` (the weights before the step) for all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava.system import apply_umask

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
    _json(folder, batch.rank).write_text(json.dumps(description, ensure_ascii=False, indent=1), encoding="utf-8")


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
        elif _is_list_of_tensors(value):
            tensors |= {f"{name}.{k}": tensor for k, tensor in enumerate(value)}
        else:
            plain[name] = value
    return tensors, plain


def _put_together(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    micro_batch = dict(plain)
    lists: dict[str, dict[int, Tensor]] = {}
    for key, tensor in tensors.items():
        _, name, *place = key.split(".")
        if place:
            lists.setdefault(name, {})[int(place[0])] = tensor
        else:
            micro_batch[name] = tensor
    return micro_batch | {name: [members[k] for k in sorted(members)] for name, members in lists.items()}


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and all(isinstance(item, Tensor) for item in value)


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
