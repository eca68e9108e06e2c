"""What makes a run this run and no other: written into its checkpoints, compared when one is gone on with.

A run is its model, its tokenizer, its data and the settings that its numbers come from. What only says where,
how fast and how often (folders, workers, engines, logging, saving, evaluating) may change, and so may its length,
upwards; everything else that differs makes another run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llava.data.files import DataEntry, find_entries
from llava.io import hash_file, hash_json
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loading import find_weights
from llava.model.lora import adapter_settings, has_adapters, is_adapter_folder
from llava.model.vocabulary import hash_tokenizer
from llava.stored_forms import TRAINING_STATE
from llava.token_layout import NO_RESAMPLER
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.checkpoint import RUN_IDENTITY, list_checkpoints
from llava.train.data_order import DATA_STATE, TrainingData, describe_changes
from llava.train.distributed import AgreedError, broadcast_from_rank0, is_first_rank
from llava.train.elastic import say_other_split
from llava.train.parts import part_of

logger = logging.getLogger(__name__)

_FREE_PREFIXES = (
    "logging_", "log_", "save_", "eval_", "hub_", "push_", "ddp_", "fsdp", "torch_compile", "deepspeed", "include_",
    "trackio_", "gradient_checkpointing", "activation_checkpointing", "per_device_", "dataloader_", "max_image_",
    "max_video_", "max_bad_", "check_", "throughput_", "score_", "card_", "sample_", "stage_",
)  # fmt: skip
_FREE = {
    "gradient_accumulation_steps", "report_to", "run_name", "project", "disable_tqdm", "prediction_loss_only",
    "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "use_cache", "torch_empty_cache_steps",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "full_determinism", "use_cpu",
    "accelerator_config", "parallelism_config", "length_column_name", "debug", "skip_memory_metrics", "do_train",
    "do_eval", "do_predict", "attn_implementation", "use_liger_kernel", "liger_kernel_config", "auto_find_batch_size",
    "enable_jit_checkpoint", "stop_on_bad_numbers", "restore_callback_states_from_checkpoint", "plugins",
    "save_vision_tower", "data_cache_dir", "allow_duplicate_ids", "allow_outside_paths", "image_folder",
    "video_folder", "on_bad_sample", "decode_timeout", "max_bad_share", "output_dir", "world_size", "versions",
    "chat_template_path", "milestones", "milestone_optimizer", "feature_cache", "feature_cache_fill",
    "feature_cache_strict", "peak_flops", "fused_gelu", "onednn", "num_samples", "run_report",
    "hang_timeout", "verify_steps", "deterministic",
}  # fmt: skip
"""Flags that may change: with the same data in the same order they leave what is learned as it is, or nearly so."""

_LEFT_OUT = {
    "local_rank", "hub_token", "resume_from_checkpoint", "resume_changed", "overwrite_output_dir", "ignore_data_skip",
    "label_names", "remove_unused_columns", "max_steps", "num_train_epochs", "word_limit", "config", "logging_dir",
    # The order of the data tells these itself, see data_order.py.
    "train_sampling_strategy", "data_seed", "dataloader_drop_last", "dataloader_in_order", "packing",
    "max_tokens_per_batch",
    # Taken from the model instead, which knows what they became.
    "lora_r", "lora_alpha", "lora_dropout", "model_max_length", "mm_projector_lr", "mm_vision_resampler_lr",
    "mm_vision_tower_lr", "mm_coordinates_lr", "learning_rate", "router_aux_loss_coef", "mm_tunable_parts",
    "num_temporal_tokens", "num_spatial_tokens", "grounding", "model_name_or_path", "vision_tower",
    "mm_projector_args", "mm_resampler_args",
    "pretrain_mm_mlp_adapter", "lora_weight_path", "data_path", "plain_lm", "version", "feature_cache_storage",
}  # fmt: skip
_NOT_SETTINGS = {"mm_vision_tower", "mm_vision_tower_hash", "mm_vision_config", "mm_token_ids", "mm_save_vision_tower"}
_RATES = ("mm_projector_lr", "mm_vision_resampler_lr", "mm_vision_tower_lr", "mm_coordinates_lr")

OPTIMIZER_SETTINGS = {"optim", "optim_args", "optim_target_modules", "mm_tunable_parts", "freeze_embeddings",
                      "freeze_coordinates", "lora_enable", "trainable_parameters", "lora_r"}  # fmt: skip
"""A change of these makes another optimizer, to which the state of the one before means nothing."""

_LABELS = {
    "tokenizer": "the tokenizer",
    "model_base": "the base model of the adapters (--model_name_or_path)",
    "backbone_model": "--backbone_model",
    "trainable_parameters": "trainable parameters (--mm_tunable_parts, or the model's size)",
    "world_size": "the number of ranks",
    "versions": "versions",
    "model_type": "the kind of model (--model_name_or_path, --variant)",
    "data_content": "the content of --data_path",
    "feature_storage": "what --feature_cache makes of features",
    "score_items": "the items that it is scored on (--score_data)",
}
_READERS = 8
_CONFIG_NOISE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}


Setting = None | bool | int | float | str | list["Setting"] | dict[str, "Setting"]
"""A setting as JSON holds it."""


@dataclass(frozen=True)
class Differences:
    """How a run differs from the one that wrote a checkpoint: each as one phrase, with flag, old and new value.

    Attributes:
        wrong: make another run of it.
        allowed: do not.
        names: of the settings in ``wrong``.
        rescheduled: whether the number of steps, and with it the schedule, is another one.
    """

    wrong: list[str]
    allowed: list[str]
    names: frozenset[str]
    rescheduled: bool = False


@dataclass(frozen=True)
class RunIdentity:
    """What a run is.

    Attributes:
        fixed: settings that stay, by name of their flag. One of content is ``{"source", "sha256"}``.
        free: settings that may change.
        length: total steps, the flags that they come from, and what the order of the data is made from.
    """

    fixed: dict[str, Any]
    free: dict[str, Any]
    length: dict[str, Any]

    @staticmethod
    def read(folder: Path) -> RunIdentity | None:
        """What a folder says; None where it says nothing.

        Raises:
            ValueError: its file is damaged.
        """
        path = folder / RUN_IDENTITY
        if not path.is_file():
            return None
        content = TRAINING_STATE.read(path)
        try:
            return RunIdentity(**{field.name: dict(content[field.name]) for field in fields(RunIdentity)})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def compare(self, before: RunIdentity, data_may_change: bool = False) -> Differences:
        """How this run differs from ``before``.

        Args:
            before: the run that wrote the checkpoint.
            data_may_change: whether a flag has already said that the data are others.
        """
        # As both look once they were in a file, where tuples are lists.
        mine, theirs = (json.loads(json.dumps(vars(run))) for run in (self, before))
        wrong, allowed, names = [], [], set()
        # A setting that only one of the two has is of another version of this library, and tells nothing.
        for name in sorted(theirs["fixed"].keys() & mine["fixed"].keys()):
            old, new = theirs["fixed"][name], mine["fixed"][name]
            if name in _RATES and all(run["fixed"][name] == run["fixed"]["learning_rate"] for run in (mine, theirs)):
                continue  # It was not given, and so is said of --learning_rate already.
            if _key(old) != _key(new):
                if name == "data_content" and data_may_change:
                    allowed.append(_describe(name, old, new))
                else:
                    wrong.append(_describe(name, old, new))
                    names.add(name)
            elif old != new and name != "tokenizer":  # It comes with the model.
                allowed.append(_describe(name, old["source"], new["source"]) + " (its content is the same)")
        for name in sorted(theirs["free"].keys() & mine["free"].keys()):
            if theirs["free"][name] != mine["free"][name]:
                allowed.append(_describe(name, theirs["free"][name], mine["free"][name]))
        old, new = theirs["length"], mine["length"]
        # Versions before --word_limit say nothing of it.
        differing = [flag for flag in ("max_steps", "num_train_epochs", "word_limit") if old.get(flag) != new.get(flag)]
        flags = " or ".join(f"--{flag}" for flag in differing)
        # Where neither flag differs, the data or the size of a step do, of which the order of the data speaks.
        if old["steps"] != new["steps"] and flags:
            phrase = f"steps in all ({flags}): {old['steps']} before, {new['steps']} now"
            if new["steps"] > old["steps"]:
                allowed.append(f"{phrase}, along whose schedule the learning rate goes on")
            else:
                wrong.append(phrase)
                names.add("steps")
        return Differences(wrong, allowed, frozenset(names), old["steps"] != new["steps"] or "word_limit" in differing)


def check_resumed(
    identity: RunIdentity | None, checkpoint: Path, args: TrainingArguments, data: TrainingData, uses_deepspeed: bool
) -> Differences:
    """See that a checkpoint is this run's, and stand in the data where it stood.

    What differs is an error, or with ``--resume_changed`` a warning.

    Args:
        identity: of this run; None where a program does not say.
        checkpoint: to go on from.
        args: of this run.
        data: whose position is set to the checkpoint's.
        uses_deepspeed: whether this run does.

    Raises:
        AgreedError: it is another run's, or another engine's.
    """
    # DeepSpeed keeps optimizer and weights in a folder global_stepN, transformers the optimizer in optimizer.pt.
    if any(checkpoint.glob("global_step*")) != uses_deepspeed:
        it = "was written with DeepSpeed" if not uses_deepspeed else "was written without DeepSpeed"
        raise AgreedError(
            f"--resume_from_checkpoint {checkpoint} {it}, whose optimizer this run cannot read; give --deepspeed "
            "as it was then"
        )
    found = Differences([], [], frozenset())
    if identity is not None:
        found = broadcast_from_rank0(lambda: _compare_with(checkpoint, identity, args.ignore_data_skip))
    wrong = [] if args.resume_changed else found.wrong
    if found.wrong and not wrong and is_first_rank():
        logger.warning("going on from %s as another run (--resume_changed): %s", checkpoint, "; ".join(found.wrong))
    try:
        if (path := checkpoint / DATA_STATE).is_file():
            data.load_state(json.loads(path.read_text(encoding="utf-8")))
        else:
            logger.warning("%s has no %s: nothing tells whether the data are still its own", checkpoint, DATA_STATE)
    except ValueError as error:
        if not wrong:
            raise AgreedError(str(error)) from error
        wrong = [*wrong, str(error)]
    if wrong:
        raise AgreedError(explain_other_run(checkpoint, wrong))
    if found.allowed and is_first_rank():
        logger.info("going on from %s with changes: %s", checkpoint, "; ".join(found.allowed))
    say_other_split(checkpoint, args, {} if identity is None else identity.fixed)
    return found


def is_finished(mine: RunIdentity, folder: Path, args: TrainingArguments) -> bool:
    """Whether a folder holds the final model of this very run, and no checkpoint of its end.

    Raises:
        ValueError: the run that is finished is another one, or was shorter and left nothing to go on from.
    """
    before = RunIdentity.read(folder)
    # From a checkpoint of the last step the run is resumed as from any other, and finds no step left.
    if before is None or (folder / f"checkpoint-{before.length['steps']}").is_dir():
        return False
    found = mine.compare(before, args.ignore_data_skip)
    wrong = found.wrong + describe_changes(before.length["order"], mine.length["order"])
    if wrong and not args.resume_changed:
        raise ValueError(explain_other_run(folder, wrong))
    if not wrong and not found.rescheduled:
        return True
    if not list_checkpoints(folder):
        raise ValueError(
            f"the run in --output_dir {folder} is finished and left no checkpoint to go on from (--save_strategy); "
            f"give another --output_dir, and --model_name_or_path {folder} to begin from its model"
        )
    return False


def _compare_with(checkpoint: Path, mine: RunIdentity, data_may_change: bool) -> Differences:
    before = RunIdentity.read(checkpoint)
    if before is None:
        note = f"it has no {RUN_IDENTITY} (an earlier version wrote it), so nothing tells whether it is of this run"
        return Differences([note], [], frozenset(), True)
    return mine.compare(before, data_may_change)


def explain_other_run(folder: Path, wrong: Sequence[str]) -> str:
    """The error where a run is to go on with another one's checkpoint or model."""
    return (
        f"--resume_from_checkpoint: {folder} was written by another run: {'; '.join(wrong)}. Give the values that it "
        "was trained with, another --output_dir for a run of its own, or --resume_changed true to go on with "
        "the new values"
    )


