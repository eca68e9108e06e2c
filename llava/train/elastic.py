"""A run that goes on with another number of ranks, batch or accumulation: what fits, what stays, what does not.

The order of the data depends on the samples of a step, over all ranks, and on nothing else of these three
(``llava.data.samplers``). So their product must stay; how it is split may change.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import set_seed

from llava.io import hash_json
from llava.train.arguments import TrainingArguments
from llava.train.checkpoint import RUN_IDENTITY
from llava.train.distributed import is_first_rank

logger = logging.getLogger(__name__)

_BY_SHARE = {"stable_adamw", "grokadamw"}
"""Optimizers whose step of a weight depends on others of its tensor, which under ZeRO is a rank's share."""


class Split(NamedTuple):
    """How the samples of a step, packs or batches by tokens are dealt: their number is the product."""

    ranks: int
    batch: int
    accumulation: int

    def __str__(self) -> str:
        return f"{count(self.ranks, 'rank')} x batch {self.batch} x accumulation {self.accumulation}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def advise(step_size: int, ranks: int, batch: int, by_tokens: bool) -> str:
    """Values with which a step has so many samples.

    Args:
        step_size: that the run was begun with.
        ranks: of this start.
        batch: of a rank, which is kept where that is possible, or else made smaller.
        by_tokens: whether a rank's batch is counted in tokens, and is one of the ``step_size``.
    """
    if step_size % ranks:
        fitting = [number for number in range(1, step_size + 1) if step_size % number == 0]
        fewer, more = (max(n for n in fitting if n < ranks), min((n for n in fitting if n > ranks), default=None))
        near = f"{fewer} or {more}" if more else str(fewer)
        return f"no batch fits {count(ranks, 'rank')}, of which {step_size} is no multiple: start {near}"
    each = step_size // ranks
    fitting_batch = 1 if by_tokens else max(number for number in range(1, min(batch, each) + 1) if each % number == 0)
    flag = "" if by_tokens else f"--per_device_train_batch_size {fitting_batch} "
    flags = f"{flag}--gradient_accumulation_steps {each // fitting_batch}"
    return f"{count(ranks, 'rank')} fit{'s' * (ranks == 1)} with {flags}"


def say_other_split(checkpoint: Path, args: TrainingArguments, settings: Mapping[str, Any]) -> None:
    """One line about what another split of a step changes, and what it does not; nothing where it is as before.

    Args:
        checkpoint: that the run goes on from, whose order of the data is this run's.
        args: of this run.
        settings: of this run, by flag.
    """
    path = checkpoint / RUN_IDENTITY
    if not (path.is_file() and is_first_rank()):
        return
    free = json.loads(path.read_text(encoding="utf-8"))["free"]
    names = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps")
    before = Split(*(free.get(name, getattr(args, name)) for name in names))
    now = Split(*(getattr(args, name) for name in names))
    if args.max_tokens_per_batch:  # The size of a rank's batch has no effect.
        before, now = before._replace(batch=1), now._replace(batch=1)
    if before == now:
        return
    others = ["sums are rounded in another order", "dropout and other noise draw other numbers"]
    if settings.get("router_aux_loss_coef"):
        others.append("the experts' balance is taken over other micro-batches")
    if not args.average_tokens_across_devices and before.ranks != now.ranks:
        others.append("--average_tokens_across_devices false weighs tokens by ranks")
    optim = str(getattr(args.optim, "value", args.optim))
    if args.deepspeed and optim in _BY_SHARE and before.ranks != now.ranks:
        others.append(f"--optim {optim} limits a step by a norm over each rank's share of the weights")
    same = "every step has the same samples in the same order, and words are counted on; "
    if args.resume_changed or args.ignore_data_skip:  # The data may be others.
        same = ""
    logger.warning(
        "going on from %s with %s in place of %s: %swhat is not the same bit for bit: %s",
        checkpoint, now, before, same, "; ".join(others),
    )  # fmt: skip


def saved_ranks(checkpoint: str | Path) -> int:
    """How many ranks have written a checkpoint."""
    return len(list(Path(checkpoint).glob("rng_state*.pth")))


def seed_rank(seed: int, step: int, rank: int, ranks: int) -> None:
    """Begin a rank's random numbers where no checkpoint has its state: others on every rank, alike in every start."""
    set_seed(int(hash_json([seed, step, rank, ranks])[:8], 16))
