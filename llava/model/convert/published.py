"""What published code of the LLaVA family did that its ``config.json`` does not say, or says and does not mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llava.config import BLACK_PADDING
from llava.geometry import ANYRES, FLAT, parse_aspect_ratio
from llava.model.convert.report import Settings
from llava.model.coordinates import COORDINATES
from llava.model.multimodal_encoder.base import TowerDescription

_POOLED = 2
"""Patches a side that LLaVA-NeXT makes one token of in videos, whatever ``mm_spatial_pool_stride`` says."""
_NEWLINES = {"grid": "each row of each frame", "frame": "each frame", "one_token": "each video"}
"""What a newline ends in LLaVA-NeXT's videos, by ``mm_newline_position``."""


def follow_published_code(
    config: Mapping[str, Any], tower: TowerDescription, names: Iterable[str], found: Settings, where: str
) -> None:
    """Let a checkpoint's settings say what its code did, and note what is done otherwise here.

    Args:
        config: the entries of its ``config.json``.
        tower: what its vision model's files say.
        names: of its tensors, under today's names.
        found: its settings, which are changed.
        where: how errors begin.

    Raises:
        ValueError: pictures go through the tower in several sizes (``s2``).
    """
    if config.get("s2"):
        raise ValueError(f"{where}: s2 is set: its tower sees pictures in several sizes, which no tower here does")
    _choose_layer(tower, found)
    _choose_merge(found)
    # Videos are pooled by the model itself, whatever resampler without parameters its configuration names.
    if config.get("mm_spatial_pool_mode") and found.fields.get("resampler_type") in (None, "spatial_pool"):
        _pool_videos(config, tower, found)
    if config.get("mm_use_im_start_end"):
        found.changed.append(
            "mm_use_im_start_end: <im_start> and <im_end> stood around the features of an image, as words; here every "
            "position of its span holds a feature"
        )
    if any(COORDINATES in name.split(".") for name in names):
        found.changed += [
            "places of patches: at (i + 0.5) * bins / side - 0.5 in the tables of height and width; here at their "
            "centres, up to half a bin apart",
            "<WIDTH-INPUT> in a prompt kept its own embedding; here it has that of its coordinate, as <HEIGHT-INPUT>",
        ]


def _choose_layer(tower: TowerDescription, found: Settings) -> None:
    asked = found.fields.get("vision_select_layer", -2)
    if tower.vision_config["model_type"] == "siglip_vision_model" and asked != -2:
        found.fields["vision_select_layer"] = -2
        found.changed.append(
            f"mm_vision_select_layer {asked}: the family's SigLIP gave its last layer but one, whatever this said; so "
            "does this model (layer -2)"
        )


def _choose_merge(found: Settings) -> None:
    """Ways to merge tiles, also where there are none to merge."""
    fields = found.fields
    aspect_ratio, merge_type = fields.get("image_aspect_ratio", "square"), fields.get("patch_merge_type", FLAT)
    tiled, max_tiles = parse_aspect_ratio(aspect_ratio)
    if not tiled:
        if aspect_ratio == "pad":
            found.changed.append(
                "image_aspect_ratio pad: pictures were padded, then resized; here they are resized, then padded, which "
                "moves them by less than a pixel"
            )
        if "unpad" in merge_type:
            found.changed.append(
                f"mm_patch_merge_type {merge_type} with image_aspect_ratio {aspect_ratio}: a newline, one token, ended "
                "every image; here images that are one square have none"
            )
        if merge_type.startswith("spatial"):
            fields["patch_merge_type"] = FLAT
        return
    fields["image_padding"] = BLACK_PADDING
    if max_tiles is not None and merge_type == FLAT:
        fields["image_aspect_ratio"] = ANYRES  # Only what spatial_unpad merges was ever shrunk.
    found.changed.append(
        f"image_aspect_ratio {aspect_ratio}: several images in one sample were one padded square each; here each is "
        "cut into tiles"
    )


def _pool_videos(config: Mapping[str, Any], tower: TowerDescription, found: Settings) -> None:
    """LLaVA-NeXT's videos: the grid of each frame pooled, and newlines in one of several places."""
    mode, side = config["mm_spatial_pool_mode"], tower.patches_per_side
    pooled = {"resampler_type": "spatial_pool", "spatial_pool_stride": _POOLED, "spatial_pool_mode": mode}
    found.fields |= {**pooled, "resample_images": False}
    if (stride := config.get("mm_spatial_pool_stride") or _POOLED) != _POOLED:
        found.changed.append(f"mm_spatial_pool_stride {stride}: LLaVA-NeXT's code took {_POOLED}; so does this model")
    if mode != "bilinear" and side % _POOLED:
        cut, whole = side // _POOLED, -(-side // _POOLED)
        found.changed.append(
            f"mm_spatial_pool_mode {mode}: of {side} x {side} patches {cut} x {cut} tokens a frame were made, without "
            f"the last row and column; here {whole} x {whole}, with them"
        )
    merge_type, position = config.get("mm_patch_merge_type") or FLAT, config.get("mm_newline_position") or "one_token"
    if (
        merge_type.startswith("spatial")
        and position in _NEWLINES
        and (position != "one_token" or "unpad" in merge_type)
    ):
        found.changed.append(
            f"mm_newline_position {position}: a newline ended {_NEWLINES[position]}; here videos have none"
        )
    found.assumed.append("num_frames 4, the default here (config.json does not say); --num_frames sets it")


def note_on_frozen_tower(config: Mapping[str, Any]) -> str | None:
    """What is said where the tower in a file is another one than at its source; None where its code took the file's."""
    if config.get("unfreeze_mm_vision_tower") or "vision_tower_pretrained" in config:  # The latter is LLaVA-NeXT's.
        return None
    return (
        "unfreeze_mm_vision_tower is not set: LLaVA's own loader took the tower that mm_vision_tower names; here the "
        "file's, which is another one, is the model's"
    )
