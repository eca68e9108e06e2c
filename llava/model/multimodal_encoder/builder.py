"""Chooses a tower for a vision model, and describes a vision model's folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig
from transformers.image_processing_base import ImageProcessingMixin

from llava.config import VisionConfig
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_encoder.hf_tower import TOWERS


def build_tower(vision: VisionConfig) -> VisionTower:
    """Build the structure of the tower that ``vision`` describes; its weights are loaded later."""
    model_type = vision.vision_config["model_type"]
    if model_type not in TOWERS:
        raise ValueError(
            f"the vision tower {vision.vision_tower!r} has model_type {model_type!r}; "
            f"known: {', '.join(TOWERS.names())}"
        )
    return TOWERS.get(model_type)(vision)


@dataclass(frozen=True)
class TowerDescription:
    """What a vision model's own files say: its configuration and how it wants its pixels."""

    vision_config: dict[str, Any]
    hidden_size: int
    image_size: int
    patches_per_side: int
    image_resize_size: int | None
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]


def describe_tower(source: str) -> TowerDescription:
    """Read ``config.json`` and, where present, ``preprocessor_config.json`` of a vision model.

    Args:
        source: a folder, or a name on the model hub.

    Raises:
        ValueError: the source cannot be read, or its grid is not a whole square of patches.
    """
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"--vision_tower {source!r} has no readable configuration: {error}") from error
    side, resize, mean, std = _read_processor(source, config)
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int) or side % patch:
        raise ValueError(
            f"--vision_tower {source!r} sees {side} x {side} pixels in patches of {patch}, which is no "
            "whole square grid; correct the size in its preprocessor_config.json"
        )
    return TowerDescription(
        vision_config=config.to_diff_dict() | {"model_type": config.model_type},
        hidden_size=config.hidden_size,
        image_size=side,
        patches_per_side=side // patch,
        image_resize_size=resize,
        image_mean=mean,
        image_std=std,
    )


def _read_processor(source: str, config: Any) -> tuple[int, int | None, tuple[float, ...], tuple[float, ...]]:
    """Side of the tower's input, shorter side before cropping (or None), mean and deviation."""
    mean: tuple[float, ...] = VisionConfig.image_mean
    std: tuple[float, ...] = VisionConfig.image_std
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError):
        return config.image_size, None, mean, std
    size = processor.get("size") or {}
    size = {"height": size, "width": size} if isinstance(size, int) else size
    crop = processor.get("crop_size") or {}
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    cropped = processor.get("do_center_crop") and "height" in crop
    final = crop if cropped else size
    height, width = (final.get("height", final.get("shortest_edge")), final.get("width", final.get("shortest_edge")))
    if height is None or height != width:
        raise ValueError(
            f"--vision_tower {source!r} wants images of {height} x {width} pixels; only squares are supported"
        )
    resize = size.get("shortest_edge") if cropped else None
    return height, resize, tuple(processor.get("image_mean", mean)), tuple(processor.get("image_std", std))
