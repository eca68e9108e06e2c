"""A checkpoint of other code, opened: today's entries of ``config.json``, its tensors under today's names, a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, PretrainedConfig, PreTrainedTokenizerBase

from llava.config import LAPE, GroundingConfig, VisionConfig
from llava.grounding.syntax import bin_tokens
from llava.messages import list_names
from llava.model.classes import build_config, check_loaded, choose_classes
from llava.model.convert.names import FAMILY_NAMES, NATIVE_NAMES, TranslatedNames, translate_names
from llava.model.convert.published import note_on_frozen_tower
from llava.model.convert.report import ConversionReport, Settings
from llava.model.convert.settings import translate_family, translate_native
from llava.model.convert.tensors import StoredTensors
from llava.model.coordinates import COORDINATES
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.multimodal_encoder.base import TowerDescription, describe_tower
from llava.model.multimodal_encoder.hf import HuggingFaceTower, hash_weights
from llava.model.pretrained import NATIVE
from llava.model.visual import is_added, vision_module_of

_FAMILY_TYPES = {"LlavaLlamaForCausalLM": "llava_llama", "LlavaMistralForCausalLM": "llava_mistral"}
"""Model types of classes whose early checkpoints all say ``llava``."""
_FORMAT = "llava_format"
_FORMAT_NOTE = (
    "no chat format (config.json does not say): prompts are plain text; for another, write the name of a --version "
    'into it, such as "llava_format": "v1" of LLaVA-1.5 or "qwen" of Qwen2'
)
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


class ForeignCheckpoint:
    """A checkpoint folder of another layout, whose weights are read when they are asked for.

    Args:
        path: folder or hub name.
        config: the entries of its ``config.json``.
        layout: of ``find_layout``.
        vision_tower: folder or hub name of its vision model, where that is not what the configuration says.
        flag: what an error calls the path.

    Raises:
        ValueError: it is damaged, lacks something, or has a part that nothing here runs.

    Attributes:
        config: today's entries of its ``config.json``.
        grounding: what coordinates are to it; None without any.
        report: what becomes of it; complete once ``fill_report`` or ``read`` has been called.
    """

    def __init__(self, path: str, config: Mapping[str, Any], layout: str, vision_tower: str | None, flag: str) -> None:
        self.where = f"{flag} {path!r}"
        self.path, self.layout = path, layout
        folder = Path(path) if os.path.isdir(path) else _download(path, self.where)
        self.tensors = StoredTensors(folder, self.where)
        native = layout == NATIVE
        text = _text_entries(config, self.tensors, self.where) if native else _family_entries(config)
        _, self._model_class = choose_classes(text["model_type"], path)
        self._source = find_source(config, path, vision_tower) if not native else vision_tower
        self._frozen_note = None if native else note_on_frozen_tower(config)
        tower = self._describe_tower(config)
        self.names = self._translate_names(set())
        shapes = {name: part.shape(self.tensors.shapes) for name, part in self.names.parts.items()}
        if native:
            settings = translate_native(LlavaConfig.from_dict(dict(config)).to_dict(), tower, self.where)
        else:
            settings = translate_family(config, tower, shapes, self.where)
        vision = self._build_vision(tower, settings)
        self.grounding = _find_grounding(shapes)
        rows = next((shape[0] for name, shape in shapes.items() if name.endswith(_EMBEDDINGS)), None)
        if rows is not None and rows != text.get("vocab_size", rows):
            settings.changed.append(f"vocab_size {text['vocab_size']}: the file has embeddings of {rows} tokens")
        kept = {name: value for name, value in text.items() if name not in settings.used}
        if _FORMAT in config:
            kept[_FORMAT] = config[_FORMAT]
        else:
            settings.assumed.append(_FORMAT_NOTE)
        self.config: dict[str, Any] = kept | vision.to_model_config() | ({} if rows is None else {"vocab_size": rows})
        self.report = ConversionReport(
            path, self._describe(config, vision), changed=settings.changed, assumed=settings.assumed
        )

    def _describe_tower(self, config: Mapping[str, Any]) -> TowerDescription:
        # transformers' own folders say of their vision model what its own folder would.
        source = self.path if self.layout == NATIVE else str(self._source)
        try:
            return describe_tower(source)
        except ValueError as error:
            if self.layout == NATIVE:
                raise
            has = "has its weights, and their configuration" if self._stored_tower() else "has no weights of it, and it"
            raise ValueError(
                f"{self.where} names the vision tower {config['mm_vision_tower']!r} and {has} cannot be read from "
                f"there ({error}); give a folder that has them with --vision_tower"
            ) from error

    def _stored_tower(self) -> bool:
        return any(vision_module_of(name) == "vision_tower" for name in self.tensors)

    def _translate_names(self, own: set[str]) -> TranslatedNames:
        head = "embed_out" if "NeoX" in self._model_class.__name__ else "lm_head"
        decoder = self._model_class.base_model_prefix
        rules = NATIVE_NAMES if self.layout == NATIVE else FAMILY_NAMES
        return translate_names(self.tensors, rules, decoder, head, own)

    def _build_vision(self, tower: TowerDescription, settings: Settings) -> VisionConfig:
        source = self._source or self.path
        try:
            return VisionConfig(
                vision_tower=os.path.abspath(source) if os.path.isdir(source) else source,
                **{**vars(tower), **settings.fields},
            )
        except ValueError as error:  # It names a flag, which nobody may have given.
            raise ValueError(f"{self.where}: the settings of its config.json: {error}") from error

    def _describe(self, config: Mapping[str, Any], vision: VisionConfig) -> dict[str, str]:
        kind = "LlavaForConditionalGeneration of transformers" if self.layout == NATIVE else "LLaVA family"
        version = f" (transformers {config['transformers_version']})" if "transformers_version" in config else ""
        held = "its weights in the file" if self.names.tower else "its weights at its source"
        return {
            "layout": kind + version,
            "language model": self._model_class.config_class.model_type,
            "tower": f"{vision.vision_config['model_type']} of {vision.vision_tower}, {held}",
            "projector": vision.projector_type,
            "resampler": vision.resampler_type or "none",
        }

    def find_grounding(self, tokenizer: PreTrainedTokenizerBase) -> GroundingConfig | None:
        """What coordinates are to the checkpoint, with the first bin's id where its tokenizer has bins already."""
        if self.grounding is None:
            return None
        first = tokenizer.get_vocab().get(bin_tokens(self.grounding)[0])
        return replace(self.grounding, first_bin=first)

    def fill_report(self, model: nn.Module) -> None:
        """Say what became of every tensor.

        Args:
            model: built as ``config`` says; its tensors may be without data.

        Raises:
            ValueError: a part of it is left over, which nothing here runs.
        """
        own = set(model.state_dict())
        self.names = self._translate_names(own)
        report = self.report
        leftover = [name for name in self.names.parts if name not in own and vision_module_of(name) is not None]
        for name in leftover:
            part = self.names.parts.pop(name)
            if vision_module_of(name) != "image_newline":
                raise ValueError(
                    f"{self.where} has {part.stored}, which the {vision_module_of(name)} that its config.json "
                    "describes does not have; it is of another kind"
                )
            report.left_out[part.stored] = "no image of this model has rows that end"
        report.left_out |= self.names.left_out
        tied = set(getattr(model, "all_tied_weights_keys", ()))
        for name, part in self.names.parts.items():
            if name == part.stored:
                report.copied.append(name)
            else:
                report.renamed.setdefault(part.stored, []).append(name)
        report.missing = sorted(
            name for name in own - set(self.names.parts) - tied if vision_module_of(name) != "vision_tower"
        )
        # A module that is not there at all is new; of half a one nothing would be what it was.
        there = {vision_module_of(name) or COORDINATES for name in self.names.parts if is_added(name)}
        halves = [
            name for name in report.missing if is_added(name) and (vision_module_of(name) or COORDINATES) in there
        ]
        if halves:
            raise ValueError(
                f"{self.where} lacks {list_names(halves)}, and has the rest of the module: it is damaged, or another "
                "one than its config.json describes"
            )

    def state_dict(self, with_vision: bool = True) -> dict[str, Tensor]:
        """Its tensors by today's names, the tower's not among them; without those of vision modules if asked for."""
        return {
            name: part.read(self.tensors)
            for name, part in self.names.parts.items()
            if with_vision or (vision_module_of(name) is None and COORDINATES not in name.split("."))
        }

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of its language model is stored in."""
        first = next(part for name, part in self.names.parts.items() if vision_module_of(name) is None)
        return first.read(self.tensors).dtype

    def describe(self) -> None:
        """Complete the report, without reading weights: what becomes of the tower's is said when they are.

        Raises:
            ValueError: the checkpoint could not be loaded.
        """
        config = build_config(self._model_class.config_class, self.config, self.where)
        with torch.device("meta"):
            model = cast(Callable[..., nn.Module], self._model_class)(config)
        self.fill_report(model)
        here = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        there = {name: part.shape(self.tensors.shapes) for name, part in self.names.parts.items()}
        info = {
            "missing_keys": self.report.missing,
            "unexpected_keys": there.keys() - here.keys(),
            "mismatched_keys": [
                (name, there[name], here[name]) for name in there if here.get(name, there[name]) != there[name]
            ],
        }
        check_loaded(info, self.where)

    def read(self, model_class: type[LlavaMetaForCausalLM], _path: str, **options: Any) -> tuple[Any, dict[str, Any]]:
        """As ``model_class.from_pretrained`` of a folder that holds the same in today's layout."""
        with torch.device("meta"):
            self.fill_report(cast(Callable[..., nn.Module], model_class)(options["config"]))
        del options["vision_tower"]  # It was looked at when the checkpoint was opened.
        read: tuple[Any, dict[str, Any]] = model_class.from_pretrained(
            None, state_dict=self.state_dict(), fill_tower=self.fill_tower, **options
        )
        return read

    def fill_tower(self, model: LlavaMetaForCausalLM) -> None:
        """Give a model the tower's weights: from the source where these are what the checkpoint holds, else its own.

        A tower whose weights lie nowhere else goes into checkpoints of the model.
        """
        if not self.names.tower:
            model.load_vision_tower(self._source)
            self.report.found["tower"] += ", which is left outside"
            return
        tower = cast(HuggingFaceTower, model.get_model().vision_tower)
        stored = {name: self.tensors[there] for name, there in self.names.tower.items()}
        weights = tower.read_weights(self.path, stored)
        unused = len(stored) - len(weights)
        note = f"{len(weights)} tensors" + (
            f", and {unused} that the selected layer does not need are left out" if unused else ""
        )
        why = "as no source has them (--vision_tower FOLDER names one)"
        if self._source is not None:
            why = _find_difference(tower, self._source, weights)
        if not why:
            model.load_vision_tower(self._source)
            self.report.found["tower"] += f": {note}; the same as at the source, and so not stored again"
            return
        if self._frozen_note is not None and why.startswith("as those of"):
            self.report.changed.append(self._frozen_note)
        tower.vision_tower.load_state_dict(weights)
        vision = replace(model.get_model().vision, vision_tower_hash=hash_weights(weights), save_vision_tower=True)
        model.set_vision(vision)
        self.report.found["tower"] += f": {note}; stored with the model, {why}"


