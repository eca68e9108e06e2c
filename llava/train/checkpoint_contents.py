"""What the files of a checkpoint say, looked at before a run goes on from it: kinds and ranges.

A checksum says that a file is as it was written, not that it is one of this library's: whoever can write the folder
can write its checksums too.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from llava.messages import is_out_of_memory, list_names, shorten, shorten_text
from llava.model.pretrained import UNSAFE_WEIGHTS
from llava.train.distributed import AgreedError

logger = logging.getLogger(__name__)

_MALFORMED = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
    EOFError,
)  # fmt: skip
_MOST = 2**63
_STEP = re.compile(r"(?:tmp-)?checkpoint-(\d+)")
_MUST_BE_LISTED = re.compile(r"trainer_state\.json|optimizer\.pt|scheduler\.pt|rng_state.*\.pth|.*\.safetensors")
_OF_STATE = {item.name for item in fields(TrainerState)}
_COUNTS = ("global_step", "max_steps", "num_train_epochs", "best_global_step")
_NUMBERS = ("epoch", "logging_steps", "eval_steps", "save_steps", "total_flos", "train_batch_size",
            "num_input_tokens_seen")  # fmt: skip


def find_unlisted(folder: Path, listed: Mapping[str, object]) -> str | None:
    """What keeps the list of a folder's checksums from being one of all files that a run goes on from."""
    found = [path.name for path in folder.iterdir() if _MUST_BE_LISTED.fullmatch(path.name)]
    if missing := sorted(set(found) - set(listed)):
        return f"it has no checksum of {list_names(missing)}"
    return None


def find_malformed(folder: Path) -> str | None:
    """Which of a checkpoint's files does not say what such a file says, and where; None if all do."""
    checks: list[tuple[str, Callable[[Any, Path], None]]] = [
        (TRAINER_STATE_NAME, _check_trainer_state),
        ("data_state.json", _check_data_state),
        ("exposure.json", _check_exposure),
        ("loss_since_log_*.json", _check_losses),
    ]
    for pattern, check in checks:
        for path in sorted(folder.glob(pattern)):
            try:
                check(json.loads(path.read_text(encoding="utf-8")), folder)
            except _MALFORMED as error:
                return f"its {path.name} is damaged: {shorten_text(str(error), 200) or type(error).__name__}"
    return None


def _check_trainer_state(state: Any, folder: Path) -> None:
    _expect(isinstance(state, dict), "an object", state)
    if unknown := sorted(state.keys() - _OF_STATE):
        raise ValueError(
            f"it has {list_names([shorten(name) for name in unknown])}, which the installed transformers does not know"
        )
    for name in _COUNTS:
        _check_count(state.get(name), name, optional=name == "best_global_step")
    for name in _NUMBERS:
        if state.get(name) is not None:
            _check_number(state[name], name)
    _expect(isinstance(state.get("best_model_checkpoint"), str | None), "a name as best_model_checkpoint", state)
    named = _STEP.fullmatch(folder.name)
    if named is not None and int(named[1]) != state["global_step"]:
        raise ValueError(f"global_step is {state['global_step']}, and the folder is {folder.name}")
    history = state.get("log_history")
    _expect(isinstance(history, list) and all(isinstance(line, dict) for line in history), "lines of log", history)
    callbacks = state.get("stateful_callbacks") or {}
    kinds = (dict, list)
    _expect(isinstance(callbacks, dict) and all(isinstance(one, kinds) for one in callbacks.values()),
            "states of callbacks", callbacks)  # fmt: skip


def _check_data_state(state: Any, folder: Path) -> None:
    _expect(isinstance(state, dict) and isinstance(state.get("order"), dict), "an object with an order", state)
    for name in ("epoch", "step"):
        _check_count(state.get(name), name)
    _check_count(state["order"].get("step_size"), "step_size")


def _check_exposure(state: Any, folder: Path) -> None:
    _expect(isinstance(state, dict) and isinstance(state.get("sources"), dict), "an object with sources", state)
    for source, counts in state["sources"].items():
        _expect(isinstance(counts, dict), f"counts of {shorten(source)}", counts)
        for name, count in counts.items():
            _check_count(count, f"{name} of {shorten(source)}")


def _check_losses(state: Any, folder: Path) -> None:
    _expect(isinstance(state, dict), "an object", state)
    _check_number(state.get("sum"), "sum")
    _check_count(state.get("last_logged_step"), "last_logged_step")


def _check_count(value: object, name: str, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MOST:
        raise ValueError(f"{name} is {shorten(value)}, expected a whole number that is not negative")


def _check_number(value: object, name: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} is {shorten(value)}, expected a finite number")


def _expect(holds: bool, expected: str, found: object) -> None:
    if not holds:
        raise ValueError(f"expected {expected}, found {shorten(found)}")


# Files of tensors, which only the optimizer, the schedule and torch's generators know to read.


@contextmanager
def reading_state(checkpoint: str | Path, file: str) -> Iterator[None]:
    """Within it whatever a file of a checkpoint makes torch or transformers raise is one line that names the file."""
    try:
        yield
    except (AgreedError, *UNSAFE_WEIGHTS):
        raise
    except (OSError, *_MALFORMED) as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, ValueError) and "--" in str(error):  # It says itself what to do.
            raise
        logger.debug("%s cannot be read", Path(checkpoint, file), exc_info=error)
        raise AgreedError(
            f"--resume_from_checkpoint {checkpoint}: its {file} cannot be read: it is damaged, or of something else "
            f"({shorten_text(repr(error), 200)}); resume from another"
        ) from error


def check_schedule(scheduler: LRScheduler | Any, checkpoint: str) -> None:
    """A ValueError for the stored state of a schedule that is none: a step below zero, a rate that is no number."""
    stored = torch.load(Path(checkpoint, SCHEDULER_NAME), map_location="cpu", weights_only=True)
    _expect(isinstance(stored, dict), "the state of a schedule", stored)
    for name in ("last_epoch", "_step_count"):
        if name in stored:
            _check_count(stored[name], name)
    for name in ("base_lrs", "_last_lr"):
        for rate in stored.get(name, ()):
            _check_number(rate, name)
    # torch puts what it finds in the place of the attributes of that name, methods included.
    if alien := [n for n in stored if n == "optimizer" or callable(getattr(type(scheduler), str(n), None))]:
        raise ValueError(f"it has {list_names([shorten(name) for name in alien])}, which no schedule stores")


def check_moments(optimizer: torch.optim.Optimizer | Any) -> None:
    """A ValueError for an optimizer whose state or rate is NaN or infinite: the next step would spoil the weights."""
    for number, group in enumerate(optimizer.param_groups):
        _check_number(float(group["lr"]), f"lr of group {number}")
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} of a parameter of shape {tuple(value.shape)} holds NaN or infinity")
