"""From a checkpoint, a tokenizer and a tower to a model that is ready to train or to generate."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llava.config import VisionConfig
from llava.coordinates import GroundingConfig, choose_grounding
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
from llava.model.foreign_code import NOT_JUST_TENSORS, UNSAFE_WEIGHTS
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.lora import is_adapter_folder, load_adapters
from llava.model.multimodal_encoder.builder import describe_tower
from llava.model.multimodal_resampler.builder import structural_settings
from llava.model.quantization import Quantization, quantization_options
from llava.model.quiet import quiet_transformers
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
        grounding: of ``llava.coordinates.GROUNDING_MODES``, what coordinates are to the model; by default what they
            are to the checkpoint. New tables of coordinates have random rows.
        num_temporal_tokens, num_spatial_tokens: bins of new tables of coordinates.
        **settings: fields of ``VisionConfig`` to set, such as ``num_frames``; None leaves a field be.

    Raises:
        ValueError: an unknown model type, a tokenizer that is not the model's, a tower that cannot be
            read or is another one, a base model that is gone or another one, weights that are missing,
            a setting that contradicts the checkpoint, or k bits where they cannot be had.
    """
    import llava.model.language_model  # noqa: F401  (registers the backbones)

    config_class, model_class = choose_classes(read_model_type(model_name_or_path), model_name_or_path, variant)
    config_dict = read_config(model_name_or_path) | {"model_type": config_class.model_type}
    tokenizer = load_tokenizer(model_name_or_path)
    stored = config_class.from_dict(dict(config_dict))
    trained = GroundingConfig.from_model_config(stored)
    check_vocabulary(tokenizer, vocab_size(config_dict, config_class), model_name_or_path, trained)

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
    config = config_class.from_dict(config_dict)

    options: dict[str, Any] = {"config": config, "dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        options |= quantization_options(quantization, model_class, config)
    if weights_from is not None and not has_weights(source):
        model, new = build_model(model_class, options, vision_tower), list[str]()
    else:
        model, new = _read_model(model_class, source, options, vision_tower)
    transfer = None if weights_from is None else copy_parameters(model, weights_from)
    if vision is not None:
        new_tokens = vision.token_ids | (coordinates.token_ids if coordinates is not None else {})
        grow_vocabulary(model, [i for token, i in new_tokens.items() if token not in known])
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
    try:
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                path, output_loading_info=True, vision_tower=vision_tower, **options
            )
    except UNSAFE_WEIGHTS as error:
        raise ValueError(f"--model_name_or_path {path!r}: {NOT_JUST_TENSORS}") from error
    return model, _check_loaded(info, path)


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
    foreign = [name for name in missing if not is_added(name)]
    unexpected = sorted(info["unexpected_keys"])
    if foreign or unexpected:
        what = f"lacks {foreign[:5]}" if foreign else f"has {unexpected[:5]}, which its model type does not know"
        raise ValueError(f"the checkpoint {path!r} does not fit its config.json: it {what}")
    if missing:
        modules = ", ".join(sorted({vision_module_of(name) or COORDINATES for name in missing}))
        logger.info("new parameters, not in %r: %d tensors of %s", path, len(missing), modules)
    return missing


def _align_special_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the model's configuration speak of the tokenizer's special tokens."""
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
