"""How many tokens each image or video takes in the text: the only place where a span is counted.

The data side writes spans of placeholder tokens, the model side overwrites them with features, and both count with the
``TokenLayout`` of one ``VisionConfig``. It knows the settings of the projector, which may pool a frame's grid, and of
the resampler, which says how many tokens it makes. Those of the library's own parts are below; a plug-in gives its
own where it is registered (docs/extending.md). Nothing here needs torch or a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from llava.constants import (
    IMAGE_END,
    IMAGE_PATCH,
    IMAGE_START,
    SLOW_VIDEO_END,
    SLOW_VIDEO_START,
    VIDEO_END,
    VIDEO_PATCH,
    VIDEO_START,
)
from llava.geometry import (
    ANYRES,
    ASPECT_RATIOS,
    FLAT,
    PATCH_MERGE_TYPES,
    SPATIAL_UNPAD,
    AnyRes,
    parse_aspect_ratio,
    parse_pinpoints,
)
from llava.registry import PLUGIN_HINT, PartSettings, Registry, build_settings
from llava.types import MediaKind

NO_RESAMPLER = "none"
"""How flags say that there is no resampler, which settings have as None."""
POOL_MODES = ("average", "max", "bilinear")
_IMAGE_MARKERS = [(IMAGE_START, IMAGE_PATCH, IMAGE_END)]
_VIDEO_MARKERS = [(VIDEO_START, VIDEO_PATCH, VIDEO_END), (SLOW_VIDEO_START, VIDEO_PATCH, SLOW_VIDEO_END)]


@dataclass(frozen=True)
class Span:
    """An atomic run of ``length`` tokens: a start marker, patch tokens and an end marker."""

    start: str
    patch: str
    end: str
    length: int

    @property
    def text(self) -> str:
        # The markers are two of the ``length`` tokens, not besides them.
        return self.start + self.patch * (self.length - 2) + self.end


@dataclass(frozen=True)
class ProjectorSettings(PartSettings):
    """Settings of a projector, and what it makes of the tower's grid of patches."""

    def pooled_side(self, side: int) -> int:
        """Side of a frame's grid behind the projector, of one with ``side`` patches a side."""
        return side


@dataclass(frozen=True)
class ResamplerSettings(PartSettings):
    """Settings of a resampler, and how many tokens it makes with them."""

    positive: ClassVar[tuple[str, ...]] = ()
    """Fields with a flag of their own that must be at least 1."""
    shorten: ClassVar[tuple[str, ...]] = ()
    """Changes of flags that make spans shorter, as in "lower --mm_perceiver_latents"."""

    def check(self, side: int) -> None:
        """A ValueError that names the flag of a setting that cannot be, for frames of ``side`` x ``side`` patches."""
        for name in self.positive:
            if getattr(self, name) < 1:
                raise ValueError(f"--mm_{name} is {getattr(self, name)}; it must be at least 1")

    def frame_tokens(self, side: int) -> int:
        """Tokens of one frame, for a resampler that makes as many of each frame."""
        raise NotImplementedError

    def count_tokens(self, side: int, kind: MediaKind, num_frames: int) -> tuple[int, ...]:
        """Tokens of each span of one image, or of one video.

        Args:
            side: of a frame's grid of patches, behind the projector.
            kind: "image", which has one span, or "video", which has one, or a fast one followed by a slow one.
            num_frames: of the video; 1 for an image.
        """
        return (num_frames * self.frame_tokens(side),)


PROJECTOR_SETTINGS: Registry[type[ProjectorSettings]] = Registry("projector")
"""By the name of the projector; one that is not here keeps the grid, and has no settings."""
RESAMPLER_SETTINGS: Registry[type[ResamplerSettings]] = Registry("resampler")


