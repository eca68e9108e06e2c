"""What a run asks of the machine and of optional packages: found before a model is read."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import TrainingArguments

from llava.messages import shorten, shorten_text

EXTRAS = ("tensorboard", "wandb", "trackio")
"""Trackers that an extra of this package installs."""


def check_machine(args: TrainingArguments, attention: str | None, launched: bool) -> None:
    """Check precision, attention, trackers and ``--deepspeed``, whose shipped name becomes a file.

    To be called before transformers reads them.

    Args:
        args: their values as they were given.
        attention: ``--attn_implementation``.
        launched: whether a launcher has started this process and says which rank it is.

    Raises:
        ValueError: this machine or its packages do not have it; names the flag and the way on.
    """
    _check_precision(args)
    if attention == "flash_attention_2":
        check_flash_attention()
    _check_trackers(args.report_to)
    if args.deepspeed:
        args.deepspeed = find_deepspeed_config(args.deepspeed)
        check_deepspeed_config(args.deepspeed)
        _check_launcher(launched)


def _check_precision(args: TrainingArguments) -> None:
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


def check_flash_attention() -> None:
    """A ValueError that says how to get flash attention, where it is missing."""
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "--attn_implementation flash_attention_2 needs the flash-attn package and a CUDA GPU: "
            "pip install 'llava-babylm[flash-attn]', or use sdpa, which needs nothing"
        )


def _check_trackers(report_to: str | Sequence[str] | None) -> None:
    """A ValueError for a tracker of ``--report_to`` that does not exist, or whose package is missing."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    for name in names:
        if name in ("none", "all"):
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


# --- DeepSpeed ---

SHIPPED = tuple(sorted(file.stem for file in (Path(__file__).parent / "deepspeed").glob("*.json")))
"""Names that ``--deepspeed`` takes in place of a file."""

_OURS = {
    "optimizer": "the optimizer is --optim, over groups with a learning rate for each part (--mm_projector_lr), weight "
    "decay for matrices alone, and vision modules that rest where a step has no media",
    "scheduler": "the schedule is --lr_scheduler_type, for every part's learning rate, which the log and the report of "
    "the parts give",
    "tensor_parallel": "weights are not split within layers",
}
"""Sections that a configuration of one's own may not have, and why."""

DeepSpeedConfig = str | dict[str, Any]
"""A file, a JSON object as text, or settings."""


def find_deepspeed_config(given: DeepSpeedConfig) -> DeepSpeedConfig:
    """What ``--deepspeed`` means: the file of one of ``SHIPPED``, or else the file or the settings that it is."""
    if given in SHIPPED:
        return str(Path(__file__).parent / "deepspeed" / f"{given}.json")
    if isinstance(given, str) and not given.lstrip().startswith("{") and not Path(given).is_file():
        raise ValueError(f"--deepspeed {shorten(given)} is no file; give one, or one of {', '.join(SHIPPED)}")
    return given


def check_deepspeed_config(given: DeepSpeedConfig) -> None:
    """Refuse sections that would take the place of this library's optimizer and schedule behind its back.

    Raises:
        ValueError: it is no JSON object, or has such a section.
    """
    settings: object = given
    name = "--deepspeed"
    if isinstance(given, str):
        is_json = given.lstrip().startswith("{")
        name += "" if is_json else f" {shorten_text(given, 200)}"
        try:
            settings = json.loads(given if is_json else Path(given).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not JSON: {shorten_text(str(error), 200)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{name}: expected a JSON object, found {type(settings).__name__}")
    for section, reason in _OURS.items():
        if section in settings:
            raise ValueError(f"{name} has a section {section!r}: {reason}; remove the section")


def _check_launcher(launched: bool) -> None:
    """Without a launcher DeepSpeed would look for MPI."""
    if not launched and importlib.util.find_spec("mpi4py") is None:
        raise ValueError(
            "--deepspeed needs a launcher, also for one process: torchrun --nproc_per_node N -m llava.train.train ..., "
            "or leave --deepspeed out"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("--deepspeed needs the deepspeed package: pip install 'llava-babylm[deepspeed]'")


def check_engine(state: AcceleratorState) -> None:
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
