"""What each flag of transformers' ``TrainingArguments`` does here: it works, is refused, or has no effect.

``FLAGS`` is both what ``--help``-readers find in ``docs/flags.md`` and what the arguments are checked with, so that
the two cannot disagree. Flags of the library's own are in ``arguments.py``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import transformers
from transformers.debug_utils import DebugOption
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from llava.train.optimizers import check_optimizer, check_schedule

logger = logging.getLogger(__name__)

WORKS, REFUSED, NO_EFFECT = "works", "refused", "no effect"


@dataclass(frozen=True)
class Refusal:
    """A value of a flag that is an error.

    Attributes:
        applies: whether arguments have it.
        reason: behind "--flag is VALUE", with what was expected or the way on.
        example: words of a command line that are refused for it.
    """

    applies: Callable[[Any], bool]
    reason: str
    example: str


@dataclass(frozen=True)
class Flag:
    """What a field of transformers' arguments does.

    Attributes:
        name: of the field.
        effect: ``WORKS``, ``REFUSED`` (any value but the default) or ``NO_EFFECT``.
        note: what a reader should know of it.
        refusals: values that are errors.
        since: the release of transformers that brought it, where an older one is supported too.
    """

    name: str
    effect: str
    note: str = "as in transformers"
    refusals: tuple[Refusal, ...] = ()
    since: str = ""


def _works(name: str, note: str = "as in transformers", *refusals: Refusal, since: str = "") -> Flag:
    return Flag(name, WORKS, note, refusals, since)


def _range(name: str, least: float, example: str, *, open_below: bool = False, below: float | None = None) -> Refusal:
    """Refuse numbers out of a range, NaN among them; a flag that may be left out may be None."""

    def applies(args: Any) -> bool:
        value = getattr(args, name)
        inside = value is None or (value > least if open_below else value >= least)
        return not (inside and (below is None or value is None or value < below))

    bound = f"above {least:g}" if open_below else f"at least {least:g}"
    upper = "" if below is None else f" and below {below:g}"
    return Refusal(applies, f"it must be {bound}{upper}", f"--{name} {example}")


def _refused(name: str, reason: str, example: str, applies: Callable[[Any], bool] | None = None) -> Flag:
    """A flag that may only have its default."""
    refuses = applies or (lambda args: bool(getattr(args, name)))
    return Flag(name, REFUSED, reason, (Refusal(refuses, reason, example),))


def _no_effect(*names: str, because: str) -> list[Flag]:
    return [Flag(name, NO_EFFECT, because) for name in names]


def _plain(*names: str, note: str = "as in transformers") -> list[Flag]:
    return [_works(name, note) for name in names]


def _is(name: str, *values: str) -> Callable[[Any], bool]:
    return lambda args: getattr(getattr(args, name), "value", getattr(args, name)) in values


def _never_evaluates(args: Any) -> bool:
    return bool(_is("eval_strategy", "no")(args))


def _accelerator_settings(args: Any) -> bool:
    """Whether accelerate is asked for anything but to synchronise gradients in every micro-batch."""
    asked = args.accelerator_config
    settings = dict(asked if isinstance(asked, dict) else asked.to_dict() if asked is not None else {})
    accumulation = dict(settings.pop("gradient_accumulation_kwargs", None) or {})
    accumulation.pop("sync_each_batch", None)
    usual = {"split_batches": False, "dispatch_batches": None, "even_batches": True, "use_seedable_sampler": True}
    usual |= {"non_blocking": False, "use_configured_state": False}
    return bool(accumulation) or any(value != usual.get(name, value) for name, value in settings.items())


_OWN_LOADERS = "batches are dealt to ranks and workers by this library (docs/running.md)"

_FLAGS: tuple[Flag, ...] = (
    # --- length and batches ---
    _works("output_dir", "folder of checkpoints and of the model"),
    _works(
        "per_device_train_batch_size", "samples of a rank's micro-batch", _range("per_device_train_batch_size", 1, "0")
    ),
    _works(
        "num_train_epochs", "unless `--max_steps` is given",
        Refusal(lambda args: args.max_steps < 0 and not args.num_train_epochs > 0, "it must be above 0",
                "--num_train_epochs 0"),
    ),
    _works(
        "max_steps", "-1: as many as `--num_train_epochs` asks for",
        Refusal(lambda args: args.max_steps == 0 or args.max_steps < -1,
                "it must be at least 1, or -1 to train for --num_train_epochs; --do_train false trains nothing",
                "--max_steps 0"),
    ),
    _works("gradient_accumulation_steps", "micro-batches of a step", _range("gradient_accumulation_steps", 1, "0")),
    _refused(
        "auto_find_batch_size",
        "it would change the samples of a step on the way, and so the order of the data; lower "
        "--per_device_train_batch_size and raise --gradient_accumulation_steps instead",
        "--auto_find_batch_size true",
    ),
    _works("average_tokens_across_devices", "false: each rank divides by its own tokens, and ranks count alike"),
    # --- optimizer and schedule ---
    _works("learning_rate", "of the parts without one of their own", _range("learning_rate", 0, "-1")),
    _works("lr_scheduler_type", "every schedule of transformers; its arguments are tried before the model is loaded"),
    _works("lr_scheduler_kwargs", "a JSON object; tried before the model is loaded"),
    _works(
        "warmup_steps", "steps, or below 1 a share of them; `--warmup_ratio` of older scripts is the same flag",
        Refusal(lambda args: args.warmup_steps > 1 and args.warmup_steps % 1 != 0,
                "it is a number of steps, or a share below 1", "--warmup_steps 2.5"),
    ),
    _works("optim", "see the table below"),
    _works("optim_args", "those that the optimizer reads, see the table below; others are refused"),
    _refused(
        "optim_target_modules", "only optimizers that are not available read it; see --optim",
        "--optim_target_modules all-linear",
    ),
    _works("weight_decay", "of matrices; biases, norms and other vectors have none", _range("weight_decay", 0, "-1")),
    _works("adam_beta1", "as in transformers", _range("adam_beta1", 0, "1", below=1)),
    _works("adam_beta2", "as in transformers", _range("adam_beta2", 0, "1", below=1)),
    _works("adam_epsilon", "as in transformers", _range("adam_epsilon", 0, "-1")),
    _works("max_grad_norm", "0 clips nothing", _range("max_grad_norm", 0, "-1")),
    _works(
        "label_smoothing_factor",
        "of the training loss, two-hot targets of coordinates included; the load balancing loss of experts is added "
        "as it is, and evaluations are not smoothed",
        _range("label_smoothing_factor", 0, "1", below=1),
    ),
    _works(
        "neftune_noise_alpha", "noise on token embeddings in training; visual features get none",
        _range("neftune_noise_alpha", 0, "-1"),
    ),
    # --- precision, memory, speed ---
    *_plain("bf16", "fp16", "tf32"),
    *_plain("bf16_full_eval", "fp16_full_eval", note="evaluations outside of training only, as in transformers"),
    _works("activation_checkpointing", "the newer name of `--gradient_checkpointing`", since="5.23"),
    _works("activation_checkpointing_kwargs", "a JSON object", since="5.23"),
    _works("gradient_checkpointing", "docs/running.md says what it goes together with"),
    _works("gradient_checkpointing_kwargs", "a JSON object"),
    _works(
        "torch_compile", "on one process",
        Refusal(lambda args: args.torch_compile and args.world_size > 1,
                "a compiled model takes part in no exchange between ranks of mixed modality; leave it out",
                ""),
    ),
    *_plain("torch_compile_backend", "torch_compile_mode", note="turns `--torch_compile` on"),
    _refused(
        "use_liger_kernel",
        "Liger's kernels are for transformers' own classes and would change nothing here; leave it out",
        "--use_liger_kernel true",
    ),
    _refused("liger_kernel_config", "--use_liger_kernel is not available", ""),
    _works("use_cache", "true only costs memory in training"),
    _works("torch_empty_cache_steps"),
    # --- logging ---
    *_plain("logging_strategy", "logging_first_step", "log_on_each_node", "log_level", "log_level_replica",
            "disable_tqdm", "report_to", "run_name", "project"),
    _works("logging_steps", "steps, or below 1 a share of them", _range("logging_steps", 0, "-1")),
    _works("logging_nan_inf_filter", "only with `--stop_on_bad_numbers false`, which lets such losses come so far"),
    *_plain("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", note="with `--report_to trackio`"),
    _works(
        "include_num_input_tokens_seen", "no, all or non_padding; visual tokens count",
        Refusal(lambda args: args.include_num_input_tokens_seen not in ("no", "all", "non_padding"),
                "known: no, all, non_padding", "--include_num_input_tokens_seen some"),
    ),
    # --- evaluation ---
    _works("eval_strategy", "no: once, at the end of training, where there is `--eval_data_path`"),
    _works(
        "eval_steps", "steps, or below 1 a share of them; by default `--logging_steps`",
        _range("eval_steps", 0, "-1"),
    ),
    _works("eval_delay", "as in transformers", _range("eval_delay", 0, "-1")),
    _works("per_device_eval_batch_size", "samples of a rank's batch", _range("per_device_eval_batch_size", 1, "0")),
    _works("prediction_loss_only", "no logits for `compute_metrics` and `predict` then"),
    _works("eval_on_start", "needs `--eval_data_path`"),
    _works("eval_do_concat_batches"),
    *_no_effect("eval_use_gather_object", because="rows of tensors of any number are gathered without it"),
    _works("eval_accumulation_steps", "as in transformers", _range("eval_accumulation_steps", 1, "0")),
    _works(
        "include_for_metrics", "inputs and loss (the mean loss of a sample's batch), for `compute_metrics`",
        Refusal(lambda args: not set(args.include_for_metrics) <= {"inputs", "loss"}, "known: inputs, loss",
                "--include_for_metrics labels"),
    ),
    _works("batch_eval_metrics"),
    _refused(
        "label_names", "the labels of the data are called labels; leave it out", "--label_names other",
        lambda args: args.label_names not in (None, ["labels"]),
    ),
    # --- saving ---
    _works(
        "save_strategy", "best saves where an evaluation is the best so far",
        Refusal(lambda args: _is("save_strategy", "best")(args) and _never_evaluates(args),
                "nothing would be saved, since nothing is evaluated; give --eval_strategy steps or epoch",
                "--save_strategy best --metric_for_best_model loss"),
        Refusal(lambda args: _is("save_strategy", "best")(args) and args.metric_for_best_model is None,
                "best by what? give --metric_for_best_model loss", "--save_strategy best --eval_strategy epoch"),
    ),
    _works(
        "save_steps", "steps, or below 1 a share of them",
        Refusal(lambda args: _is("save_strategy", "steps")(args) and not args.save_steps > 0,
                "it must be above 0; --save_strategy no saves the last model alone", "--save_steps 0"),
    ),
    _works("save_total_limit", "the newest and the best stay", _range("save_total_limit", 1, "0")),
    _works("save_only_model", "such checkpoints cannot be resumed"),
    _refused(
        "save_on_each_node", "checkpoints are one folder, which all ranks see (docs/running.md); leave it out",
        "--save_on_each_node true",
    ),
    _refused(
        "enable_jit_checkpoint",
        "a signal is answered with a checkpoint already (docs/running.md); leave it out",
        "--enable_jit_checkpoint true",
    ),
    *_plain("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
            "hub_revision"),
    _works(
        "load_best_model_at_end", "needs `--eval_strategy` and `--save_strategy` that fit",
        Refusal(lambda args: args.load_best_model_at_end and _never_evaluates(args),
                "nothing is evaluated, so nothing is best; give --eval_strategy",
                "--load_best_model_at_end true --save_strategy no"),
    ),
    _works(
        "metric_for_best_model", "one that evaluations give, which is checked before the first step",
        Refusal(lambda args: args.metric_for_best_model is not None and _never_evaluates(args),
                "nothing is evaluated, so nothing is best; give --eval_strategy", "--metric_for_best_model loss"),
    ),
    _works("greater_is_better"),
    # --- data ---
    _works("seed"),
    _works("data_seed", "of the order of the data; by default `--seed`"),
    _works("ignore_data_skip", "see docs/running.md"),
    _works("dataloader_drop_last", "leaves the samples of incomplete steps out of training"),
    _works("dataloader_num_workers", "as in transformers", _range("dataloader_num_workers", 0, "-1")),
    _works("dataloader_pin_memory"),
    _works(
        "dataloader_persistent_workers", "of the training data",
        Refusal(lambda args: args.dataloader_persistent_workers and args.dataloader_num_workers == 0,
                "there are no workers; give --dataloader_num_workers", "--dataloader_persistent_workers true"),
    ),
    _works(
        "dataloader_prefetch_factor", "as in transformers",
        Refusal(lambda args: args.dataloader_prefetch_factor is not None and args.dataloader_prefetch_factor < 1,
                "it must be at least 1", "--dataloader_prefetch_factor 0 --dataloader_num_workers 1"),
    ),
    _works(
        "dataloader_multiprocessing_context", "fork, spawn or forkserver",
        Refusal(lambda args: bool(args.dataloader_multiprocessing_context) and args.dataloader_num_workers == 0,
                "there are no workers; give --dataloader_num_workers", "--dataloader_multiprocessing_context spawn"),
    ),
    _refused(
        "dataloader_in_order",
        "false trains batches in the order in which workers happen to finish, which no resumed run can repeat; "
        "leave it out",
        "--dataloader_in_order false", lambda args: not args.dataloader_in_order,
    ),
    _works("train_sampling_strategy", "random, sequential, group_by_length or group_by_modality_length"),
    *_no_effect("remove_unused_columns", because="samples have no columns to remove"),
    *_no_effect("length_column_name", because="lengths are counted from the samples"),
    # --- engines and ranks ---
    _refused(
        "accelerator_config", f"{_OWN_LOADERS}; only gradient_accumulation_kwargs with sync_each_batch may be given",
        "--accelerator_config {\"split_batches\":true}", _accelerator_settings,
    ),
    _refused(
        "parallelism_config", "tensors, contexts and sequences are not split over ranks here; leave it out", "",
        lambda args: args.parallelism_config is not None,
    ),
    *_plain("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_backend"),
    _works("ddp_timeout", "seconds", _range("ddp_timeout", 0, "0", open_below=True)),
    _works("ddp_find_unused_parameters", "false by default: every trainable parameter takes part in every step"),
    _refused(
        "ddp_static_graph", "the graph of a step depends on which ranks have images or videos; leave it out",
        "--ddp_static_graph true",
    ),
    _refused("fsdp", "FSDP is not available; --deepspeed zero3 shares weights out to ranks", "--fsdp full_shard"),
    _refused("fsdp_config", "FSDP is not available; see --deepspeed", "--fsdp_config {\"version\":2}"),
    _works("deepspeed", "zero1, zero2, zero3, zero3_offload or a file of your own, without optimizer and scheduler"),
    _works("use_cpu"),
    # --- the rest ---
    _works("full_determinism", "slow, and not every operation of a GPU has a deterministic form"),
    _works(
        "debug", "a NaN or an infinity is found by `--stop_on_bad_numbers`",
        Refusal(lambda args: DebugOption.TPU_METRICS_DEBUG in args.debug, "there are no TPUs here; leave it out",
                "--debug tpu_metrics_debug"),
        Refusal(lambda args: DebugOption.UNDERFLOW_OVERFLOW in args.debug,
                "it cannot watch modules that a step leaves out; --stop_on_bad_numbers (default) finds a NaN or an "
                "infinity and keeps the step for python -m llava.train.replay, which names its first module",
                "--debug underflow_overflow"),
    ),
    _works("skip_memory_metrics", "false adds memory to the metrics, and slows down"),
    _works("restore_callback_states_from_checkpoint"),
    _works("do_train", "true (default); false evaluates alone, with `--do_eval`"),
    _works("do_eval", "by default true where there is `--eval_data_path`: an evaluation at the end, if no other"),
    _refused(
        "do_predict",
        "predictions of a data file are written by python -m llava.eval.run (docs/evaluation.md), and logits are given "
        "by trainer.predict of a program; leave it out",
        "--do_predict true",
    ),
    _works("resume_from_checkpoint", "a folder, or auto for the last whole checkpoint"),
    _works("local_rank", "accepted from launchers that give it; their environment tells ranks apart"),
)  # fmt: skip

FLAGS: dict[str, Flag] = {flag.name: flag for flag in _FLAGS}
"""What each field does, by its name."""

_CHOICES: dict[str, type[Enum]] = {
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "hub_strategy": HubStrategy,
}
_SETTINGS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
_FILES = ("accelerator_config", "fsdp_config")


def check_spelling(args: Any) -> None:
    """A ValueError that names the flag, for values that transformers could not read."""
    for name, kind in _CHOICES.items():
        _check_choice(name, [getattr(args, name)], kind)
    for name in ("fsdp", "fsdp_config"):  # which transformers announces in the environment as it reads them
        _check_refusals(args, FLAGS[name])
    debug = args.debug
    _check_choice("debug", debug.split() if isinstance(debug, str) else debug or [], DebugOption)
    for name in (*_SETTINGS, *_FILES):
        value = getattr(args, name, None)
        if isinstance(value, str):
            _check_settings(name, value)
    asked = args.accelerator_config
    if isinstance(asked, str) and asked.startswith("{"):  # transformers makes an object of it, and stumbles
        known = [field.name for field in fields(AcceleratorConfig)]
        if unknown := sorted(json.loads(asked).keys() - set(known)):
            raise ValueError(f"--accelerator_config has the unknown setting {unknown[0]!r}; known: {', '.join(known)}")


def _check_choice(name: str, values: Iterable[Any], kind: type[Enum]) -> None:
    known = [member.value for member in kind]
    for value in values:
        if getattr(value, "value", value) not in known:
            raise ValueError(f"--{name} is {value!r}; known: {', '.join(known)}")


def _check_settings(name: str, text: str) -> None:
    if name in _FILES and not text.startswith("{"):
        if not Path(text).is_file():
            raise ValueError(f"--{name} {text!r} is no file; give one, or a JSON object")
        return
    try:
        read = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} is {text!r}, expected a JSON object: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f'--{name} is {text!r}, expected a JSON object such as {{"key": 1}}')


def check_flags(args: Any) -> None:
    """Check every flag that transformers defines; one without effect that was given is said.

    Args:
        args: ``TrainingArguments`` whose values transformers has read.

    Raises:
        ValueError: a value is refused; names the flag, the value and the reason.
    """
    for flag in FLAGS.values():
        if not hasattr(args, flag.name):
            continue  # of another release of transformers
        _check_refusals(args, flag)
        if flag.effect == NO_EFFECT and _is_given(args, flag.name):
            logger.warning("--%s has no effect: %s", flag.name, flag.note)
    if args.lr_scheduler_type == SchedulerType.CONSTANT and args.warmup_steps > 0:
        logger.warning("--warmup_steps has no effect: constant has no warm-up; see --lr_scheduler_type")
    check_optimizer(getattr(args.optim, "value", args.optim), args.optim_args)
    check_schedule(args)


def _check_refusals(args: Any, flag: Flag) -> None:
    for refusal in flag.refusals:
        if refusal.applies(args):
            value = getattr(args, flag.name)
            value = value.to_dict() if hasattr(value, "to_dict") else value
            shown = value.value if isinstance(value, Enum) else repr(value)
            raise ValueError(f"--{flag.name} is {shown}; {refusal.reason}")


def _is_given(args: Any, name: str) -> bool:
    """Whether a field differs from transformers' default."""
    field = next(field for field in fields(transformers.TrainingArguments) if field.name == name)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return bool(getattr(args, name) != default)
