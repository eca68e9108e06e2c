"""From a checkpoint, a tokenizer and a tower to a model that is ready to train or to generate."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llava.config import VisionConfig
from llava.grounding.syntax import GroundingConfig, choose_grounding
from llava.messages import list_names, shorten
from llava.model.checkpoint import (
    choose_classes,
    find_weights,
    fit_to_base,
    has_weights,
    load_tokenizer,
    read_config,
    read_model_type,
    vocab_size,
)
from llava.model.coordinates import COORDINATES
from llava.model.generation import drop_unused_sampling
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.lora import is_adapter_folder, load_adapters
from llava.model.multimodal_encoder.base import describe_tower
from llava.model.multimodal_resampler.builder import structural_settings
from llava.model.pretrained import NOT_JUST_TENSORS, UNSAFE_WEIGHTS, describe_damage, locate_model, quiet_transformers
from llava.model.quantization import Quantization, quantization_options
from llava.model.transfer import TransferReport, copy_parameters
from llava.model.visual import is_added, vision_module_of
from llava.model.vocabulary import (
    add_coordinate_tokens,
    add_visual_tokens,
    check_vocabulary,
    grow_vocabulary,
)

logger = logging.getLogger(__name__)

# Settings that decide which parameters exist, with those of the resampler: a trained checkpoint's cannot be changed.
_STRUCTURE = ("vision_select_layer", "projector_type", "resampler_type", "patch_merge_type")
# What a RuntimeError says that is about a file of weights.
_UNREADABLE = ("PytorchStreamReader", "Error(s) in loading state_dict", "automatic conversion", "unexpected EOF")


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
    grounding: str | None = None,
    num_temporal_tokens: int | None = None,
    num_spatial_tokens: int | None = None,
    flag: str = "--model_name_or_path",
    allow_bad_weights: bool = False,
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
        grounding: of ``llava.grounding.syntax.GROUNDING_MODES``, what coordinates are to the model; by default
            what they are to the checkpoint. New tables of coordinates have random rows.
        num_temporal_tokens, num_spatial_tokens: bins of new tables of coordinates.
        flag: what an error calls the first argument.
        allow_bad_weights: whether weights may be NaN or infinite.
        **settings: fields of ``VisionConfig`` to set, such as ``num_frames``; None leaves a field be.

    Raises:
        ValueError: an unknown model type, a tokenizer that is not the model's, a tower that cannot be
            read or is another one, a base model that is gone or another one, weights that are missing,
            a setting that contradicts the checkpoint, or k bits where they cannot be had.
    """
    model_name_or_path = locate_model(model_name_or_path, flag)
    config_class, model_class = choose_classes(read_model_type(model_name_or_path, flag), model_name_or_path, variant)
    config_dict = read_config(model_name_or_path, flag) | {"model_type": config_class.model_type}
    stored = build_config(config_class, config_dict, f"{flag} {model_name_or_path!r}")
    tokenizer = load_tokenizer(model_name_or_path, flag)
    trained = GroundingConfig.from_model_config(stored)
    check_vocabulary(tokenizer, vocab_size(config_dict, config_class), model_name_or_path, trained, config_dict)

    given = {name: value for name, value in settings.items() if value is not None}
    vision = _build_vision(stored, vision_tower, given)
    coordinates = choose_grounding(trained, grounding, num_temporal_tokens, num_spatial_tokens)
    if coordinates is not None and vision is None:
        raise ValueError("--grounding needs a model that sees; give --vision_tower")
    if weights_from is not None and (quantization is not None or is_adapter_folder(model_name_or_path)):
        raise ValueError(f"parameters of {weights_from!r} cannot be copied under adapters or into k bits")
    known = set(tokenizer.get_vocab())
    source = find_weights(model_name_or_path, model_base)
    if source != model_name_or_path:
        known = fit_to_base(config_dict, tokenizer, source, model_name_or_path)
    if vision is not None:
        vision = replace(vision, token_ids=add_visual_tokens(tokenizer))
        config_dict |= vision.to_model_config()
    if coordinates is not None:
        coordinates = add_coordinate_tokens(tokenizer, coordinates)
        config_dict |= coordinates.to_model_config()
    config = build_config(config_class, config_dict, f"{flag} {model_name_or_path!r}")

    options: dict[str, Any] = {"config": config, "dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        options |= quantization_options(quantization, model_class, config)
    if weights_from is not None and not has_weights(source):
        model, new = build_model(model_class, options, vision_tower), list[str]()
    else:
        model, new = _read_model(model_class, source, options, vision_tower, flag)
    transfer = None if weights_from is None else copy_parameters(model, weights_from)
    if vision is not None:
        new_tokens = vision.token_ids | (coordinates.token_ids if coordinates is not None else {})
        grow_vocabulary(model, [i for token, i in new_tokens.items() if token not in known])
        model.set_vision(replace(model.vision, save_vision_tower=save_vision_tower or model.vision.save_vision_tower))
    if source != model_name_or_path:
        load_adapters(model, model_name_or_path, source)
        new = []
    if not allow_bad_weights:
        check_weights(model, f"{flag} {model_name_or_path!r}")
    _align_special_tokens(model, tokenizer)
    drop_unused_sampling(model.generation_config, model_name_or_path)
    return LoadedModel(model, tokenizer, model.vision, new, transfer)


def build_config(config_class: type[PretrainedConfig], settings: dict[str, Any], path: str) -> PretrainedConfig:
    """A configuration of a ``config.json``'s entries; a ValueError, beginning with ``path``, if they do not fit."""
    try:
        return config_class.from_dict(dict(settings))
    except (TypeError, AttributeError, KeyError, ZeroDivisionError, StrictDataclassError) as error:
        raise ValueError(f"{path}: its config.json does not fit {config_class.__name__}: {error}") from error


def check_weights(model: Any, path: str) -> None:
    """A ValueError, beginning with ``path``, that names the weights of a model that are NaN or infinite."""
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not parameter.is_meta and not bool(torch.isfinite(parameter).all())
    ]
    if bad:
        raise ValueError(
            f"{path}: {len(bad)} of its weights hold NaN or infinity: {list_names(bad)}; the run that wrote them went "
            "wrong, or the file is damaged: take an earlier checkpoint"
        )


