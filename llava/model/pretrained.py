"""A model's folder or its name on the hub: where it is, what its settings say, and what is never run."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from llava.messages import list_names, shorten, shorten_text
from llava.model.backbones import known_types
from llava.model.loading_errors import check_counts, check_files
from llava.stored_forms import MODEL

logger = logging.getLogger(__name__)

_TIMEOUT = 5.0
"""Seconds that the hub has for the first answer."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_FILE_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".git", ".yaml", ".yml", ".index")

FAMILY = "family"
"""LLaVA, LLaVA-NeXT, LLaVA-ST and forks: a language model's configuration with entries such as ``mm_vision_tower``."""
NATIVE = "native"
"""transformers' ``LlavaForConditionalGeneration``: a configuration for text and one for vision."""

_NATIVE_TYPE = "llava"
_RELATIVES = ("llava_next", "llava_next_video", "llava_onevision", "video_llava", "vipllava")
"""Model types of transformers' own that hold other models than ``NATIVE``."""

_ADAPTER_FILE = "non_lora_trainables.bin"
"""Beside the family's adapters; this library's have a file of safetensors of that name."""

# What a generation configuration has no use for where it does not sample, or searches without beams.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("early_stopping", "length_penalty")


def locate_model(name_or_path: str, flag: str) -> str:
    """Check that a model is there, so that what is read of it later is read from a folder or a hub that answers.

    ``flag`` is what an error calls it. Returns the same name; a folder below the home directory (~) with its full path.

    Raises:
        ValueError: there is no such folder, it is a file, or the hub has no such model or does not answer.
    """
    if not name_or_path.strip():
        raise ValueError(f"{flag} is empty; give the folder of a model, or leave the flag out")
    path = os.path.expanduser(name_or_path)  # noqa: PTH111 (Path's raises for a user that there is not)
    if os.path.isdir(path):
        check_files(path, flag)
        return path
    if os.path.exists(path):  # noqa: PTH110
        raise ValueError(f"{flag} {shorten(name_or_path)} is a file; give the folder that it lies in")
    if (reason := _find_sign_of_path(name_or_path)) is not None:
        raise ValueError(f"{flag} {shorten(name_or_path)} is no folder{reason}")
    _ask_hub(name_or_path, flag)
    return name_or_path


def _find_sign_of_path(name: str) -> str | None:
    """What makes a name that is no folder a path all the same, as the end of an error; None for a hub's name."""
    # "checkpoints/modle" is no name of the hub if "checkpoints/model" lies here, though it looks like one.
    folder, _, last = name.rstrip("/").rpartition("/")
    near = _find_near(folder or ".", last)
    hint = f"; did you mean {near}?" if near else ""
    # A hub's names have no other characters, and no more than one slash.
    if not _HUB_NAME.fullmatch(name) or ".." in name or "--" in name or name.endswith(_FILE_SUFFIXES):
        return hint
    if near or (folder and os.path.isdir(folder)):
        return hint or f" ({folder} is a folder here)"
    return None


def _find_near(folder: str, name: str) -> str | None:
    """The model's folder beside a name that is spelled almost like it."""
    try:
        beside = [entry.name for entry in os.scandir(folder) if Path(entry.path, "config.json").is_file()]
    except OSError:
        return None
    near = difflib.get_close_matches(name, beside, n=1, cutoff=0.75)
    return os.path.normpath(os.path.join(folder, near[0])) if near else None


