"""How many tokens an image or a video takes behind each resampler.

The data side counts with these laws, the model's resamplers are held to them. A resampler that is
added in a file of its own registers its law there, beside its class::

    @stream_law("first_patches", shorten=("lower --mm_perceiver_latents",))
    def count_first_patches(vision: VisionConfig, kind: MediaKind, num_frames: int) -> tuple[int, ...]:
        return (num_frames * vision.perceiver_latents,)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava.registry import Registry
from llava.types import MediaKind

if TYPE_CHECKING:
    from llava.config import VisionConfig

FAST_SLOW_RESAMPLER = "fast_slow_resampler"
POOL_MODES = ("average", "max", "bilinear")

StreamCount = Callable[["VisionConfig", MediaKind, int], tuple[int, ...]]
"""From settings, kind and number of frames to the tokens of each stream.

An image has one stream; a video has one, or a fast one followed by a slow one.
"""


@dataclass(frozen=True)
class StreamLaw:
    """What is known of a resampler without building it.

    Attributes:
        count: the tokens of each stream of what passes the resampler.
        shorten: changes of flags that make the streams shorter, as in "lower --mm_perceiver_latents".
        check: raises a ValueError that names the flag of a setting the resampler cannot have.
    """

    count: StreamCount
    shorten: tuple[str, ...] = ()
    check: Callable[[VisionConfig], None] | None = None


STREAM_LAWS: Registry[StreamLaw] = Registry("resampler")


def stream_law(
    name: str, *, shorten: tuple[str, ...] = (), check: Callable[[VisionConfig], None] | None = None
) -> Callable[[StreamCount], StreamCount]:
    """Decorator that files a counting function as the law of the resampler ``name``, see ``StreamLaw``.

    The function must be importable by its name: workers that do not share this process's memory find
    it, and with it the law, by importing its module.
    """

    def register(count: StreamCount) -> StreamCount:
        STREAM_LAWS.register(name)(StreamLaw(count, shorten, check))
        return count

    return register


def check_positive(vision: VisionConfig, *names: str) -> None:
    """A ValueError for a setting of ``vision`` below one."""
    for name in names:
        if getattr(vision, name) < 1:
            raise ValueError(f"--mm_{name} is {getattr(vision, name)}; it must be at least 1")


def check_heads(vision: VisionConfig) -> None:
    """A ValueError where the resampler's inner width cannot be shared among its heads."""
    check_positive(vision, "resampler_width", "resampler_heads")
    if vision.resampler_width % vision.resampler_heads:
        raise ValueError(
            f"--mm_resampler_width {vision.resampler_width} is no multiple of "
            f"--mm_resampler_heads {vision.resampler_heads}"
        )


def _check_fast_slow(vision: VisionConfig) -> None:
    finest = vision.grid_side
    for name in ("perceiver_latents", "perceiver_latents_fast"):
        latents = getattr(vision, name)
        side = math.isqrt(max(latents, 0))
        if latents < 1 or side * side != latents:
            below = max(side, 1)
            raise ValueError(
                f"--mm_{name} is {latents}, which is not a square; the nearest squares are "
                f"{below * below} and {(below + 1) ** 2}"
            )
        if side > finest:
            raise ValueError(
                f"--mm_{name} is {latents} ({side} x {side}), finer than the {finest} x {finest} grid "
                f"it is pooled from; use at most {finest * finest}"
            )
        finest = side
    check_heads(vision)


@stream_law(FAST_SLOW_RESAMPLER, shorten=("lower --mm_perceiver_latents",), check=_check_fast_slow)
def count_fast_slow(vision: VisionConfig, kind: MediaKind, num_frames: int) -> tuple[int, ...]:
    """A video: few tokens of every frame, then many of some; an image: as a frame of the latter."""
    if kind == "image":
        return (vision.perceiver_latents,)
    return (
        num_frames * vision.perceiver_latents_fast,
        vision.slow_length(num_frames) * vision.perceiver_latents,
    )


def _check_perceiver(vision: VisionConfig) -> None:
    check_positive(vision, "perceiver_latents", "perceiver_depth")
    check_heads(vision)


@stream_law("perceiver", shorten=("lower --mm_perceiver_latents",), check=_check_perceiver)
def count_perceiver(vision: VisionConfig, kind: MediaKind, num_frames: int) -> tuple[int, ...]:
    """The latents of each frame."""
    return (num_frames * vision.perceiver_latents,)


def _check_qformer(vision: VisionConfig) -> None:
    check_positive(vision, "qformer_latents", "qformer_depth")
    check_heads(vision)


@stream_law("qformer", shorten=("lower --mm_qformer_latents",), check=_check_qformer)
def count_qformer(vision: VisionConfig, kind: MediaKind, num_frames: int) -> tuple[int, ...]:
    """The queries of each frame."""
    return (num_frames * vision.qformer_latents,)


def _check_spatial_pool(vision: VisionConfig) -> None:
    check_positive(vision, "spatial_pool_stride")
    if vision.spatial_pool_mode not in POOL_MODES:
        raise ValueError(f"--mm_spatial_pool_mode is {vision.spatial_pool_mode!r}; known: {', '.join(POOL_MODES)}")


@stream_law("spatial_pool", shorten=("raise --mm_spatial_pool_stride",), check=_check_spatial_pool)
def count_spatial_pool(vision: VisionConfig, kind: MediaKind, num_frames: int) -> tuple[int, ...]:
    """The cells of each frame's pooled grid."""
    return (num_frames * vision.pooled_side**2,)


def _check_masked_drop(vision: VisionConfig) -> None:
    if not 0 < vision.mask_drop_ratio <= 1:
        raise ValueError(
            f"--mm_mask_drop_ratio is {vision.mask_drop_ratio}; it is the share of patches that is kept, "
            "above 0 and at most 1"
        )


@stream_law("masked_drop", shorten=("lower --mm_mask_drop_ratio",), check=_check_masked_drop)
def count_masked_drop(vision: VisionConfig, kind: MediaKind, num_frames: int) -> tuple[int, ...]:
    """The patches of each frame that are kept."""
    return (num_frames * vision.kept_patches,)
