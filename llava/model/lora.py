"""LoRA: adapters on the linear layers of the language model, their files, and their merge."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from packaging.version import Version
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llava.compat import LOWEST_PEFT, forget_adapters, has_adapters, inject_adapters, kept_out_of_checkpoints
from llava.messages import list_names
from llava.model.generation import MultimodalGeneration
from llava.model.quantization import find_linear_layers, quantized_bits
from llava.model.visual import is_added

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OTHER_WEIGHTS = "non_lora_trainables.safetensors"
"""Files of a checkpoint with adapters: the first two in peft's format, the third with the vision modules."""

# peft's names: of the only adapter of a model, and of what its files put before each parameter.
_ADAPTER = "default"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraSettings:
    """What fresh adapters are; the text under each field is its flag's help."""

    r: int = 64
    """Rank of the adapters."""
    alpha: int = 16
    """Adapters are scaled by --lora_alpha over --lora_r."""
    dropout: float = 0.05
    """Share of an adapter's inputs dropped in training."""


def check_peft() -> None:
    """A ValueError that says how to get peft, where it is missing or too old."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("LoRA adapters need the peft package: pip install 'llava-babylm[lora]'")
    found = importlib.metadata.version("peft")
    if Version(found) < Version(LOWEST_PEFT):
        raise ValueError(
            f"LoRA adapters need peft {LOWEST_PEFT} or newer, and {found} is installed: pip install -U peft"
        )


def is_adapter_parameter(name: str) -> bool:
    return any(component.startswith("lora_") for component in name.split("."))


def add_adapters(model: MultimodalGeneration, base: str, rank: int, alpha: int, dropout: float) -> None:
    """Put fresh adapters on the language model's linear layers, in place; all else is frozen.

    A layer then computes x W + (alpha / rank) dropout(x) A B, with A (width, rank) and B (rank, width). B starts at
    zero: nothing changes before the first step. See Hu et al., "LoRA", arXiv 2106.09685. ``base``, a folder or hub
    name, goes into ``adapter_config.json``.
    """
    check_peft()
    from peft import LoraConfig

    # By full names: peft matches short ones as endings, and would find layers of the tower too.
    layers = find_linear_layers(model)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers, bias="none"
    )
    _inject(model, config, os.path.abspath(base) if os.path.isdir(base) else base)


def set_up_adapters(model: MultimodalGeneration, base: str, asked: Mapping[str, Any]) -> None:
    """Give a model, loaded from ``base``, fresh adapters, or check those that it was loaded with.

    Args:
        asked: fields of ``LoraSettings``; None where a flag was not given.

    Raises:
        ValueError: loaded adapters have other settings.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if not has_adapters(model):
        # Only what was asked for is compared below: defaults may change between releases, checkpoints do not.
        fresh = LoraSettings(**given)
        add_adapters(model, base, fresh.r, fresh.alpha, fresh.dropout)
        return
    stored = adapter_settings(model)
    for name, value in given.items():
        if value != (has := stored[f"lora_{name}"]):
            raise ValueError(f"--lora_{name} is {value}, but the adapters in {base!r} have {has}; leave the flag out")


def _adapter_config(model: nn.Module) -> LoraConfig:
    return cast("dict[str, LoraConfig]", model.peft_config)[_ADAPTER]