@dataclass(frozen=True)
class TokenLayout:
    """How many tokens each image or video takes, markers included.

    Attributes:
        projector: settings of the projector.
        grid_side, grid_patches: of a frame's grid behind the projector, the patches a side and all of them.
        resampler_type, resampler: name and settings of the resampler; None without one.
        resample_images: whether images pass the resampler too; videos always do.
        anyres: how images are cut into tiles; None where each is a single square.
    """

    projector: ProjectorSettings
    grid_side: int
    grid_patches: int
    resampler_type: str | None = None
    resampler: ResamplerSettings | None = None
    resample_images: bool = False
    anyres: AnyRes | None = None

    def resamples(self, kind: MediaKind) -> bool:
        """Whether media of a kind pass the resampler; the others keep one token a patch."""
        # It is videos that take too many tokens; images keep their patches unless --mm_resample_images is set.
        return self.resampler is not None and (kind == "video" or self.resample_images)

    def count_tokens(self, kind: MediaKind, num_frames: int = 1) -> tuple[int, ...]:
        """Tokens of each span of a video, or of one view of an image."""
        if self.resampler is None or not self.resamples(kind):
            return (num_frames * self.grid_patches,)
        return self.resampler.count_tokens(self.grid_side, kind, num_frames)

    def spans(self, kind: MediaKind, num_frames: int = 1, image_size: tuple[int, int] | None = None) -> list[Span]:
        """The token spans of one image, or of one video of ``num_frames`` frames, in order.

        ``image_size`` is the original (height, width) of an image; one of anyres must come with it.
        """
        lengths = self.count_tokens(kind, num_frames)  # one number for each span
        if kind == "image" and self.anyres is not None:
            if image_size is None:
                raise ValueError(
                    "how many tokens an anyres image takes depends on its size; pass the (height, width) of each image"
                )
            # All views of an anyres image are one span.
            lengths = (self.anyres.num_tokens(image_size),)
        markers = _IMAGE_MARKERS if kind == "image" else _VIDEO_MARKERS
        if not 1 <= len(lengths) <= len(markers):
            raise ValueError(
                f"the resampler {self.resampler_type!r} counts {len(lengths)} spans for one {kind}; "
                f"its count_tokens must give one{' or two' * (len(markers) - 1)}"
            )
        # strict=False: a video of one span has no slow one.
        spans = [Span(*marker, length) for marker, length in zip(markers, lengths, strict=False)]
        # Markers are overwritten with features too (see ``visual.splice``): a span counts them in.
        short = [span for span in spans if span.length < 2]
        if short:
            raise ValueError(
                f"{short[0].start}...{short[0].end} would have {short[0].length} token, but a span needs "
                "one for its start and one for its end; raise --num_frames or the number of tokens a frame"
            )
        return spans

    def text(self, kind: MediaKind, num_frames: int = 1, image_size: tuple[int, int] | None = None) -> str:
        """What stands in the text for one image or video; see ``spans``."""
        return "".join(span.text for span in self.spans(kind, num_frames, image_size))

    def num_tokens(self, kind: MediaKind, num_frames: int = 1, image_size: tuple[int, int] | None = None) -> int:
        """Positions that the spans of one image or video take; see ``spans``."""
        return sum(span.length for span in self.spans(kind, num_frames, image_size))

    @property
    def most_image_tokens(self) -> int:
        """Positions that no image takes more than."""
        return self.num_tokens("image") if self.anyres is None else self.anyres.most_tokens


def build_layout(settings: Mapping[str, Any]) -> TokenLayout:
    """The layout of a model's visual settings, by the names that ``VisionConfig`` has for them.

    Raises:
        ValueError: settings of projector, resampler or tiles that cannot be, or that contradict one another.
    """
    projector_type, resampler_type = settings["projector_type"], settings["resampler_type"]
    kind = ProjectorSettings
    # Not an error where it is unknown: names such as mlp2x_gelu are a pattern, which build_projector reads.
    if projector_type in PROJECTOR_SETTINGS:
        kind = PROJECTOR_SETTINGS.get(projector_type)
    elif settings["projector_args"]:
        raise ValueError(
            f"--mm_projector_args: the projector {projector_type!r} has no settings of its own; {PLUGIN_HINT}"
        )
    # The projector comes first: it may pool the grid that the resampler's settings are checked against.
    projector = build_settings(kind, settings, settings["projector_args"], "--mm_projector_args")
    side = projector.pooled_side(settings["patches_per_side"])
    resampler = None
    if resampler_type is not None:
        if resampler_type not in RESAMPLER_SETTINGS:
            raise ValueError(
                f"unknown --mm_resampler_type {resampler_type!r}; known: {', '.join(RESAMPLER_SETTINGS.names())}, "
                f"none; {PLUGIN_HINT}"
            )
        own = settings["resampler_args"]
        resampler = build_settings(RESAMPLER_SETTINGS.get(resampler_type), settings, own, "--mm_resampler_args")
        resampler.check(side)
    elif settings["resampler_args"]:
        raise ValueError("--mm_resampler_args needs --mm_resampler_type")
    # Tiles come last: their views are counted by the layout of single images.
    layout = TokenLayout(projector, side, side**2, resampler_type, resampler, settings["resample_images"])
    return replace(layout, anyres=_build_anyres(settings, layout))


