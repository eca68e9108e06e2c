"""The parts of a model: which of them train, at what rate, by which optimizer, and the table that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers.activations import NewGELUActivation

from llava.model.coordinates import COORDINATES, CoordinateTables
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loading import LoadedModel
from llava.model.lora import describe_adapters, has_adapters, is_adapter_parameter, set_up_adapters
from llava.model.quantization import count_weights
from llava.model.visual import vision_module_of
from llava.train.arguments import COORDINATES_PART, PARTS, ModelArguments, TrainingArguments

_MODULE_PARTS = {
    "vision_tower": "mm_vision_tower",
    "mm_projector": "mm_mlp_adapter",
    "image_newline": "mm_mlp_adapter",
    "vision_resampler": "mm_vision_resampler",
    COORDINATES: COORDINATES_PART,
}


def part_of(parameter_name: str) -> str:
    """The part that a parameter belongs to: what is in none of the others is the language model."""
    # By whole components of the name, not by substrings: a backbone's layer may be called vision_tower_something.
    for component in parameter_name.split("."):
        if component in _MODULE_PARTS:
            return _MODULE_PARTS[component]
    return "mm_language_model"


def set_up_parts(loaded: LoadedModel, model_args: ModelArguments, training_args: TrainingArguments) -> None:
    """Make a model ready to train: its adapters, which parts of it learn, and its experts in balance.

    Raises:
        ValueError: flags do not fit the model, each other, or the settings of adapters that it was loaded with.
    """
    # Adapters come first: what learns is decided by the names of the parameters, and theirs must be there.
    if training_args.lora_enable:
        if "mm_language_model" not in model_args.tunable_parts:
            raise ValueError(
                "--lora_enable adapts the language model, but --mm_tunable_parts is "
                f"{','.join(model_args.tunable_parts)}; add mm_language_model, or leave --lora_enable out"
            )
        if loaded.transfer is not None:
            raise ValueError(
                "--lora_enable stores adapters and where their base model lies, but with --init_from_backbone that "
                "model lies nowhere; leave one of the two out"
            )
        source = training_args.lora_weight_path or model_args.model_name_or_path
        asked = {"r": training_args.lora_r, "alpha": training_args.lora_alpha, "dropout": training_args.lora_dropout}
        set_up_adapters(loaded.model, source, asked)
    half = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None
    if training_args.bf16_weights:
        hold_in(loaded.model, torch.bfloat16)
    if training_args.fused_gelu:
        fuse_gelu(loaded.model)
    set_trainable_parts(loaded.model, model_args.tunable_parts, model_args.freeze_embeddings, half)
    balance_experts(loaded.model, training_args.router_aux_loss_coef)


def set_trainable_parts(
    model: LlavaMetaForCausalLM,
    tunable_parts: Sequence[str],
    freeze_embeddings: bool = False,
    half: torch.dtype | None = None,
) -> None:
    """Train the named parts and freeze the others.

    Args:
        model: a language model with head.
        tunable_parts: names of ``PARTS``, and ``COORDINATES_PART``. The language model includes embeddings,
            head and the rows of new tokens; where a model has LoRA adapters, these alone stand for it.
        freeze_embeddings: keeps embeddings and head of the language model as they are.
        half: what a run in mixed precision computes in: a frozen tower is held in it, since nothing updates it, and
            stored in it by a checkpoint that holds its weights.

    A trained vision tower is no longer its source's: its weights join the checkpoints.
    """
    tower = model.get_vision_tower()
    adapted = {"mm_language_model"} if has_adapters(model) else set()
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad = part in tunable_parts and (part not in adapted or is_adapter_parameter(name))
    if freeze_embeddings:
        # Of GPT-2 and other models with tied weights the two are one parameter.
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(False)
    if tower is not None and "mm_vision_tower" in tunable_parts:
        # What encode never uses (a mask token, a pooling head) gets no gradient, which DDP takes for an error.
        tower.freeze_unused()
        model.keep_trained_tower()
    if half is not None and tower is not None and not tower.trainable:
        tower.hold_in(half)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"--mm_tunable_parts {','.join(tunable_parts)} trains nothing: this model has only "
            f"{', '.join(sorted({part_of(name) for name, _ in model.named_parameters()}))}"
        )


def hold_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Hold the parameters of a module in a type; its buffers, such as the frequencies of rotary positions, stay."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def unfused_gelus(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The activations of a model that compute GELU's approximation by tanh step by step: their parents, and names."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, NewGELUActivation)
    ]


def fuse_gelu(model: nn.Module) -> None:
    """Compute GELU's approximation by tanh in one kernel: the same function, with other last bits.

    Raises:
        ValueError: the model has none to fuse.
    """
    found = unfused_gelus(model)
    if not found:
        raise ValueError("--fused_gelu: no activation of this model is gelu_new, so it changes nothing; leave it out")
    for parent, name in found:
        setattr(parent, name, nn.GELU(approximate="tanh"))


def balance_experts(model: LlavaMetaForCausalLM, weight: float | None) -> None:
    """Let a mixture of experts train with its load balancing loss; without it, few experts take all tokens.

    Args:
        model: one without experts is left as it is.
        weight: of the loss; 0 leaves it out, None takes the checkpoint's.
    """
    own = getattr(model.config, "router_aux_loss_coef", None)
    if own is None:
        if weight is not None:
            raise ValueError(f"--router_aux_loss_coef is {weight}, but {model.config.model_type} has no experts")
        return
    model.config.router_aux_loss_coef = own if weight is None else weight
    # Without the routers' logits no backbone computes that loss.
    model.config.output_router_logits = model.config.router_aux_loss_coef > 0


def parameter_groups(
    model: nn.Module, learning_rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters, by vision module and by whether they decay.

    Matrices decay; biases, norms and other vectors do not. A group's entries say its ``part`` and its
    ``vision_module``, None for the language model.

    Args:
        model: its ``requires_grad`` flags are set.
        learning_rates: by part.
        weight_decay: of the matrices.
    """
    groups: dict[tuple[str, str | None, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # By module too: a group whose module saw no media in a step sits that step out (model/grad_sync.py).
            key = (part_of(name), vision_module_of(name), parameter.ndim >= 2)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rates[part],
            "weight_decay": weight_decay if decays else 0.0,
            "part": part,
            "vision_module": module,
        }
        for (part, module, decays), parameters in groups.items()
    ]


