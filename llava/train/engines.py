"""What a run asks of the machine and of packages: precision, attention, trackers, DeepSpeed, optimizers.

All of it is checked before a model is read.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import TrainingArguments, get_scheduler

from llava.compat import linear_by_onednn, shard_on_cpu
from llava.messages import shorten, shorten_text
from llava.train.sharding_flags import check_fsdp

EXTRAS = ("tensorboard", "wandb", "trackio")
"""Trackers that an extra of this package installs."""


def check_machine(args: TrainingArguments, attention: str | None, launched: bool) -> None:
    """Check precision, attention, trackers, which are chosen here, and ``--deepspeed``, whose name becomes a file.

    Ranks on a machine that has nothing but its CPU take that.

    To be called before transformers reads them.

    Args:
        args: their values as they were given.
        attention: ``--attn_implementation``.
        launched: whether a launcher has started this process and says which rank it is.

    Raises:
        ValueError: this machine or its packages do not have it; names the flag and the way on.
    """
    _check_precision(args)
    if launched and not torch.accelerator.is_available():
        # Without it transformers would see no other ranks: each would train the whole run, all in one folder.
        args.use_cpu = True
    if attention == "flash_attention_2":
        check_flash_attention()
    if args.report_to is None:
        args.report_to = ["tensorboard"] if importlib.util.find_spec("tensorboard") is not None else ["none"]
    _check_trackers(args.report_to)
    if args.fsdp:
        check_fsdp(args, launched)
        shard_on_cpu()
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
    # fp16 needs a scaled loss, which accelerate has for GPUs alone; bf16 needs none.
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
    # Compute capability 8.0 is Ampere's, the first generation with TF32.
    if args.tf32 and (on_cpu or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8):
        raise ValueError("--tf32 needs a GPU of NVIDIA's Ampere generation or newer; leave it out")


def choose_kernels(deterministic: bool = False) -> None:
    """Keep PyTorch from kernels whose gradients are wrong and, where that is asked for, from those that vary.

    cuDNN's attention gives NaN on Hopper GPUs in half precision.

    With a mask, at lengths of 64 more than a multiple of 128, where a row has low logits: PyTorch 2.11 and later
    (github.com/pytorch/pytorch/issues/196678). A run on an H100 met it at its step 125. Another of the kernels that
    PyTorch chooses from takes its place.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not deterministic:
        return
    from llava.train.command_line import set_variables  # It knows the arguments, which know this file.

    # cuBLAS reads the first when it is first used, and transformers' flash attention the second.
    set_variables({"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"})
    torch.use_deterministic_algorithms(True)
    # It would fill what is allocated and not written yet, which nothing here reads.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


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
        # Not every integration tells whether its package is there; making its callback does.
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            package = f"'llava-babylm[{name}]'" if name in EXTRAS else name.replace("_", "-")
            raise ValueError(
                f"--report_to {name}: its package is not installed; pip install {package}, or --report_to none"
            ) from error


# DeepSpeed.

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


def check_engine(state: AcceleratorState, fsdp: object = None) -> None:
    """Refuse what ``accelerate launch`` asks for in the environment, past this library's flags.

    Args:
        state: of accelerate.
        fsdp: what ``--fsdp`` asks for.

    Raises:
        ValueError: it asks for FSDP, or for a configuration of DeepSpeed that ``check_deepspeed_config`` refuses; or
            FSDP was asked for here, and accelerate would train without it.
    """
    if getattr(state, "fsdp_plugin", None) is not None and not fsdp:
        raise ValueError("accelerate's environment asks for FSDP; give --fsdp true instead, which is checked")
    if fsdp and not state.is_fsdp2:
        raise ValueError(f"--fsdp: accelerate {accelerate.__version__} would train without it here; leave it out")
    # The configuration may also come from accelerate's own file, which no flag names.
    plugin = getattr(state, "deepspeed_plugin", None)
    if plugin is not None:
        check_deepspeed_config(plugin.deepspeed_config)


def compile_decoder(trainer: Any) -> None:
    """For ``--torch_compile``: compile the decoder, in place of accelerate's compiling all of the model.

    What is around it depends on how many images a batch has and how many tokens it predicts: compiled, that would be
    compiled anew for every number of them, until torch gives up. The decoder's shapes are a batch's rows and length,
    which torch makes symbols of when they change for the first time.
    """
    args = trainer.args
    if not args.torch_compile:
        return
    trainer.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
    trainer.model.get_model().compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def choose_products(onednn: bool) -> AbstractContextManager[object]:
    """For ``--onednn``: within it float32 products with weights run in oneDNN."""
    return linear_by_onednn() if onednn else nullcontext()


