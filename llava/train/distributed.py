"""Several ranks: what the first decides, failures and flags of any, the end of the group, and ZeRO-3's shares."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.integrations import deepspeed as integration

from llava.compat_deepspeed import gather_and_keep
from llava.model.coordinates import COORDINATES
from llava.model.grad_sync import is_distributed
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.visual import VISION_MODULES, is_added

Choice = TypeVar("Choice")


class AgreedError(ValueError):
    """An error that every rank raises alike, so that the first one speaks for all."""


def is_first_rank() -> bool:
    return not is_distributed() or dist.get_rank() == 0


def broadcast_from_rank0(decide: Callable[[], Choice]) -> Choice:
    """Call ``decide`` on the first rank alone, and return on every rank what it returned there.

    Raises:
        AgreedError: it raised a ValueError there.
    """
    if not is_distributed():
        return decide()
    decision: list = [None, None]
    if is_first_rank():
        try:
            decision[0] = decide()
        # Any other error ends this rank alone, and the launcher ends those that wait for it.
        except ValueError as error:
            decision[1] = str(error)
    # The others wait here while the first reads, hashes or writes, for --ddp_timeout at most.
    dist.broadcast_object_list(decision)
    if decision[1] is not None:
        raise AgreedError(decision[1])
    return decision[0]


def gather_from_ranks(value: Choice) -> list[Choice]:
    """Each rank's value, rank by rank, on all of them; each must come here. It is pickled on the way."""
    if not is_distributed():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_failures(failure: str | None) -> list[str]:
    """The failures of all ranks, on all of them; each must come here, with None where nothing failed."""
    if not is_distributed():
        return [failure] if failure is not None else []
    return [f"rank {rank}: {said}" for rank, said in enumerate(gather_from_ranks(failure)) if said is not None]


def max_over_ranks(values: Tensor) -> Tensor:
    """The largest of each value over the ranks, which must all come here; in place."""
    if is_distributed():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def is_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank; each must ask, with the device that its process group talks from."""
    return bool(max_over_ranks(torch.tensor(int(flag), device=device))) if is_distributed() else flag


def leave_process_group() -> None:
    """End this rank's part in the process group; to be called once a run needs the other ranks no more.

    A thread of gloo may still hold the tensors of the last exchange, and it needs the interpreter to let go of
    them. One that asks for it after the interpreter has begun to end aborts the process. Neither
    ``destroy_process_group`` nor dropping the trainer ends these threads, so they are given their turn here.
    """
    if not is_distributed():
        return
    threads_may_linger = "gloo" in dist.get_backend()
    dist.destroy_process_group()
    if threads_may_linger:
        time.sleep(0.5)


# ZeRO-3, which splits the parameters themselves among ranks: what loading and the vision modules need for it.


@contextmanager
def loading_whole(training_args: TrainingArguments) -> Iterator[None]:
    """Load models as without DeepSpeed, although ``training_args`` have announced it to transformers."""
    announced = getattr(training_args, "hf_deepspeed_config", None)
    if announced is None:
        yield
        return
    # from_pretrained asks transformers' global for ZeRO-3; TrainingArguments set it as they were read.
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(announced)


def gather_added_together(model: LlavaMetaForCausalLM) -> None:
    """Let every rank gather vision modules and coordinates before each forward pass, if DeepSpeed shares them out.

    Args:
        model: a language model with head. Without ZeRO-3, or for plain text, nothing changes.
    """
    decoder = model.get_model()
    names = [name for name, _ in decoder.named_parameters() if is_added(name)]
    parts = (getattr(decoder, name, None) for name in (*VISION_MODULES, COORDINATES))
    modules = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]

    @torch.no_grad()
    def gather(*args: object) -> None:
        own = dict(decoder.named_parameters())
        gather_and_keep([own[name] for name in names], modules)

    if names:
        model.register_forward_pre_hook(gather)
