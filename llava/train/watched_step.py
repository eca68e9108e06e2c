"""A step that stopped a run, once more and watched: its model, its micro-batches, and what of them is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.data.collator import model_inputs
from llava.model.loading import load_model
from llava.model.quantization import Quantization
from llava.train.engines import choose_products
from llava.train.nan_check import (
    MODEL_FOLDER,
    RankBatch,
    RunSettings,
    describe_samples,
    random_states,
    set_random_states,
)
from llava.train.parts import fuse_gelu, hold_in

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MOST_SHOWN = 10


def load_run_model(folder: Path, settings: RunSettings, device: torch.device, vision_tower: str | None) -> Any:
    """The model as it was before the step, ready to train."""
    dtype = _DTYPES[settings.precision]
    quantization = None
    if settings.bits != 16:
        quantization = Quantization(settings.bits, settings.quant_type, settings.double_quant, dtype, device)
    model = load_model(
        str(folder / MODEL_FOLDER),
        vision_tower=vision_tower,
        attn_implementation=settings.attn_implementation,
        # DeepSpeed holds weights in 16 bits; without it they are fp32, and autocast rounds them where they are used.
        dtype=dtype if settings.casts_weights else torch.float32,
        quantization=quantization,
        flag="FOLDER",
        allow_bad_weights=True,
    ).model
    trainable = set(settings.trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in trainable
    tower = model.get_vision_tower()
    # As parts.set_up_parts holds weights, and set_trainable_parts those of a frozen tower.
    if settings.bf16_weights:
        hold_in(model, dtype)
    if settings.fused_gelu:
        fuse_gelu(model)
    if tower is not None and not tower.trainable:
        hold_in(tower, dtype)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # In training mode: dropout is part of the step, and random states make it drop the same values.
    return model.to(device).train()


def replay(model: nn.Module, batch: RankBatch, settings: RunSettings, device: torch.device) -> bool:
    """Run the micro-batches of a rank twice, as the step did; whether a number is not finite, or the two differ."""
    print(f"step {batch.step}, {describe_samples(batch.sample_ids, batch.rank)}")
    # The states of before the first micro-batch; the later ones draw what comes after, so all run, in their order.
    set_random_states(batch.random_states, device)
    found = False
    for i, micro_batch in enumerate(batch.micro_batches):
        before = random_states(device)
        run_step = _step(model, micro_batch, batch.num_items, settings, device)
        # The run sums gradients over micro-batches; here each is looked at alone.
        model.zero_grad()
        with watch_activations(model) as activations, tracing(model) as first:
            loss = run_step()
        print(f"  micro-batch {i}: loss {float(loss)} (in the run {batch.losses[i]})")
        print_names("modules with values that are not finite, in the order they ran", activations)
        gradients = bad_names((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
        print_names("gradients that are not finite", gradients)
        after = random_states(device)
        set_random_states(before, device)
        model.zero_grad()
        with tracing(model) as second:
            run_step()
        set_random_states(after, device)
        difference = first.first_difference(second)
        if difference is not None:
            print(f"    computed again, the first bits that differ are those of the {difference}")
        if gradients:
            # The same dropout once more, this time under anomaly detection, which is slow.
            set_random_states(before, device)
            print_first_bad_operation(run_step)
        found = found or bool(gradients) or not bool(loss.isfinite()) or difference is not None
    return found


def _step(
    model: nn.Module, micro_batch: dict[str, Any], num_items: float | None, settings: RunSettings, device: torch.device
) -> Callable[[], Tensor]:
    """A function that runs forward and backward of a micro-batch and returns the loss."""
    inputs = {name: _move(value, device) for name, value in model_inputs(micro_batch).items()}
    share = None if num_items is None else torch.tensor(num_items, device=device)

    def run() -> Tensor:
        with _precision(settings, device), choose_products(settings.onednn):
            loss = model(
                **inputs, num_items_in_batch=share, return_logits=False, smoothing=settings.label_smoothing
            ).loss
            # As transformers' compute_loss: DDP means over ranks what is divided by the tokens of all of them already.
            loss = loss * settings.loss_factor
        loss.backward()
        return loss.detach()

    return run


def _move(value: object, device: torch.device) -> object:
    if isinstance(value, list):
        return [_move(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value


def _precision(settings: RunSettings, device: torch.device) -> AbstractContextManager[Any]:
    casts = settings.precision != "fp32" and not settings.casts_weights
    # Where autocast is off, the type says nothing.
    return torch.autocast(device.type, _DTYPES[settings.precision] if casts else torch.bfloat16, enabled=casts)


@contextmanager
def watch_activations(model: nn.Module) -> Iterator[list[str]]:
    """Within it, modules whose output is not finite join the list, innermost first, as they run."""
    found: list[str] = []

    def look(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: object, output: object) -> None:
            bad = [tensor for tensor in _tensors(output) if not is_finite(tensor)]
            if bad:
                since = "" if all(map(is_finite, _tensors(inputs))) else ", as its input is"
                share = int((~bad[0].isfinite()).sum())
                found.append(f"{name} ({type(module).__name__}): {share} of {bad[0].numel()} values{since}")

        return hook

    # A hook runs when its module returns: inner modules come before those that hold them.
    handles = [module.register_forward_hook(look(name or "model", module)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Trace:
    """What a pass has computed, as checksums of its bits in their order: outputs of modules, then gradients."""

    names: list[str] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor) -> None:
        self.names.append(name)
        self.sums.append(checksum(tensor))

    def first_difference(self, other: Trace) -> str | None:
        """The first thing that another computation of the same has otherwise; None where all bits are alike."""
        for name, here in zip(self.names, other.names, strict=False):
            if name != here:
                return name
        if len(self.names) != len(other.names):
            return max(self.names, other.names, key=len)[min(len(self.names), len(other.names))]
        if not self.sums:
            return None
        device = self.sums[0].device
        sums, others = (torch.stack([one.to(device) for one in trace.sums]) for trace in (self, other))
        different = (sums != others).nonzero().flatten().tolist()  # The one wait for the device.
        return self.names[different[0]] if different else None


@contextmanager
def tracing(model: nn.Module, outside: nn.Module | None = None, gradients: bool = True) -> Iterator[Trace]:
    """Within it, a pass leaves the checksums of what its modules return and of the gradients that it gives.

    Args:
        model: that runs.
        outside: a module within which none is looked at.
        gradients: whether those of parameters are looked at, each before it is added to others or exchanged.
    """
    trace = Trace()
    left_out = set() if outside is None else set(outside.modules())

    def look(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: object, output: object) -> None:
            for tensor in _tensors(output):
                trace.add(f"output of {name} ({type(module).__name__})", tensor)

        return hook

    # Modules with parameters of their own: what others make of these shows in the next one's output.
    handles = [
        module.register_forward_hook(look(name or "model", module))
        for name, module in model.named_modules()
        if module not in left_out and next(module.parameters(recurse=False), None) is not None
    ]
    if gradients:
        handles += [
            parameter.register_hook(partial(_add_gradient, trace, name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _add_gradient(trace: Trace, name: str, gradient: Tensor) -> None:
    trace.add(f"gradient of {name}", gradient)


_COLUMNS = 4096


@cache
def _weights(device: torch.device) -> Tensor:
    """Odd numbers of 64 bits, always the same, without a random number of anybody else's."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**62), 2**62, (_COLUMNS,), generator=generator)
    return (2 * numbers + 1).to(device)