def build_identity(
    model: LlavaMetaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    sources: Mapping[str, str | None],
    feature_storage: str | None = None,
) -> RunIdentity:
    """The identity of a run whose model is ready; ``length`` is still empty.

    Args:
        model: as it is about to train, parts and adapters set.
        max_length: most tokens of a sample.
        sources: folders, files or hub names that weights come from, by flag.
        feature_storage: the form that features of the tower are trained on in, where it is not exact.
    """
    fixed, free = dict[str, Any](), dict[str, Any]()
    for group in (model_args, data_args, training_args):
        # A new flag that is in neither list stays fixed: it is safer to ask about one too many.
        for field in fields(group):  # type: ignore[arg-type]
            if field.name not in _LEFT_OUT:
                place = free if field.name in _FREE or field.name.startswith(_FREE_PREFIXES) else fixed
                place[field.name] = _plain(getattr(group, field.name))
    if fixed["mm_resampler_type"] == NO_RESAMPLER:  # In this file null has always said so.
        fixed["mm_resampler_type"] = None
    rates = vars(training_args)
    fixed |= _model_settings(model)
    fixed |= {
        "feature_storage": feature_storage,
        "model_max_length": max_length,
        "version": data_args.format_name,
        "tokenizer": {"source": sources.get("model_name_or_path"), "sha256": hash_tokenizer(tokenizer)},
        "learning_rate": training_args.learning_rate,
        **{name: training_args.learning_rate if rates[name] is None else rates[name] for name in _RATES},
    }
    fixed |= hash_sources(sources)
    entries = find_entries(data_args.data_path)
    fixed["data_content"] = {"source": _plain(data_args.data_path), "sha256": hash_data(entries)}
    free["world_size"] = training_args.world_size
    # Other releases may round otherwise: a line in the log, not another run.
    free["versions"] = {name: version(name) for name in ("torch", "transformers")}
    return RunIdentity(fixed, free, {})