def adapter_settings(model: nn.Module) -> dict[str, int | float]:
    """Rank, alpha and dropout of a model's adapters, by the names of their flags."""
    config = _adapter_config(model)
    return {"lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}


def describe_adapters(model: nn.Module) -> str:
    """What the adapters are, what they leave frozen, and in how many bits."""
    from peft.tuners.lora import LoraLayer

    config = _adapter_config(model)
    layers = sum(isinstance(module, LoraLayer) for module in model.modules())
    bits = quantized_bits(model)
    held = f" and held in {bits} bits" if bits else ""
    return (
        f"LoRA: of the language model only adapters train, of rank {config.r} (alpha {config.lora_alpha}) on {layers} "
        f"linear layers, whose own weights are frozen{held}; so is the rest of it, embeddings and head included"
    )


def is_adapter_folder(path: str) -> bool:
    return os.path.isfile(os.path.join(path, ADAPTER_CONFIG))  # noqa: PTH113 (Path's raises for a name that is too long)


def read_base(folder: str) -> str:
    """The base model that the adapters of a folder were trained on, as their configuration says."""
    config = json.loads(Path(folder, ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if config.get("peft_type") != "LORA" or not base:
        raise ValueError(
            f"{folder}/{ADAPTER_CONFIG} has peft_type {config.get('peft_type')!r} and base_model_name_or_path "
            f"{base!r}; expected LORA and a model (which --model_base can give)"
        )
    return base


def save_adapters(model: MultimodalGeneration, folder: str, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a checkpoint of a model with adapters: these, the vision modules and the configurations.

    ``state`` is the model's state dict, where it must be gathered from several ranks first.
    """
    state = model.state_dict() if state is None else state
    Path(folder).mkdir(parents=True, exist_ok=True)
    files = {ADAPTER_WEIGHTS: _adapter_weights(model, state), OTHER_WEIGHTS: _other_weights(model, state)}
    for file, weights in files.items():
        stored = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(stored, Path(folder, file), metadata={"format": "pt"})

    adapter_config = copy.copy(_adapter_config(model))
    adapter_config.inference_mode = True  # As peft stores it; loading to train says otherwise.
    if isinstance(adapter_config.target_modules, set | list):  # A set, whose order would differ from save to save.
        adapter_config.target_modules = sorted(adapter_config.target_modules)
    adapter_config.save_pretrained(folder)
    config = copy.deepcopy(model.config)
    # The base model is stored elsewhere, in its own precision: in how many bits this run held it is not recorded.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def load_adapters(model: MultimodalGeneration, folder: str, base: str) -> None:
    """Put the adapters of a folder on their base model, read from ``base``, with the vision modules trained along."""
    check_peft()
    from peft import LoraConfig

    _inject(model, LoraConfig.from_pretrained(folder), base)
    load_adapter_weights(model, folder)


@torch.no_grad()
def load_adapter_weights(model: MultimodalGeneration, folder: str) -> None:
    """Read the weights of a checkpoint into a model that has such adapters already.

    Raises:
        ValueError: a file is missing, or holds other weights than the model has.
    """
    stored_adapters, stored_others = read_adapter_weights(model, folder)
    state = model.state_dict()
    adapters = _adapter_weights(model, state)
    for name, tensor in stored_adapters.items():
        adapters[name].copy_(tensor)
    # Embeddings of new tokens are stored alone: the tables they belong to are the base model's.
    tables = _token_tables(model)
    for name, tensor in stored_others.items():
        if name in tables:
            # Rows of a table (tokens, width); all others stay the base model's.
            state[tables[name]][_new_token_ids(model)] = tensor.to(state[tables[name]])
        else:
            state[name].copy_(tensor)


def read_adapter_weights(model: MultimodalGeneration, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapters of a checkpoint and what trained beside them, which have the names and shapes of the model's.

    Raises:
        ValueError: a file is missing, or holds other weights than the model has.
    """
    state = model.state_dict()
    adapters = _read_like(_adapter_weights(model, state), folder, ADAPTER_WEIGHTS)
    return adapters, _read_like(_other_weights(model, state), folder, OTHER_WEIGHTS)


def merge_adapters(model: MultimodalGeneration) -> None:
    """Add each adapter's product to its layer's weight and take the adapters away; outputs stay, up to rounding.

    Raises:
        ValueError: the model has no adapters, or its weights are quantised and cannot take a sum.
    """
    if not has_adapters(model):
        raise ValueError("there is nothing to merge: the model has no adapters")
    if quantized_bits(model):
        raise ValueError("adapters cannot be merged into quantised weights; load the model without --bits")
    from peft.tuners.tuners_utils import BaseTunerLayer

    # W + (alpha / rank) A B in place of W; a list, as the modules are replaced while it is gone through.
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    forget_adapters(model)


def _inject(model: MultimodalGeneration, config: LoraConfig, base: str) -> None:
    layers = [model.get_submodule(name) for name in find_linear_layers(model)]
    # GPT-2's layers hold their weights transposed, except in k bits.
    config.fan_in_fan_out = any(isinstance(layer, Conv1D) for layer in layers)
    config.inference_mode = False
    inject_adapters(model, config, _ADAPTER)
    config.base_model_name_or_path = base


def _adapter_weights(model: MultimodalGeneration, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters' tensors of a state dict, under the names that peft's files give them."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, dict(state), adapter_name=_ADAPTER, save_embedding_layers=False)
    return {_PREFIX + name: tensor for name, tensor in weights.items()}


def _other_weights(model: MultimodalGeneration, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a base model may lack beside the adapters: vision modules, coordinates and the embeddings of new tokens."""
    if model.vision is None:
        return {}
    left_out = kept_out_of_checkpoints(model)
    # What config.json keeps out (a frozen tower) is found again by its source, here as in a whole checkpoint.
    weights = {name: tensor for name, tensor in state.items() if is_added(name) and name not in left_out}
    embeddings = {name: state[table][_new_token_ids(model)] for name, table in _token_tables(model).items()}
    return weights | embeddings


def _new_token_ids(model: MultimodalGeneration) -> list[int]:
    """Tokens that this library has added to the vocabulary."""
    assert model.vision is not None
    return [*model.vision.visual_token_ids, *(model.grounding.token_ids.values() if model.grounding else ())]


def _token_tables(model: MultimodalGeneration) -> dict[str, str]:
    """Embeddings and head (once where they are tied), by what their part for visual tokens is called in a file."""
    # A tied head is the embeddings' own tensor, which named_parameters lists once, under the first name.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tables = {
        "visual_tokens.input": model.get_input_embeddings(),
        "visual_tokens.output": model.get_output_embeddings(),
    }
    found = {key: names[id(module.weight)] for key, module in tables.items()}
    if len(set(found.values())) == 1:
        del found["visual_tokens.output"]
    return found


def _read_like(own: Mapping[str, Tensor], folder: str, file: str) -> dict[str, Tensor]:
    """The tensors of a file, which must have the names and shapes of ``own``."""
    path = Path(folder, file)
    if not path.is_file():
        raise ValueError(f"{folder!r} is no complete checkpoint with adapters: it has no {file}")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: it is cut short or damaged ({error}); copy it again") from error
    shapes = {name: [tuple(t[name].shape) if name in t else None for t in (stored, own)] for name in {*stored, *own}}
    # All are compared before the first is copied: a model half of one checkpoint is worse than an error.
    wrong = sorted(name for name, (there, here) in shapes.items() if there != here)
    if wrong:
        there, here = shapes[wrong[0]]
        raise ValueError(
            f"{path} does not fit its base model in {len(wrong)} tensors ({list_names(wrong)}): {wrong[0]} is {there} "
            f"in the file and {here} in the model; give the base model that it was trained on (--model_base, or in "
            "training --model_name_or_path), or another checkpoint"
        )
    return stored
