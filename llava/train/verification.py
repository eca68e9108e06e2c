"""``--verify_steps``: steps that are computed twice and compared bit for bit, and ranks that compare what they hold.

A verified step is trained as any other. Beside it, from the same weights, batches and random numbers, each micro-batch
runs a second time without exchanging gradients, and the optimizer's step is taken back and done again. What each module
returns, each gradient, parameter and moment is compared by checksums of its bits, here and with the other ranks.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.train.distributed import AgreedError, gather_failures, gather_from_ranks
from llava.train.nan_check import RankBatch, build_nan_check, describe_samples, random_states, set_random_states
from llava.train.watched_step import Trace, as_words, checksum, tracing

logger = logging.getLogger(__name__)

_MOST_NAMED = 5


class VerificationError(AgreedError):
    """What was computed twice differs, or ranks hold other bits; the message names rank, step and place."""


@dataclass(eq=False)
class Verification(TrainerCallback):
    """Verifies the first step of a start, which shows whether there is room for it, and every ``every``-th one.

    DeepSpeed takes the optimizer's step within the backward pass: there the forward pass is computed twice, and of what
    its ranks hold, the parameters are compared.

    Attributes:
        trainer: of the run.
        every: steps from one verified step to the next.
    """

    trainer: Any  # a LlavaTrainer, whose file imports this one
    every: int
    _first: int | None = None
    _differences: list[str] = field(default_factory=list)
    _batches: list[dict[str, Any]] = field(default_factory=list)
    _losses: list[float] = field(default_factory=list)
    _random: dict[str, Tensor] = field(default_factory=dict)
    _num_items: float | None = None
    _before: list[dict[str, Any]] = field(default_factory=list)
    _gradients: dict[str, int] = field(default_factory=dict)
    _frozen: dict[str, int] = field(default_factory=dict)
    _verified: int = 0
    _summed: dict[str, int] = field(default_factory=dict)  # gradients as the micro-batches so far have left them

    @property
    def step(self) -> int:
        """The step that is under way."""
        return self.trainer.state.global_step + 1

    @property
    def is_due(self) -> bool:
        if self._first is None:
            self._first = self.step
        return self.step == self._first or self.step % self.every == 0

    @property
    def _is_distributed(self) -> bool:
        return self.trainer.args.world_size > 1

    # Forward and backward.

    def compute(
        self,
        training_step: Callable[..., Tensor],
        model: nn.Module,
        inputs: dict[str, Any],
        num_items: Tensor | int | None,
    ) -> Tensor:
        """The loss of a micro-batch, as ``training_step`` computes it; in a verified step it is computed twice."""
        run = partial(training_step, model, inputs, num_items)
        if not self.is_due:
            return run()
        trainer = self.trainer
        if not self._batches:
            self._random = random_states(trainer.args.device)
            self._num_items = None if num_items is None else float(num_items)
        self._batches.append(dict(inputs))
        if trainer.is_deepspeed_enabled:
            return self._compute_forward_twice(run, model, inputs, num_items)
        trained = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
        self._check_summed(trained)
        # Ranks sum their gradients in the last micro-batch: what a rank has added to them itself is seen by hooks.
        earlier = [] if self._is_distributed else [None if p.grad is None else p.grad.clone() for _, p in trained]
        state = _State(trainer)
        with self._tracing() as first:
            loss = run()
        after, gradients = _State(trainer), [p.grad for _, p in trained]
        self._close(first, loss, trained)
        traces = [first]
        for _ in range(2):  # A third time only where the first two differ: two that are alike tell which was wrong.
            for i, (_, p) in enumerate(trained):
                p.grad = None if not earlier or earlier[i] is None else earlier[i].clone()  # type: ignore[union-attr]
            state.restore()
            with self._alone(model), self._tracing() as trace:
                again = run()
            self._close(trace, again, trained)
            traces.append(trace)
            if traces[0].first_difference(traces[-1]) is None:
                break
        after.restore()
        for (_, p), gradient in zip(trained, gradients, strict=True):
            p.grad = gradient
        # What ranks have exchanged, they compare before the optimizer's step.
        self._summed = {} if trainer.accelerator.sync_gradients else _sum_gradients(trained)
        self._losses.append(float(loss))
        self._note_difference(traces)
        return loss

    def _check_summed(self, trained: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Note what has become of gradients since the micro-batch before, on which nothing else works."""
        now = _sum_gradients(trained) if self._summed else {}
        if wrong := [name for name, value in self._summed.items() if now.get(name) != value]:
            at = len(self._batches) - 1
            self._differences.append(f"before micro-batch {at} the sum of those before it has changed: {_name(wrong)}")

    def _compute_forward_twice(
        self, run: Callable[[], Tensor], model: nn.Module, inputs: Mapping[str, Any], num_items: Tensor | int | None
    ) -> Tensor:
        trainer = self.trainer
        if len(self._batches) == 1:  # Here: its optimizer writes parameters anew, from the only copy of each.
            self._compare_ranks(self._sum_held(None))
        state = _State(trainer)
        with self._alone(model), self._tracing(gradients=False) as first, trainer.compute_loss_context_manager():
            model.train()
            trainer.compute_loss(model, trainer._prepare_inputs(dict(inputs)), num_items_in_batch=num_items)
        state.restore()
        with self._tracing(gradients=False) as second:
            loss = run()
        self._losses.append(float(loss))
        self._note_difference([first, second])
        return loss

    def _note_difference(self, traces: Sequence[Trace]) -> None:
        place = traces[0].first_difference(traces[1])
        if place is None:
            return
        if len(traces) < 3 or (traces[0].first_difference(traces[2]) and traces[1].first_difference(traces[2])):
            cause = "no two computations are alike: a kernel is not deterministic (--deterministic true), or the "
            cause += "device computes wrongly"
        else:
            wrong = "second" if traces[0].first_difference(traces[2]) is None else "first"
            cause = f"a third one says that the {wrong} was wrong: memory or arithmetic of this device failed"
        micro_batch = len(self._batches) - 1
        self._differences.append(f"micro-batch {micro_batch} computed twice differs first in the {place}; {cause}")

    def _tracing(self, gradients: bool = True) -> contextlib.AbstractContextManager[Trace]:
        # Hooks within a compiled decoder would have it compiled anew.
        outside = self.trainer.model.get_model() if self.trainer.args.torch_compile else None
        # One process looks at all of its gradients when the pass is over, see _close.
        return tracing(self.trainer.model, outside, gradients and self._is_distributed)

    def _close(self, trace: Trace, loss: Tensor, trained: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Add to a trace what is known once the backward pass is over."""
        if not self._is_distributed:
            for name, p in reversed(trained):  # About as the backward pass comes to them.
                if p.grad is not None:
                    trace.add(f"gradient of {name}", p.grad)
        trace.add("loss", loss)

    @contextlib.contextmanager
    def _alone(self, model: nn.Module) -> Iterator[None]:
        """Within it gradients stay on this rank, and nothing is counted or added to a cache of features."""
        trainer = self.trainer
        log, trainer.feature_log = trainer.feature_log, None
        no_sync = getattr(model, "no_sync", None)
        try:
            # DeepSpeed's engine knows no forward pass of its own within it, and needs none.
            with contextlib.nullcontext() if no_sync is None or trainer.is_deepspeed_enabled else no_sync():
                yield
        finally:
            trainer.feature_log = log

    # The optimizer's step, and the other ranks.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._first = None
        self._frozen = self._sum_frozen()

    def on_pre_optimizer_step(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: object
    ) -> None:
        if not self._batches:
            return
        self._meet(keeps_batch=not self.trainer.is_deepspeed_enabled)
        if not self.trainer.is_deepspeed_enabled:
            if self._is_distributed:
                named = self._trained_names()
                self._gradients = _sum_gradients([(name, p) for p, name in named.items()])
            self._before = _take_state(_raw(optimizer))

    def on_optimizer_step(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: object
    ) -> None:
        if not self._batches:
            return
        trainer = self.trainer
        if self._before and not trainer.accelerator.optimizer_step_was_skipped:
            raw, names = _raw(optimizer), {id(p): name for p, name in self._trained_names().items()}
            _swap_state(raw, self._before)
            raw.step()
            if wrong := _find_differences(raw, self._before, names):
                self._differences.append(f"the optimizer's step computed twice differs in {_name(wrong)}")
        frozen = self._sum_frozen()
        if wrong := [name for name, value in frozen.items() if self._frozen.get(name, value) != value]:
            self._differences.append(f"what does not train has changed since the start: {_name(wrong)}")
        if self._is_distributed:
            self._compare_ranks(self._gradients | self._sum_held(optimizer) | frozen)
        self._meet(keeps_batch=False)
        self._batches, self._losses, self._before, self._gradients = [], [], [], {}
        self._verified += 1

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if args.process_index == 0:
            logger.info("--verify_steps: %d steps were computed twice, and nothing differed", self._verified)

    def _compare_ranks(self, held: dict[str, int]) -> None:
        """Note what this rank holds otherwise than others do; all ranks call this together."""
        if not self._is_distributed:
            return
        ranks = gather_from_ranks(held)
        if all(other == ranks[0] for other in ranks):
            return
        ours, theirs = [], []
        for name in held:
            values = [other.get(name) for other in ranks]
            most = max(values, key=values.count)
            if 2 * values.count(most) <= len(values):  # Nothing tells which of two ranks is right.
                theirs.append(name)
            elif held[name] != most:
                ours.append(name)
        if ours:
            self._differences.append(f"it holds other bits than most ranks: {_name(ours)}")
        if theirs:
            self._differences.append(f"ranks hold different bits, and no majority the same: {_name(theirs)}")

    def _meet(self, keeps_batch: bool) -> None:
        """Stop all ranks where one of them has found a difference.

        Raises:
            VerificationError: on all ranks alike.
        """
        failures = gather_failures("; ".join(self._differences) or None)
        if not failures:
            return
        trainer, rank = self.trainer, self.trainer.args.process_index
        ids = [list(batch.get("sample_ids", ())) for batch in self._batches]
        samples = "; ".join(describe_samples(own, i) for i, own in enumerate(gather_from_ranks(ids)))
        kept = ""
        if keeps_batch:
            batch = RankBatch(self.step, rank, self._batches, self._losses, None, self._num_items, self._random)
            folder = Path(str(trainer.args.output_dir), f"bad_step-{self.step}")
            kept = f" {build_nan_check(trainer).leave(folder, batch)}."
        raise VerificationError(
            f"step {self.step} is not what it should be (--verify_steps): {'; '.join(failures)}. Samples of the step: "
            f"{samples}.{kept} Go on from the last checkpoint, without the device if it is to blame"
        )

    # Checksums.

    def _trained_names(self) -> dict[nn.Parameter, str]:
        return {p: name for name, p in self.trainer.model.named_parameters() if p.requires_grad}

    def _sum_frozen(self) -> dict[str, int]:
        frozen = [(f"parameter {n}", p) for n, p in self.trainer.model.named_parameters() if not p.requires_grad]
        return _sum_all(frozen)

    def _sum_held(self, optimizer: Any) -> dict[str, int]:
        """Checksums of the parameters that train and of the optimizer's state."""
        named, held = self._trained_names(), []
        if not self.trainer.is_deepspeed_enabled:
            names = {id(p): name for p, name in named.items()}
            for p, state in _raw(optimizer).state.items():
                own = sorted((key, value) for key, value in state.items() if isinstance(value, Tensor))
                held += [(f"{key} of {names.get(id(p), 'a parameter')}", value) for key, value in own]
        # Behind what moves them: what differs first is where it began.
        held += [(f"parameter {name}", p.data) for p, name in named.items()]
        return _sum_all(held)


def add_verification(trainer: Any, every: int) -> Verification:
    """What verifies the steps of a trainer, among its callbacks."""
    verification = Verification(trainer, every)
    trainer.add_callback(verification)
    return verification


@dataclass
class _State:
    """What a pass changes beside gradients: random numbers and buffers, as they are when this is made."""

    trainer: Any

    def __post_init__(self) -> None:
        self.random = random_states(self.trainer.args.device)
        self.python, self.numpy = random.getstate(), np.random.get_state()
        self.buffers = [buffer.clone() for buffer in self.trainer.model.buffers()]

    def restore(self) -> None:
        set_random_states(self.random, self.trainer.args.device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        with torch.no_grad():
            for buffer, value in zip(self.trainer.model.buffers(), self.buffers, strict=True):
                buffer.copy_(value)


def _raw(optimizer: Any) -> torch.optim.Optimizer:
    """torch's own optimizer within accelerate's."""
    raw: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return raw


def _take_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Copies of all that an optimizer's step changes: its groups' numbers, and each parameter with its state."""
    taken = []
    for group in optimizer.param_groups:
        numbers = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        parameters = []
        for p in group["params"]:
            state = optimizer.state.get(p)
            own = None if state is None else {key: _copy(value) for key, value in state.items()}
            parameters.append((p.detach().clone() if p.grad is not None else None, own))
        taken.append({"numbers": numbers, "parameters": parameters})
    return taken


def _copy(value: object) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


@torch.no_grad()
def _swap_state(optimizer: torch.optim.Optimizer, taken: Sequence[dict[str, Any]]) -> None:
    """Let an optimizer and its parameters be as they were when their state was taken, which becomes what they were."""
    for group, before in zip(optimizer.param_groups, taken, strict=True):
        now = {key: value for key, value in group.items() if key != "params"}
        group.update(before["numbers"])
        before["numbers"] = now
        for i, (p, (value, own)) in enumerate(zip(group["params"], before["parameters"], strict=True)):
            if value is not None:
                _swap(p, value)
            if own is None:  # It had none yet, and gets a new one.
                before["parameters"][i] = value, optimizer.state.pop(p, None)
                continue
            state = optimizer.state[p]
            for key in set(state) | set(own):
                if isinstance(kept := own.get(key), Tensor):
                    _swap(state[key], kept)
                else:
                    state[key], own[key] = kept, state.get(key)


def _swap(one: Tensor, other: Tensor) -> None:
    between = one.clone()
    one.copy_(other)
    other.copy_(between)


def _find_differences(
    optimizer: torch.optim.Optimizer, taken: Sequence[Mapping[str, Any]], names: Mapping[int, str]
) -> list[str]:
    """What of an optimizer's state, and then of its parameters, has other bits than what was taken."""
    moments, parameters = [], []
    for group, before in zip(optimizer.param_groups, taken, strict=True):
        for p, (value, own) in zip(group["params"], before["parameters"], strict=True):
            name, state = names.get(id(p), "a parameter"), optimizer.state.get(p, {})
            for key, kept in sorted((own or {}).items()):
                if isinstance(kept, Tensor) and not torch.equal(as_words(kept), as_words(state[key])):
                    moments.append(f"{key} of {name}")
            if value is not None and not torch.equal(as_words(p), as_words(value)):
                parameters.append(f"parameter {name}")
    return moments + parameters


def _sum_all(named: Any) -> dict[str, int]:
    """The checksums of tensors by name; the device is waited for once."""
    sums = {name: checksum(tensor) for name, tensor in named if tensor.numel()}
    by_device: dict[torch.device, list[str]] = {}
    for name, value in sums.items():
        by_device.setdefault(value.device, []).append(name)
    found: dict[str, int] = {}
    for names in by_device.values():
        found |= dict(zip(names, torch.stack([sums[name] for name in names]).tolist(), strict=True))
    return {name: found[name] for name in sums}


def _sum_gradients(trained: Sequence[tuple[str, nn.Parameter]]) -> dict[str, int]:
    return _sum_all((f"gradient of {name}", p.grad) for name, p in trained if p.grad is not None)


def _name(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
