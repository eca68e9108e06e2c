"""Tower, projector and resampler: from frames to token features."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from llava.config import VisionConfig
from llava.model.multimodal_encoder.base import VisionTower
from llava.types import MediaKind


def as_media(images: list[Tensor] | Tensor) -> list[Tensor]:
    """Bring what callers pass as ``images`` to a list of (frames, 3, side, side) tensors.

    A tensor is taken apart along its first axis; an entry (3, side, side) is one image.
    """
    return [image.unsqueeze(0) if image.ndim == 3 else image for image in images]


def infer_modalities(images: list[Tensor] | Tensor) -> list[MediaKind]:
    """Modalities of entries that come without: (3, side, side) is an image, a stack is a video."""
    return ["image" if image.ndim == 3 else "video" for image in images]


def encode_visual(
    tower: VisionTower,
    projector: nn.Module,
    resampler: nn.Module | None,
    media: list[Tensor],
    modalities: list[MediaKind],
) -> list[Tensor]:
    """Encode all media of a batch: one call of the tower, one of the resampler for each length.

    Args:
        tower: frames to (frames, patches, tower width).
        projector: tower width to the language model's width.
        resampler: see ``Resampler.forward``; None keeps every patch.
        media: one (frames, 3, side, side) tensor a medium.
        modalities: the kind of each medium.

    Returns:
        One (tokens, width) tensor a medium, in order.
    """
    if len(media) != len(modalities):
        raise ValueError(f"{len(media)} images or videos came with {len(modalities)} modalities; pass one for each")
    features = projector(tower(torch.cat(media))).split([len(frames) for frames in media])
    groups: dict[tuple[MediaKind, int], list[int]] = {}
    for i, (kind, frames) in enumerate(zip(modalities, media, strict=True)):
        groups.setdefault((kind, len(frames)), []).append(i)
    encoded: dict[int, Tensor] = {}
    for (kind, _), members in groups.items():
        group = torch.stack([features[i] for i in members])
        tokens = group.flatten(1, 2) if resampler is None else resampler(group, kind)
        encoded.update(zip(members, tokens, strict=True))
    return [encoded[i] for i in range(len(media))]


def encode_nothing(
    tower: VisionTower, projector: nn.Module, resampler: nn.Module | None, vision: VisionConfig
) -> Tensor:
    """Run zero media through the trainable vision modules.

    The (0, width) result joins no token, yet ties the modules into the graph with gradients of
    exactly zero. A rank whose batch is text alone needs this: collectives of DDP and ZeRO wait for
    every parameter on every rank.
    """
    # A projector without parameters hands on what the tower gives, in the tower's dtype.
    weight = next(chain(projector.parameters(), tower.parameters()))
    if tower.trainable:
        # Not every vision model takes no frames at all: of one, nothing is kept.
        patches = tower(weight.new_zeros((1, 3, vision.image_size, vision.image_size)))[:0]
    else:
        patches = weight.new_zeros((0, vision.num_patches, vision.hidden_size))
    features = projector(patches).unflatten(0, (0, vision.max_frames))
    return (features.flatten(1, 2) if resampler is None else resampler(features, "video")).flatten(0, 1)
