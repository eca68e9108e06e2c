"""The contract of a vision tower."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

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