def _model_settings(model: LlavaMetaForCausalLM) -> dict[str, Any]:
    """Settings that the model knows better than the flags, which may have been left to their defaults."""
    settings: dict[str, Any] = {"model_type": model.config.model_type, "vision_tower": None}
    trained = [(part_of(name), p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    settings["mm_tunable_parts"] = ",".join(sorted({part for part, _ in trained}))
    settings["trainable_parameters"] = sum(number for _, number in trained)
    if model.vision is not None:
        entries = {name: value for name, value in model.vision.to_model_config().items() if name not in _NOT_SETTINGS}
        on_command_line = {field.name for group in (ModelArguments, DataArguments) for field in fields(group)}
        for name, value in entries.items():
            settings[name if name in on_command_line else name.removeprefix("mm_")] = _plain(value)
        # Hash and structure tell the tower, not its path, which may differ between machines.
        structure = {k: v for k, v in model.vision.vision_config.items() if k not in _CONFIG_NOISE}
        digest = hash_json([model.vision.vision_tower_hash, _plain(structure)])
        settings["vision_tower"] = {"source": model.vision.vision_tower, "sha256": digest}
    if model.grounding is not None:
        settings |= {
            "grounding": model.grounding.mode,
            "num_temporal_tokens": model.grounding.num_temporal,
            "num_spatial_tokens": model.grounding.num_spatial,
        }
    if has_adapters(model):
        settings |= adapter_settings(model)
    if hasattr(model.config, "router_aux_loss_coef"):
        settings["router_aux_loss_coef"] = model.config.router_aux_loss_coef
    return settings


# The content of weights, tokenizers and data, as hashes.


def hash_sources(sources: Mapping[str, str | None]) -> dict[str, Any]:
    """Source and hash of the weights behind each flag; a hub name's are those in the local cache."""
    given = {flag: path for flag, path in sources.items() if path}
    model = given.get("model_name_or_path")
    if model is not None and is_adapter_folder(model):
        given["model_base"] = find_weights(model)
    with ThreadPoolExecutor(_READERS) as readers:
        found = {flag: {"source": path, "sha256": hash_weights(path, readers)} for flag, path in given.items()}
    return dict.fromkeys(sources) | found


def hash_weights(path: str, readers: ThreadPoolExecutor) -> str:
    """SHA-256 over a model's weights, and over what its ``config.json`` says; names of files do not count."""
    folder = _find_folder(path)
    if folder is None:
        return f"of the hub: {path}"
    if folder.is_file():
        return hash_file(folder)
    # What transformers would read: safetensors before .bin; training_args.bin is a pickle of flags, no weights.
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    files = files or sorted(file for file in folder.glob("*.bin") if file.name != "training_args.bin")
    digests = list(readers.map(hash_file, files))
    config = folder / "config.json"
    if config.is_file():
        entries = json.loads(config.read_text(encoding="utf-8"))
        digests.append(json.dumps({k: v for k, v in entries.items() if k not in _CONFIG_NOISE}, sort_keys=True))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _find_folder(path: str) -> Path | None:
    """Where a folder, a file or what a hub name stands for lies on this machine."""
    if Path(path).exists():
        return Path(path)
    from transformers.utils import cached_file

    try:
        found = cached_file(path, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(found).parent if found else None


def hash_data(entries: Sequence[DataEntry]) -> str:
    """SHA-256 over the content of data files and how they are sampled; where they lie does not count."""
    with ThreadPoolExecutor(_READERS) as readers:
        described = []
        for entry in entries:
            # A data set that ``datasets`` has saved is a folder of files.
            places = [place for name in entry.files for place in (Path(name), *sorted(Path(name).rglob("*")))]
            files = [place for place in places if place.is_file()]
            described.append([list(readers.map(hash_file, files)), entry.sampling, entry.source])
    return hash_json(described)


# Settings as they are stored, compared and shown.


def _plain(value: object) -> Setting:
    """A setting as JSON can hold it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _key(value: Setting) -> Setting:
    """What is compared of a setting: its content, or where it comes from if that was not hashed."""
    if isinstance(value, dict) and "sha256" in value:
        return value["source"] if value["sha256"] is None else value["sha256"]
    return value


def _show(value: Setting) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"{_show(value['source'])} (hash {str(value['sha256'])[:8]})"
    if isinstance(value, list):
        return " ".join(map(_show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _describe(name: str, old: Setting, new: Setting) -> str:
    return f"{_LABELS.get(name, f'--{name}')} was {_show(old)}, is {_show(new)}"
