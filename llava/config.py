"""VisionConfig: how images and videos become token positions.

The data side (which writes placeholder tokens) and the model side (which overwrites them with
features) both read this one description, so they cannot disagree on a count.
"""

from __future__ import annotations

import math
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
from llava.types import MediaKind

FAST_SLOW_RESAMPLER = "fast_slow_resampler"
ASPECT_RATIOS = ("square", "pad")


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


@dataclass(frozen=True)
class VisionConfig:
    """Everything that fixes the visual side of a model.

    A model's ``config.json`` holds each field under its name with the prefix ``mm_``.

    Attributes:
        vision_tower: name or folder that the tower's weights come from.
        vision_config: the tower's own configuration, with its ``model_type``.
        vision_tower_hash: digest of the tower's weights, see ``hf_tower.hash_weights``.
        save_vision_tower: whether checkpoints hold the tower's weights too.
        vision_select_layer: which hidden state is used, counted as in the list of the embeddings
            and every layer's output: -2 is the output of the last layer but one.
        hidden_size: width of the tower's features.
        image_size: side in pixels of the square frames that the tower sees.
        image_resize_size: with aspect ratio ``square``, the shorter side before a centre crop;
            None stretches the image to the square.
        image_aspect_ratio: ``square`` or ``pad`` (the whole image, padded with the mean colour).
        image_mean, image_std: per channel, of pixels in [0, 1].
        patches_per_side: side of the tower's patch grid.
        projector_type: a registered projector.
        resampler_type: a registered resampler, or None.
        perceiver_latents: tokens a frame in the slow stream (and of a resampled image).
        perceiver_latents_fast: tokens a frame in the fast stream.
        perceiver_depth: layers of resamplers that have a depth; the fast/slow one has none.
        resampler_width, resampler_heads: inner width and heads of the resampler's attention.
        resample_images: whether images pass the resampler too; False keeps one token a patch.
        num_frames: frames sampled from a video.
        slow_frames: temporal length of the slow stream; 0 keeps every frame.
        video_fps: frames sampled a second instead of ``num_frames``; 0 switches this off.
        frames_upbound: most frames that ``video_fps`` may sample.
        token_ids: ids of the visual tokens in the model's vocabulary.
    """

    vision_tower: str
    vision_config: dict[str, Any]
    hidden_size: int
    image_size: int
    patches_per_side: int
    vision_tower_hash: str | None = None
    save_vision_tower: bool = False
    vision_select_layer: int = -2
    image_resize_size: int | None = None
    image_aspect_ratio: str = "square"
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    projector_type: str = "mlp2x_gelu"
    resampler_type: str | None = None
    perceiver_latents: int = 81
    perceiver_latents_fast: int = 9
    perceiver_depth: int = 2
    resampler_width: int = 1024
    resampler_heads: int = 8
    resample_images: bool = False
    num_frames: int = 4
    slow_frames: int = 0
    video_fps: float = 0.0
    frames_upbound: int = 32
    token_ids: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.image_aspect_ratio not in ASPECT_RATIOS:
            raise ValueError(f"--image_aspect_ratio is {self.image_aspect_ratio!r}; known: {', '.join(ASPECT_RATIOS)}")
        for name in ("num_frames", "frames_upbound", "patches_per_side", "resampler_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.slow_frames < 0 or self.video_fps < 0:
            raise ValueError("--mm_slow_frames and --video_fps must not be negative")
        if self.resampler_type == FAST_SLOW_RESAMPLER:
            self._check_latents()

    def _check_latents(self) -> None:
        finest = self.patches_per_side
        for flag, latents in (
            ("--mm_perceiver_latents", self.perceiver_latents),
            ("--mm_perceiver_latents_fast", self.perceiver_latents_fast),
        ):
            side = math.isqrt(max(latents, 0))
            if latents < 1 or side * side != latents:
                below = max(side, 1)
                raise ValueError(
                    f"{flag} is {latents}, which is not a square; the nearest squares are "
                    f"{below * below} and {(below + 1) ** 2}"
                )
            if side > finest:
                raise ValueError(
                    f"{flag} is {latents} ({side} x {side}), finer than the {finest} x {finest} grid "
                    f"it is pooled from; use at most {finest * finest}"
                )
            finest = side
        if self.resampler_width % self.resampler_heads:
            raise ValueError(
                f"--mm_resampler_width {self.resampler_width} is no multiple of "
                f"--mm_resampler_heads {self.resampler_heads}"
            )

    @property
    def num_patches(self) -> int:
        return self.patches_per_side**2

    @property
    def slow_side(self) -> int:
        return math.isqrt(self.perceiver_latents)

    @property
    def fast_side(self) -> int:
        return math.isqrt(self.perceiver_latents_fast)

    @property
    def max_frames(self) -> int:
        """The most frames that one video can have."""
        return self.frames_upbound if self.video_fps > 0 else self.num_frames

    def slow_length(self, num_frames: int) -> int:
        """Temporal length of the slow stream for a video of ``num_frames`` frames."""
        return min(self.slow_frames or num_frames, num_frames)

    def spans(self, kind: MediaKind, num_frames: int = 1) -> list[Span]:
        """The token spans of one image, or of one video of ``num_frames`` frames, in order."""
        if kind == "image":
            resampled = self.resampler_type is not None and self.resample_images
            length = self.perceiver_latents if resampled else self.num_patches
            spans = [Span(IMAGE_START, IMAGE_PATCH, IMAGE_END, length)]
        elif self.resampler_type is None:
            length = num_frames * self.num_patches
            spans = [Span(VIDEO_START, VIDEO_PATCH, VIDEO_END, length)]
        else:
            fast = num_frames * self.perceiver_latents_fast
            slow = self.slow_length(num_frames) * self.perceiver_latents
            spans = [
                Span(VIDEO_START, VIDEO_PATCH, VIDEO_END, fast),
                Span(SLOW_VIDEO_START, VIDEO_PATCH, SLOW_VIDEO_END, slow),
            ]
        short = [span for span in spans if span.length < 2]
        if short:
            raise ValueError(
                f"{short[0].start}...{short[0].end} would have {short[0].length} token, but a span needs "
                "one for its start and one for its end; raise --num_frames or the number of latents"
            )
        return spans

    def num_tokens(self, kind: MediaKind, num_frames: int = 1) -> int:
        """Positions that one image, or one video of ``num_frames`` frames, takes; markers included."""
        return sum(span.length for span in self.spans(kind, num_frames))

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
