"""Clips that are pictures: an animated GIF, PNG, WebP or AVIF, a folder of frames, a list of them.

Takes no torch: the decoder process imports it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava.data.files import MediaError, check_file, is_picture_name
from llava.data.image_structure import Animation, name_kind
from llava.data.images import OpenPicture, open_picture, read_image_size, read_picture, to_rgb
from llava.data.limits import DEFAULT_LIMITS, MediaLimits

_NOT_LISTED = ("thumbs.db", "desktop.ini")


def is_picture_file(path: str) -> bool:
    """Whether a file is a picture by its content; a MediaError if it cannot be read."""
    check_file(path)
    with open(path, "rb") as file:  # noqa: PTH123
        return name_kind(file.read(32)) is not None


class FrameFiles:
    """A clip whose frames are files of their own.

    Attributes:
        fps: frames a second; 1 where nobody has said.
        times: seconds of each frame from the first one.
    """

    def __init__(self, paths: Sequence[str], fps: float = 0.0, limits: MediaLimits = DEFAULT_LIMITS) -> None:
        limits.check_length(len(paths))
        self._paths, self._limits = paths, limits
        self.fps = fps or 1.0
        self.times = [i / self.fps for i in range(len(paths))]
        self.duration = len(paths) / self.fps

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Frames at ascending indices, as ``Video.read`` gives them; a ValueError if they differ in size."""
        height, width = read_image_size(self._paths[indices[0]])
        self._limits.check_frames(len(indices), width, height)
        frames: dict[int, NDArray[np.uint8]] = {}
        for index in indices:
            if index not in frames:
                frames[index] = read_picture(self._paths[index], self._limits)
            found = frames[index].shape[:2]
            if found != (height, width):
                raise ValueError(
                    f"its frames differ in size: {os.path.basename(self._paths[indices[0]])} is {width} x {height}, "
                    f"{os.path.basename(self._paths[index])} is {found[1]} x {found[0]}"
                )
        return np.stack([frames[index] for index in indices])


class AnimatedPicture:
    """A clip that is one animated picture; attributes as those of ``FrameFiles``, from the delays in the file."""

    def __init__(self, picture: OpenPicture, limits: MediaLimits) -> None:
        self._image: Any = picture.image
        self._limits = limits
        animation = picture.animation or self._read_delays()
        if animation is None:
            raise ValueError(
                'it is one still picture and no clip; give it as "image", or the frames of a clip as a list or a folder'
            )
        self._first = animation.first
        *starts, self.duration = accumulate(animation.seconds, initial=0.0)
        self.times: list[float] = starts
        self.fps = len(starts) / self.duration

    def _read_delays(self) -> Animation | None:
        """Of a sequence whose delays only the decoder knows (AVIF)."""
        count = getattr(self._image, "n_frames", 1)
        if self._image.format != "AVIF" or count < 2:
            return None
        self._limits.check_length(count)
        seconds = []
        for index in range(count):
            self._image.seek(index)
            self._image.load()
            seconds.append(self._image.info.get("duration", 0) / 1000 or 0.1)
        return Animation(tuple(seconds))

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Frames at ascending indices, as ``Video.read`` gives them."""
        size = self._image.size
        self._limits.check_frames(len(indices), *size)
        frames: dict[int, NDArray[np.uint8]] = {}
        for index in indices:
            if index not in frames:
                self._image.seek(self._first + index)
                if self._image.size != size:
                    raise ValueError(f"its frame {index} is larger than its first")
                frames[index] = to_rgb(self._image)
        return np.stack([frames[index] for index in indices])


@contextmanager
def open_animation(path: str, limits: MediaLimits = DEFAULT_LIMITS) -> Iterator[AnimatedPicture]:
    """Open an animated picture as a clip.

    Raises:
        MediaError: it is a still picture, or not what ``open_picture`` opens.
    """
    with open_picture(path, limits) as picture:
        yield AnimatedPicture(picture, limits)


def list_frames(folder: str) -> list[str]:
    """The pictures of a folder in the order of the numbers in their names.

    Raises:
        MediaError: it has none, something else lies among them, or two of them have one place.
    """
    names = [name for name in os.listdir(folder) if not name.startswith(".") and name.lower() not in _NOT_LISTED]
    others = sorted(name for name in names if not is_picture_name(name))
    if others or not names:
        why = f"{others[0]} is none" if others else "it is empty"
        raise MediaError(
            f"{folder}: a folder, not a file; a clip may be a folder of pictures and nothing else, but {why}"
        )
    places: dict[Any, str] = {}
    for name in names:
        place = _place(name.rpartition(".")[0])
        if (other := places.setdefault(place, name)) != name:
            raise MediaError(
                f"{folder}: its pictures {min(name, other)} and {max(name, other)} have one place in a clip"
            )
    return [os.path.join(folder, places[place]) for place in sorted(places)]


def _place(name: str) -> tuple[tuple[str, int], ...]:
    """Sorts names by their words and by the value of their numbers: ``f2`` before ``f10``."""
    pieces = re.split(r"(\d+)", name.lower())
    return tuple((word, int(number)) for word, number in zip(pieces[::2], [*pieces[1::2], "-1"], strict=True))
