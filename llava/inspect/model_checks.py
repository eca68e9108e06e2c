"""What is wrong with a model before any pass: random parts that are frozen, and pixels that the tower does not know."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from llava.config import VisionConfig
from llava.inspect.batches import SampledExample
from llava.inspect.findings import Findings
from llava.inspect.run import InspectedRun
from llava.messages import list_names
from llava.model.multimodal_encoder.base import TOWERS, describe_tower
from llava.train.parts import part_of
from llava.types import holds_features

_FARTHEST_MEAN, _LEAST_SPREAD, _MOST_SPREAD = 4.0, 0.05, 6.0
"""Normalised pixels have a mean near 0 and a deviation near 1; beyond these bounds they are of another scale."""


def check_frozen(run: InspectedRun, findings: Findings) -> None:
    """Find parts that no checkpoint has filled, and that do not train."""
    assert run.loaded is not None
    frozen = {name for name, p in run.loaded.model.named_parameters() if not p.requires_grad}
    by_part: dict[str, list[str]] = {}
    for name in run.loaded.new_parameters:
        if name in frozen and part_of(name) != "mm_vision_tower":
            by_part.setdefault(part_of(name), []).append(name)
    for part, names in by_part.items():
        other = "" if part == "mm_language_model" else ", or give weights that are trained (--pretrain_mm_mlp_adapter)"
        findings.error(
            "frozen_random",
            f"{part} is not in {run.model_args.model_name_or_path!r} and so is random ({list_names(names, 2)}), and "
            f"--mm_tunable_parts {run.model_args.mm_tunable_parts} freezes it: it would never learn; add {part} to "
            f"--mm_tunable_parts{other}",
        )


def check_tower(run: InspectedRun, sampled: Sequence[SampledExample], findings: Findings) -> None:
    """Compare the mean and deviation that pixels are normalised with to the tower's own files, and to pixels."""
    assert run.loaded is not None
    vision = run.loaded.vision
    if vision is None:
        return
    _compare_with_files(vision, findings)
    frames = [medium.frames for s in sampled for medium in s.media if not holds_features(medium.frames)]
    if not frames:
        return
    mean, spread = measure_pixels(vision, frames)
    if abs(mean) > _FARTHEST_MEAN or not _LEAST_SPREAD < spread < _MOST_SPREAD:
        findings.error(
            "tower_statistics",
            f"normalised pixels of {len(frames)} images and clips have the mean {mean:.3g} and the deviation "
            f"{spread:.3g}, where a tower expects about 0 and 1: image_mean {_show(vision.image_mean)} and image_std "
            f"{_show(vision.image_std)} are of another scale (for pixels in [0, 1]); correct mm_image_mean and "
            "mm_image_std in the checkpoint's config.json, or image_mean and image_std in the tower's "
            "preprocessor_config.json",
        )


def measure_pixels(vision: VisionConfig, frames: Sequence[Tensor]) -> tuple[float, float]:
    """Mean and standard deviation of pixels as the tower sees them."""
    pixels = torch.cat([medium.flatten(2).transpose(0, 1).flatten(1) for medium in frames], dim=1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1) for values in (vision.image_mean, vision.image_std))
    normalised = (pixels - mean) / std  # (3, pixels)
    # Channel by channel: their means may differ by more than a wrong deviation leaves.
    return float(normalised.mean()), float(normalised.std(dim=1).mean())


def _compare_with_files(vision: VisionConfig, findings: Findings) -> None:
    own = (vision.image_mean, vision.image_std)
    source = vision.vision_tower
    if not os.path.isdir(source):
        findings.note(
            "inspection", f"the vision tower {source!r} is no folder here: its own mean and std were not read"
        )
    else:
        try:
            described = describe_tower(source)
        except ValueError as error:
            findings.note("inspection", f"the vision tower's own files cannot be read: {error}")
            return
        theirs = (described.image_mean, described.image_std)
        if any(_differ(a, b) for a, b in zip(own, theirs, strict=True)):
            findings.error(
                "tower_statistics",
                f"pixels are normalised with mean {_show(own[0])} and std {_show(own[1])}, but the vision tower "
                f"{source!r} was made with mean {_show(theirs[0])} and std {_show(theirs[1])}: it would see other "
                "colours than it knows; correct mm_image_mean and mm_image_std in the checkpoint's config.json",
            )
            return
    family = TOWERS.get(vision.vision_config["model_type"])
    usual: list[Sequence[float]] = [getattr(family, name, ()) for name in ("image_mean", "image_std")]
    if all(usual) and any(_differ(a, b) for a, b in zip(own, usual, strict=True)):
        findings.warn(
            "tower_statistics",
            f"pixels are normalised with mean {_show(own[0])} and std {_show(own[1])}, as the tower's files say, but "
            f"most models of the type {vision.vision_config['model_type']} have mean {_show(usual[0])} and std "
            f"{_show(usual[1])}; see its preprocessor_config.json",
        )


def _differ(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) != len(b) or any(abs(x - y) > 1e-3 for x, y in zip(a, b, strict=True))


def _show(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values) + ")"
