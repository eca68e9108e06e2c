"""VisionConfig: how images and videos become token positions.

The data side (which writes placeholder tokens) and the model side (which overwrites them with
features) both read this one description, so they cannot disagree on a count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from llava.constants import (
    IMAGE_END,
    IMAGE_PATCH,
    IMAGE_START,
    SLOW_VIDEO_END,
    SLOW_VIDEO_START,
    VIDEO_END,
    VIDEO_PATCH,
    VIDEO_START,
    VISUAL_TOKENS,
)
from llava.geometry import (
    ANYRES,
    DEFAULT_PINPOINTS,
    FLAT,
    PATCH_MERGE_TYPES,
    SPATIAL_UNPAD,
    AnyRes,
    parse_aspect_ratio,
    parse_pinpoints,
)
from llava.token_layout import STREAM_LAWS, StreamLaw
from llava.types import MediaKind

ASPECT_RATIOS = ("square", "pad")
"""Manners of fitting an image into a single square; anyres and anyres_max_N are those of ``llava.geometry``."""
PROJECTOR_STRIDES = {"pooler": 2}
"""Projectors that pool the grid, and how many patches a side become one."""


@dataclass(frozen=True)
class Span:
    """An atomic run of ``length`` tokens: a start marker, patch tokens and an end marker."""

    start: str
    patch: str
    end: str
    length: int

    @property
    def text(self) -> str:
        return self.start + self.patch * (self.length - 2) + self.end


_UNBOUNDED_FRAMES = 32
"""Frames that a video counts with, before it is opened, where nothing bounds them."""
_VIDEO_MARKERS = [(VIDEO_START, VIDEO_PATCH, VIDEO_END), (SLOW_VIDEO_START, VIDEO_PATCH, SLOW_VIDEO_END)]


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
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per channel, of pixels in [0, 1]."""
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per channel, of pixels in [0, 1]."""
    projector_type: str = "mlp2x_gelu"
    """linear, identity, pooler, mlpNx_gelu or mlpNx_resMx_gelu."""
    resampler_type: str | None = None
    """fast_slow_resampler, perceiver, qformer, spatial_pool, masked_drop, or none (default): every patch becomes a
    token."""
    perceiver_latents: int = 81
    """Tokens a frame of the perceiver, or in the slow stream, there a square."""
    perceiver_latents_fast: int = 9
    """Tokens a frame in the fast stream, a square."""
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
    """Temporal length of the slow stream; 0 (default) keeps every frame."""
    video_fps: float = 0.0
    """Sample so many frames a second instead of --num_frames; 0 (default) does not."""
    frames_upbound: int = 32
    """Most frames that --video_fps samples (default 32; 0: no bound)."""
    add_time_instruction: bool = False
    """Tell the user's turn how long its videos are and when their frames were taken; needs --version."""
    token_ids: dict[str, int] = field(default_factory=dict)
    """Ids of the visual tokens in the model's vocabulary."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "patches_per_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.slow_frames < 0 or self.video_fps < 0:
            raise ValueError("--mm_slow_frames and --video_fps must not be negative")
        if self.frames_upbound < 0:
            raise ValueError(f"--frames_upbound is {self.frames_upbound}; it must be at least 0, which sets no bound")
        if self.stream_law is not None and self.stream_law.check is not None:
            self.stream_law.check(self)
        self._check_images()

    def _check_images(self) -> None:
        tiled, max_tiles = parse_aspect_ratio(self.image_aspect_ratio)
        if not tiled and self.image_aspect_ratio not in ASPECT_RATIOS:
            known = ", ".join([*ASPECT_RATIOS, ANYRES, f"{ANYRES}_max_N"])
            raise ValueError(f"--image_aspect_ratio is {self.image_aspect_ratio!r}; known: {known}")
        if self.patch_merge_type not in PATCH_MERGE_TYPES:
            known = ", ".join(PATCH_MERGE_TYPES)
            raise ValueError(f"--mm_patch_merge_type is {self.patch_merge_type!r}; known: {known}")
        if tiled:
            parse_pinpoints(self.image_grid_pinpoints, self.image_size)
        if max_tiles is not None and self.patch_merge_type == FLAT:
            raise ValueError(
                f"--image_aspect_ratio {self.image_aspect_ratio} shrinks the grid that --mm_patch_merge_type "
                f"{SPATIAL_UNPAD} makes; set that, or limit {FLAT} by fewer --image_grid_pinpoints"
            )
        if self.patch_merge_type == SPATIAL_UNPAD and not tiled:
            raise ValueError(f"--mm_patch_merge_type {SPATIAL_UNPAD} needs --image_aspect_ratio {ANYRES}")
        if self.patch_merge_type == SPATIAL_UNPAD and self.resamples("image"):
            raise ValueError(
                f"--mm_patch_merge_type {SPATIAL_UNPAD} needs images as grids of patches, and --mm_resample_images "
                f"takes the grid away; switch it off, or use {FLAT}"
            )

    def __reduce__(self) -> tuple[Callable[..., VisionConfig], tuple[Any, ...]]:
        # The law goes along, by reference: a process that unpickles it imports, and so registers, it.
        return _restore, (self.stream_law, vars(self))

    @property
    def stream_law(self) -> StreamLaw | None:
        """How tokens are counted behind the resampler; None without one."""
        if self.resampler_type is None:
            return None
        if self.resampler_type not in STREAM_LAWS:
            raise ValueError(
                f"unknown --mm_resampler_type {self.resampler_type!r}; known: {', '.join(STREAM_LAWS.names())}, none; "
                "one of your own is known once its file is imported"
            )
        return STREAM_LAWS.get(self.resampler_type)

    @property
    def num_patches(self) -> int:
        """Patches of a frame as they leave the tower."""
        return self.patches_per_side**2

    @property
    def grid_side(self) -> int:
        """Side of a frame's grid behind the projector; one that pools takes a last, half window for whole."""
        return math.ceil(self.patches_per_side / PROJECTOR_STRIDES.get(self.projector_type, 1))

    @property
    def grid_patches(self) -> int:
        """Patches of a frame behind the projector."""
        return self.grid_side**2

    @property
    def anyres(self) -> AnyRes | None:
        """How images are cut into tiles; None where each is a single square."""
        tiled, max_tiles = parse_aspect_ratio(self.image_aspect_ratio)
        if not tiled:
            return None
        return AnyRes(
            side=self.image_size,
            patches_per_side=self.grid_side,
            view_tokens=sum(self.stream_lengths("image")),
            grids=parse_pinpoints(self.image_grid_pinpoints, self.image_size),
            merge_type=self.patch_merge_type,
            max_tiles=max_tiles,
        )

    @property
    def pooled_side(self) -> int:
        """Side of a frame's grid behind the spatial pool; a last window that juts out counts."""
        return math.ceil(self.grid_side / self.spatial_pool_stride)

    @property
    def kept_patches(self) -> int:
        """Patches of a frame that the masked drop keeps, at least one."""
        return max(1, round(self.grid_patches * self.mask_drop_ratio))

    @property
    def slow_side(self) -> int:
        return math.isqrt(self.perceiver_latents)

    @property
    def fast_side(self) -> int:
        return math.isqrt(self.perceiver_latents_fast)

    @property
    def max_frames(self) -> int:
        """The most frames that one video can have; an estimate where ``frames_upbound`` is 0 (see ``is_bounded``)."""
        return (self.frames_upbound or _UNBOUNDED_FRAMES) if self.video_fps > 0 else self.num_frames

    @property
    def is_bounded(self) -> bool:
        """Whether a video cannot have more than ``max_frames``, however long it is."""
        return self.frames_upbound > 0 or not self.video_fps

    def slow_length(self, num_frames: int) -> int:
        """Temporal length of the slow stream for a video of ``num_frames`` frames."""
        return min(self.slow_frames or num_frames, num_frames)

    def resamples(self, kind: MediaKind) -> bool:
        """Whether media of a kind pass the resampler; the others keep one token a patch."""
        return self.resampler_type is not None and (kind == "video" or self.resample_images)

    def stream_lengths(self, kind: MediaKind, num_frames: int = 1) -> tuple[int, ...]:
        """Tokens of each stream: one, or for a video a fast one followed by a slow one."""
        law = self.stream_law
        if law is None or not self.resamples(kind):
            return (num_frames * self.grid_patches,)
        return law.count(self, kind, num_frames)

    def spans(self, kind: MediaKind, num_frames: int = 1, image_size: tuple[int, int] | None = None) -> list[Span]:
        """The token spans of one image, or of one video of ``num_frames`` frames, in order.

        ``image_size`` is the original (height, width) of an image; one of anyres must come with it.
        """
        lengths = self.stream_lengths(kind, num_frames)
        if kind == "image" and self.anyres is not None:
            if image_size is None:
                raise ValueError(
                    "how many tokens an anyres image takes depends on its size; pass the (height, width) of each image"
                )
            lengths = (self.anyres.num_tokens(image_size),)
        markers = [(IMAGE_START, IMAGE_PATCH, IMAGE_END)] if kind == "image" else _VIDEO_MARKERS
        if not 1 <= len(lengths) <= len(markers):
            raise ValueError(
                f"the resampler {self.resampler_type!r} counts {len(lengths)} streams for one {kind}; "
                f"its law must give one{' or two' * (len(markers) - 1)}"
            )
        spans = [Span(*marker, length) for marker, length in zip(markers, lengths, strict=False)]
        short = [span for span in spans if span.length < 2]
        if short:
            raise ValueError(
                f"{short[0].start}...{short[0].end} would have {short[0].length} token, but a span needs "
                "one for its start and one for its end; raise --num_frames or the number of tokens a frame"
            )
        return spans

    def num_tokens(self, kind: MediaKind, num_frames: int = 1, image_size: tuple[int, int] | None = None) -> int:
        """Positions that the spans of one image or video take, markers included; see ``spans``."""
        return sum(span.length for span in self.spans(kind, num_frames, image_size))

    @property
    def most_image_tokens(self) -> int:
        """Positions that no image takes more than."""
        return self.num_tokens("image") if self.anyres is None else self.anyres.most_tokens

    def ways_to_shorten(self, kinds: Collection[MediaKind]) -> list[str]:
        """Changes of flags that make the spans of such media shorter, as in "lower --num_frames"."""
        ways = []
        if "video" in kinds:
            flag = "frames_upbound" if self.video_fps > 0 else "num_frames"
            ways.append(f"{'lower' if self.is_bounded else 'set'} --{flag}")
        if "image" in kinds and self.anyres is not None:
            ways.append("give smaller --image_grid_pinpoints")
        if self.stream_law is not None and any(map(self.resamples, kinds)):
            ways += self.stream_law.shorten
        return ways

    @property
    def visual_token_ids(self) -> list[int]:
        missing = [token for token in VISUAL_TOKENS if token not in self.token_ids]
        if missing:
            raise ValueError(
                f"the vocabulary has no id for {', '.join(missing)}; "
                "load the model with llava.model.loading.load_model, which adds them"
            )
        return [self.token_ids[token] for token in VISUAL_TOKENS]

    @classmethod
    def from_model_config(cls, config: Any) -> VisionConfig | None:
        """Read the ``mm_`` entries of a Hugging Face config; None for a model without vision."""
        if not getattr(config, "mm_vision_config", None):
            return None
        known = {f.name: getattr(config, "mm_" + f.name) for f in fields(cls) if hasattr(config, "mm_" + f.name)}
        for name in ("image_mean", "image_std"):
            if name in known:
                known[name] = tuple(known[name])
        return cls(**known)

    def to_model_config(self) -> dict[str, Any]:
        """The entries that ``from_model_config`` reads, as plain values."""
        entries = {"mm_" + name: value for name, value in asdict(self).items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in entries.items()}


def _restore(law: StreamLaw | None, settings: dict[str, Any]) -> VisionConfig:
    """Unpickle a ``VisionConfig``; ``law`` has done its work by being imported."""
    return VisionConfig(**settings)
