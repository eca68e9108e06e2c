"""Tower, projector and resampler: from frames to token features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llava.model.coordinates import COORDINATES
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.views import ViewMerger
from llava.types import MediaKind

VISION_MODULES = ("vision_tower", "mm_projector", "vision_resampler", "image_newline")
"""Attributes of a decoder that hold its vision modules; the first part of their parameters' names."""


def vision_module_of(name: str) -> str | None:
    """Which of ``VISION_MODULES`` a parameter or a module belongs to by its name, None for the language model's."""
    return next((module for module in VISION_MODULES if module in name.split(".")), None)


def is_added(name: str) -> bool:
    """Whether a parameter belongs to what this library adds to a language model: vision modules, coordinates."""
    return vision_module_of(name) is not None or COORDINATES in name.split(".")


def as_media(images: list[Tensor] | Tensor) -> list[Tensor]:
    """Bring what callers pass as ``images`` to a list of (frames, 3, side, side) tensors.

    A tensor is taken apart along its first axis; an entry (3, side, side) is one image.
    """
    return [image.unsqueeze(0) if image.ndim == 3 else image for image in images]


def infer_modalities(images: list[Tensor] | Tensor) -> list[MediaKind]:
    """Modalities of entries that come without: (3, side, side) is an image, a stack is a video.

    The views of an anyres image are a stack too: say that they are an image.
    """
    return ["image" if image.ndim == 3 else "video" for image in images]


def encode_visual(
    tower: VisionTower,
    projector: nn.Module,
    resampler: nn.Module | None,
    media: list[Tensor],
    modalities: list[MediaKind],
    image_sizes: Sequence[tuple[int, int]] | None = None,
    merger: ViewMerger | None = None,
    positions: Callable[[int], Tensor] | None = None,
) -> list[Tensor]:
    """Encode all media of a batch: one call of the tower, one of the resampler for images and each length of video.

    Args:
        tower: frames to (frames, patches, tower width).
        projector: tower width to the language model's width.
        resampler: see ``Resampler.forward``; None keeps every patch.
        media: one (frames, 3, side, side) tensor a medium, the frames of an anyres image being its views.
        modalities: the kind of each medium.
        image_sizes: original (height, width) of each medium; needed for anyres images alone.
        merger: puts the views of anyres images together; None where an image is one frame.
        positions: from a number of frames to (frames, patches, width) embeddings of where and when the patches are,
            added before the resampler; None adds nothing.

    Returns:
        One (tokens, width) tensor a medium, in order.
    """
    if len(media) != len(modalities):
        raise ValueError(f"{len(media)} images or videos came with {len(modalities)} modalities; pass one for each")
    if merger is not None:
        merger.check(media, modalities, image_sizes)
    features = projector(tower(torch.cat(media))).split([len(frames) for frames in media])
    if positions is not None:
        features = tuple(feature + positions(len(feature)).to(feature.dtype) for feature in features)
    groups: dict[tuple[MediaKind, int], list[int]] = {}
    for i, (kind, frames) in enumerate(zip(modalities, media, strict=True)):
        # Each view of an image is resampled on its own; the frames of a video are together.
        groups.setdefault((kind, 1 if kind == "image" else len(frames)), []).append(i)
    encoded: dict[int, Tensor] = {}
    for (kind, length), members in groups.items():
        group = torch.cat([features[i] for i in members]).unflatten(0, (-1, length))
        tokens = group.flatten(1, 2) if resampler is None else resampler(group, kind)
        for i, parts in zip(members, tokens.split([len(media[i]) // length for i in members]), strict=True):
            if kind == "image" and merger is not None:
                assert image_sizes is not None
                encoded[i] = merger(parts, image_sizes[i])
            else:
                encoded[i] = parts.flatten(0, 1)
    return [encoded[i] for i in range(len(media))]