# Once a run and with a short timeout: on a cluster's nodes without a network, transformers' own retries take minutes.
@cache
def _ask_hub(name: str, flag: str) -> None:
    """A ValueError if the hub, or what was downloaded before, has no such model; one question, no second try."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # What was downloaded before needs no answer from the hub.
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    what = f"{flag} {shorten(name)} is no folder here"
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{what}, and was not downloaded before (HF_HUB_OFFLINE is set); give a folder")
    # The base of what its library for HTTP raises, which is not always an OSError.
    unreachable: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError)
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_TIMEOUT)
    except GatedRepoError as error:
        raise ValueError(
            f"{what}, and on the hub it is only for those who were granted access (hf auth login)"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ValueError(f"{what}, and no model on the hub has this name; check the path") from error
    except OfflineModeIsEnabled as error:
        raise ValueError(f"{what}, and the hub is not asked (HF_HUB_OFFLINE is set); give a folder") from error
    except EntryNotFoundError as error:
        raise ValueError(f"{what}, and on the hub {name} has no config.json: it is no model") from error
    except unreachable as error:
        reason = shorten_text(str(error), 150) or type(error).__name__
        raise ValueError(
            f"{what}, and the hub at {constants.ENDPOINT} cannot be reached ({reason}); check the path, or the network"
        ) from error


def read_config(name_or_path: str, flag: str = "--model_name_or_path") -> dict[str, Any]:
    """The entries of ``config.json`` of a folder or hub name, a ``model_type`` ("gpt2", "llava_gpt2") among them.

    A name is taken for a hint only where the file says no type. ``flag`` is what an error calls the path.
    """
    path = locate_model(name_or_path, flag)
    try:
        settings, _ = PretrainedConfig.get_config_dict(path)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:  # The last three: no object.
        raise ValueError(f"{flag} {name_or_path!r} has no readable config.json: {error}") from error
    if not isinstance(settings, dict) or not settings:
        raise ValueError(f"{flag} {name_or_path!r} has no readable config.json")
    MODEL.check(settings, f"{flag} {os.path.join(path, 'config.json')}")
    _check_quantization(settings, f"{flag} {name_or_path!r}")
    check_counts(settings, f"{flag} {name_or_path!r}")
    if settings.get("model_type") is None:
        name = os.path.basename(os.path.normpath(name_or_path)).lower()
        if not any(hint in name for hint in ("gpt2", "bambi")):
            known = ", ".join(known_types())
            raise ValueError(f"config.json of {name_or_path!r} has no model_type; add one of: {known}")
        logger.warning("config.json of %r has no model_type; taking it for gpt2 by its name", name_or_path)
        settings["model_type"] = "gpt2"
    return drop_remote_kernels(settings, name_or_path)


def find_layout(config: Mapping[str, Any], path: str, flag: str) -> str | None:
    """The layout of a folder, None for a plain language model and for what this library wrote.

    Args:
        config: the entries of its ``config.json``.
        path: the folder or hub name.
        flag: what an error calls it.

    Raises:
        ValueError: a relative whose layout is not read; says what to take.
    """
    if config.get("mm_vision_config"):  # This library's own.
        return None
    model_type = config.get("model_type")
    if Path(path, _ADAPTER_FILE).is_file():
        raise ValueError(
            f"{flag} {path!r} holds LoRA adapters of the LLaVA family ({_ADAPTER_FILE}); merge them with their "
            "base model by the code that trained them (scripts/merge_lora_weights.py), and give the merged folder"
        )
    if isinstance(config.get("text_config"), Mapping) and "vision_config" in config:
        if model_type == _NATIVE_TYPE:
            return NATIVE
        if model_type in _RELATIVES:
            raise ValueError(
                f"{flag} {path!r} is a {model_type} of transformers, of which only {_NATIVE_TYPE} is read; take the "
                "checkpoint that it was converted from (LLaVA-NeXT's own), if there is one"
            )
        return None
    return FAMILY if config.get("mm_vision_tower") else None


def describe_damage(folder: str, error: BaseException) -> str:
    """Which file of weights in a folder is missing, cut short or damaged, for an error that came of reading them."""
    from safetensors import SafetensorError, safe_open

    for index in sorted(Path(folder).glob("*.index.json")):
        try:
            files = set(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{index.name} cannot be read: it is cut short or damaged; copy the folder again"
        missing = sorted(str(file) for file in files if not Path(folder, str(file)).is_file())
        if missing:
            return f"{list_names(missing)} is missing, which {index.name} names; copy the folder again"
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as reason:
            return f"{file.name} cannot be read: it is cut short or damaged ({reason}); copy the folder again"
    return f"its weights cannot be read: {shorten_text(str(error), 300)}"


# What a checkpoint may not bring along: Python code, compiled kernels, and pickles that hold more than tensors.

_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_LOCAL_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
"""What needs nothing but torch: for others (``org/repo``, flash attention that is not installed) transformers fetches
compiled code from the hub."""

UNSAFE_WEIGHTS = (UnpicklingError,)
"""What ``torch.load(..., weights_only=True)`` raises for a file that is no plain file of tensors."""

NOT_JUST_TENSORS = (
    "not a file of plain tensors; what else a pickle may hold is never loaded: store the weights as .safetensors"
)


def foreign_code_note(settings: Mapping[str, Any]) -> str:
    """The end of an error about a folder whose configuration (its JSON) names code of its own; else empty.

    transformers asks on the terminal whether to run such code unless ``trust_remote_code`` is given: give
    it, as False, to every ``Auto`` class, so that no job waits for an answer.
    """
    if "auto_map" not in settings:
        return ""
    return (
        "; it brings Python code of its own (auto_map), which is never run here: take a model whose type "
        "transformers knows, or register the class yourself with --plugins (docs/extending.md)"
    )


def drop_remote_kernels(settings: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The entries of a ``config.json`` without those, at any depth, that name an implementation to be fetched.

    Args:
        settings: the entries.
        path: where they stand, for the warning.
    """
    kept: dict[str, Any] = {}
    for name, value in settings.items():
        if name.strip("_").removesuffix("_internal") in _IMPLEMENTATIONS and not _is_local(value):
            logger.warning(
                "%s: its configuration asks for %s %s, which is not used: ask for it with --attn_implementation",
                path, name, shorten(value),
            )  # fmt: skip
            continue
        kept[name] = drop_remote_kernels(value, path) if isinstance(value, Mapping) else value
    return kept


