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
    """An image or a video of a record, not loaded yet."""

    kind: MediaKind
    path: str  # resolved; of a clip that is given as its frames, that of the first
    root: int = 0  # characters of the path that name the folder which the file must lie in, links followed; 0: any
    frames: tuple[str, ...] = ()  # the path of each frame, of a clip that is given as its frames
    fps: float = 0.0  # of these frames; 0 where it is not given


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation, and whose it is."""

    role: Role
    text: str


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of a sample, ``variables`` in a data file: each list in the order of its placeholders."""

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
    """One validated sample of a data file."""

    id: str
    turns: tuple[Turn, ...]
    media: tuple[Media, ...] = ()
    source: str = ""  # the file and the place in it, for errors: "captions.json, sample 12"
    split: tuple[int, int] | None = None  # first and last frame of the part of the clip that is meant; None for all
    fault: str | None = None  # what is wrong with a bad sample, which has no turns and no media
    coordinates: Coordinates = NO_COORDINATES  # in the image or video, not yet in the tower's square
    data_file: str = field(default="", compare=False)  # its full path: other files may have the name in source

    def __str__(self) -> str:
        return f"sample {self.id!r} ({self.source})" if self.source else f"sample {self.id!r}"


@dataclass(frozen=True)
class FeatureEntry:
    """What a feature cache keeps of an image or a video beside the tower's features."""

    key: str  # its name, made of the file's bytes and of all that its features depend on
    context: str  # the settings among these, see data/feature_cache/keys.py
    kind: MediaKind
    original_size: tuple[int, int]
    times: tuple[float, ...]
    duration: float


@dataclass(frozen=True)
class VisualInput:
    """A decoded image or video, ready for the tower, or the tower's features of it."""

    kind: MediaKind
    # uint8 (frames, 3, side, side): one frame of an image, or its views with anyres. Features that were kept stand in
    # the same place, as (frames, 1, patches, tower width), see holds_features.
    frames: Tensor
    original_size: tuple[int, int]  # (height, width) in pixels, before resizing
    times: tuple[float, ...] = ()  # of the frames, in seconds from the video's first
    duration: float = 0.0  # seconds of the whole video
    entry: FeatureEntry | None = None  # that a feature cache lacks, and is to get once the tower has run


def holds_features(frames: Tensor) -> bool:
    """Whether the entry of an image or a video holds features of the tower: it has one channel, and pixels have 3."""
    return frames.ndim == 4 and frames.shape[1] == 1


@dataclass(frozen=True)
class Exposure:
    """What a sample presents to the model each time that it is trained on."""

    source: int = 0  # the number of its data file, see dataset_stats.sources_of
    samples: int = 1  # a chunk of a text is one as well
    words: int = 0  # see data/words.py
    answer_words: int = 0  # those of the assistant's turns
    tokens: int = 0  # positions, visual ones included
    supervised_tokens: int = 0  # those that are predicted and learned
    images: int = 0
    videos: int = 0
    video_ms: int = 0  # milliseconds that its clips, or the parts of them that are meant, last together
    cut_samples: int = 0  # 1 where text was cut off
    cut_words: int = 0  # that were cut off
    cut_tokens: int = 0

    @property
    def counts(self) -> tuple[int, ...]:
        """All of it but the source."""
        return tuple(vars(self).values())[1:]


EXPOSURE_COUNTS = tuple(Exposure.__dataclass_fields__)[1:]
"""The names of ``Exposure.counts``."""


@dataclass(frozen=True)
class Example:
    """One tokenised sample."""

    id: str
    input_ids: list[int]
    labels: list[int]  # as many as ids
    media: list[VisualInput] = field(default_factory=list)  # in reading order
    coordinates: Coordinates = NO_COORDINATES  # in the tower's square
    num_cut: int = 0  # tokens of the text that were cut off, for which the context had no room
    exposure: Exposure | None = None  # what a run's budget counts of it; None where nobody says


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, in place of its ``Example``."""

    id: str
    source: str  # as in Record
    file: str  # the image or video at fault; "" where no file is
    reason: str  # one line, without id, source and file
    data_file: str = ""  # as in Record

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
    """What the collator returns and, but for the last five, ``forward`` takes; rows are samples, or packs of some."""

    input_ids: Tensor  # int64 (batch, length)
    labels: Tensor  # int64 (batch, length)
    attention_mask: Tensor  # int64 (batch, length), ones exactly over each sample's own length
    # Three lists with an entry for each image or video of the batch, in reading order; absent without any.
    images: list[Tensor]  # uint8 (frames, 3, side, side) each, or features: (frames, 1, patches, tower width)
    modalities: list[MediaKind]
    image_sizes: list[tuple[int, int]]  # original (height, width)
    variables: list[dict[str, list[float]]]  # coordinates of each row, in the tower's square; absent without any
    pack_lengths: list[list[int]]  # tokens of the samples of each row; absent where a row is one sample
    # For the trainer, which takes them out.
    sample_ids: list[str]  # of the rows; none for the one row of an empty batch
    bad_samples: list[BadSample]  # those that have no row; absent without any
    num_cut: list[int]  # tokens that each row has lost; absent where nothing was cut
    exposure: list[Exposure]  # of each row; absent where nobody says
    feature_entries: list[FeatureEntry | None]  # that a cache is to get, one for each of images; absent without any