def find_source(config: Mapping[str, Any], path: str, vision_tower: str | None) -> str:
    """Where a checkpoint's vision model lies: what was given, else what its configuration says, also from beside it."""
    if vision_tower is not None:
        return vision_tower
    named = str(config["mm_vision_tower"])
    beside = Path(path).absolute().parent / named
    return str(beside) if not os.path.isdir(named) and os.path.isdir(path) and beside.is_dir() else named


def _find_difference(tower: HuggingFaceTower, source: str, weights: Mapping[str, Tensor]) -> str:
    """How the weights at a source differ from those that a file has in a type of its own; empty where they do not."""
    try:
        theirs = tower.read_weights(source)
    except ValueError:  # Its configuration is there, and no weights.
        return f"as {source} has none (--vision_tower FOLDER names another place)"
    differ = [name for name, tensor in weights.items() if not torch.equal(theirs[name].to(tensor.dtype), tensor)]
    return f"as those of {source} are others ({list_names(differ, 1)})" if differ else ""


def _family_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the family's ``config.json``, with the model type that its class has today."""
    architecture = (config.get("architectures") or [""])[0]
    if config.get("model_type") == "llava" and architecture in _FAMILY_TYPES:
        return {**config, "model_type": _FAMILY_TYPES[architecture]}
    return dict(config)


def _text_entries(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """The entries of the language model within transformers' own configuration, with all defaults."""
    try:
        whole = LlavaConfig.from_dict(dict(config))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{where}: its config.json is no configuration of LlavaForConditionalGeneration: {error}"
        ) from error
    entries = cast(PretrainedConfig, whole.text_config).to_dict()
    has_head = any(name.endswith("lm_head.weight") for name in tensors)
    return {**entries, "tie_word_embeddings": not has_head, "architectures": None}


def _find_grounding(shapes: Mapping[str, tuple[int, ...]]) -> GroundingConfig | None:
    """What coordinates are to a checkpoint, told from its tables; None without any."""
    bins = {name.rpartition(".")[2]: shape[0] for name, shape in shapes.items() if COORDINATES in name.split(".")}
    if not bins:
        return None
    return GroundingConfig(LAPE, bins["temporal_input"], bins["height_input"])


def _download(name: str, where: str) -> Path:
    """The folder of a hub name's files, downloaded where they are not there yet."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model"]))
    except OSError as error:
        raise ValueError(f"{where} cannot be downloaded: {error}") from error
