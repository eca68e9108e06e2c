"""The settings of a model: VisionConfig, how it sees, and GroundingConfig, how it tells places and times.

Each is validated once, as it is made, and written to and read from ``config.json``. What other files need of it often
(the token layout, the side of the grid) is computed then too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from llava.constants import AXES, VISUAL_TOKENS, Axis
from llava.geometry import DEFAULT_PINPOINTS, FLAT, AnyRes, Letterbox
from llava.registry import PartSettings
from llava.setting_ranges import check_kinds, check_ranges
from llava.token_layout import ProjectorSettings, ResamplerSettings, TokenLayout, build_layout
from llava.types import MediaKind

LAPE, PLACEHOLDER, NO_GROUNDING = "lape", "placeholder", "none"
GROUNDING_MODES = (LAPE, PLACEHOLDER, NO_GROUNDING)
DEFAULT_BINS = 100
_MOST_BINS = 1000
"""Bins are numbered with three digits."""
MEAN_PADDING, BLACK_PADDING = "mean", "black"
_PLAIN_FLAGS = ("num_frames", "video_fps", "frames_upbound", "add_time_instruction", "image_aspect_ratio",
                "image_grid_pinpoints", "vision_tower", "save_vision_tower", "patches_per_side")  # fmt: skip
"""Fields whose flags have no prefix."""
_UNBOUNDED_FRAMES = 32
"""Frames that a video counts with, before it is opened, where nothing bounds them."""


@dataclass(frozen=True)
class VisionConfig:
    """Everything that fixes the visual side of a model.

    A model's ``config.json`` holds each field under its name with the prefix ``mm_``.

    Where a field is a flag too, the text under it is the flag's help.
    """

    vision_tower: str
    """Name or folder that the tower's weights come from."""
    vision_config: dict[str, Any]
    """The tower's own configuration, with its ``model_type``."""
    hidden_size: int
    """Width of the tower's features."""
    image_size: int
    """Side in pixels of the square frames that the tower sees."""
    patches_per_side: int
    """Side of the tower's patch grid."""
    vision_tower_hash: str | None = None
    """Digest of the tower's weights, see ``multimodal_encoder.hf.hash_weights``."""
    save_vision_tower: bool = False
    """Whether checkpoints hold the tower's weights too."""
    vision_select_layer: int = -2
    """Hidden state of the tower to use; -2 is the output of the last layer but one (default)."""
    vision_final_norm: bool = False
    """Whether features pass the tower's final norm, behind the last layer; so in checkpoints of some forks."""
    image_resize_size: int | None = None
    """With aspect ratio ``square``, the shorter side before a centre crop; None stretches the image to the square."""
    image_aspect_ratio: str = "square"
    """square (default: as the tower's processor does), pad (the whole picture), anyres (the whole picture and tiles of
    it) or anyres_max_N (of the tiles, about N tiles' worth of tokens at most)."""
    image_grid_pinpoints: str = DEFAULT_PINPOINTS
    """What anyres may cut an image into, width x height: (1x2),(2x1) in tiles, (1x1),...,(6x6) for a range, or
    [[224, 448]] in pixels."""
    patch_merge_type: str = FLAT
    """How the tokens of an anyres image stand: flat (default: view by view) or spatial_unpad (its tiles as one grid
    without padding, a learned newline behind each row)."""
    image_padding: str = MEAN_PADDING
    """What surrounds a picture in a square or canvas: mean (its mean colour) or black, as under LLaVA-NeXT's anyres."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per channel, of pixels in [0, 1]."""
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per channel, of pixels in [0, 1]."""
    projector_type: str = "mlp2x_gelu"
    """linear, identity, pooler, mlpNx_gelu or mlpNx_resMx_gelu."""
    projector_width: int | None = None
    """Width between the layers of an mlpNx projector (default: the language model's)."""
    resampler_type: str | None = None
    """fast_slow_resampler, perceiver, qformer, spatial_pool, masked_drop, or none (default): every patch becomes a
    token."""
    perceiver_latents: int = 81
    """Tokens a frame of the perceiver, or of the fast_slow_resampler's slow span, there a square."""
    perceiver_latents_fast: int = 9
    """Tokens a frame of the fast span, a square."""
    perceiver_depth: int = 2
    """Layers of the perceiver."""
    qformer_latents: int = 32
    """Tokens a frame of the Q-Former."""
    qformer_depth: int = 3
    """Layers of the Q-Former."""
    spatial_pool_stride: int = 2
    """How many patches a side spatial_pool makes one."""
    spatial_pool_mode: str = "bilinear"
    """How spatial_pool does so: average, max, bilinear."""
    mask_drop_ratio: float = 0.25
    """Share of each frame's patches that masked_drop keeps."""
    resampler_width: int = 1024
    """Inner width of the resampler's attention."""
    resampler_heads: int = 8
    """Heads of the resampler's attention."""
    resample_images: bool = False
    """Let images pass the resampler too (default false: one token a patch)."""
    num_frames: int = 4
    """Frames sampled evenly from a video."""
    slow_frames: int = 0
    """Temporal length of the slow span; 0 (default) keeps every frame."""
    video_fps: float = 0.0
    """Sample so many frames a second instead of --num_frames; 0 (default) does not."""
    frames_upbound: int = 32
    """Most frames that --video_fps samples (default 32; 0: no bound)."""
    add_time_instruction: bool = False
    """Tell the user's turn how long its videos are and when their frames were taken; needs --version."""
    projector_args: dict[str, object] = field(default_factory=dict)
    """Settings of a plug-in projector, as a JSON object such as '{"depth": 3}' (docs/extending.md)."""
    resampler_args: dict[str, object] = field(default_factory=dict)
    """Settings of a plug-in resampler, as a JSON object such as '{"stride": 3}' (docs/extending.md)."""
    token_ids: dict[str, int] = field(default_factory=dict)
    """Ids of the visual tokens in the model's vocabulary."""

    # Computed from the above.
    projector: ProjectorSettings = field(init=False, repr=False, compare=False)
    """Settings of the projector, those of its own included."""
    resampler: ResamplerSettings | None = field(init=False, repr=False, compare=False)
    """Settings of the resampler, those of its own included; None without one."""
    layout: TokenLayout = field(init=False, repr=False, compare=False)
    """How many tokens each image or video takes."""
    grid_side: int = field(init=False, repr=False, compare=False)
    """Side of a frame's grid of patches behind the projector."""
    anyres: AnyRes | None = field(init=False, repr=False, compare=False)
    """How images are cut into tiles; None where each is a single square."""
    letterbox: Callable[[tuple[int, int]], Letterbox] = field(init=False, repr=False, compare=False)
    """From the (height, width) of a picture, under anyres of a video's frame, to its place in the tower's square."""
    is_bounded: bool = field(init=False, repr=False, compare=False)
    """Whether a video cannot have more than ``max_frames``, however long it is."""
    max_frames: int = field(init=False, repr=False, compare=False)
    """The most frames that one video can have; an estimate where ``frames_upbound`` is 0 (see ``is_bounded``)."""

    def __post_init__(self) -> None:
        names = {
            item.name: f"--{item.name}" if item.name in _PLAIN_FLAGS else f"mm_{item.name}" for item in fields(self)
        }
        check_kinds(self, names)
        for name in ("num_frames", "patches_per_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.slow_frames < 0 or self.video_fps < 0:
            raise ValueError("--mm_slow_frames and --video_fps must not be negative")
        if self.frames_upbound < 0:
            raise ValueError(f"--frames_upbound is {self.frames_upbound}; it must be at least 0, which sets no bound")
        if self.image_padding not in (MEAN_PADDING, BLACK_PADDING):
            raise ValueError(f"mm_image_padding is {self.image_padding!r}; known: {MEAN_PADDING}, {BLACK_PADDING}")
        check_ranges(self, names)
        # Without the computed fields below, which are made of these.
        settings = {item.name: getattr(self, item.name) for item in fields(self) if item.init}
        layout = build_layout(settings)
        pad = self.image_aspect_ratio == "pad"
        computed = {
            "layout": layout,
            "grid_side": layout.grid_side,
            "anyres": layout.anyres,
            "projector": layout.projector,
            "resampler": layout.resampler,
            # With all defaults filled in: a plug-in may change them later, and a checkpoint keeps its own.
            "projector_args": _own_settings(layout.projector, settings),
            "resampler_args": {} if layout.resampler is None else _own_settings(layout.resampler, settings),
            "letterbox": partial(Letterbox.fit, side=self.image_size, pad=pad, resize=self.image_resize_size),
            "is_bounded": self.frames_upbound > 0 or not self.video_fps,
            "max_frames": (self.frames_upbound or _UNBOUNDED_FRAMES) if self.video_fps > 0 else self.num_frames,
        }
        for name, value in computed.items():
            object.__setattr__(self, name, value)  # The way around frozen that dataclasses use themselves.

    def ways_to_shorten(self, kinds: Collection[MediaKind]) -> list[str]:
        """Changes of flags that make the spans of such media shorter, as in "lower --num_frames"."""
        ways = []
        if "video" in kinds:
            # The one of the two that counts: with a rate the number of frames follows from the length.
            flag = "frames_upbound" if self.video_fps > 0 else "num_frames"
            ways.append(f"{'lower' if self.is_bounded else 'set'} --{flag}")
        if "image" in kinds and self.anyres is not None:
            ways.append("give smaller --image_grid_pinpoints")
        if self.resampler is not None and any(map(self.layout.resamples, kinds)):
            ways += self.resampler.shorten
        return ways

    @property
    def visual_token_ids(self) -> list[int]:
        """Ids of ``VISUAL_TOKENS``, in order; a ValueError where the vocabulary does not have them yet."""
        missing = [token for token in VISUAL_TOKENS if token not in self.token_ids]
        if missing:
            raise ValueError(
                f"the vocabulary has no id for {', '.join(missing)}; "
                "load the model with llava.model.loading.load_model, which adds them"
            )
        return [self.token_ids[token] for token in VISUAL_TOKENS]

    @classmethod
    def from_model_config(cls, config: object) -> VisionConfig | None:
        """Read the ``mm_`` entries of a Hugging Face config; None for a model without vision."""
        if not getattr(config, "mm_vision_config", None):
            return None
        # Checkpoints of earlier versions lack the later fields, which then have their defaults.
        names = [item.name for item in fields(cls) if item.init]
        known: dict[str, Any] = {name: getattr(config, "mm_" + name) for name in names if hasattr(config, "mm_" + name)}
        for name in ("image_mean", "image_std"):  # JSON knows no tuples.
            if name in known:
                known[name] = tuple(known[name])
        return cls(**known)

    def to_model_config(self) -> dict[str, Any]:
        """The entries that ``from_model_config`` reads, as plain values; those of plug-ins where there are any."""
        # Copied: whoever edits a configuration must not change the settings of a model.
        entries = {"mm_" + item.name: deepcopy(getattr(self, item.name)) for item in fields(self) if item.init}
        # So that files without them, and with towers as most are, stay as they were.
        for name in ("mm_projector_args", "mm_resampler_args", "mm_projector_width", "mm_vision_final_norm"):
            if not entries[name]:
                del entries[name]
        if self.image_padding == MEAN_PADDING:
            del entries["mm_image_padding"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in entries.items()}


def _own_settings(part: PartSettings, settings: Mapping[str, object]) -> dict[str, object]:
    """The settings that a part has beside those of the whole model, as JSON has them."""
    own = {item.name: getattr(part, item.name) for item in fields(part) if item.name not in settings}
    return json.loads(json.dumps(own))  # Tuples are lists, as in a flag and in a checkpoint.


_GROUNDING_ENTRIES = {
    "mode": "grounding",
    "num_temporal": "num_temporal_tokens",
    "num_spatial": "num_spatial_tokens",
    "token_ids": "coordinate_token_ids",
    "first_bin": "first_coordinate_bin",
}
"""Entries of a model's ``config.json``, by the field of ``GroundingConfig``."""


@dataclass(frozen=True)
class GroundingConfig:
    """How a model reads and writes coordinates.

    A model's ``config.json`` holds it under the names of ``_GROUNDING_ENTRIES``.

    Where a field is a flag too, the text under it is the flag's help.
    """

    mode: str = LAPE
    """``lape`` (tables of bins, which text and pictures share) or ``placeholder`` (a placeholder is a word like others,
    and says nothing of where)."""
    num_temporal: int = DEFAULT_BINS
    """Bins of time in new tables."""
    num_spatial: int = DEFAULT_BINS
    """Bins of height, and of width, in new tables."""
    token_ids: dict[str, int] = field(default_factory=dict)
    """Ids of the placeholders."""
    first_bin: int | None = None
    """Id of the first bin; all others follow it, time, height, width. None with ``placeholder``."""

    # Computed from the above.
    has_tables: bool = field(init=False, repr=False, compare=False)
    """Whether bins have embeddings that pictures share, which fill the places of placeholders."""
    total_bins: int = field(init=False, repr=False, compare=False)
    """Bins of all axes; 0 without tables."""

    def __post_init__(self) -> None:
        check_kinds(self, _GROUNDING_ENTRIES)
        if self.mode not in (LAPE, PLACEHOLDER):
            raise ValueError(f"--grounding is {self.mode!r}; known: {', '.join(GROUNDING_MODES)}")
        for name in ("num_temporal", "num_spatial"):
            if not 2 <= getattr(self, name) <= _MOST_BINS:
                raise ValueError(f"--{name}_tokens is {getattr(self, name)}; it must be 2 to {_MOST_BINS}")
        check_ranges(self, _GROUNDING_ENTRIES)
        # Frozen for callers, computed once: both are asked for at every step.
        object.__setattr__(self, "has_tables", self.mode == LAPE)
        object.__setattr__(self, "total_bins", self.num_temporal + 2 * self.num_spatial if self.has_tables else 0)

    def num_bins(self, axis: str) -> int:
        """Bins of an axis of ``AXES``."""
        return self.num_temporal if axis == "TEMP" else self.num_spatial

    def first_bin_of(self, axis: Axis) -> int:
        """Id of the first bin of an axis; the axes follow one another in the order of ``AXES``."""
        assert self.first_bin is not None
        return self.first_bin + sum(map(self.num_bins, AXES[: AXES.index(axis)]))

    @property
    def filled_token_ids(self) -> list[int]:
        """Ids of the placeholders where these are filled with coordinates, and so are never an answer."""
        return list(self.token_ids.values()) if self.has_tables else []

    @classmethod
    def from_model_config(cls, config: object) -> GroundingConfig | None:
        """Read the entries of a Hugging Face config; None for a model without coordinates."""
        # Checkpoints from before there were coordinates have no such entry.
        if getattr(config, "grounding", NO_GROUNDING) == NO_GROUNDING:
            return None
        return cls(**{name: getattr(config, entry) for name, entry in _GROUNDING_ENTRIES.items()})

    def to_model_config(self) -> dict[str, Any]:
        """The entries that ``from_model_config`` reads, as plain values."""
        return {entry: deepcopy(getattr(self, name)) for name, entry in _GROUNDING_ENTRIES.items()}


def choose_grounding(
    trained: GroundingConfig | None,
    mode: str | None,
    num_temporal: int | None,
    num_spatial: int | None,
    sees: bool = True,
) -> GroundingConfig | None:
    """What coordinates are to a model: what they are to its checkpoint, or what flags ask for where that is new.

    Args:
        trained: of the checkpoint; None without coordinates.
        mode: of ``GROUNDING_MODES``; None asks for nothing.
        num_temporal, num_spatial: bins; None asks for nothing.
        sees: whether the model has vision modules, which coordinates need.

    Raises:
        ValueError: what is asked for is not what the checkpoint was trained with, or the model does not see.
    """
    if mode is not None and mode not in GROUNDING_MODES:
        raise ValueError(f"--grounding is {mode!r}; known: {', '.join(GROUNDING_MODES)}")
    if not sees and (trained is not None or mode not in (None, NO_GROUNDING)):
        raise ValueError("--grounding needs a model that sees; give --vision_tower")
    # From placeholders to tables a checkpoint may go on: tables are new parameters. Not the other way.
    if trained is None or (trained.mode == PLACEHOLDER and mode == LAPE):
        if mode in (None, NO_GROUNDING):
            return None
        return GroundingConfig(str(mode), num_temporal or DEFAULT_BINS, num_spatial or DEFAULT_BINS)
    for flag, asked, has in (
        ("--grounding", mode, trained.mode),
        ("--num_temporal_tokens", num_temporal, trained.num_temporal),
        ("--num_spatial_tokens", num_spatial, trained.num_spatial),
    ):
        # The number of bins is the size of trained tables.
        if asked is not None and asked != has:
            raise ValueError(f"{flag} is {asked}, but the checkpoint was trained with {has}; leave the flag out")
    return trained
