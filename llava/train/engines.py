"""What a run asks of the machine and of optional packages: found before a model is read."""

from __future__ import annotations

import difflib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from llava.messages import shorten, shorten_text

_FOLDER = Path(__file__).parent / "deepspeed"

SHIPPED = tuple(sorted(file.stem for file in _FOLDER.glob("*.json")))
"""Names that ``--deepspeed`` takes in place of a file."""

EXTRAS = ("tensorboard", "wandb", "trackio")
"""Trackers that an extra of this package installs."""

_LEAST = {
    "num_frames": 1,
    "video_fps": 0,
    "frames_upbound": 0,
    "model_max_length": 1,
    "seed": 0,
    "data_seed": 0,
}
"""The least that a flag may be."""


def check_counts(args: Any) -> None:
    """A ValueError for a flag of a group of arguments that is below what it must be at least."""
    for name, least in _LEAST.items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    for name in ("seed", "data_seed"):
        if (getattr(args, name, None) or 0) >= 2**32:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be below 2**32")


def find_deepspeed_config(given: Any) -> Any:
    """What ``--deepspeed`` means: one of ``SHIPPED`` by its name, or else the file or the settings that it is.

    Raises:
        ValueError: it is none of these.
    """
    if given in SHIPPED:
        return str(_FOLDER / f"{given}.json")
    if not isinstance(given, str):
        return given
    if not given.lstrip().startswith("{") and not Path(given).is_file():
        raise ValueError(f"--deepspeed {shorten(given)} is no file; give one, or one of {', '.join(SHIPPED)}")
    try:
        settings = json.loads(given if given.lstrip().startswith("{") else Path(given).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--deepspeed {shorten(given)} is not JSON: {shorten_text(str(error), 200)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--deepspeed {shorten(given)}: expected an object of settings, found {shorten(settings)}")
    return given


def check_launcher(launched: bool) -> None:
    """A ValueError where ``--deepspeed`` runs without a launcher (it would look for MPI), or without its package."""
    if not launched and importlib.util.find_spec("mpi4py") is None:
        raise ValueError(
            "--deepspeed needs a launcher, also for one process: torchrun --nproc_per_node N -m llava.train.train ..., "
            "or leave --deepspeed out"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("--deepspeed needs the deepspeed package: pip install 'llava-babylm[deepspeed]'")


def check_precision(args: Any) -> None:
    """A ValueError for a precision that cannot be had; ``args`` before transformers has looked at them."""
    if args.fp16 and args.bf16:
        raise ValueError("--fp16 and --bf16 are both true; choose one (--bf16 where the GPU has it)")
    if args.fp16_full_eval and args.bf16_full_eval:
        raise ValueError("--fp16_full_eval and --bf16_full_eval are both true; choose one")
    on_cpu = args.use_cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    half = next((name for name in ("fp16", "fp16_full_eval") if getattr(args, name)), None)
    if half is not None and on_cpu:
        raise ValueError(
            f"--{half} needs a GPU, and this run is on the CPU; leave it out, or use --bf16 --use_cpu true"
        )
    bf16 = next((name for name in ("bf16", "bf16_full_eval") if getattr(args, name)), None)
    if bf16 is not None and on_cpu and not args.use_cpu:
        raise ValueError(f"--{bf16}: no GPU can be seen; leave it out, or add --use_cpu true to use it on the CPU")
    if bf16 is not None and not on_cpu and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ValueError(f"--{bf16}: this GPU has no bfloat16; use --fp16")
    if args.tf32 and (on_cpu or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8):
        raise ValueError("--tf32 needs a GPU of NVIDIA's Ampere generation or newer; leave it out")


def check_trackers(report_to: Any) -> None:
    """A ValueError for a tracker of ``--report_to`` that does not exist, or whose package is missing."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    for name in names:
        if not isinstance(name, str) or name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"did you mean {near[0]}? Known" if near else "known"
            raise ValueError(f"--report_to is {shorten(name)}; {hint}: none, all, {', '.join(INTEGRATION_TO_CALLBACK)}")
        if name in get_available_reporting_integrations():
            continue
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            package = f"'llava-babylm[{name}]'" if name in EXTRAS else name.replace("_", "-")
            raise ValueError(
                f"--report_to {name}: its package is not installed; pip install {package}, or --report_to none"
            ) from error


_OURS = {
    "optimizer": "the optimizer is --optim, over groups with a learning rate for each part (--mm_projector_lr), weight "
    "decay for matrices alone, and vision modules that rest where a step has no media",
    "scheduler": "the schedule is --lr_scheduler_type, for every part's learning rate, which the log and the report of "
    "the parts give",
    "tensor_parallel": "weights are not split within layers",
}
"""Sections that a configuration of one's own may not have, and why."""


def check_deepspeed_config(given: Any) -> None:
    """Refuse sections that would take the place of this library's optimizer and schedule behind its back.

    Args:
        given: a file, a JSON object or settings, as ``find_deepspeed_config`` returns it.

    Raises:
        ValueError: it is no JSON object, or has such a section.
    """
    settings, name = given, "--deepspeed"
    if isinstance(given, (str, Path)):
        text = str(given)
        is_json = text.lstrip().startswith("{")
        name = "--deepspeed" if is_json else f"--deepspeed {text}"
        try:
            settings = json.loads(text if is_json else Path(text).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{name}: expected a JSON object, found {type(settings).__name__}")
    for section, reason in _OURS.items():
        if section in settings:
            raise ValueError(f"{name} has a section {section!r}: {reason}; remove the section")


def check_engine(state: Any) -> None:
    """Refuse what ``accelerate launch`` asks for in the environment, past this library's flags.

    Args:
        state: of accelerate.

    Raises:
        ValueError: it asks for FSDP, or for a configuration of DeepSpeed that ``check_deepspeed_config`` refuses.
    """
    if getattr(state, "fsdp_plugin", None) is not None:
        raise ValueError("accelerate's environment asks for FSDP, which is not available; see --deepspeed zero3")
    plugin = getattr(state, "deepspeed_plugin", None)
    if plugin is not None:
        check_deepspeed_config(plugin.deepspeed_config)
