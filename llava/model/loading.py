"""From a checkpoint, a tokenizer and a tower to a model that is ready to train or to generate."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from llava.config import GroundingConfig, VisionConfig, choose_grounding
from llava.messages import list_names, shorten
from llava.model.backbones import split_type
from llava.model.classes import build_config, check_loaded, choose_classes
from llava.model.convert.foreign import ForeignCheckpoint
from llava.model.convert.report import ConversionReport
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loading_errors import check_sizes, one_line_errors
from llava.model.lora import is_adapter_folder, load_adapters, read_base
from llava.model.multimodal_encoder.base import describe_tower
from llava.model.multimodal_encoder.lazy import FindTowerHash, put_lazy_tower
from llava.model.multimodal_resampler import RESAMPLERS
from llava.model.pretrained import (
    NOT_JUST_TENSORS,
    UNSAFE_WEIGHTS,
    describe_damage,
    find_layout,
    locate_model,
    prepare_generation,
    quiet_transformers,
    read_config,
)
from llava.model.quantization import Quantization, quantization_options
from llava.model.transfer import TransferReport, copy_parameters
from llava.model.vocabulary import add_tokens, check_vocabulary, grow_vocabulary, load_tokenizer
from llava.token_layout import NO_RESAMPLER

logger = logging.getLogger(__name__)

# Settings that decide which parameters exist, with those of the resampler: a trained checkpoint's cannot be changed.
_STRUCTURE = ("vision_select_layer", "projector_type", "projector_width", "resampler_type", "patch_merge_type")
# What a RuntimeError says that is about a file of weights.
_UNREADABLE = ("PytorchStreamReader", "Error(s) in loading state_dict", "automatic conversion", "unexpected EOF")


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, its visual settings (None for text alone) and the names of its new parameters.

    ``transfer`` says what was taken over from another model, if one was asked for; ``conversion``, what became of a
    checkpoint of another layout.
    """

    model: LlavaMetaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    vision: VisionConfig | None
    new_parameters: list[str]
    transfer: TransferReport | None = None
    conversion: ConversionReport | None = None

    def check_complete(self, name: str) -> None:
        """A ValueError, beginning with a name, if parts of the model are random: it has nothing to say."""
        if self.new_parameters:
            raise ValueError(
                f"{name} lacks {list_names(self.new_parameters)}, which would be random; give one that has them"
            )