def as_words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as a row of integers, in 64 bits where they fit."""
    words = tensor.detach().contiguous().flatten()
    if words.numel() * words.element_size() % 8 == 0:
        # By its size alone: the same bits give the same words wherever in memory they begin.
        is_aligned = words.data_ptr() % 8 == 0 and words.storage_offset() * words.element_size() % 8 == 0
        return (words if is_aligned else words.clone()).view(torch.int64)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(words.element_size())
    return torch.view_as_real(words).view(torch.int64) if width is None else words.view(width)


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """A number of 64 bits that another one has if any single bit of a tensor is flipped; on its device, without a wait.

    A sum of its words, each times a number of its place: changes that cancel out in a plain sum are seen as well, where
    they do not lie 4096 words apart.
    """
    words, weights = as_words(tensor), _weights(tensor.device)
    if len(words) > _COLUMNS:
        rows = len(words) // _COLUMNS * _COLUMNS
        sums = words[:rows].view(-1, _COLUMNS).sum(0, dtype=torch.int64)  # (columns,)
        if rest := len(words) - rows:
            sums[:rest] += words[rows:]
        words = sums
    return (words * weights[: len(words)]).sum()


def _tensors(value: object) -> list[Tensor]:
    """The tensors in what a module takes or returns."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


def is_finite(tensor: Tensor) -> bool:
    # Ids and masks are whole numbers, which are always finite.
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def bad_names(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors, of (name, tensor) pairs, that are not finite."""
    return [name for name, tensor in tensors if not is_finite(tensor)]


def print_first_bad_operation(run_step: Callable[[], Tensor]) -> None:
    """Name the first operation whose gradient is NaN; torch warns with the line of its forward pass."""
    try:
        with torch.autograd.set_detect_anomaly(True):
            run_step()
    except RuntimeError as error:
        if "nan values" not in str(error):
            raise
        print(f"    first operation with a NaN gradient: {error}")


def print_names(what: str, names: Sequence[str]) -> None:
    """Print what was found, the first ones by name; nothing if nothing was."""
    if names:
        print(f"    {len(names)} {what}:")
        for name in names[:_MOST_SHOWN]:
            print(f"      {name}")
        if len(names) > _MOST_SHOWN:
            print(f"      and {len(names) - _MOST_SHOWN} more")
