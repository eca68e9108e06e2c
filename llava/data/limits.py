"""How large media may be: what is more is an error before it is decoded, not a process without memory."""

from __future__ import annotations

from dataclasses import dataclass

PILLOW_LIMIT = 178_956_970
"""Pixels above which Pillow refuses an image (twice its ``MAX_IMAGE_PIXELS``, which is the whole process's to set)."""


@dataclass(frozen=True)
class MediaLimits:
    """The most that a file may ask for; each field is a flag. Its checks raise ValueError without the path.

    Attributes:
        max_image_pixels: of an image, or of one frame of a video.
        max_image_bytes: of an image's file.
        max_video_pixels: of all frames sampled from a clip, which are in memory together (3 bytes each).
        max_video_frames: of a clip, whose times are in memory together.
    """

    max_image_pixels: int = 100_000_000
    max_image_bytes: int = 2**29
    max_video_pixels: int = 500_000_000
    max_video_frames: int = 1_000_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")
        if self.max_image_pixels > PILLOW_LIMIT:
            raise ValueError(
                f"--max_image_pixels is {self.max_image_pixels}; it can be at most {PILLOW_LIMIT}, where Pillow stops"
            )

    def check_image_file(self, size: int) -> None:
        """Before an image is opened; ``size`` in bytes."""
        if size > self.max_image_bytes:
            raise ValueError(f"its file has {size} bytes, but --max_image_bytes is {self.max_image_bytes}")

    def check_picture(self, width: int, height: int) -> None:
        """Before an image, or any frame of a clip, is decoded; sizes as its header declares them."""
        if width * height > self.max_image_pixels:
            raise ValueError(
                f"it is {width} x {height} pixels, {width * height}, but --max_image_pixels is {self.max_image_pixels}"
            )

    def check_frames(self, num_frames: int, width: int, height: int) -> None:
        """Before the frames sampled from a clip are decoded."""
        if (pixels := num_frames * width * height) > self.max_video_pixels:
            raise ValueError(
                f"{num_frames} frames of {width} x {height} are {pixels} pixels, but --max_video_pixels is "
                f"{self.max_video_pixels}; scale the clip down, or lower --num_frames or --frames_upbound"
            )

    def check_length(self, num_frames: int) -> None:
        """While the frames of a clip are counted."""
        if num_frames > self.max_video_frames:
            raise ValueError(f"it has more frames than --max_video_frames, {self.max_video_frames}; cut it into clips")


DEFAULT_LIMITS = MediaLimits()