@one_line_errors
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
    find_tower_hash: FindTowerHash | None = None,
    **settings: object,
) -> LoadedModel:
    """Load a plain language model or a multimodal checkpoint, with its tokenizer.

    Args:
        model_name_or_path: folder or hub name of either; its ``config.model_type`` chooses the class.
            A folder with LoRA adapters is put on its base model. One of the LLaVA family's layouts or
            transformers' own is translated (``convert``), and what became of it is logged as a table.
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
            what they are to the checkpoint. New tables of coordinates are random.
        num_temporal_tokens, num_spatial_tokens: bins of new tables of coordinates.
        flag: what an error calls the first argument.
        allow_bad_weights: whether weights may be NaN or infinite.
        find_tower_hash: tells which weights lie at a source. Where it knows, those of a frozen tower that checkpoints
            leave out are read when they are first needed; not to be given with ``save_vision_tower``.
        **settings: fields of ``VisionConfig`` to set, such as ``num_frames``; None leaves a field be, and
            "none" takes no resampler.

    Raises:
        ValueError: an unknown model type, a tokenizer that is not the model's, a tower that cannot be
            read or is another one, a base model that is gone or another one, weights that are missing,
            a setting that contradicts the checkpoint, or k bits where they cannot be had.
    """
    path = locate_model(model_name_or_path, flag)
    name, foreign, config_dict = f"{flag} {path!r}", None, read_config(path, flag)
    # A checkpoint of other code is one of this library's from here on, whose tensors have other names.
    if (layout := find_layout(config_dict, path, flag)) is not None:
        foreign = ForeignCheckpoint(path, config_dict, layout, vision_tower, flag)
        config_dict = foreign.config
    config_class, model_class = choose_classes(config_dict["model_type"], path, variant)
    config_dict["model_type"] = config_class.model_type
    stored = build_config(config_class, config_dict, name)
    tokenizer = load_tokenizer(path, flag)
    trained = foreign.find_grounding(tokenizer) if foreign else GroundingConfig.from_model_config(stored)
    check_vocabulary(tokenizer, vocab_size(config_dict, config_class), path, trained, config_dict)
    # What was asked for: refused where it contradicts what was trained.
    vision = _build_vision(name, stored, vision_tower, {field: v for field, v in settings.items() if v is not None})
    coordinates = choose_grounding(trained, grounding, num_temporal_tokens, num_spatial_tokens, vision is not None)
    if weights_from is not None and (quantization is not None or is_adapter_folder(path)):
        raise ValueError(f"parameters of {weights_from!r} cannot be copied under adapters or into k bits")
    check_sizes(stored, source := find_weights(path, model_base), name)
    known = set(tokenizer.get_vocab()) if source == path else fit_to_base(config_dict, tokenizer, source, path)
    if vision is not None:  # Before the model is built: bins have to be the last, and their first id is a setting.
        vision, coordinates = add_tokens(tokenizer, vision, coordinates)
        config_dict |= vision.to_model_config() | ({} if coordinates is None else coordinates.to_model_config())

    # The weights: the model's own or, under adapters, their base's; then another model's, new tokens, adapters.
    options: dict[str, Any] = {"config": build_config(config_class, config_dict, name), "dtype": dtype}
    options |= {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    options |= {} if quantization is None else quantization_options(quantization, model_class, options["config"])
    if weights_from is None or has_weights(source):
        model, new = _read_model(model_class, source, options, vision_tower, find_tower_hash, flag, foreign)
    else:
        model, new = _build_model(options, vision_tower)
    transfer = copy_parameters(model, weights_from) if weights_from is not None else None
    if vision is not None:
        _finish_vision(model, vision, coordinates, known, save_vision_tower)
    if source != path:
        load_adapters(model, path, source)
    if not allow_bad_weights:
        check_weights(model, name)
    prepare_generation(model, tokenizer, path)
    report, new = foreign.report if foreign else None, new if source == path else []
    return LoadedModel(model, tokenizer, model.vision, new, transfer, report)


def _finish_vision(
    model: LlavaMetaForCausalLM,
    vision: VisionConfig,
    coordinates: GroundingConfig | None,
    known: Collection[str],
    save_vision_tower: bool,
) -> None:
    """Make room for tokens that are not ``known``, and record whether checkpoints are to hold the tower."""
    new_tokens = vision.token_ids | (coordinates.token_ids if coordinates is not None else {})
    grow_vocabulary(model, [i for token, i in new_tokens.items() if token not in known])
    current = model.get_model().vision  # The tower's source and hash became known as it was read.
    model.set_vision(replace(current, save_vision_tower=save_vision_tower or current.save_vision_tower))


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
    # The folder says where its base model was; on another machine it may be somewhere else.
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
        The base's tokens; the checkpoint's others get their embeddings as they did when it was trained.

    Raises:
        ValueError: the base is of another type, or its tokenizer is another one.
    """
    settings = read_config(base, "--model_base")
    config_class, _ = choose_classes(settings["model_type"], base)
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
    # The base is read first, and in its own size; new tokens are added to it as when it was trained.
    config_dict["vocab_size"] = vocab_size(settings, config_class)
    return set(tokens)


def vocab_size(config_dict: dict[str, Any], config_class: type[PretrainedConfig]) -> int:
    """Number of embeddings that a ``config.json`` says, or the default of its class."""
    return config_dict.get("vocab_size", config_class().vocab_size)


def check_weights(model: nn.Module, path: str) -> None:
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


def choose_device(name: str | None) -> torch.device:
    """The device of a name such as "cpu" or "cuda:1"; by default a GPU if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # "cuda:9" is a device to torch until something is put on it.
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is {shorten(name)}; expected cpu, cuda, or cuda:N for GPU N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        built = "" if torch.version.cuda else ", and this torch was built without CUDA"
        raise ValueError(f"--device is {shorten(name)}, but {found or 'no'} GPUs can be seen{built}; give cpu")
    # A device of this name there is; whether it works (a driver, memory) shows when something is put on it.
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device is {shorten(name)}, which cannot be used here ({error}); give cpu") from error
    return device


def _build_model(options: dict[str, Any], vision_tower: str | None) -> tuple[Any, list[str]]:
    """A model with random weights, none of which count as new; only its tower's are read."""
    model = AutoModelForCausalLM.from_config(**options, trust_remote_code=False)
    if model.vision is not None:
        model.load_vision_tower(vision_tower)
    return model, []


def _read_model(
    model_class: type[LlavaMetaForCausalLM],
    path: str,
    options: dict[str, Any],
    vision_tower: str | None,
    find_tower_hash: FindTowerHash | None,
    flag: str,
    foreign: ForeignCheckpoint | None,
) -> tuple[Any, list[str]]:
    """A checkpoint's model, and the names of the parameters that the checkpoint does not have."""
    if not has_weights(path):
        raise ValueError(
            f"{flag} {path!r} has no weights (*.safetensors, *.bin); give a folder that has, or begin "
            "from another model's with --init_from_backbone (train_alternating.py)"
        )
    read = model_class.from_pretrained if foreign is None else partial(foreign.read, model_class)
    if find_tower_hash is not None and foreign is None:
        options["fill_tower"] = partial(put_lazy_tower, source=vision_tower, find_hash=find_tower_hash)
    model, info = read_pretrained(read, path, flag, vision_tower=vision_tower, **options)
    new = check_loaded(info, f"{flag} {path!r}")
    if foreign is not None:
        logger.warning("%s", foreign.report)
    return model, new


def read_pretrained(read: Callable[..., Any], path: str, flag: str, **options: object) -> tuple[Any, dict[str, Any]]:
    """What ``from_pretrained`` gives for a folder, and what it says of tensors that did not fit, of any shape.

    Args:
        read: a class's ``from_pretrained``, which is given ``options``.
        path: a folder or hub name.
        flag: what an error calls it.

    Raises:
        ValueError: files cannot be read, or no model can be built from them.
    """
    try:
        # Shapes that differ are named by the caller.
        with quiet_transformers():
            return read(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
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


def _build_vision(
    where: str, config: PretrainedConfig, tower: str | None, given: dict[str, Any]
) -> VisionConfig | None:
    """The visual settings of the checkpoint or, for a language model that gets a tower, new ones."""
    if given.get("resampler_type") == NO_RESAMPLER:  # A flag that is None was not given.
        given["resampler_type"] = None
    try:
        vision = VisionConfig.from_model_config(config)
    except TypeError as error:
        raise ValueError(f"the visual settings (mm_...) of its config.json are not whole: {error}") from error
    except ValueError as error:  # It names a flag, which nobody may have given.
        raise ValueError(f"{where}: the visual settings (mm_...) of its config.json: {error}") from error
    if vision is None and tower is None:
        return None
    if vision is None:
        # A plain language model gets a tower: its own files say side, grid and statistics.
        assert tower is not None
        source = os.path.abspath(tower) if os.path.isdir(tower) else tower
        return VisionConfig(vision_tower=source, **{**vars(describe_tower(tower)), **given})
    if vision.vision_final_norm and given.pop("vision_select_layer", -1) != -1:
        logger.warning("--mm_vision_select_layer has no effect: this model's tower gives its last layer, normed")
    structure = () if vision.resampler_type is None else RESAMPLERS.get(vision.resampler_type).structure
    for name in _STRUCTURE + tuple(name for name in structure if name not in vision.resampler_args):
        if name in given and given[name] != getattr(vision, name):
            raise ValueError(
                f"--mm_{name} {given[name] or NO_RESAMPLER!r} was given, but the checkpoint was trained with "
                f"{getattr(vision, name)!r}; leave the flag out"
            )
    for part, bound in (("projector_args", tuple(vision.projector_args)), ("resampler_args", structure)):
        trained, asked = getattr(vision, part), given.get(part, {})
        for name in bound:
            if name in trained and asked.get(name, trained[name]) != trained[name]:
                raise ValueError(
                    f"--mm_{part} has {name} {asked[name]!r}, but the checkpoint was trained with "
                    f"{trained[name]!r}; leave it out"
                )
        given[part] = trained | asked
    # The rest may change from run to run (frames, pooling without parameters), and is told.
    changed = {name: value for name, value in given.items() if value != getattr(vision, name)}
    for name, value in changed.items():
        logger.info("%s: %r here, %r in the checkpoint", name, value, getattr(vision, name))
    return replace(vision, **changed)