def choose_device(name: str | None, flag: str = "--device") -> torch.device:
    """The device of a name such as "cpu" or "cuda:1"; by default a GPU if there is one.

    Raises:
        ValueError: there is no such device here; ``flag`` is what the error calls it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{flag} is {shorten(name)}; expected cpu, cuda, or cuda:N for GPU N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        built = "" if torch.version.cuda else ", and this torch was built without CUDA"
        raise ValueError(f"{flag} is {shorten(name)}, but {found or 'no'} GPUs can be seen{built}; give cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{flag} is {shorten(name)}, which cannot be used here ({error}); give cpu") from error
    return device


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
    model_class: type[LlavaMetaForCausalLM], path: str, options: dict[str, Any], vision_tower: str | None, flag: str
) -> tuple[Any, list[str]]:
    """A checkpoint's model, and the names of the parameters that the checkpoint does not have."""
    if not has_weights(path):
        raise ValueError(
            f"{flag} {path!r} has no weights (*.safetensors, *.bin); give a folder that has, or begin "
            "from another model's with --init_from_backbone (train_alternating.py)"
        )
    try:
        # Shapes that differ are named below.
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, vision_tower=vision_tower, **options
            )
    except UNSAFE_WEIGHTS as error:
        raise ValueError(f"{flag} {path!r}: {NOT_JUST_TENSORS}") from error
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{flag} {path!r}: no model can be built as its config.json says: {error!r}") from error
    except (OSError, SafetensorError, EOFError, json.JSONDecodeError) as error:
        raise ValueError(f"{flag} {path!r}: {describe_damage(path, error)}") from error
    except ValueError as error:  # Transformers' own have no name of a folder; ours say where they come from.
        raise error if "--" in str(error) else ValueError(f"{flag} {path!r}: {error}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _UNREADABLE):
            raise
        raise ValueError(f"{flag} {path!r}: {describe_damage(path, error)}") from error
    return model, _check_loaded(info, f"{flag} {path!r}")


def _build_vision(config: PretrainedConfig, tower: str | None, given: dict[str, Any]) -> VisionConfig | None:
    """The visual settings of the checkpoint or, for a language model that gets a tower, new ones."""
    try:
        vision = VisionConfig.from_model_config(config)
    except TypeError as error:
        raise ValueError(f"the visual settings (mm_...) of its config.json are not whole: {error}") from error
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
    foreign = [name for name in missing if not is_added(name)]
    unexpected = sorted(info["unexpected_keys"])
    if info["mismatched_keys"]:
        name, there, here = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"{path} does not fit its config.json in {len(info['mismatched_keys'])} shapes: {name} is "
            f"{tuple(there)} in the file and {tuple(here)} by the configuration; the two are of different models"
        )
    if foreign or unexpected:
        what = f"lacks {foreign[:5]}" if foreign else f"has {unexpected[:5]}, which its model type does not know"
        raise ValueError(f"{path} does not fit its config.json: it {what}")
    if missing:
        modules = ", ".join(sorted({vision_module_of(name) or COORDINATES for name in missing}))
        logger.info("new parameters, not in %s: %d tensors of %s", path, len(missing), modules)
    return missing


def _align_special_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the model's configuration speak of the tokenizer's special tokens."""
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
