"""From a checkpoint, a tokenizer and a tower to a model that is ready to train or to generate."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

import llava.model as models
from llava.config import VisionConfig
from llava.model.language_model.registration import PLAIN_TYPES
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.lora import is_adapter_folder, load_adapters, read_base
from llava.model.multimodal_encoder.builder import describe_tower
from llava.model.multimodal_resampler.builder import structural_settings
from llava.model.quantization import Quantization, quantization_options
from llava.model.quiet import quiet_transformers
from llava.model.transfer import TransferReport, copy_parameters
from llava.model.visual import vision_module_of
from llava.model.vocabulary import add_visual_tokens, check_vocabulary, grow_vocabulary

logger = logging.getLogger(__name__)

# Settings that decide which parameters exist, with those of the resampler: a trained checkpoint's cannot be changed.
_STRUCTURE = ("vision_select_layer", "projector_type", "resampler_type", "patch_merge_type")


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, its visual settings (None for text alone) and the names of its new parameters.

    ``transfer`` says what was taken over from another model, if one was asked for.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    vision: VisionConfig | None
    new_parameters: list[str]
    transfer: TransferReport | None = None


def load_model(
    model_name_or_path: str,
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    save_vision_tower: bool = False,
    variant: str | None = None,
    weights_from: str | None = None,
    attn_implementation: str | None = None,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    **settings: Any,
) -> LoadedModel:
    """Load a plain language model or a multimodal checkpoint, with its tokenizer.

    Args:
        model_name_or_path: folder or hub name of either; its ``config.model_type`` chooses the class.
            A folder with LoRA adapters is put on its base model.
        model_base: folder or hub name of that base model, where it is no longer what the folder says.
        vision_tower: folder or hub name of the vision model. A plain language model without one
            stays a text model. For a multimodal checkpoint: where its tower lies now.
        save_vision_tower: whether checkpoints of this model hold the tower's weights too.
        variant: kind of attention, of ``llava.model.VARIANTS``; by default the checkpoint's own.
        weights_from: folder or hub name of a model whose parameters replace this one's, where names and
            shapes agree (see ``copy_parameters``). The first folder then needs no weights.
        attn_implementation: "sdpa", "eager" or "flash_attention_2"; by default what transformers picks.
        dtype: of the weights.
        quantization: holds the linear layers of the language model in fewer bits.
        **settings: fields of ``VisionConfig`` to set, such as ``num_frames``; None leaves a field be.

    Raises:
        ValueError: an unknown model type, a tokenizer that is not the model's, a tower that cannot be
            read or is another one, a base model that is gone or another one, weights that are missing,
            a setting that contradicts the checkpoint, or k bits where they cannot be had.
    """
    import llava.model.language_model  # noqa: F401  (registers the backbones)

    config_class, model_class = _choose_classes(read_model_type(model_name_or_path), model_name_or_path, variant)
    config_dict = _read_config(model_name_or_path) | {"model_type": config_class.model_type}
    tokenizer = load_tokenizer(model_name_or_path)
    check_vocabulary(tokenizer, _vocab_size(config_dict, config_class), model_name_or_path)

    given = {name: value for name, value in settings.items() if value is not None}
    vision = _build_vision(config_class.from_dict(dict(config_dict)), vision_tower, given)
    if weights_from is not None and (quantization is not None or is_adapter_folder(model_name_or_path)):
        raise ValueError(f"parameters of {weights_from!r} cannot be copied under adapters or into k bits")
    known = set(tokenizer.get_vocab())
    source = find_weights(model_name_or_path, model_base)
    if source != model_name_or_path:
        known = _fit_to_base(config_dict, tokenizer, source, model_name_or_path)
    if vision is not None:
        vision = replace(vision, token_ids=add_visual_tokens(tokenizer))
        config_dict |= vision.to_model_config()
    config = config_class.from_dict(config_dict)

    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    options |= {"config": config, "dtype": dtype}
    if quantization is not None:
        options |= quantization_options(quantization, model_class, config)
    if weights_from is not None and not has_weights(source):
        model, new = build_model(model_class, options, vision_tower), list[str]()
    else:
        model, new = _read_model(model_class, source, options, vision_tower)
    transfer = None if weights_from is None else copy_parameters(model, weights_from)
    if vision is not None:
        grow_vocabulary(model, [i for token, i in vision.token_ids.items() if token not in known])
        model.set_vision(replace(model.vision, save_vision_tower=save_vision_tower or model.vision.save_vision_tower))
    if source != model_name_or_path:
        load_adapters(model, model_name_or_path, source)
        new = []
    _align_special_tokens(model, tokenizer)
    return LoadedModel(model, tokenizer, model.vision, new, transfer)


def build_model(model_class: type[LlavaMetaForCausalLM], options: dict[str, Any], vision_tower: str | None) -> Any:
    """A model with random weights; only its tower's are read.

    Args:
        model_class: of the model.
        options: ``config`` and what else transformers' ``from_config`` takes.
        vision_tower: where its tower lies now; by default where the configuration says.
    """
    model: Any = model_class._from_config(**options)  # type: ignore[attr-defined]
    if model.vision is not None:
        model.load_vision_tower(vision_tower)
    return model


def _read_model(
    model_class: type[LlavaMetaForCausalLM], path: str, options: dict[str, Any], vision_tower: str | None
) -> tuple[Any, list[str]]:
    """A checkpoint's model, and the names of the parameters that the checkpoint does not have."""
    if not has_weights(path):
        raise ValueError(
            f"--model_name_or_path {path!r} has no weights (*.safetensors, *.bin); give a folder that has, or begin "
            "from another model's with --init_from_backbone (train_alternating.py)"
        )
    with quiet_transformers():
        model, info = model_class.from_pretrained(path, output_loading_info=True, vision_tower=vision_tower, **options)
    return model, _check_loaded(info, path)


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
        _read_config(base, "--model_base")
    except ValueError as error:
        raise ValueError(
            f"{name_or_path!r} holds adapters, and their base model {base!r} cannot be read; "
            f"give its folder with --model_base ({error})"
        ) from error
    return base


