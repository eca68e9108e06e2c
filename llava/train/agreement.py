"""Ranks that decide together, a choice of the first one, a mistake of any, a wish of any; and their parting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

Choice = TypeVar("Choice")


class AgreedError(ValueError):
    """An error that every rank raises alike, so that the first one speaks for all."""


def has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    return not has_ranks() or dist.get_rank() == 0


def decide_once(decide: Callable[[], Choice]) -> Choice:
    """What ``decide`` returns on the first rank, on all of them.

    Raises:
        AgreedError: it raised a ValueError there.
    """
    if not has_ranks():
        return decide()
    decision: list = [None, None]
    if is_first_rank():
        try:
            decision[0] = decide()
        except ValueError as error:
            decision[1] = str(error)
    dist.broadcast_object_list(decision)
    if decision[1] is not None:
        raise AgreedError(decision[1])
    return decision[0]


def gather_failures(failure: str | None) -> list[str]:
    """The failures of all ranks, on all of them; each must come here, with None where nothing failed."""
    if not has_ranks():
        return [failure] if failure is not None else []
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    return [f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure is not None]


def is_wanted_by_any(wanted: bool, device: torch.device) -> bool:
    """Whether any rank wants it; each must ask, with the device that its process group talks from."""
    if not has_ranks():
        return wanted
    votes = torch.tensor(int(wanted), device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


def leave_process_group() -> None:
    """End what this rank has in common with the others; to be called once a run needs them no more.

    A thread of gloo may still hold the tensors of the last exchange, and it needs the interpreter to let go of
    them. One that asks for it after the interpreter has begun to end aborts the process. Neither
    ``destroy_process_group`` nor dropping the trainer ends these threads, so they are given their turn here.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    threads_may_linger = "gloo" in dist.get_backend()
    dist.destroy_process_group()
    if threads_may_linger:
        time.sleep(0.5)
