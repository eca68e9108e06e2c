"""k-bit loading: the frozen linear layers of a language model in 8 or 4 bits, through bitsandbytes."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from llava.model.generation import MultimodalGeneration
from llava.model.visual import vision_module_of

QUANT_TYPES = ("nf4", "fp4")


@dataclass(frozen=True)
class Quantization:
    """How the language model's linear layers are held.

    Where a field is a flag with the same default, the text under it is the flag's help.
    """

    bits: int
    """4 or 8."""
    quant_type: str = "nf4"
    """Code of 4-bit weights, nf4 (default) or fp4."""  # See Dettmers et al., "QLoRA", arXiv 2305.14314.
    double_quant: bool = True
    """Quantise the scales of 4-bit weights too (default true)."""
    compute_dtype: torch.dtype = torch.float32
    """What 4-bit weights are turned into to be multiplied."""
    device: str | torch.device | None = None
    """Where the model is put, and quantised while it is read. By default the current GPU, if there is one."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"--bits is {self.bits}; known: 16 (as the weights come), 8, 4")
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"--quant_type is {self.quant_type!r}; known: {', '.join(QUANT_TYPES)}")


def check_bitsandbytes(device: torch.device) -> None:
    """A ValueError where bitsandbytes is missing, or cannot work on a device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--bits 8 and --bits 4 need the bitsandbytes package: pip install 'llava-babylm[kbit]'")
    import bitsandbytes

    if device.type not in bitsandbytes.supported_torch_devices:
        known = ", ".join(sorted(bitsandbytes.supported_torch_devices))
        raise ValueError(
            f"--bits 8 and --bits 4: bitsandbytes {bitsandbytes.__version__} does not work on {device.type!r} "
            f"(only on {known}); leave --bits out"
        )


def quantization_options(
    quantization: Quantization, model_class: type[MultimodalGeneration], config: PretrainedConfig
) -> dict[str, Any]:
    """Arguments for ``from_pretrained`` that load the decoder's linear layers in k bits, and no others.

    Vision modules, head, embeddings and norms stay as they are: they train, or are too small to matter.
    """
    from transformers import BitsAndBytesConfig

    # bitsandbytes quantises while it moves weights to the device: there is no later moment for it.
    device = torch.device(quantization.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    check_bitsandbytes(device)
    settings: dict[str, Any] = {"llm_int8_skip_modules": _other_linear_layers(model_class, config)}
    if quantization.bits == 8:
        settings["load_in_8bit"] = True
    else:
        settings |= {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quantization.quant_type,
            "bnb_4bit_use_double_quant": quantization.double_quant,
            "bnb_4bit_compute_dtype": quantization.compute_dtype,
        }
    return {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": device}}


def quantized_bits(model: nn.Module) -> int | None:
    """The bits that a model's linear layers are held in; None for a model as it came."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return None
    # transformers keeps what loaded the weights on the model.
    return 4 if quantizer.quantization_config.load_in_4bit else 8


def count_weights(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for: bitsandbytes packs two of 4 bits into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _other_linear_layers(model_class: type[MultimodalGeneration], config: PretrainedConfig) -> list[str]:
    # For the names of its layers alone: no memory, no random numbers.
    with torch.device("meta"), no_init_weights():
        skeleton = model_class(config)
    quantized = set(find_linear_layers(skeleton))  # bitsandbytes would take every other one too, the tower's included
    linear = {name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    return sorted(linear - quantized)


# The linear layers of a language model, found by structure: what carries adapters and may be held in k bits.


def find_linear_layers(model: MultimodalGeneration) -> list[str]:
    """Names of the linear layers of a model's decoder: ``nn.Linear``, its kin in k bits, GPT-2's ``Conv1D``.

    Vision modules, embeddings and head are not among them; nor are the routers and experts of a
    mixture, which transformers holds as bare parameters and not as layers.
    """
    return [
        f"{model.base_model_prefix}.{name}"
        for name, module in model.get_model().named_modules()
        if isinstance(module, nn.Linear | Conv1D) and vision_module_of(name) is None
    ]
