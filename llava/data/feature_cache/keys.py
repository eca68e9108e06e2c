"""What features depend on, and the keys made of it: whatever changes makes another key, and so a miss.

An entry's key is a hash of its context, of the bytes of the image or clip, and of what its record says of it (part of
the clip, rate of a clip that is given as pictures). The context is all the rest: the tower and how it is run, the
square or tiles that it is shown, which frames are sampled, what files may be (a file that is refused has no entry),
and the form that features are kept in. Where files lie, and where the tower's weights came from, does not count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llava.config import VisionConfig
from llava.data.feature_cache.storage import Storage
from llava.data.media_files import MediaLimits
from llava.io import hash_json
from llava.types import Media, MediaKind

VERSION = 1
"""Of sampling, resizing and normalising: raised where the same file and settings would give other pixels."""
_KEY_DIGITS, _CONTEXT_DIGITS = 40, 16
_NOISE = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures"}
_LIMITS = {"image": ("max_image_pixels", "max_image_bytes"), "video": ("max_video_pixels", "max_video_frames")}


@dataclass(frozen=True)
class TowerRun:
    """A tower and how it is run.

    Attributes:
        weights: hash of its weights.
        precision: what it computes in, such as "float32" or "bfloat16 under autocast".
    """

    weights: str
    precision: str

    def describe(self, vision: VisionConfig) -> dict[str, Any]:
        """What of a context is the tower's."""
        return describe_structure(vision) | {"weights": self.weights, "precision": self.precision}


def describe_structure(vision: VisionConfig) -> dict[str, Any]:
    """Which part of which model a tower is, whatever its weights."""
    structure = {name: value for name, value in vision.vision_config.items() if name not in _NOISE}
    return {
        "structure": structure,
        "select_layer": vision.vision_select_layer,
        "final_norm": vision.vision_final_norm,
        "patches": vision.patches_per_side**2,
        "width": vision.hidden_size,
    }


@dataclass(frozen=True)
class KeyMaker:
    """Makes keys for the images and clips of one run.

    Attributes:
        tower: and how it is run.
        vision: the settings of the run's model.
        storage: the form that features are kept in.
        limits: how large images and clips may be.
    """

    tower: TowerRun
    vision: VisionConfig
    storage: Storage
    limits: MediaLimits

    contexts: dict[str, dict[str, Any]] = field(init=False, repr=False, compare=False)
    """What clips and images depend on, by the hash that stands for it in ``FeatureEntry.context``."""
    _hashes: dict[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        described = {kind: self._describe(kind) for kind in ("image", "video")}
        hashes = {kind: hash_json(context, _CONTEXT_DIGITS) for kind, context in described.items()}
        object.__setattr__(self, "_hashes", hashes)
        object.__setattr__(self, "contexts", {hashes[kind]: context for kind, context in described.items()})

    def context_of(self, kind: MediaKind) -> str:
        """The hash that stands for the context of all images, or of all clips."""
        return self._hashes[kind]

    def key_of(self, media: Media, split: tuple[int, int] | None, digest: str) -> str:
        """The key of an image or a clip, or of a part of it, whose bytes have a hash."""
        part = [split, media.fps, bool(media.frames)] if media.kind == "video" else []
        return hash_json([self.context_of(media.kind), digest, part], _KEY_DIGITS)

    def _describe(self, kind: str) -> dict[str, Any]:
        vision = self.vision
        pixels: dict[str, Any] = {
            "side": vision.image_size,
            "mean": list(vision.image_mean),
            "std": list(vision.image_std),
            "resize": vision.image_resize_size,
            "padding": vision.image_padding,
        }
        frames: dict[str, Any] = {}
        if kind == "image":
            pixels["aspect_ratio"] = vision.image_aspect_ratio
            pixels["pinpoints"] = vision.image_grid_pinpoints if vision.anyres is not None else None
        else:  # Under anyres clips are squares as without it.
            pixels["aspect_ratio"] = "pad" if vision.image_aspect_ratio == "pad" else "square"
            # Of the two ways to sample, only the one that counts.
            by_rate = {"video_fps": vision.video_fps, "frames_upbound": vision.frames_upbound}
            frames = by_rate if vision.video_fps > 0 else {"num_frames": vision.num_frames}
        return {
            "version": VERSION,
            "kind": kind,
            "tower": self.tower.describe(vision),
            "pixels": pixels,
            "frames": frames,
            "limits": {name: getattr(self.limits, name) for name in _LIMITS[kind]},
            "storage": [self.storage.kind, self.storage.pool],
        }


def find_differences(mine: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """In what two contexts differ, each as "num_frames: 8 here, 4 there"."""
    found = []
    for name in sorted(mine.keys() | other.keys()):
        here, there = mine.get(name), other.get(name)
        if here == there:
            continue
        if isinstance(here, dict) and isinstance(there, dict):
            found += find_differences(here, there)
        else:
            found.append(f"{name}: {_short(here)} here, {_short(there)} there")
    return found


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text


def frames_at_most(vision: VisionConfig, kind: MediaKind) -> int:
    """The most frames that an image (its views, with anyres) or a clip has; an estimate where nothing bounds it."""
    if kind == "video":
        return vision.max_frames
    if vision.anyres is None:
        return 1
    return 1 + max(grid.area for grid in vision.anyres.grids)
