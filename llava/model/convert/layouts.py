"""Which layout a checkpoint folder has, told from its ``config.json``, and what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAMILY = "family"
"""LLaVA, LLaVA-NeXT, LLaVA-ST and forks: a language model's configuration with entries such as ``mm_vision_tower``."""
NATIVE = "native"
"""transformers' ``LlavaForConditionalGeneration``: a configuration for text and one for vision."""

_NATIVE_TYPE = "llava"
_RELATIVES = ("llava_next", "llava_next_video", "llava_onevision", "video_llava", "vipllava")
"""Model types of transformers' own that hold other models than ``NATIVE``."""

_ADAPTER_FILE = "non_lora_trainables.bin"
"""Beside the family's adapters; this library's have a file of safetensors of that name."""


def find_layout(config: Mapping[str, Any], path: str, flag: str) -> str | None:
    """The layout of a folder, None for a plain language model and for what this library wrote.

    Args:
        config: the entries of its ``config.json``.
        path: the folder or hub name.
        flag: what an error calls it.

    Raises:
        ValueError: a relative whose layout is not read; says what to take.
    """
    if config.get("mm_vision_config"):  # This library's own.
        return None
    model_type = config.get("model_type")
    if Path(path, _ADAPTER_FILE).is_file():
        raise ValueError(
            f"{flag} {path!r} holds LoRA adapters of the LLaVA family ({_ADAPTER_FILE}); merge them with their "
            "base model by the code that trained them (scripts/merge_lora_weights.py), and give the merged folder"
        )
    if isinstance(config.get("text_config"), Mapping) and "vision_config" in config:
        if model_type == _NATIVE_TYPE:
            return NATIVE
        if model_type in _RELATIVES:
            raise ValueError(
                f"{flag} {path!r} is a {model_type} of transformers, of which only {_NATIVE_TYPE} is read; take the "
                "checkpoint that it was converted from (LLaVA-NeXT's own), if there is one"
            )
        return None
    return FAMILY if config.get("mm_vision_tower") else None