def build_optimizer(
    model: nn.Module,
    learning_rates: Mapping[str, float],
    weight_decay: float,
    optimizer_class: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """An optimizer over the groups of ``parameter_groups``; class and options are transformers' for ``--optim``."""
    optimizer = optimizer_class(parameter_groups(model, learning_rates, weight_decay), **options)
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


def put_in_force(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, settings: Sequence[dict[str, Any]]) -> None:
    """Give an optimizer that was read from a checkpoint the settings of this run's flags.

    Args:
        optimizer: whose groups hold the settings of the run that wrote the checkpoint.
        scheduler: its schedule, at the checkpoint's step.
        settings: of each group, as they were before the checkpoint was read.
    """
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        # lr is the rate of the step, which follows below from the base rate.
        group.update({name: value for name, value in own.items() if name != "lr"})
    if not hasattr(scheduler, "lr_lambdas"):
        return  # It sets the rate from what it has seen, not from the step.
    # The rate of a step is the base rate times a function of the step: a new --learning_rate counts at once.
    scheduler.base_lrs = [own["initial_lr"] for own in settings]
    scheduler._last_lr = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def count_parts(model: nn.Module) -> list[tuple[str, int, int]]:
    """Each part of a model that is there: its name, its parameters, and how many of them train."""
    total: dict[str, int] = {}
    trainable: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        # numel() of a matrix in 4 bits counts bytes, of two weights each.
        total[part] = total.get(part, 0) + count_weights(parameter)
        trainable[part] = trainable.get(part, 0) + parameter.numel() * parameter.requires_grad  # True counts as 1
    return [(part, total[part], trainable[part]) for part in (*PARTS, COORDINATES_PART) if part in total]


def parts_table(model: nn.Module, learning_rates: Mapping[str, float]) -> str:
    """One line a part: its parameters, how many of them train, at what learning rate; and what LoRA freezes."""
    parts = count_parts(model)
    lines = [f"{'part':<22}{'parameters':>14}{'trainable':>14}  learning rate"]
    for part, size, trainable in parts:
        rate = f"{learning_rates[part]:g}" if trainable else "frozen"
        lines.append(f"{part:<22}{size:>14,}{trainable:>14,}  {rate}")
    lines.append(f"{'all':<22}{sum(part[1] for part in parts):>14,}{sum(part[2] for part in parts):>14,}")
    if has_adapters(model):
        lines.append(describe_adapters(model))
    return "\n".join(lines)
