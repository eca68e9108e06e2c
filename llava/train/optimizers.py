"""The optimizers that ``--optim`` names: which of them train here, and what an argument of theirs may be."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from llava.model.coordinates import CoordinateTables
from llava.train.parts import parameter_groups


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
    steps = args.max_steps if args.max_steps > 0 else 100_000
    warmup = args.get_warmup_steps(steps)
    settings: Any = args.lr_scheduler_kwargs or {}  # transformers has read the text that a command line gives.
    kind = args.lr_scheduler_type
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate or 1.0)
    try:
        schedule: Any = get_scheduler(kind, optimizer, warmup, steps, settings)
        if kind not in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            for function in schedule.lr_lambdas:
                for step in (0, warmup, (warmup + steps) // 2, steps):
                    float(function(step))
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(
            f"--lr_scheduler_type {getattr(kind, 'value', kind)} cannot be made with --lr_scheduler_kwargs {settings}: "
            f"{error}"
        ) from error


def build_optimizer(
    model: nn.Module, args: Any, optimizer_class: Any, options: dict[str, Any]
) -> torch.optim.Optimizer:
    """An optimizer over the groups of ``parameter_groups``.

    Args:
        model: its ``requires_grad`` flags are set.
        args: ``TrainingArguments``.
        optimizer_class, options: as transformers chooses them for ``--optim``.
    """
    groups = parameter_groups(model, args.part_learning_rates(), args.weight_decay)
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **options)
    if optimizer_class.__module__.startswith("bitsandbytes") and options.get("optim_bits") == 8:
        keep_embeddings_whole(model)
    return optimizer


def keep_embeddings_whole(model: nn.Module) -> None:
    """Let 8-bit optimizers hold the state of embeddings, tables of coordinates among them, in 32 bits.

    Most of an embedding's rows have no gradient in a step, and 8 bits have too few steps between theirs and the
    others'; transformers does so too.
    """
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, (nn.Embedding, CoordinateTables)):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    manager.register_module_override(module, name, {"optim_bits": 32})


def put_in_force(optimizer: Any, scheduler: Any, wanted: Sequence[dict[str, Any]]) -> None:
    """Give an optimizer that was read from a checkpoint the settings of this run's flags.

    Args:
        optimizer: whose groups hold the settings of the run that wrote the checkpoint.
        scheduler: its schedule, at the checkpoint's step.
        wanted: each group's settings, as they were before the checkpoint was read.
    """
    for group, own in zip(optimizer.param_groups, wanted, strict=True):
        group.update({name: value for name, value in own.items() if name != "lr"})
    if not hasattr(scheduler, "lr_lambdas"):
        return  # It sets the rate from what it has seen, not from the step.
    scheduler.base_lrs = [own["initial_lr"] for own in wanted]
    scheduler._last_lr = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
