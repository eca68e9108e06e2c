"""What a checkpoint's folder says, before any weight is read: its type, its tokenizer, where its weights lie."""

from __future__ import annotations

import logging
import os
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from llava.model.backbones import AVAILABLE_MODELS, PLAIN_TYPES, find_class, split_type, variant_type
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.lora import is_adapter_folder, read_base
from llava.model.pretrained import check_quantization, drop_remote_kernels, foreign_code_note, locate_model

logger = logging.getLogger(__name__)


def read_config(name_or_path: str, flag: str = "--model_name_or_path") -> dict[str, Any]:
    """The entries of ``config.json`` of a folder or hub name; ``flag`` is what an error calls the path."""
    path = locate_model(name_or_path, flag)
    try:
        config_dict, _ = PretrainedConfig.get_config_dict(path)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:  # The last three: no object.
        raise ValueError(f"{flag} {name_or_path!r} has no readable config.json: {error}") from error
    if not isinstance(config_dict, dict) or not config_dict:
        raise ValueError(f"{flag} {name_or_path!r} has no readable config.json")
    check_quantization(config_dict, f"{flag} {name_or_path!r}")
    return drop_remote_kernels(config_dict, name_or_path)


def read_model_type(name_or_path: str, flag: str = "--model_name_or_path") -> str:
    """The model type that a checkpoint's ``config.json`` says, "gpt2" or "llava_gpt2" for one.

    A name is taken for a hint only where it says none.
    """
    model_type = read_config(name_or_path, flag).get("model_type")
    if model_type is not None:
        return model_type
    name = os.path.basename(os.path.normpath(name_or_path)).lower()
    if not any(hint in name for hint in ("gpt2", "bambi")):
        raise ValueError(f"config.json of {name_or_path!r} has no model_type; add one of: {', '.join(_known_types())}")
    logger.warning("config.json of %r has no model_type; taking it for gpt2 by its name", name_or_path)
    return "gpt2"


def choose_classes(
    model_type: str, path: str, variant: str | None
) -> tuple[type[PretrainedConfig], type[LlavaMetaForCausalLM]]:
    """Configuration and model class for a model type and, where one is asked for, a variant."""
    name = PLAIN_TYPES.get(model_type, model_type)
    if name not in AVAILABLE_MODELS:
        raise ValueError(
            f"{path!r} has the unknown model_type {model_type!r}; known: {', '.join(_known_types())}"
            f"{foreign_code_note(read_config(path))}"
        )
    if variant is not None:
        name = variant_type(split_type(name)[0], variant)
    config_name, _, model_name = AVAILABLE_MODELS[name]
    return find_class(config_name), find_class(model_name)


def _known_types() -> list[str]:
    return sorted(PLAIN_TYPES) + sorted(AVAILABLE_MODELS)


def vocab_size(config_dict: dict[str, Any], config_class: type[PretrainedConfig]) -> int:
    """Rows of the embeddings that a ``config.json`` speaks of, or that its class takes for granted."""
    return config_dict.get("vocab_size", config_class().vocab_size)


def load_tokenizer(name_or_path: str, flag: str = "--model_name_or_path") -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a padding token pads with its end of text.

    Attention never depends on padding ids here: masks are made from lengths. ``flag`` is what an error calls the path.
    """
    path = locate_model(name_or_path, flag)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (AttributeError, TypeError, KeyError, StrictDataclassError) as error:  # JSON, but of another kind.
        raise ValueError(f"{flag}: no tokenizer can be read from {name_or_path!r}: {error!r}") from error
    except (OSError, ValueError) as error:
        note = foreign_code_note(get_tokenizer_config(path))
        raise ValueError(f"{flag}: no tokenizer can be read from {name_or_path!r}{note or f': {error}'}") from error
    except Exception as error:
        if type(error) is not Exception:  # The tokenizers package has no class of its own.
            raise
        raise ValueError(f"{flag}: no tokenizer can be read from {name_or_path!r}: {error}") from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # transformers makes one of special tokens alone where a folder has a config.json and no tokenizer's files.
        raise ValueError(
            f"{flag}: no tokenizer can be read from {name_or_path!r}: it has no vocabulary; put the files of the "
            "model's tokenizer (tokenizer.json, tokenizer_config.json) into that folder"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {name_or_path!r} has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_weights(name_or_path: str) -> bool:
    """Whether a folder has a model's weights; a hub name is taken to have them."""
    if not os.path.isdir(name_or_path):
        return True
    return any(file.endswith((".safetensors", ".bin")) for file in os.listdir(name_or_path))


def find_weights(name_or_path: str, model_base: str | None = None) -> str:
    """Where a checkpoint's language model comes from: itself or, under LoRA adapters, their base model.

    Raises:
        ValueError: a base was given for a checkpoint that needs none, or the base is gone.
    """
    if not is_adapter_folder(name_or_path):
        if model_base is not None:
            raise ValueError(
                f"--model_base {model_base!r} was given, but {name_or_path!r} holds no adapters "
                "(no adapter_config.json); leave the flag out"
            )
        return name_or_path
    base = model_base or read_base(name_or_path)
    try:
        read_config(base, "--model_base")
    except ValueError as error:
        raise ValueError(
            f"{name_or_path!r} holds adapters, and their base model {base!r} cannot be read; "
            f"give its folder with --model_base ({error})"
        ) from error
    return base


def fit_to_base(config_dict: dict[str, Any], tokenizer: PreTrainedTokenizerBase, base: str, path: str) -> set[str]:
    """Give the configuration of a checkpoint with adapters the vocabulary that its base model has.

    Returns:
        The base's tokens; the checkpoint's others get their rows as they did when it was trained.

    Raises:
        ValueError: the base is of another type, or its tokenizer is another one.
    """
    config_class, _ = choose_classes(read_model_type(base, "--model_base"), base, None)
    tokens, own = load_tokenizer(base).get_vocab(), tokenizer.get_vocab()
    differing = [token for token, i in tokens.items() if own.get(token) != i]
    # A kind of attention has no weights of its own: one base serves all of them.
    backbone = split_type(config_class.model_type)[0]
    if backbone != split_type(config_dict["model_type"])[0] or differing:
        what = f"other ids for {differing[:3]}" if differing else f"model_type {backbone!r}"
        raise ValueError(
            f"{base!r} is not the base model of the adapters in {path!r}: it has {what}; "
            "give the right one with --model_base"
        )
    config_dict["vocab_size"] = vocab_size(read_config(base), config_class)
    return set(tokens)
