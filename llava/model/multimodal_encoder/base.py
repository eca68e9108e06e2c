"""The contract of a vision tower."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from llava.config import VisionConfig
from llava.registry import Registry


@dataclass(frozen=True)
class TowerDescription:
    """What a vision model's own files say: its configuration and how it wants its pixels.

    The names are those of ``VisionConfig``.
    """

    vision_config: dict[str, Any]
    hidden_size: int
    image_size: int
    patches_per_side: int
    image_resize_size: int | None
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]


class VisionTower(nn.Module, ABC):
    """A vision encoder that is frozen unless its parameters ask for gradients.

    While frozen it stays in evaluation mode and runs without recording gradients, whatever mode the
    model around it is in.

    Args:
        vision: side, statistics and layer that the tower is used with.
    """

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        self.vision = vision

    @classmethod
    @abstractmethod
    def describe(cls, source: str, config: PretrainedConfig) -> TowerDescription:
        """Describe the vision model at ``source``, a folder or hub name, whose configuration is ``config``.

        Raises:
            ValueError: the model does not see squares in a square grid of patches.
        """

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode normalised (frames, 3, side, side) pixels to (frames, patches, width)."""

    @abstractmethod
    def load_weights(self, source: str) -> str:
        """Fill the tower with the weights of ``source`` and return their hash.

        Raises:
            ValueError: the source cannot be read, or holds other weights than ``vision`` expects.
        """

    def freeze_unused(self) -> None:
        """Freeze parameters that ``encode`` never uses; they would wait in vain for a gradient."""

    @property
    def trainable(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def train(self, mode: bool = True) -> VisionTower:
        super().train(mode and self.trainable)
        return self

    def forward(self, frames: Tensor) -> Tensor:
        """Encode frames.

        Args:
            frames: (frames, 3, side, side), uint8, or floats that are normalised already.

        Returns:
            (frames, patches, width), patches row by row, without class or register tokens.
        """
        pixels = self.normalize(frames) if frames.dtype == torch.uint8 else frames.to(self.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            return self.encode(pixels)

    def normalize(self, frames: Tensor) -> Tensor:
        """uint8 (frames, 3, side, side) to the tower's dtype, by its mean and standard deviation."""
        scale = frames.new_tensor(self.vision.image_std, dtype=torch.float32).view(3, 1, 1) * 255
        shift = frames.new_tensor(self.vision.image_mean, dtype=torch.float32).view(3, 1, 1) * 255
        return ((frames.float() - shift) / scale).to(self.dtype)


TOWERS: Registry[type[VisionTower]] = Registry("vision tower")
"""Towers by the ``model_type`` of the vision model's configuration."""


def count_layers(vision: VisionConfig, num_layers: int) -> int:
    """How many of a vision model's layers stand before the selected hidden state.

    Hidden states are counted as in the list of the embeddings and every layer's output.
    """
    selected = vision.vision_select_layer
    kept = selected if selected >= 0 else num_layers + 1 + selected
    if not 1 <= kept <= num_layers:
        raise ValueError(
            f"--mm_vision_select_layer is {selected}, but {vision.vision_tower!r} has {num_layers} layers; "
            f"use 1 to {num_layers}, or -1 to {-num_layers}"
        )
    return kept


# How a vision model wants its images: squares of which side, cut and normalised how.


@dataclass(frozen=True)
class ImageFormat:
    """What a model's image processor does; None where it does not say.

    Attributes:
        side: side in pixels of the square that the model sees.
        resize: length of the shorter side before a centre crop.
        max_num_patches: for a processor of variable grids, the most patches of one image.
        mean, std: per channel, of pixels in [0, 1].
    """

    side: int | None
    resize: int | None
    max_num_patches: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_image_format(source: str, mean: Sequence[float], std: Sequence[float]) -> ImageFormat:
    """Read ``preprocessor_config.json`` of a vision model, where present.

    Args:
        source: a folder, or a name on the model hub.
        mean, std: statistics that hold where the file has none.

    Raises:
        ValueError: the processor makes images that are not square.
    """
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError):
        processor = {}
    size = processor.get("size")
    crop = processor.get("crop_size") if processor.get("do_center_crop") else None
    height, width = _height_and_width(crop or size)
    if height != width or (size and height is None):
        raise ValueError(
            f"--vision_tower {source!r} wants images of {height} x {width} pixels; only squares are supported: "
            "set one side for height and width in its preprocessor_config.json"
        )
    if processor.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return ImageFormat(
        side=height,
        resize=_shorter_side(size) if crop else None,
        max_num_patches=processor.get("max_num_patches"),
        mean=tuple(processor.get("image_mean") or mean),
        std=tuple(processor.get("image_std") or std),
    )


def square_side(size: int | Sequence[int], source: str, what: str) -> int:
    """The side of a square that is given as one number or as (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(
            f"--vision_tower {source!r} has {what} {height} x {width} in its config.json; only squares are supported: "
            "give one that has been trained on squares"
        )
    return height


def count_patches(source: str, side: int, patch: int, own_side: int) -> int:
    """Patches along a side.

    A remainder is an error, unless the model was made with it: SigLIP so400m cuts 384 pixels into 27
    patches of 14 and leaves the last six out.
    """
    if side % patch and side != own_side:
        raise ValueError(
            f"--vision_tower {source!r} sees {side} x {side} pixels in patches of {patch}, which is no "
            f"whole square grid; use a multiple of {patch} in its preprocessor_config.json"
        )
    return side // patch


def _height_and_width(size: int | Mapping[str, int] | None) -> tuple[int | None, int | None]:
    """A size as processors write it; a number or a shorter side stands for a square."""
    if not isinstance(size, Mapping):
        return size, size
    return size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))


def _shorter_side(size: int | Mapping[str, int] | None) -> int | None:
    return size.get("shortest_edge") if isinstance(size, Mapping) else size
