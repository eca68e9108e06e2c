"""The models: backbones, vision modules, loading.

Nothing heavy is imported until a class of ``AVAILABLE_MODELS`` (or ``load_model``) is asked for. transformers' Auto
classes know all of them from here on (see ``backbones``).
"""

from __future__ import annotations

from typing import Any

from llava.model.backbones import (
    AVAILABLE_MODELS,
    BACKBONES,
    VARIANTS,
    find_class,
    register_backbone,
    split_type,
    variant_type,
)

__all__ = ["AVAILABLE_MODELS", "BACKBONES", "VARIANTS", "load_model", "register_backbone", "split_type", "variant_type"]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from llava.model.loading import load_model

        return load_model
    return find_class(name)


def __dir__() -> list[str]:
    names = [name for classes in AVAILABLE_MODELS.values() for name in classes]
    return sorted([*globals(), "load_model", *names])
