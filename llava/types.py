"""What travels from a line of a data file to the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

MediaKind = Literal["image", "video"]
Role = Literal["system", "user", "assistant"]

ERROR, SKIP = "error", "skip"
ON_BAD_SAMPLE = (ERROR, SKIP)
"""What may be done about a bad sample: stop with an error that names it, or leave it out and write it down."""


@dataclass(frozen=True)
class Media:
    """An image or a video of a record: its kind and the resolved path of its file.

    ``root`` is how many characters of the path name the folder that the file may not lie outside of,
    links followed; 0 lets it lie anywhere. A clip that is given as its frames has the path of each in ``frames``
    (``path`` is the first) and their ``fps``, 0 if it is not given.
    """

    kind: MediaKind
    path: str
    root: int = 0
    frames: tuple[str, ...] = ()
    fps: float = 0.0


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation, and whose it is."""

    role: Role
    text: str


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of a sample, each list in the order in which its placeholders stand in the text.

    What a data file calls ``variables``.
    """

    temporal_input_locations: tuple[float, ...] = ()
    temporal_output_locations: tuple[float, ...] = ()
    spatial_height_input_locations: tuple[float, ...] = ()
    spatial_height_output_locations: tuple[float, ...] = ()
    spatial_width_input_locations: tuple[float, ...] = ()
    spatial_width_output_locations: tuple[float, ...] = ()

    def to_variables(self) -> dict[str, list[float]]:
        """The lists as a data file and ``forward`` have them."""
        return {name: list(numbers) for name, numbers in vars(self).items()}

    @classmethod
    def from_variables(cls, variables: Mapping[str, Sequence[float]]) -> Coordinates:
        """From lists; a missing one is empty."""
        return cls(**{name: tuple(numbers) for name, numbers in variables.items()})

    def __bool__(self) -> bool:
        """Whether there are any."""
        return any(vars(self).values())


NO_COORDINATES = Coordinates()


@dataclass(frozen=True)
class Record:
    """One validated sample of a data file.

    ``source`` names the file and the place in it ("captions.json, sample 12"), for error messages.
    ``split`` is the first and last frame of the clip that the sample speaks of, or None. ``fault`` is
    what is wrong with a bad sample, whose record has no turns and no media; None for a good one.
    ``coordinates`` are in the picture that they speak of, as the data file has them. ``data_file`` is its full path,
    which ``source`` alone may share with other files' names; "" where it is not known.
    """

    id: str
    turns: tuple[Turn, ...]
    media: tuple[Media, ...] = ()
    source: str = ""
    split: tuple[int, int] | None = None
    fault: str | None = None
    coordinates: Coordinates = NO_COORDINATES
    data_file: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"sample {self.id!r} ({self.source})" if self.source else f"sample {self.id!r}"


@dataclass(frozen=True)
class VisualInput:
    """Decoded media, ready for the tower.

    ``frames`` is uint8, (frames, 3, side, side), one frame for an image, or the views of an anyres
    image. ``original_size`` is (height, width) in pixels before resizing; ``times`` are the frames'
    times in seconds from the first frame of a video, ``duration`` the seconds that all of it lasts.
    """

    kind: MediaKind
    frames: Tensor
    original_size: tuple[int, int]
    times: tuple[float, ...] = ()
    duration: float = 0.0


@dataclass(frozen=True)
class Example:
    """One tokenised sample: equal-length ids and labels, its media in reading order, and coordinates in the square.

    ``num_cut`` is how many tokens of its text were cut off, for which the context had no room.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    media: list[VisualInput] = field(default_factory=list)
    coordinates: Coordinates = NO_COORDINATES
    num_cut: int = 0


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, in place of its ``Example``.

    ``file`` is the image or video at fault, empty where no file is; ``reason`` is one line, without
    the id, the source and the file. ``data_file`` is the full path of the data file, as in ``Record``.
    """

    id: str
    source: str
    file: str
    reason: str
    data_file: str = ""

    @classmethod
    def from_error(cls, record: Record, error: ValueError) -> BadSample:
        """What an error that was raised over a record says of it; that of a media file has a ``path``."""
        file: str = getattr(error, "path", "")
        reason = str(error).removeprefix(f"{record}: ").removeprefix(f"{record.source}: ").removeprefix(f"{file}: ")
        return cls(record.id, record.source, file, " ".join(reason.splitlines()), record.data_file)

    def to_json(self, with_data_file: bool = False) -> dict[str, str]:
        """What a file of bad samples says of it."""
        entry = {"id": self.id, "source": self.source, "file": self.file, "reason": self.reason}
        return entry | {"data_file": self.data_file} if with_data_file and self.data_file else entry

    def __str__(self) -> str:
        where = f"sample {self.id!r} ({self.source})" if self.source else f"sample {self.id!r}"
        return ": ".join(part for part in (where, self.file, self.reason) if part)


class BadSampleError(ValueError):
    """A bad sample under ``on_bad_sample="error"``; the message is one line that names sample and file.

    PyTorch raises the error of a worker process anew from its type and a text, the worker's traceback. That text
    ends with the line that was meant, which is taken out of it here.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__qualname__}: ")[2].rstrip())


class Batch(TypedDict, total=False):
    """What the collator returns and, but for the last two, ``forward`` takes.

    ``input_ids`` and ``labels`` are int64 (batch, length), ``attention_mask`` is int64 of the same
    shape with ones exactly over each sample's own length. ``images`` holds one uint8
    (frames, 3, side, side) tensor for each image or video, over the whole batch in reading order, ``modalities``
    their kinds and ``image_sizes`` their original (height, width); the three are absent from a
    batch without media. ``variables`` has the coordinates of each row, in the tower's square; it is absent
    from a batch without any. ``sample_ids`` are the ids of the rows, none of an empty batch's one;
    ``bad_samples``, absent where there are none, are those that got no row; ``num_cut``, absent where nothing was
    cut, are the tokens that rows have lost. The trainer takes these three out.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    images: list[Tensor]
    modalities: list[MediaKind]
    image_sizes: list[tuple[int, int]]
    variables: list[dict[str, list[float]]]
    sample_ids: list[str]
    bad_samples: list[BadSample]
    num_cut: list[int]
