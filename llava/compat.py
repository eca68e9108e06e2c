"""Every touch of what transformers, accelerate, peft and Jinja keep to themselves, or name anew in each release.

Each entry says what is touched and why. The tests ran with transformers 5.17, 5.23 and 5.24 and with peft 0.21. A new
release is tried with ``make test-newest`` (see ``constraints-newest.txt``); what breaks is mended here.
"""

from __future__ import annotations

import logging
import platform
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import Cache, PretrainedConfig, PreTrainedModel, Trainer

LOWEST_PEFT = "0.21"
"""The oldest peft that the tests ran with; adapters on an older one are refused."""


def cache_name() -> str:
    """What the installed transformers calls a decoder's cache: ``cache``, or ``past_key_values`` before 5.24.

    Both an argument of ``forward`` and a field of its output. 5.24 still takes the old name, with a warning.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    names = {field.name for field in fields(BaseModelOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"


def choose_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that a caller gave, by the new name or the old one; two of them are a ValueError."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument, and two caches were given; give one")
    return past_key_values if cache is None else cache


@cache
def linear_by_onednn() -> AbstractContextManager[object]:
    """Within it, float32 products with weights, forward and backward, run in oneDNN on an x86 CPU.

    PyTorch gives them to MKL, which on AMD's processors reaches half the rate of oneDNN. The operator that its compiler
    uses for oneDNN has no public name. Other dtypes, devices and builds stay as they are. Backward passes are those of
    what ran within it.
    """
    import torch
    from torch import Tensor
    from torch.nn.functional import linear
    from torch.overrides import TorchFunctionMode

    operator: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    machine = platform.machine() in ("x86_64", "AMD64")
    is_there = operator is not None and torch.backends.mkldnn.is_available() and machine

    def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., inputs), (outputs, inputs) -> (..., outputs)"""
        return operator(rows, weight, bias, "none", [], "none")

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
            # What a gradient needs and no more: a frozen layer keeps no rows, and they may be changed behind it.
            needs_rows, needs_weight = ctx.needs_input_grad[1], ctx.needs_input_grad[0]
            ctx.save_for_backward(rows if needs_rows else None, weight if needs_weight else None)
            ctx.is_transposed = is_transposed
            return multiply(rows, weight.t() if is_transposed else weight, bias)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            rows, weight = ctx.saved_tensors
            # The operator has no derivative of its own: a gradient that is itself differentiated goes around it.
            times = linear if torch.is_grad_enabled() else multiply
            needed, of_rows, of_weight, of_bias = ctx.needs_input_grad, None, None, None
            if needed[0]:
                of_rows = times(gradient, weight if ctx.is_transposed else weight.t())
            gradient = gradient.flatten(0, -2)  # (rows, outputs)
            if needed[1]:
                rows = rows.flatten(0, -2)  # (rows, inputs)
                pair = (rows.t(), gradient.t()) if ctx.is_transposed else (gradient.t(), rows.t())
                of_weight = times(*pair)
            if needed[2]:
                of_bias = gradient.sum(0)
            return of_rows, of_weight, of_bias, None

    class LinearByOneDnn(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if is_there and not kwargs:
                given: tuple[Any, Any, Any] = (*args, None, None, None)[:3]
                if func is linear and _is_plain_product(*given, False):
                    return Linear.apply(*given, False) if torch.is_grad_enabled() else multiply(*given)
                # transformers' Conv1D, GPT-2's layers, whose weights are (inputs, outputs).
                if func is torch.addmm and len(args) == 3 and _is_plain_product(args[1], args[2], args[0], True):
                    return Linear.apply(args[1], args[2], args[0], True)
            return func(*args, **(kwargs or {}))

    return LinearByOneDnn()


def _is_plain_product(rows: Any, weight: Any, bias: Any, is_transposed: bool) -> bool:
    """Whether oneDNN's operator does with these what PyTorch does."""
    import torch

    given = [rows, weight] if bias is None else [rows, weight, bias]
    if torch.is_autocast_enabled("cpu") or type(weight) not in (torch.Tensor, torch.nn.Parameter):
        return False  # Autocast rounds to half precision; quantised and sharded weights are of types of their own.
    if not all(isinstance(each, torch.Tensor) and each.dtype == torch.float32 for each in given):
        return False
    if not all(each.device.type == "cpu" and each.layout == torch.strided for each in given):
        return False
    if weight.ndim != 2 or rows.ndim < 2 or rows.numel() == 0 or weight.numel() == 0:
        return False
    inputs, outputs = weight.shape if is_transposed else weight.shape[::-1]
    # The operator reads a bias as if its numbers lay side by side.
    is_bias_plain = bias is None or (bias.shape == (outputs,) and bias.is_contiguous())
    return rows.shape[-1] == inputs and (rows.ndim == 2 or not is_transposed) and is_bias_plain


def has_adapters(model: nn.Module) -> bool:
    """Whether a model of transformers holds peft's adapters.

    ``_hf_peft_config_loaded`` is what transformers itself goes by, in its trainer too; there is no public name.
    """
    return getattr(model, "_hf_peft_config_loaded", False)


def inject_adapters(model: Any, config: PeftConfig, name: str) -> None:
    """Put adapters into a model and make them the active ones, as ``model.add_adapter`` of transformers does.

    Not through that method: transformers 5.24 has it refuse any peft before 0.22, though it calls what 0.21
    has as well. What is needed is public in peft; of transformers only its mark on the model.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    inject_adapter_in_model(config, model, name)
    model._hf_peft_config_loaded = True
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(name)


def forget_adapters(model: Any) -> None:
    """Take the mark of adapters off a model that has no such layer any more (see ``inject_adapters``)."""
    del model.peft_config
    model._hf_peft_config_loaded = False


class OwnGenerationDefaults:
    """Mixin for a configuration whose class attributes are named as generation parameters; put it first.

    transformers refuses to store such values in a ``config.json``, and takes class attributes for them.
    """

    def _get_generation_parameters(self) -> dict[str, Any]:
        """Those that were set on this very configuration, which are refused as ever."""
        found = super()._get_generation_parameters()  # type: ignore[misc]
        return {name: value for name, value in found.items() if name in vars(self)}


class OwnAttention:
    """Mixin for a model that runs on attention functions of its own; put it first.

    transformers checks the name of an attention function, and fills in the one it prefers, in a private method; there
    is no public way to let a model have another set of them.
    """

    attention_prefix: ClassVar[str]
    """Stands before the name of each of transformers' functions that this model has its own one for."""

    def check_attention(self, name: str | None) -> None:
        """A ValueError for a function of transformers that this model has none of its own for."""

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        name = None if attn_implementation is None else attn_implementation.removeprefix(self.attention_prefix)
        self.check_attention(name)
        plain = super()._check_and_adjust_attn_implementation(name, *args, **kwargs)  # type: ignore[misc]
        return self.attention_prefix + plain


def attention_of(config: PretrainedConfig) -> str | None:
    """The name of the attention function that a model runs on."""
    return config._attn_implementation


def set_attention(config: PretrainedConfig, name: str) -> None:
    """Let a model run on another attention function that is registered.

    The public ``set_attn_implementation`` refuses names that transformers does not know for the model's class.
    """
    config._attn_implementation = name


WITHOUT_SDPA = {"_supports_sdpa": False}
"""Attributes of a class whose scores have a soft cap, Gemma 2's: sdpa has none, which 5.17 passes over in silence."""


def supports_sdpa(model_class: type[PreTrainedModel]) -> bool:
    """Whether a model may run on torch's ``scaled_dot_product_attention``."""
    return model_class._supports_sdpa


class ModulesFilledLater:
    """Mixin for a model that fills some of its modules itself, right after ``from_pretrained``; put it first.

    transformers gives random values to whatever a checkpoint lacks, unless ``_is_hf_initialized`` is set on it. It has
    to be set at this very place: earlier the parameters are replaced once more, later they are filled.
    """

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        model: Any = self
        for module in model.modules():
            if getattr(module, "filled_later", False):
                for parameter in module.parameters():
                    parameter._is_hf_initialized = True
        super()._initialize_missing_keys(*args, **kwargs)  # type: ignore[misc]


def mark_unfilled(model: Any) -> None:
    """Let ``post_init`` fill a model's own parameters once more, though transformers has marked them as filled."""
    model._is_hf_initialized = False


def keep_out_of_checkpoints(model: PreTrainedModel, names: set[str], pattern: str, out: bool) -> None:
    """Say for one model, and not its class, that checkpoints leave tensors out, or (``out`` is False) that they do not.

    The attributes are documented as a class's own; transformers reads them from the model.

    Args:
        names: of the tensors in the state dict.
        pattern: a regular expression that all of them match, and no others.
    """
    saved, loaded = set(model._keys_to_ignore_on_save or ()), set(model._keys_to_ignore_on_load_missing or ())
    model._keys_to_ignore_on_save = saved | names if out else saved - names
    model._keys_to_ignore_on_load_missing = loaded | {pattern} if out else loaded - {pattern}


def kept_out_of_checkpoints(model: PreTrainedModel) -> set[str]:
    """Names of the tensors that checkpoints of a model leave out (see ``keep_out_of_checkpoints``)."""
    return set(model._keys_to_ignore_on_save or ())


def inherit_conversions(plain: str, own: str) -> None:
    """Read and write weights of a model as transformers does for the plain one.

    Some checkpoints are stored under other names than the model's own (every expert of a mixture by itself, for one).
    transformers finds the translation by model type or by class name, and would not find it under ours; the module
    that keeps them is not part of its documented interface.

    Args:
        plain, own: two model types, or the names of two classes.
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    conversions = get_checkpoint_conversion_mapping(plain)
    if conversions is not None:
        register_checkpoint_conversion_mapping(own, conversions, overwrite=True)


def add_to_auto_configs(tables: ModuleType, model_type: str, config: str, module: ModuleType) -> None:
    """Let ``AutoConfig`` find a model type.

    ``AutoConfig.register`` wants the class itself, and so the backbone's file loaded. What it looks a name up in,
    ``CONFIG_MAPPING_NAMES`` and the mapping's ``_modules``, takes a name and a module.

    Args:
        tables: ``transformers.models.auto.configuration_auto``.
        model_type, config: of the model, and the name of its configuration class.
        module: has that name as an attribute, or makes it when it is asked for.
    """
    tables.CONFIG_MAPPING_NAMES[model_type] = config
    tables.CONFIG_MAPPING._modules[tables.model_type_to_module_name(model_type)] = module


def add_to_auto_models(
    tables: ModuleType, model_type: str, config: str, classes: dict[str, str], module: ModuleType
) -> None:
    """Let the ``AutoModel`` classes find a model type; as for ``AutoConfig``.

    Args:
        tables: ``transformers.models.auto.modeling_auto``.
        model_type, config, module: as there.
        classes: by the name of a mapping, the name of the class it leads to.
    """
    for mapping_name, class_name in classes.items():
        mapping = getattr(tables, mapping_name)
        getattr(tables, f"{mapping_name}_NAMES")[model_type] = class_name
        _lead_to_module(mapping, model_type, config, module)


def add_to_auto_tokenizers(tables: ModuleType, model_type: str, config: str, plain_type: str) -> None:
    """Let ``AutoTokenizer`` take for a model type the class that it takes for another one of transformers' own."""
    name = tables.TOKENIZER_MAPPING_NAMES.get(plain_type)
    if name is not None:
        tables.TOKENIZER_MAPPING_NAMES[model_type] = name
        _lead_to_module(tables.TOKENIZER_MAPPING, model_type, config, sys.modules["transformers"])


def _lead_to_module(mapping: Any, model_type: str, config: str, module: ModuleType) -> None:
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    mapping._reverse_config_mapping[config] = model_type
    mapping._modules[model_type_to_module_name(model_type)] = module


_UNASKED = {
    # bitsandbytes looks for a kernel of its own on the hub, transformers imports it through peft.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit",),
    "DeepSpeed": ("Setting accelerator to", "Setting ds_accelerator to"),
}
"""What packages log when transformers imports them, whether or not they are to be used: their loggers' names."""


def hush_imports() -> None:
    """Drop the lines of ``_UNASKED``; all else that these packages log is heard."""

    def is_asked_for(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(_UNASKED[record.name])

    for name in _UNASKED:
        logging.getLogger(name).addFilter(is_asked_for)


# transformers' trainer and DeepSpeed's engine: parts of a checkpoint, and numbers of the loop, have no public names.


def save_training_state(
    trainer: Trainer, folder: str, failure: AbstractContextManager[object], states: AbstractContextManager[object]
) -> tuple[float, int]:
    """Write what transformers puts into a checkpoint beside the model: optimizer, schedule, loss scale, random states.

    Its ``_save_checkpoint`` writes these among other files, and stops at the first that cannot be written, on which
    the other ranks would wait for ever.

    Args:
        trainer: on every rank.
        folder: of the checkpoint.
        failure: keeps an error of this rank.
        states: within it the optimizer gives its states as they are to be written.

    Returns:
        What ``restore_loop`` needs beside: the sum of losses that no line of the log has yet, and the last line's step.
    """
    from llava.compat_deepspeed import forgiving_engine

    # optimizer.pt and scheduler.pt, or DeepSpeed's folder global_stepN; then scaler.pt (fp16) and rng_state*.pth.
    with failure, states, forgiving_engine(trainer, failure):
        trainer._save_optimizer_and_scheduler(folder)
    with failure:
        trainer._save_scaler(folder)
        trainer._save_rng_state(folder)
    return trainer._tr_loss.item(), trainer._globalstep_last_logged


def restore_loop(
    trainer: Trainer,
    checkpoint: str,
    loss_meter: tuple[float, int, float] | None,
    seed: Callable[[], None] | None = None,
) -> None:
    """Let the loop, before its first step, stand where a checkpoint was written.

    Args:
        trainer: has begun to train. It reads the random states once more, when it has fetched the first batches.
        checkpoint: has the random states.
        loss_meter: the sum of losses since the last line of the log, the step of that line, and the sum of all losses
            logged, for the mean at the end; None leaves them at zero.
        seed: begins the random numbers where the checkpoint's states are those of other ranks.
    """
    vars(trainer).pop("_load_rng_state", None)  # A trainer may train twice.
    if seed is not None:
        trainer._load_rng_state = lambda checkpoint: seed()  # type: ignore[method-assign]
    # rng_state.pth, or rng_state_N.pth of rank N; one that is not there is passed over.
    trainer._load_rng_state(checkpoint)
    if loss_meter is not None:
        loss, trainer._globalstep_last_logged, trainer._total_loss_scalar = loss_meter
        # In place: it is a tensor on the device, to which the loop adds.
        trainer._tr_loss.fill_(loss)


def evaluate_as_due(trainer: Trainer) -> None:
    """Evaluate as after a step that an evaluation was due, with all that follows: the best metric, and its save."""
    trainer.control.should_evaluate = True
    epoch = trainer.state.epoch or 0
    assert trainer.model is not None
    trainer._maybe_log_save_evaluate(trainer._tr_loss, None, trainer.model, None, epoch, None, time.time())


def namespace_values(value: object) -> Iterable[object]:
    """What a ``namespace()`` of a chat template holds, the only values that its loops can change; nothing of others.

    Jinja (3.1) has no public way to them.
    """
    held = getattr(value, "_Namespace__attrs", None)
    return held.values() if isinstance(held, dict) else ()


@cache
def shard_on_cpu() -> None:
    """From here on accelerate takes FSDP for ranks on CPUs too.

    It does so for GPUs and other accelerators alone, and would train ranks on CPUs with DDP without a word (1.15).
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    make = AcceleratorState.__init__

    def make_sharding(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            # Every further AcceleratorState takes it from there.
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = make_sharding  # type: ignore[method-assign]