def _build_anyres(settings: Mapping[str, Any], layout: TokenLayout) -> AnyRes | None:
    aspect_ratio, merge_type = settings["image_aspect_ratio"], settings["patch_merge_type"]
    # "anyres_max_9" is (True, 9), "anyres" (True, None), "square" and "pad" (False, None).
    tiled, max_tiles = parse_aspect_ratio(aspect_ratio)
    if not tiled and aspect_ratio not in ASPECT_RATIOS:
        known = ", ".join([*ASPECT_RATIOS, ANYRES, f"{ANYRES}_max_N"])
        raise ValueError(f"--image_aspect_ratio is {aspect_ratio!r}; known: {known}")
    if merge_type not in PATCH_MERGE_TYPES:
        raise ValueError(f"--mm_patch_merge_type is {merge_type!r}; known: {', '.join(PATCH_MERGE_TYPES)}")
    grids = parse_pinpoints(settings["image_grid_pinpoints"], settings["image_size"]) if tiled else ()
    if max_tiles is not None and merge_type == FLAT:
        raise ValueError(
            f"--image_aspect_ratio {aspect_ratio} shrinks the grid that --mm_patch_merge_type "
            f"{SPATIAL_UNPAD} makes; set that, or limit {FLAT} by fewer --image_grid_pinpoints"
        )
    if merge_type == SPATIAL_UNPAD and not tiled:
        raise ValueError(f"--mm_patch_merge_type {SPATIAL_UNPAD} needs --image_aspect_ratio {ANYRES}")
    if merge_type == SPATIAL_UNPAD and layout.resamples("image"):
        raise ValueError(
            f"--mm_patch_merge_type {SPATIAL_UNPAD} needs images as grids of patches, and --mm_resample_images "
            f"takes the grid away; switch it off, or use {FLAT}"
        )
    if not tiled:
        return None
    # A view is an image of its own to the resampler.
    view_tokens = sum(layout.count_tokens("image"))
    return AnyRes(settings["image_size"], layout.grid_side, view_tokens, grids, merge_type, max_tiles)


# The library's own projectors and resamplers. Each of their fields is a field, and so a flag, of ``VisionConfig``.


@PROJECTOR_SETTINGS.register("pooler")
@dataclass(frozen=True)
class PoolerSettings(ProjectorSettings):
    """One feature of each 2 x 2 patches."""

    stride: ClassVar[int] = 2

    def pooled_side(self, side: int) -> int:
        """A last, half window counts for a whole one."""
        return math.ceil(side / self.stride)


@dataclass(frozen=True)
class AttentionSettings(ResamplerSettings):
    """A resampler whose attention has an inner width of its own."""

    resampler_width: int
    resampler_heads: int
    positive: ClassVar[tuple[str, ...]] = ("resampler_width", "resampler_heads")

    def check(self, side: int) -> None:
        super().check(side)
        if self.resampler_width % self.resampler_heads:
            raise ValueError(
                f"--mm_resampler_width {self.resampler_width} is no multiple of "
                f"--mm_resampler_heads {self.resampler_heads}"
            )


