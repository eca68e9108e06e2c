"""How a vision model wants its images: squares of which side, cut and normalised how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers.image_processing_base import ImageProcessingMixin


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
