"""``--fsdp``: FSDP2, which shares weights, gradients and optimizer states out to ranks; checkpoints have them whole.

The wrapping is accelerate's: each block of the language model is gathered when it computes, all else (embeddings,
tower, projector, resampler, coordinates) for the whole of a forward pass. So what a rank computes with are whole
tensors, as with DDP, whatever modality its batch has. A checkpoint is the same as DDP's, and a run goes on from either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Trainer

Value = TypeVar("Value")


def prepare_sharding(trainer: Trainer) -> None:
    """With FSDP, let a model that is to be shared out compute in ``--bf16`` as it would with DDP.

    accelerate casts weights as they are gathered, and leaves autocast out; modules here compute in 32 bits what needs
    them, and expect autocast around them.
    """
    if not trainer.args.bf16:
        return
    trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = None
    assert trainer.model is not None
    autocast = torch.autocast(trainer.args.device.type, torch.bfloat16)
    trainer.model.forward = convert_outputs_to_fp32(autocast(trainer.model.forward))  # type: ignore[method-assign]


# Tensors that ranks have shares of (DTensors), and the same as a whole.


def whole(value: Value) -> Value:
    """A tensor of which ranks have shares, as a whole on each of them, which must all come here; others as they are."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()


def shares_of(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors as this rank's shares of them, where the model's are shared out."""
    own = model.state_dict()
    return {name: _share(tensor, own[name]) if name in own else tensor for name, tensor in state.items()}


def _share(tensor: Tensor, like: Tensor) -> Tensor:
    mesh, placements = getattr(like, "device_mesh", None), getattr(like, "placements", None)
    if mesh is None or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Each rank has read all of it: nothing is sent.
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=None)


class _WholeOptimizer:
    """An optimizer whose state is read and written as a whole, by the place of each parameter, as DDP has it."""

    def __init__(self, optimizer: torch.optim.Optimizer, state: dict[str, Any] | None) -> None:
        self.optimizer, self.state_of_all = optimizer, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def state_dict(self) -> dict[str, Any]:
        assert self.state_of_all is not None
        return self.state_of_all

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = {
            place: parameter
            for old, new in zip(state["param_groups"], self.optimizer.param_groups, strict=True)
            for place, parameter in zip(old["params"], new["params"], strict=True)
        }
        shared = {
            place: {
                name: _share(value, parameters[place]) if isinstance(value, Tensor) else value
                for name, value in moments.items()
            }
            for place, moments in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": shared})


def _gather_states(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """The state of an optimizer, of which every rank must come for each tensor, and ``keep`` says who needs them."""
    state = optimizer.state_dict()
    gathered: dict[int, dict[str, Any]] = {}
    for place in sorted(state["state"]):
        moments = gathered[place] = {}
        for name, value in state["state"][place].items():
            complete = whole(value)
            if keep:
                moments[name] = complete.cpu() if isinstance(complete, Tensor) else complete
    return {**state, "state": gathered}


@contextmanager
def whole_states(trainer: Trainer, to_save: bool) -> Iterator[None]:
    """Within it transformers writes or reads the optimizer's state as without FSDP.

    Args:
        to_save: whether it is written; then all ranks must come here.
    """
    optimizer = trainer.optimizer
    if not trainer.is_fsdp_enabled or optimizer is None:
        yield
        return
    state = _gather_states(optimizer, trainer.args.should_save) if to_save else None
    trainer.optimizer, trainer.is_fsdp_enabled = _WholeOptimizer(optimizer, state), False  # type: ignore[assignment]
    try:
        yield
    finally:
        trainer.optimizer, trainer.is_fsdp_enabled = optimizer, True
