"""LoRA and k-bit weights in a training run: the flags, and what they ask of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llava.model.loading import LoadedModel
from llava.model.lora import adapter_settings, add_adapters, check_peft, has_adapters, is_adapter_folder
from llava.model.quantization import Quantization

RANK, ALPHA, DROPOUT = 64, 16, 0.05
"""Settings of fresh adapters where a flag is not given."""


@dataclass
class LoraArguments:
    """Flags of LoRA and k-bit loading, under the LLaVA family's names."""

    lora_enable: bool = field(
        default=False,
        metadata={
            "help": "Train LoRA adapters on the linear layers of the language model instead of the language model: its "
            "own weights, embeddings and head are frozen. Projector and resampler train as --mm_tunable_parts says."
        },
    )
    lora_r: int | None = field(default=None, metadata={"help": f"Rank of the adapters (default {RANK})."})
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": f"Adapters are scaled by --lora_alpha over --lora_r (default {ALPHA})."},
    )
    lora_dropout: float | None = field(
        default=None,
        metadata={"help": f"Share of an adapter's inputs dropped in training (default {DROPOUT})."},
    )
    lora_weight_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint with adapters to train on, with --model_name_or_path as their base model."},
    )
    bits: int = field(
        default=16,
        metadata={
            "help": "8 or 4 holds the linear layers of the language model in so many bits, which needs --lora_enable; "
            "16 (default) leaves all weights as they come."
        },
    )
    quant_type: str = field(default="nf4", metadata={"help": "Code of 4-bit weights, nf4 (default) or fp4."})
    double_quant: bool = field(
        default=True, metadata={"help": "Quantise the scales of 4-bit weights too (default true)."}
    )

    def check_lora(self) -> None:
        """A ValueError for values that do not fit, or a package that is missing."""
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"--lora_r is {self.lora_r}; it must be at least 1")
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1")
        if self.bits != 16:
            Quantization(self.bits, self.quant_type)
        if self.lora_enable:
            check_peft()
        elif self.bits != 16:
            raise ValueError(f"--bits {self.bits} needs --lora_enable true: quantised weights cannot be trained")
        elif self.lora_weight_path:
            raise ValueError("--lora_weight_path was given without --lora_enable true; add it, or leave the path out")

    def quantization(self) -> Quantization | None:
        """How ``--bits`` and its companions hold the frozen weights; None for as they come."""
        if self.bits == 16:
            return None
        args: Any = self
        compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        return Quantization(self.bits, self.quant_type, self.double_quant, compute, args.device)


def lora_loading(model_name_or_path: str, args: LoraArguments) -> dict[str, Any]:
    """What the flags ask of ``load_model``: a model or adapters on their base, and how many bits.

    Raises:
        ValueError: adapters lie where this run, which trains none, would read or write a whole model.
    """
    path, base = model_name_or_path, None
    if args.lora_weight_path:
        path, base = args.lora_weight_path, model_name_or_path
        if not is_adapter_folder(path):
            raise ValueError(f"--lora_weight_path {path!r} holds no adapters (no adapter_config.json)")
    loading = {"model_name_or_path": path, "model_base": base, "quantization": args.quantization()}
    if args.lora_enable:
        return loading
    if is_adapter_folder(path):
        raise ValueError(
            f"{path!r} holds LoRA adapters; train them on with --lora_enable true, or merge them first: "
            f"python -m llava.model.merge_lora --model_path {path} --output_dir MERGED"
        )
    output_dir = str(args.output_dir)  # type: ignore[attr-defined]
    if is_adapter_folder(output_dir):
        raise ValueError(
            f"--output_dir {output_dir!r} holds the LoRA adapters of another run, and this one trains none; "
            "give another folder"
        )
    return loading


def set_up_adapters(loaded: LoadedModel, source: str, parts: Sequence[str], args: LoraArguments) -> None:
    """Give a model fresh adapters, or check those that it was loaded with against the flags.

    Args:
        loaded: the run's model.
        source: what it was loaded from.
        parts: what ``--mm_tunable_parts`` names.
        args: the flags of a run with ``--lora_enable``.

    Raises:
        ValueError: the parts leave the adapters out, loaded adapters have other settings, or the base model
            would stand nowhere.
    """
    model = loaded.model
    if "mm_language_model" not in parts:
        raise ValueError(
            f"--lora_enable adapts the language model, but --mm_tunable_parts is {','.join(parts)}; add "
            "mm_language_model, or leave --lora_enable out"
        )
    if loaded.transfer is not None:
        raise ValueError(
            "--lora_enable stores adapters and where their base model lies, but with --init_from_backbone that model "
            "lies nowhere; leave one of the two out"
        )
    if not has_adapters(model):
        add_adapters(
            model,
            source,
            rank=RANK if args.lora_r is None else args.lora_r,
            alpha=ALPHA if args.lora_alpha is None else args.lora_alpha,
            dropout=DROPOUT if args.lora_dropout is None else args.lora_dropout,
        )
        return
    for name, stored in adapter_settings(model).items():
        if getattr(args, name) not in (None, stored):
            raise ValueError(
                f"--{name} is {getattr(args, name)}, but the adapters in {source!r} have {stored}; leave the flag out"
            )
