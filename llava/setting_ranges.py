"""Kinds and ranges of settings: what flags and ``config.json`` give is looked at before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, fields
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from llava.messages import shorten

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_KINDS: dict[type, str] = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object",
    tuple: "three numbers", NoneType: "null",
}  # fmt: skip
WIDTH = (1, 2**16)
AT_MOST_WIDE = (-math.inf, 2**16)
"""Of a resampler, which says itself what it needs at least; settings of one that a model does not have do not count."""
RANGES: dict[str, tuple[float, float]] = {
    "hidden_size": WIDTH, "image_size": (1, 2**14), "patches_per_side": (1, 2**10), "image_resize_size": (1, 2**15),
    "projector_width": WIDTH, "resampler_width": AT_MOST_WIDE, "resampler_heads": AT_MOST_WIDE,
    "perceiver_latents": (-math.inf, 2**20), "perceiver_latents_fast": (-math.inf, 2**20),
    "perceiver_depth": (-math.inf, 256), "qformer_latents": (-math.inf, 2**20), "qformer_depth": (-math.inf, 256),
    "num_frames": (1, 100_000), "slow_frames": (0, 100_000), "frames_upbound": (0, 100_000), "video_fps": (0, 10_000),
    "vision_select_layer": (-1000, 1000), "image_mean": (-1000, 1000), "image_std": (1e-4, 1000),
    "num_temporal": (2, 1000), "num_spatial": (2, 1000), "first_bin": (0, 2**31),
}  # fmt: skip
"""The least and the most of a setting: wider than any model, and far from what a machine cannot hold."""


def check_kinds(settings: DataclassInstance, names: Mapping[str, str]) -> None:
    """A ValueError for a setting of another kind than its field, or a number that is not finite.

    Args:
        settings: whose annotations say the kinds.
        names: what errors call a field.
    """
    for item, kinds in _kinds_of(type(settings)):
        value = getattr(settings, item.name)
        if not _is_of(value, kinds):
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            raise ValueError(f"{names[item.name]} is {shorten(value)}; expected {expected}")


def check_ranges(settings: DataclassInstance, names: Mapping[str, str]) -> None:
    """A ValueError for a number outside of ``RANGES``."""
    for item, _ in _kinds_of(type(settings)):
        value = getattr(settings, item.name)
        if item.name not in RANGES or value is None:
            continue
        least, most = RANGES[item.name]
        for number in value if isinstance(value, tuple) else (value,):
            if not least <= number <= most:
                span = f"{least:,} to {most:,}" if math.isfinite(least) else f"at most {most:,}"
                raise ValueError(f"{names[item.name]} is {shorten(value)}; it must be {span}")


@cache
def _kinds_of(settings: type[Any]) -> list[tuple[Field[Any], tuple[type, ...]]]:
    """The fields that a caller gives, each with the kinds of its values."""
    hints = get_type_hints(settings)
    found = []
    for item in fields(settings):
        if item.init:
            hint = hints[item.name]
            kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
            found.append((item, tuple(get_origin(kind) or kind for kind in kinds)))
    return found


def _is_of(value: object, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int | float) and not math.isfinite(value):
        return False
    if isinstance(value, tuple):
        return tuple in kinds and len(value) == 3 and all(_is_of(number, (float,)) for number in value)
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))