def _fit_to_base(config_dict: dict[str, Any], tokenizer: PreTrainedTokenizerBase, base: str, path: str) -> set[str]:
    """Give the configuration of a checkpoint with adapters the vocabulary that its base model has.

    Returns:
        The base's tokens; the checkpoint's others get their rows as they did when it was trained.

    Raises:
        ValueError: the base is of another type, or its tokenizer is another one.
    """
    config_class, _ = _choose_classes(read_model_type(base, "--model_base"), base, None)
    tokens, own = load_tokenizer(base).get_vocab(), tokenizer.get_vocab()
    differing = [token for token, i in tokens.items() if own.get(token) != i]
    # A kind of attention has no weights of its own: one base serves all of them.
    backbone = models.split_type(config_class.model_type)[0]
    if backbone != models.split_type(config_dict["model_type"])[0] or differing:
        what = f"other ids for {differing[:3]}" if differing else f"model_type {backbone!r}"
        raise ValueError(
            f"{base!r} is not the base model of the adapters in {path!r}: it has {what}; "
            "give the right one with --model_base"
        )
    config_dict["vocab_size"] = _vocab_size(_read_config(base), config_class)
    return set(tokens)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a padding token pads with its end of text.

    Attention never depends on padding ids here: masks are made from lengths.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer can be read from {name_or_path!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {name_or_path!r} has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_config(name_or_path: str, flag: str = "--model_name_or_path") -> dict[str, Any]:
    # A hub name has at most one slash and does not begin with one, or with a dot.
    looks_local = name_or_path.count("/") > 1 or name_or_path.startswith((".", "/", "~"))
    if looks_local and not os.path.isdir(name_or_path):
        raise ValueError(f"{flag} {name_or_path!r} is no folder")
    try:
        config_dict, _ = PretrainedConfig.get_config_dict(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {name_or_path!r} has no readable config.json: {error}") from error
    if not config_dict:
        raise ValueError(f"{flag} {name_or_path!r} has no readable config.json")
    return config_dict


def read_model_type(name_or_path: str, flag: str = "--model_name_or_path") -> str:
    """The model type that a checkpoint's ``config.json`` says, "gpt2" or "llava_gpt2" for one.

    A name is taken for a hint only where it says none. ``flag`` is what an error calls the path.
    """
    model_type = _read_config(name_or_path, flag).get("model_type")
    if model_type is not None:
        return model_type
    name = os.path.basename(os.path.normpath(name_or_path)).lower()
    if not any(hint in name for hint in ("gpt2", "bambi")):
        raise ValueError(f"config.json of {name_or_path!r} has no model_type; add one of: {', '.join(_known_types())}")
    logger.warning("config.json of %r has no model_type; taking it for gpt2 by its name", name_or_path)
    return "gpt2"


def _choose_classes(
    model_type: str, path: str, variant: str | None
) -> tuple[type[PretrainedConfig], type[LlavaMetaForCausalLM]]:
    """Configuration and model class for a model type and, where one is asked for, a variant."""
    name = PLAIN_TYPES.get(model_type, model_type)
    if name not in models.AVAILABLE_MODELS:
        raise ValueError(f"{path!r} has the unknown model_type {model_type!r}; known: {', '.join(_known_types())}")
    if variant is not None:
        name = models.variant_type(models.split_type(name)[0], variant)
    config_name, _, model_name = models.AVAILABLE_MODELS[name]
    return getattr(models, config_name), getattr(models, model_name)


def _known_types() -> list[str]:
    return sorted(PLAIN_TYPES) + sorted(models.AVAILABLE_MODELS)


def _vocab_size(config_dict: dict[str, Any], config_class: type[PretrainedConfig]) -> int:
    return config_dict.get("vocab_size", config_class().vocab_size)


def _build_vision(config: PretrainedConfig, tower: str | None, given: dict[str, Any]) -> VisionConfig | None:
    """The visual settings of the checkpoint or, for a language model that gets a tower, new ones."""
    vision = VisionConfig.from_model_config(config)
    if vision is None and tower is None:
        return None
    if vision is None:
        assert tower is not None
        source = os.path.abspath(tower) if os.path.isdir(tower) else tower
        return VisionConfig(vision_tower=source, **{**vars(describe_tower(tower)), **given})
    for name in (*_STRUCTURE, *structural_settings(vision)):
        if name in given and given[name] != getattr(vision, name):
            raise ValueError(
                f"--mm_{name} {given[name]!r} was given, but the checkpoint was trained with "
                f"{getattr(vision, name)!r}; leave the flag out"
            )
    changed = {name: value for name, value in given.items() if value != getattr(vision, name)}
    for name, value in changed.items():
        logger.info("%s: %r here, %r in the checkpoint", name, value, getattr(vision, name))
    return replace(vision, **changed)


def _check_loaded(info: dict[str, Any], path: str) -> list[str]:
    """Names of the new parameters; anything but vision modules missing or left over is an error."""
    missing = sorted(info["missing_keys"])
    foreign = [name for name in missing if vision_module_of(name) is None]
    unexpected = sorted(info["unexpected_keys"])
    if foreign or unexpected:
        what = f"lacks {foreign[:5]}" if foreign else f"has {unexpected[:5]}, which its model type does not know"
        raise ValueError(f"the checkpoint {path!r} does not fit its config.json: it {what}")
    if missing:
        modules = ", ".join(sorted({module for name in missing if (module := vision_module_of(name))}))
        logger.info("new parameters, not in %r: %d tensors of %s", path, len(missing), modules)
    return missing


def _align_special_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the model's configuration speak of the tokenizer's special tokens."""
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
