"""The contract of a vision tower, and the choice of one by the vision model's ``model_type``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from llava.compat import linear_by_onednn
from llava.config import VisionConfig
from llava.model.loading_errors import check_counts
from llava.model.pretrained import foreign_code_note, forget_implementations, locate_model
from llava.registry import PLUGIN_HINT, Registry

FRAMES_AT_ONCE = {"cpu": 4}
"""Frames that a frozen tower encodes in one call, by the type of device: the fastest number on a CPU, whose caches hold
the activations of few (``benchmarks/growth.py``)."""
_MOST_AT_ONCE = 128
"""The same for other devices: a bound on the memory of long clips."""


@dataclass(frozen=True)
class TowerDescription:
    """What a vision model's own files say: its configuration and how its pixels are prepared.

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

    filled_later: bool = False
    """Whether its weights come from their own source, right after those of the model around it."""

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
        """Freeze parameters that ``encode`` never uses, which would never get a gradient."""

    def hold_in(self, dtype: torch.dtype) -> None:
        """Hold the parameters in a type; buffers, such as the frequencies of rotary positions, stay."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)

    @property
    def trainable(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def train(self, mode: bool = True) -> VisionTower:
        super().train(mode and self.trainable)  # No dropout or stochastic depth in a frozen tower.
        return self

    def forward(self, frames: Tensor) -> Tensor:
        """Encode frames.

        Args:
            frames: (frames, 3, side, side), uint8, or floats that are normalised already.

        Returns:
            (frames, patches, width), patches row by row, without class or register tokens.
        """
        if self.trainable and torch.is_grad_enabled():
            return self.encode(self.prepare(frames))
        # A frozen tower records nothing, though the projector behind it trains; so frames need not be there together.
        with torch.no_grad(), linear_by_onednn():
            parts = [self.encode(self.prepare(part)) for part in frames.split(self.frames_at_once(frames.device))]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def frames_at_once(device: torch.device) -> int:
        """Frames that a frozen tower encodes in one call."""
        return FRAMES_AT_ONCE.get(device.type, _MOST_AT_ONCE)

    def prepare(self, frames: Tensor) -> Tensor:
        """Frames as ``encode`` takes them: uint8 is normalised, floats are so already."""
        return self.normalize(frames) if frames.dtype == torch.uint8 else frames.to(self.dtype)

    def normalize(self, frames: Tensor) -> Tensor:
        """uint8 (frames, 3, side, side) to the tower's dtype, by its mean and standard deviation."""
        # (x / 255 - mean) / std, as one subtraction and one division of the bytes.
        scale = frames.new_tensor(self.vision.image_std, dtype=torch.float32).view(3, 1, 1) * 255
        shift = frames.new_tensor(self.vision.image_mean, dtype=torch.float32).view(3, 1, 1) * 255
        return ((frames.float() - shift) / scale).to(self.dtype)


TOWERS: Registry[type[VisionTower]] = Registry("vision tower")
"""Towers by the ``model_type`` of the vision model's configuration."""


def build_tower(vision: VisionConfig) -> VisionTower:
    """Build the structure of the tower that ``vision`` describes; its weights are loaded later."""
    # By the type that the checkpoint recorded, never by a name or a path: "clip" in a folder's name says nothing.
    return _find_tower(vision.vision_config["model_type"], vision.vision_tower)(vision)


def describe_tower(source: str) -> TowerDescription:
    """Describe a vision model, a folder or hub name, by its ``config.json`` and any ``preprocessor_config.json``.

    Of a model of images and text (CLIP, SigLIP) the vision half is meant.

    Raises:
        ValueError: it cannot be read, no tower is known for it, or its grid is no square of patches.
    """
    config = _read_config(locate_model(source, "--vision_tower"))
    return _find_tower(config.model_type, source).describe(source, config)


def _find_tower(model_type: str, source: str) -> type[VisionTower]:
    try:
        return TOWERS.get(model_type)
    except ValueError as error:
        raise ValueError(
            f"the vision tower {source!r} has model_type {model_type!r}; known: {', '.join(TOWERS.names())}, "
            f"and models whose vision_config is one of these; {PLUGIN_HINT}"
        ) from error


def _read_config(source: str) -> PretrainedConfig:
    """The configuration of a vision model, or of the vision half of a two-tower model."""
    try:
        settings, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(source, error) from error
    check_counts(settings, f"--vision_tower {source!r}")
    # timm's own configurations have no model_type, and transformers cannot even read them without timm.
    if settings.get("model_type") == "timm_wrapper" or "pretrained_cfg" in settings:
        require_timm()
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ArithmeticError, StrictDataclassError) as error:
        if note := foreign_code_note(settings):
            raise ValueError(
                f"--vision_tower {source!r} has the unknown type {settings.get('model_type')!r}{note}"
            ) from error
        raise _unreadable(source, error) from error
    # Of CLIP and SigLIP the configuration has two halves; a vision model alone is its own.
    return forget_implementations(getattr(config, "vision_config", config))


def _unreadable(source: str, error: Exception) -> ValueError:
    return ValueError(f"--vision_tower {source!r} has no readable configuration: {error}")


def require_timm() -> None:
    """A ValueError that says how to get timm, where it is missing."""
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the vision tower needs timm, which cannot be imported ({error}); pip install 'llava-babylm[timm]'"
        ) from error
