"""What each flag of transformers' ``TrainingArguments`` does here: it works, is refused, or has no effect.

``TOPICS`` is what ``docs/flags.md`` prints, what ``--help`` sorts the flags by, and what they are checked with, so that
these cannot disagree. Flags of the library's own are in ``arguments.py``. Loads neither torch nor transformers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.command import read_json_object
from llava.train.sharding_flags import GIVEN as SHARDING
from llava.train.sharding_flags import find_unknown_setting

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from transformers.trainer_pt_utils import AcceleratorConfig

logger = logging.getLogger(__name__)

WORKS, REFUSED, NO_EFFECT = "works", "refused", "no effect"
AS_IN_TRANSFORMERS = "as in transformers"
"""The note of a flag of which there is nothing to say."""
Applies = Callable[[Any, Any], object]


@dataclass(frozen=True)
class Refusal:
    """A value of a flag that is an error.

    Attributes:
        applies: whether a value is refused, from the value and all arguments.
        reason: behind "--flag is VALUE", with what was expected or the way on.
        example: words behind the flag that are refused for it; "" where a command line cannot say it.
    """

    applies: Applies
    reason: str
    example: str


@dataclass(frozen=True)
class Flag:
    """What a field of transformers' arguments does.

    Attributes:
        note: what a reader should know of it.
        effect: ``WORKS``, ``REFUSED`` (any value but the default) or ``NO_EFFECT``.
        refusals: values that are errors.
        since: the release of transformers that brought it, where an older one is supported too.
    """

    note: str
    effect: str = WORKS
    refusals: tuple[Refusal, ...] = ()
    since: str = ""


def _works(note: str = AS_IN_TRANSFORMERS, *refusals: Refusal, since: str = "") -> Flag:
    return Flag(note, WORKS, refusals, since)


def _refused(reason: str, example: str, applies: Applies = lambda value, args: value) -> Flag:
    """A flag that may only have its default."""
    return Flag(reason, REFUSED, (Refusal(applies, reason, example),))


def _all(*names: str, note: str = AS_IN_TRANSFORMERS) -> dict[str, Flag]:
    return dict.fromkeys(names, Flag(note))


def _at_least(least: float, below: float | None = None) -> Refusal:
    """Refuse numbers below ``least`` or not below ``below``, NaN among them; a flag may be left out, as None."""

    def applies(value: float | None, args: object) -> bool:
        # Not ``value < least``: NaN compares false both ways, and must be refused.
        return value is not None and not (value >= least and (below is None or value < below))

    upper = "" if below is None else f" and below {below:g}"
    return Refusal(
        applies, f"it must be at least {least:g}{upper}", f"{least - 1:g}" if below is None else f"{below:g}"
    )


def _above_0(applies: Applies = lambda value, args: not value > 0, way_on: str = "") -> Refusal:
    return Refusal(applies, f"it must be above 0{way_on}", "0")


def _asks_of_accelerator(asked: AcceleratorConfig | dict[str, Any] | None, args: object) -> bool:
    """Whether accelerate is asked for anything but to synchronise gradients in every micro-batch."""
    settings = dict(asked if isinstance(asked, dict) else asked.to_dict() if asked is not None else {})
    accumulation = dict(settings.pop("gradient_accumulation_kwargs", None) or {})
    accumulation.pop("sync_each_batch", None)
    # accelerate's defaults. The first four deal batches to ranks, which data_order.py does instead.
    usual = {"split_batches": False, "dispatch_batches": None, "even_batches": True, "use_seedable_sampler": True}
    usual |= {"non_blocking": False, "use_configured_state": False}
    return bool(accumulation) or any(value != usual.get(name, value) for name, value in settings.items())


_NO_WORKERS = "there are no workers; give --dataloader_num_workers"
_NO_EVALUATION = "nothing is evaluated, so nothing is best; give --eval_strategy"

# Enums of transformers are texts too, so that "no" compares to --eval_strategy without importing them.
TOPICS: dict[str, dict[str, Flag]] = {
    "steps and order": {
        "output_dir": _works("folder of checkpoints and of the model"),
        "per_device_train_batch_size": _works("samples of a rank's micro-batch", _at_least(1)),
        "num_train_epochs": _works(
            "unless `--max_steps` is given", _above_0(lambda value, args: args.max_steps < 0 and not value > 0)
        ),
        "max_steps": _works(
            "-1: as many as `--num_train_epochs` asks for",
            Refusal(lambda value, args: value == 0 or value < -1,
                    "it must be at least 1, or -1 to train for --num_train_epochs; --do_train false trains nothing",
                    "0"),
        ),
        "gradient_accumulation_steps": _works("micro-batches of a step", _at_least(1)),
        "auto_find_batch_size": _refused(
            "it would change the samples of a step on the way, and so the order of the data; lower "
            "--per_device_train_batch_size and raise --gradient_accumulation_steps instead", "true"),
        "average_tokens_across_devices": _works("false: each rank divides by its own tokens, and ranks count alike"),
    },
    "optimizer and schedule": {
        "learning_rate": _works("of the parts without one of their own", _at_least(0)),
        "lr_scheduler_type": _works(
            "every schedule of transformers; its arguments are tried before the model is loaded"),
        "lr_scheduler_kwargs": _works("a JSON object; tried before the model is loaded"),
        "warmup_steps": _works(
            "steps, or below 1 a share of them; `--warmup_ratio` of older scripts is the same flag",
            Refusal(lambda value, args: value > 1 and value % 1 != 0, "it is a number of steps, or a share below 1",
                    "2.5"),
        ),
        "optim": _works("`adamw_torch_fused` unless another is named; docs/flags.md has a table of all"),
        "optim_args": _works("those that the optimizer reads (docs/flags.md); others are refused"),
        "optim_target_modules": _refused(
            "only optimizers that are not available read it; see --optim", "all-linear"),
        "weight_decay": _works("of matrices; biases, norms and other vectors have none", _at_least(0)),
        "adam_beta1": _works("as in transformers", _at_least(0, below=1)),
        "adam_beta2": _works("as in transformers", _at_least(0, below=1)),
        "adam_epsilon": _works("as in transformers", _at_least(0)),
        "max_grad_norm": _works("0 clips nothing", _at_least(0)),
        "label_smoothing_factor": _works(
            "of the training loss, two-hot targets of coordinates included; the load balancing loss of experts is "
            "added as it is, and evaluations are not smoothed", _at_least(0, below=1)),
        "neftune_noise_alpha": _works(
            "noise on token embeddings in training; visual features get none", _at_least(0)),
    },
    "precision, memory, speed": {
        **_all("bf16", "fp16", "tf32"),
        **_all("bf16_full_eval", "fp16_full_eval", note="evaluations outside of training only, as in transformers"),
        "activation_checkpointing": _works("the newer name of `--gradient_checkpointing`", since="5.23"),
        "activation_checkpointing_kwargs": _works("a JSON object", since="5.23"),
        "gradient_checkpointing": _works("docs/running.md says what it goes together with"),
        "gradient_checkpointing_kwargs": _works("a JSON object"),
        "torch_compile": _works(
            "of the decoder, on one process; media and loss, whose shapes change with every batch, stay as they are",
            Refusal(lambda value, args: value and args.world_size > 1,
                    "a compiled model takes part in no exchange between ranks of mixed modality; leave it out", ""),
        ),
        **_all("torch_compile_backend", "torch_compile_mode", note="turns `--torch_compile` on"),
        "use_liger_kernel": _refused(
            "Liger's kernels are for transformers' own classes and would change nothing here; leave it out", "true"),
        "liger_kernel_config": _refused("--use_liger_kernel is not available", ""),
        "use_cache": _works("true only costs memory in training"),
        **_all("torch_empty_cache_steps"),
    },
    "logging": {
        **_all("logging_strategy", "logging_first_step", "log_on_each_node", "log_level", "log_level_replica",
               "disable_tqdm", "run_name", "project"),
        "report_to": _works("by default tensorboard where it is installed, else none"),
        "logging_steps": _works("steps, or below 1 a share of them", _at_least(0)),
        "logging_nan_inf_filter": _works(
            "only with `--stop_on_bad_numbers false`, which lets such losses come so far"),
        **_all("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", note="with `--report_to trackio`"),
        "include_num_input_tokens_seen": _works(
            "no, all or non_padding; visual tokens count",
            Refusal(lambda value, args: value not in ("no", "all", "non_padding"), "known: no, all, non_padding",
                    "some"),
        ),
    },
    "evaluation": {
        "eval_strategy": _works("no: once, at the end of training, where there is `--eval_data_path`"),
        "eval_steps": _works("steps, or below 1 a share of them; by default `--logging_steps`", _at_least(0)),
        "eval_delay": _works("as in transformers", _at_least(0)),
        "per_device_eval_batch_size": _works("samples of a rank's batch", _at_least(1)),
        "prediction_loss_only": _works("no logits for `compute_metrics` and `predict` then"),
        "eval_on_start": _works("needs `--eval_data_path`"),
        **_all("eval_do_concat_batches"),
        "eval_use_gather_object": Flag("rows of tensors of any number are gathered without it", NO_EFFECT),
        "eval_accumulation_steps": _works("as in transformers", _at_least(1)),
        "include_for_metrics": _works(
            "inputs and loss (the mean loss of a sample's batch), for `compute_metrics`",
            Refusal(lambda value, args: not set(value) <= {"inputs", "loss"}, "known: inputs, loss", "labels"),
        ),
        **_all("batch_eval_metrics"),
        "label_names": _refused("the labels of the data are called labels; leave it out", "other",
                                lambda value, args: value not in (None, ["labels"])),
    },
    "saving and resuming": {
        "save_strategy": _works(
            "best saves where an evaluation is the best so far",
            Refusal(lambda value, args: value == "best" and args.eval_strategy == "no",
                    "nothing would be saved, since nothing is evaluated; give --eval_strategy steps or epoch",
                    "best --metric_for_best_model loss"),
            Refusal(lambda value, args: value == "best" and args.metric_for_best_model is None,
                    "best by what? give --metric_for_best_model loss", "best --eval_strategy epoch"),
        ),
        "save_steps": _works(
            "steps, or below 1 a share of them",
            _above_0(lambda value, args: args.save_strategy == "steps" and not value > 0,
                     "; --save_strategy no saves the last model alone"),
        ),
        "save_total_limit": _works("the newest and the best stay", _at_least(1)),
        "save_only_model": _works("such checkpoints cannot be resumed"),
        "save_on_each_node": _refused(
            "checkpoints are one folder, which all ranks see (docs/running.md); leave it out", "true"),
        "enable_jit_checkpoint": _refused(
            "a signal is answered with a checkpoint already (docs/running.md); leave it out", "true"),
        "push_to_hub": _works("model, tokenizer, card and scores; docs/running.md says what is not sent"),
        "hub_token": _works("by default HF_TOKEN, or that of `hf auth login`; it is written to no file"),
        "hub_private_repo": _works("of a repository that is not there yet"),
        "hub_model_id": _works("OWNER/NAME; by default the name of `--output_dir`"),
        "hub_strategy": _works(
            "every_save sends each checkpoint's model, checkpoint and all_checkpoints all of its files too, end the "
            "last model alone"),
        "hub_always_push": _works("also while an earlier checkpoint is on its way"),
        "hub_revision": _works("a branch, which is made where it is not there"),
        "load_best_model_at_end": _works(
            "needs `--eval_strategy` and `--save_strategy` that fit",
            Refusal(lambda value, args: value and args.eval_strategy == "no", _NO_EVALUATION,
                    "true --save_strategy no"),
        ),
        "metric_for_best_model": _works(
            "one that evaluations give, which is checked before the first step",
            Refusal(lambda value, args: value is not None and args.eval_strategy == "no", _NO_EVALUATION, "loss"),
        ),
        **_all("greater_is_better"),
    },
    "loading of data": {
        **_all("seed"),
        "data_seed": _works("of the order of the data; by default `--seed`"),
        "ignore_data_skip": _works("see docs/running.md"),
        "dataloader_drop_last": _works("leaves the samples of incomplete steps out of training"),
        "dataloader_num_workers": _works("as in transformers", _at_least(0)),
        **_all("dataloader_pin_memory"),
        "dataloader_persistent_workers": _works("of the training data, and by default true"),
        "dataloader_prefetch_factor": _works(
            "as in transformers",
            Refusal(lambda value, args: value is not None and value < 1, "it must be at least 1",
                    "0 --dataloader_num_workers 1"),
        ),
        "dataloader_multiprocessing_context": _works(
            "fork, spawn or forkserver",
            Refusal(lambda value, args: value and args.dataloader_num_workers == 0, _NO_WORKERS, "spawn"),
        ),
        "dataloader_in_order": _refused(
            "false trains batches in the order in which workers happen to finish, which no resumed run can repeat; "
            "leave it out", "false", lambda value, args: not value),
        "train_sampling_strategy": _works("random, sequential, group_by_length or group_by_modality_length"),
        "remove_unused_columns": Flag("samples have no columns to remove", NO_EFFECT),
        "length_column_name": Flag("lengths are counted from the samples", NO_EFFECT),
    },
    "engines and ranks": {
        "accelerator_config": _refused(
            "batches are dealt to ranks and workers by this library (docs/running.md); only "
            "gradient_accumulation_kwargs with sync_each_batch may be given",
            '{"split_batches":true}', _asks_of_accelerator),
        "parallelism_config": _refused(
            "tensors, contexts and sequences are not split over ranks here; leave it out", "",
            lambda value, args: value is not None),
        **_all("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_backend"),
        "ddp_timeout": _works("seconds (default: 600 more than `--hang_timeout`, and at least 1800)", _above_0()),
        "ddp_find_unused_parameters": _works("false by default: every trainable parameter takes part in every step"),
        "ddp_static_graph": _refused(
            "the graph of a step depends on which ranks have images or videos; leave it out", "true"),
        "fsdp": _works(
            "true: weights, gradients and optimizer shared out to ranks (FSDP2); checkpoints are those of DDP "
            "(docs/reliability.md, Engines)",
            Refusal(lambda value, args: bool(value) and value not in SHARDING,
                    "known: true (or full_shard, its older name); other ways to share out have not been tried",
                    "shard_grad_op"),
        ),
        "fsdp_config": _works(
            "a JSON object with version (2), reshard_after_forward and transformer_layer_cls_to_wrap, which is by "
            "default the model's own",
            Refusal(lambda value, args: value and not args.fsdp, "it was given without --fsdp; add --fsdp true",
                    '{"version":2}'),
            Refusal(lambda value, args: find_unknown_setting(value),
                    "of it version (2 alone), reshard_after_forward and transformer_layer_cls_to_wrap may be given",
                    '{"version":1} --fsdp true'),
        ),
        "deepspeed": _works(
            "zero1, zero2, zero3, zero3_offload or a file of your own, without optimizer and scheduler"),
        **_all("use_cpu"),
    },
    "everything else": {
        "full_determinism": _works("slow, and not every operation of a GPU has a deterministic form"),
        "debug": _works(
            "a NaN or an infinity is found by `--stop_on_bad_numbers`",
            Refusal(lambda value, args: "tpu_metrics_debug" in value, "there are no TPUs here; leave it out",
                    "tpu_metrics_debug"),
            Refusal(lambda value, args: "underflow_overflow" in value,
                    "it cannot watch modules that a step leaves out; --stop_on_bad_numbers (default) finds a NaN or an "
                    "infinity and keeps the step for python -m llava.train.replay, which names its first module",
                    "underflow_overflow"),
        ),
        "skip_memory_metrics": _works("false adds memory to the metrics, and slows down"),
        **_all("restore_callback_states_from_checkpoint"),
        "do_train": _works("true (default); false evaluates alone, with `--do_eval`"),
        "do_eval": _works("by default true where there is `--eval_data_path`: an evaluation at the end, if no other"),
        "do_predict": _refused(
            "predictions of a data file are written by python -m llava.eval.run (docs/evaluation.md), and logits are "
            "given by trainer.predict of a program; leave it out", "true"),
        "resume_from_checkpoint": _works("a folder, or auto for the last whole checkpoint"),
        "local_rank": _works("accepted from launchers that give it; their environment tells ranks apart"),
    },
}  # fmt: skip
"""What each field does, by topic and name."""
FLAGS: dict[str, Flag] = {name: flag for topic in TOPICS.values() for name, flag in topic.items()}

_SETTINGS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
_FILES = ("accelerator_config", "fsdp_config")


def check_spelling(args: TrainingArguments) -> None:
    """A ValueError that names the flag, for values that transformers could not read."""
    # In here, since --help reads this module's tables without transformers.
    from transformers.debug_utils import DebugOption
    from transformers.trainer_pt_utils import AcceleratorConfig
    from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    choices: dict[str, type[Enum]] = {
        "lr_scheduler_type": SchedulerType,
        "optim": OptimizerNames,
        "eval_strategy": IntervalStrategy,
        "logging_strategy": IntervalStrategy,
        "save_strategy": SaveStrategy,
        "hub_strategy": HubStrategy,
    }
    for name, kind in choices.items():
        _check_choice(name, [getattr(args, name)], kind)
    # Refused before all others: transformers announces FSDP in the environment as it reads these.
    for name in ("fsdp", "fsdp_config"):
        _check_refusals(args, name)
    debug = args.debug
    _check_choice("debug", debug.split() if isinstance(debug, str) else debug or [], DebugOption)
    for name in (*_SETTINGS, *_FILES):
        value = getattr(args, name, None)
        if isinstance(value, str):
            _check_settings(name, value)
    asked = args.accelerator_config
    if isinstance(asked, str) and asked.startswith("{"):  # transformers makes an object of it, and fails
        known = [field.name for field in fields(AcceleratorConfig)]
        if unknown := sorted(json.loads(asked).keys() - set(known)):
            raise ValueError(f"--accelerator_config has the unknown setting {unknown[0]!r}; known: {', '.join(known)}")


def _check_choice(name: str, values: Iterable[object], kind: type[Enum]) -> None:
    known = [member.value for member in kind]
    for value in values:
        if getattr(value, "value", value) not in known:
            raise ValueError(f"--{name} is {value!r}; known: {', '.join(known)}")


def _check_settings(name: str, text: str) -> None:
    # transformers takes a path here as well as JSON; of the other settings it takes JSON alone.
    if name in _FILES and not text.startswith("{"):
        if not Path(text).is_file():
            raise ValueError(f"--{name} {text!r} is no file; give one, or a JSON object")
        return
    read_json_object(text, f"--{name}")


def check_flags(args: TrainingArguments) -> None:
    """Check every flag that transformers defines; one without effect that was given is said.

    Args:
        args: whose values transformers has read.

    Raises:
        ValueError: a value is refused; names the flag, the value and the reason.
    """
    defaults = {field.name: field.default for field in fields(args) if field.default is not MISSING}
    for name, flag in FLAGS.items():
        if not hasattr(args, name):
            continue  # of another release of transformers
        _check_refusals(args, name)
        if flag.effect == NO_EFFECT and getattr(args, name) != defaults[name]:
            logger.warning("--%s has no effect: %s", name, flag.note)
    if args.lr_scheduler_type == "constant" and args.warmup_steps > 0:
        logger.warning("--warmup_steps has no effect: constant has no warm-up; see --lr_scheduler_type")


def _check_refusals(args: TrainingArguments, name: str) -> None:
    value = getattr(args, name)
    for refusal in FLAGS[name].refusals:
        if refusal.applies(value, args):
            shown = value.to_dict() if hasattr(value, "to_dict") else value
            raise ValueError(f"--{name} is {shown.value if isinstance(shown, Enum) else repr(shown)}; {refusal.reason}")