@RESAMPLER_SETTINGS.register("fast_slow_resampler")
@dataclass(frozen=True)
class FastSlowSettings(AttentionSettings):
    """A video has few tokens of every frame, then many of some frames; an image is like one of these."""

    perceiver_latents: int
    perceiver_latents_fast: int
    slow_frames: int
    shorten = ("lower --mm_perceiver_latents",)

    def check(self, side: int) -> None:
        finest = side
        for name in ("perceiver_latents", "perceiver_latents_fast"):
            latents = getattr(self, name)
            # Cells lie in a square grid, which pools the one before it: tower's, slow, fast.
            root = math.isqrt(max(latents, 0))
            if latents < 1 or root * root != latents:
                below = max(root, 1)
                raise ValueError(
                    f"--mm_{name} is {latents}, which is not a square; the nearest squares are "
                    f"{below * below} and {(below + 1) ** 2}"
                )
            if root > finest:
                raise ValueError(
                    f"--mm_{name} is {latents} ({root} x {root}), finer than the {finest} x {finest} grid "
                    f"it is pooled from; use at most {finest * finest}"
                )
            finest = root
        super().check(side)

    def num_slow(self, num_frames: int) -> int:
        """Temporal length of a video's slow span."""
        # A video shorter than that keeps every frame: time is pooled, never stretched.
        return min(self.slow_frames or num_frames, num_frames)

    def count_tokens(self, side: int, kind: MediaKind, num_frames: int) -> tuple[int, ...]:
        if kind == "image":
            return (self.perceiver_latents,)
        # The fast span first, as in LLaVA-ST (arXiv 2501.08282).
        return num_frames * self.perceiver_latents_fast, self.num_slow(num_frames) * self.perceiver_latents


@RESAMPLER_SETTINGS.register("perceiver")
@dataclass(frozen=True)
class PerceiverSettings(AttentionSettings):
    """The latents of each frame."""

    perceiver_latents: int
    perceiver_depth: int
    positive = ("perceiver_latents", "perceiver_depth", *AttentionSettings.positive)
    shorten = ("lower --mm_perceiver_latents",)

    def frame_tokens(self, side: int) -> int:
        return self.perceiver_latents


@RESAMPLER_SETTINGS.register("qformer")
@dataclass(frozen=True)
class QFormerSettings(AttentionSettings):
    """The queries of each frame."""

    qformer_latents: int
    qformer_depth: int
    positive = ("qformer_latents", "qformer_depth", *AttentionSettings.positive)
    shorten = ("lower --mm_qformer_latents",)

    def frame_tokens(self, side: int) -> int:
        return self.qformer_latents


@RESAMPLER_SETTINGS.register("spatial_pool")
@dataclass(frozen=True)
class SpatialPoolSettings(ResamplerSettings):
    """The cells of each frame's pooled grid."""

    spatial_pool_stride: int
    spatial_pool_mode: str
    positive = ("spatial_pool_stride",)
    shorten = ("raise --mm_spatial_pool_stride",)

    def check(self, side: int) -> None:
        super().check(side)
        if self.spatial_pool_mode not in POOL_MODES:
            raise ValueError(f"--mm_spatial_pool_mode is {self.spatial_pool_mode!r}; known: {', '.join(POOL_MODES)}")

    def pooled_side(self, side: int) -> int:
        """Side of the pooled grid; a last window that juts out counts."""
        return math.ceil(side / self.spatial_pool_stride)

    def frame_tokens(self, side: int) -> int:
        return self.pooled_side(side) ** 2


@RESAMPLER_SETTINGS.register("masked_drop")
@dataclass(frozen=True)
class MaskedDropSettings(ResamplerSettings):
    """The patches of each frame that are kept."""

    mask_drop_ratio: float
    shorten = ("lower --mm_mask_drop_ratio",)

    def check(self, side: int) -> None:
        if not 0 < self.mask_drop_ratio <= 1:
            raise ValueError(
                f"--mm_mask_drop_ratio is {self.mask_drop_ratio}; it is the share of patches that is kept, "
                "above 0 and at most 1"
            )

    def frame_tokens(self, side: int) -> int:
        # At least one patch: a frame without any would leave a span of nothing.
        return max(1, round(side**2 * self.mask_drop_ratio))