def _is_local(value: object) -> bool:
    names = value.values() if isinstance(value, Mapping) else [value]
    return all(name is None or name in _LOCAL_IMPLEMENTATIONS for name in names)


def forget_implementations(config: PretrainedConfig) -> PretrainedConfig:
    """A configuration, and those within it, that leaves the choice of an implementation to the loader."""
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))):
        # The field behind the property, whose setter would reach into the configurations within.
        for name in _IMPLEMENTATIONS:
            if getattr(part, f"_{name}", None) not in (None, *_LOCAL_IMPLEMENTATIONS):
                setattr(part, f"_{name}_internal", None)
    return config


def _check_quantization(settings: Mapping[str, Any], path: str) -> None:
    """A ValueError for weights that were stored in fewer bits by another method than bitsandbytes'."""
    quantization = settings.get("quantization_config")
    method = quantization.get("quant_method", "bitsandbytes") if isinstance(quantization, Mapping) else None
    if method not in (None, "bitsandbytes"):
        raise ValueError(
            f"{path}: its weights are quantised by {shorten(method)}, which is not read here; take the model with "
            "plain weights (and --bits 4 or 8 to hold it in fewer)"
        )


def prepare_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Give the configurations the tokenizer's special tokens, and take from them what could not be saved again."""
    # GPT-2 ships with ids of its own vocabulary in both files, and ``generate`` goes by them.
    assert model.generation_config is not None
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
    _drop_unused_sampling(model.generation_config, source)


def _drop_unused_sampling(config: GenerationConfig, source: str) -> None:
    """Leave out settings without effect that transformers refuses to save, and with them the whole model.

    Vicuna's ``generation_config.json`` is the best known: a temperature, but no sampling.

    Args:
        config: of a model that was loaded; what it generates stays the same.
        source: the model's folder or hub name, for the note.
    """
    if _can_be_saved(config):
        return
    # Back to transformers' own defaults, but only if that is what makes the configuration one that can be saved.
    unused = [] if config.do_sample else [name for name in _SAMPLING if hasattr(config, name)]
    unused += [name for name in _BEAMS if (config.num_beams or 1) == 1]
    fresh = GenerationConfig()
    given = {name: getattr(config, name) for name in unused if getattr(config, name) != getattr(fresh, name)}
    for name in given:
        setattr(config, name, getattr(fresh, name))
    if given and _can_be_saved(config):
        settings = ", ".join(f"{name} {value}" for name, value in given.items())
        logger.warning(
            "generation_config.json of %s sets %s, without effect as it neither samples nor searches with beams, and "
            "could not be saved again; left out", source, settings
        )  # fmt: skip
        return
    for name, value in given.items():
        setattr(config, name, value)


def _can_be_saved(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


# Keeps transformers' reports back while we check, and report, what was loaded ourselves.


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it transformers logs errors only and shows no progress bars."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
