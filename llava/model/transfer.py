"""Parameters of one checkpoint in the model of another, where names and shapes agree."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llava.messages import list_names
from llava.model.convert.names import FAMILY_NAMES, translate_names
from llava.model.convert.tensors import StoredTensors
from llava.model.generation import MultimodalGeneration
from llava.model.pretrained import (
    NOT_JUST_TENSORS,
    UNSAFE_WEIGHTS,
    describe_damage,
    forget_implementations,
    locate_model,
    quiet_transformers,
)
from llava.model.visual import vision_module_of

Status = Literal["copied", "new", "shape mismatch"]
_MOST_NAMED = 3


@dataclass(frozen=True)
class TensorReport:
    """What happened to one parameter of the model.

    ``source_file`` is the file of the backbone that has it, or all of its files where transformers
    makes the parameter of several stored ones (the experts of a mixture).
    """

    name: str
    shape: tuple[int, ...]
    status: Status
    source_shape: tuple[int, ...] | None = None
    source_file: str | None = None


@dataclass(frozen=True)
class TransferReport:
    """What ``copy_parameters`` did: each parameter of the model, and what of the backbone found no place."""

    backbone: str
    tensors: list[TensorReport]
    unused: list[str]

    def names(self, status: Status) -> list[str]:
        return [tensor.name for tensor in self.tensors if tensor.status == status]

    def __str__(self) -> str:
        lines = [f"weights from {self.backbone}"]
        for status in ("copied", "new", "shape mismatch"):
            lines.append(f"  {status:<15}{len(self.names(status)):>6} tensors{self._examples(status)}")
        unused = f": {list_names(self.unused, _MOST_NAMED)}" if self.unused else ""
        return "\n".join([*lines, f"  {'unused':<15}{len(self.unused):>6} tensors{unused}"])

    def _examples(self, status: Status) -> str:
        named = [
            tensor.name if status == "new" else f"{tensor.name} {tensor.source_shape} for {tensor.shape}"
            for tensor in self.tensors
            if tensor.status == status
        ]
        return f": {list_names(named, _MOST_NAMED)}" if named and status != "copied" else ""

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write all of it as JSON: ``{"backbone", "tensors": [{"name", "shape", "status", ...}], "unused"}``."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def copy_parameters(model: PreTrainedModel, backbone: str) -> TransferReport:
    """Copy the language model of another checkpoint, a folder or hub name, parameter by parameter.

    Vision modules are never copied: they belong to the model that they were trained with.

    Raises:
        ValueError: it cannot be read, or not one parameter of it fits.
    """
    source = _read_language_model(backbone)
    files = _files_of_tensors(backbone)
    # For parameters that transformers puts together of several stored ones, as a mixture's experts.
    every_file = ", ".join(sorted(set(files.values()))) or None
    tensors = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The other model may see too; its tower and projector fit its own features, not ours.
            tensor = None if vision_module_of(name) else source.get(name)
            if tensor is None:
                tensors.append(TensorReport(name, tuple(parameter.shape), "new"))
                continue
            fits = tensor.shape == parameter.shape  # Another vocabulary or width: left as it is, and reported.
            if fits:
                parameter.copy_(tensor)
            status: Status = "copied" if fits else "shape mismatch"
            file = files.get(name, every_file)
            tensors.append(TensorReport(name, tuple(parameter.shape), status, tuple(tensor.shape), file))
    report = TransferReport(backbone, tensors, sorted(set(source) - {tensor.name for tensor in tensors}))
    if not report.names("copied"):
        raise ValueError(
            f"--backbone_model {backbone!r}: none of its {len(source)} tensors fits {model.config.model_type}; "
            f"they begin with {list_names(sorted(source), _MOST_NAMED)}"
        )
    return report


def _read_language_model(path: str) -> dict[str, torch.Tensor]:
    """The parameters of a checkpoint's language model, each once."""
    path = locate_model(path, "--backbone_model")
    try:
        with quiet_transformers():
            config = forget_implementations(AutoConfig.from_pretrained(path, trust_remote_code=False))
            model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype="auto", trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"--backbone_model {path!r} cannot be read: {error}") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--backbone_model {path!r}: {describe_damage(path, error)}") from error
    except UNSAFE_WEIGHTS as error:
        raise ValueError(f"--backbone_model {path!r}: {NOT_JUST_TENSORS}") from error
    return {name: parameter for name, parameter in model.named_parameters() if not vision_module_of(name)}


def _files_of_tensors(path: str) -> dict[str, str]:
    """The file of each stored tensor, for a folder of safetensors; empty for anything else."""
    files: dict[str, str] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file.name)
    return files


# Weights of projector, image newline and resampler from another checkpoint.

_MODULES = ("mm_projector", "image_newline", "vision_resampler")


def load_adapter(model: MultimodalGeneration, path: str) -> list[str]:
    """Copy projector, image newline and resampler of a checkpoint into a model; returns the names of their parameters.

    What the checkpoint lacks of them stays as it is: a newline may be new to a projector that is not.

    Args:
        path: a checkpoint folder, or a ``.safetensors`` or ``.bin`` file. Names may have any prefix before
            ``mm_projector``, ``image_newline`` or ``vision_resampler``; those of LLaVA-ST's resampler are translated.

    Raises:
        ValueError: no such file, no such weights in it, or weights of another shape.
    """
    weights = _translate(_open_weights(path))
    # Names from the decoder on: what stands before it differs from library to library.
    decoder = model.get_model()
    own = {name: p for name, p in decoder.named_parameters() if name.split(".")[0] in _MODULES}
    wrong = [
        f"{name} {tuple(weights[name].shape)} (here {tuple(own[name].shape)})"
        for name in weights
        if name in own and weights[name].shape != own[name].shape
    ]
    # A projector of another type has other names, and no part of it would do.
    unknown = sorted(set(weights) - set(own))
    if not weights or wrong or unknown:
        what = f"weights unknown here: {unknown[:3]}" if unknown else "no projector"
        what = f"other shapes: {wrong[:3]}" if wrong else what
        raise ValueError(f"--pretrain_mm_mlp_adapter {path!r} has {what}; it must come from the same kind of model")
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    return sorted(weights)


def _open_weights(path: str) -> dict[str, StoredTensors]:
    """The files of a checkpoint folder, or the one that a path names, by the names of their tensors."""
    where, folder = f"--pretrain_mm_mlp_adapter {path!r}", Path(path)
    files = [folder]
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors")) or [folder / "mm_projector.bin"]
    if not all(file.is_file() for file in files):
        raise ValueError(f"{where}: no such file, or a folder without .safetensors and mm_projector.bin")
    return {name: stored for file in files for stored in [StoredTensors(file, where)] for name in stored}


def _translate(weights: Mapping[str, StoredTensors]) -> dict[str, Tensor]:
    """What belongs to projector, newline and resampler, under this library's names; nothing else is read."""
    names: dict[str, str] = {}
    for name in weights:
        parts = name.split(".")
        # Names begin with whatever holds the decoder there: model., base_model.model.model., module. ...
        start = next((i for i, part in enumerate(parts) if part in _MODULES), None)
        if start is not None:
            names[".".join(parts[start:])] = name
    translated = translate_names(names, FAMILY_NAMES, "", "", set())
    stored = {short: weights[name][name] for short, name in names.items()}
    return {name: part.read(stored) for name, part in translated.parts.items()}