def onednn_gain(side: int = 1024) -> float:
    """How many times as fast as PyTorch's own choice oneDNN is at a product of float32 matrices, on this CPU."""
    rows, weight = torch.ones(side // 2, side), torch.ones(side, side)
    taken: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(4):  # The first of each counts for nothing: it is none of the smallest.
            for times, onednn in zip(taken, (False, True), strict=True):
                with choose_products(onednn):
                    start = time.process_time()
                    torch.nn.functional.linear(rows, weight)
                    times.append(time.process_time() - start)
    return min(taken[0]) / max(min(taken[1]), 1e-9)


# Optimizers and schedules.


@dataclass(frozen=True)
class OptimizerRule:
    """What is known of an optimizer.

    Attributes:
        package: that it needs beside torch and transformers, by its name for pip and for import.
        arguments: names that ``--optim_args`` may give it.
        refused: why it does not train here; "" for one that does.
    """

    package: tuple[str, str] | None = None
    arguments: tuple[str, ...] = ()
    refused: str = ""


_BITSANDBYTES = ("bitsandbytes", "bitsandbytes")
_NO_PICKLES = (
    "its state holds Python objects, which a checkpoint here cannot (nothing is unpickled), so no run could be resumed"
)
_IN_BACKWARD = (
    "it changes weights within the backward pass: no gradient could be summed over micro-batches, looked at for NaN or "
    "kept from unused vision modules"
)
_TWO_WEIGHTS = "it trains other weights than those to evaluate and save, and checkpoints here hold one set"
_HARDWARE = "it needs hardware that this library is not run on"
_ADEMAMIX = ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")

OPTIMIZERS: dict[str, OptimizerRule] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adafactor"), OptimizerRule()),
    "sgd": OptimizerRule(arguments=("momentum", "dampening", "nesterov")),
    "adagrad": OptimizerRule(arguments=("lr_decay", "eps")),
    "rmsprop": OptimizerRule(arguments=("momentum", "alpha", "eps", "centered")),
    **dict.fromkeys(
        (
            "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "lion_32bit", "lion_8bit",
            "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
        ),
        OptimizerRule(_BITSANDBYTES),
    ),
    **dict.fromkeys(
        ("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
        OptimizerRule(_BITSANDBYTES, _ADEMAMIX),
    ),
    "grokadamw": OptimizerRule(
        ("grokadamw", "grokadamw"), ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping")
    ),
    "stable_adamw": OptimizerRule(("torch-optimi", "optimi"), ("max_lr",)),
    **dict.fromkeys(
        (
            "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
            "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "apollo_adamw", "apollo_adamw_layerwise",
        ),
        OptimizerRule(refused=_NO_PICKLES),
    ),
    **dict.fromkeys(("lomo", "adalomo"), OptimizerRule(refused=_IN_BACKWARD)),
    **dict.fromkeys(
        ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), OptimizerRule(refused=_TWO_WEIGHTS)
    ),
    **dict.fromkeys(("adamw_torch_xla", "adamw_torch_npu_fused"), OptimizerRule(refused=_HARDWARE)),
    "adamw_anyprecision": OptimizerRule(refused="it needs torchdistx, which does not exist for this torch"),
    **dict.fromkeys(
        ("adamw_torch_4bit", "adamw_torch_8bit"),
        OptimizerRule(refused="its state is of a tensor class of torchao's own, which no checkpoint here can hold"),
    ),
}  # fmt: skip
"""What is known of each optimizer, by its name."""


def working_optimizers() -> list[str]:
    """Names of the optimizers that train here, some of them with a package of their own."""
    return [name for name, rule in OPTIMIZERS.items() if not rule.refused]


def check_optimization(args: TrainingArguments) -> None:
    """Check ``--optim`` and the schedule; a ValueError names the flag and the way on."""
    check_optimizer(getattr(args.optim, "value", args.optim), args.optim_args)
    _check_schedule(args)


def check_optimizer(name: str, arguments: str | None) -> None:
    """A ValueError for an optimizer that does not train here, a missing package, or arguments it would not read.

    Args:
        name: as ``--optim`` gives it.
        arguments: as ``--optim_args`` gives them: "key=value,key=value".
    """
    rule = OPTIMIZERS.get(name, OptimizerRule(refused="this version of the library has not tried it"))
    if rule.refused:
        raise ValueError(f"--optim {name} is not available: {rule.refused}; known: {', '.join(working_optimizers())}")
    # Looked for, not imported: some of these load CUDA's libraries as they are imported.
    if rule.package is not None and importlib.util.find_spec(rule.package[1]) is None:
        raise ValueError(f"--optim {name} needs the package {rule.package[0]}: pip install {rule.package[0]}")
    if arguments:
        _check_arguments(name, rule.arguments, arguments)


def _check_arguments(name: str, known: tuple[str, ...], given: str) -> None:
    takes = f"{name} takes {', '.join(known)}" if known else f"{name} takes none; see --adam_beta1 and --weight_decay"
    for argument in given.replace(" ", "").split(","):
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"--optim_args is {given!r}, expected key=value,key=value: {argument!r} has no value")
        if key not in known:
            raise ValueError(f"--optim_args gives {key!r}: {takes}")
        if key in ("nesterov", "centered"):
            if value.lower() not in ("true", "false"):
                raise ValueError(f"--optim_args gives {key} {value!r}; it is true or false")
            continue
        try:
            float(value)
        except ValueError as error:
            raise ValueError(f"--optim_args gives {key} {value!r}; it is a number") from error


def _check_schedule(args: TrainingArguments) -> None:
    """A ValueError where ``--lr_scheduler_kwargs`` does not fit the schedule, or its warm-up the run.

    The schedule is made and asked for rates along a run of as many steps; only for runs whose number of steps is
    not known yet (``--num_train_epochs``) it is one of 100,000.
    """
    # Wrong settings show when a schedule is made or, for some, when its function is first called, hours later.
    steps = args.max_steps if args.max_steps > 0 else 100_000
    warmup = args.get_warmup_steps(steps)
    settings: Any = args.lr_scheduler_kwargs or {}  # transformers has read the text that a command line gives.
    kind = args.lr_scheduler_type
    # Whichever optimizer trains: a schedule only reads and sets the rates of its groups.
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate or 1.0)
    try:
        schedule = get_scheduler(kind, optimizer, warmup, steps, settings)
        # Those that follow the loss (reduce_lr_on_plateau, greedy) have no function of the step to try.
        for function in getattr(schedule, "lr_lambdas", ()):
            for step in (0, warmup, (warmup + steps) // 2, steps):
                float(function(step))
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(
            f"--lr_scheduler_type {getattr(kind, 'value', kind)} cannot be made with --lr_scheduler_kwargs {settings}: "
            f"{error}"
        ) from error
