"""Flags about media: where they lie, how they are checked, what their files may ask for."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from llava.data.media_files import DEFAULT_LIMITS, MediaLimits
from llava.data.start_checks import CHECK_DATA


@dataclass(kw_only=True)
class MediaArguments:
    """Limits of media files; one that exceeds them is a bad sample."""

    allow_outside_paths: bool = field(
        default=False,
        metadata={
            "help": "Let paths in data files lead out of --image_folder and --video_folder (or, without these, out of "
            "the data file's folder), be it by .., as absolute paths or through links."
        },
    )
    check_data: str = field(
        default="files",
        metadata={
            "help": "What is done with media before training: files (default) looks whether they are there, decode "
            "decodes all of them (as python -m llava.data.check), none does nothing."
        },
    )
    ignore_keys: list[str] | None = field(
        default=None,
        metadata={
            "help": "Keys of samples that hold no image and no video, whatever they look like: nothing is said of them."
        },
    )
    max_image_pixels: int = field(
        default=DEFAULT_LIMITS.max_image_pixels,
        metadata={"help": "Most pixels of an image, or of one frame of a video (default 100 million)."},
    )
    max_image_bytes: int = field(
        default=DEFAULT_LIMITS.max_image_bytes, metadata={"help": "Largest image file, in bytes (default 512 MiB)."}
    )
    max_video_pixels: int = field(
        default=DEFAULT_LIMITS.max_video_pixels,
        metadata={
            "help": "Most pixels of the frames sampled from a clip, before they are fitted to the tower (default 500 "
            "million, which take 1.5 GB)."
        },
    )
    max_video_frames: int = field(
        default=DEFAULT_LIMITS.max_video_frames, metadata={"help": "Most frames of a clip (default 1 million)."}
    )

    def check_media(self) -> None:
        """A ValueError for values that do not fit."""
        if self.check_data not in CHECK_DATA:
            raise ValueError(f"--check_data is {self.check_data!r}; known: {', '.join(CHECK_DATA)}")
        self.media_limits  # noqa: B018  (is checked where it is made)

    @property
    def media_limits(self) -> MediaLimits:
        """The limits for the data."""
        return MediaLimits(**{limit.name: getattr(self, limit.name) for limit in fields(MediaLimits)})
