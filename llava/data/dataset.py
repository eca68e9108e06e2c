"""From records to tokenised examples with decoded media."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from llava import progress
from llava.config import GroundingConfig, VisionConfig
from llava.constants import IGNORE_INDEX
from llava.data.dataset_stats import (
    count_coordinates,
    count_cut_tokens,
    count_media,
    count_presented_words,
    find_targets,
    list_sources,
    measure_lengths,
    number_sources,
)
from llava.data.feature_cache.cache import FeatureCacheError
from llava.data.formats import PLAIN_LM, Format, build_format
from llava.data.formats.base import ContextError, label_segments
from llava.data.images import read_image_size
from llava.data.media import load_media
from llava.data.media_files import DEFAULT_LIMITS, MediaError, MediaLimits, check_mounted
from llava.data.placeholders import add_time_instruction, clips_of, expand_placeholders, in_reading_order, stand_in
from llava.data.words import count_kept_words, cut_exposure, expose
from llava.grounding.samples import move_to_square
from llava.storage import StorageError, read_again
from llava.types import (
    ERROR,
    NO_COORDINATES,
    ON_BAD_SAMPLE,
    SKIP,
    BadSample,
    BadSampleError,
    Coordinates,
    Example,
    Exposure,
    Media,
    Record,
    Turn,
    VisualInput,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava.data.feature_cache.run import RunFeatures
    from llava.data.staging import StagedMedia

_MOST_NAMED = 5
DecodingKey = tuple[Media, tuple[int, int] | None]
"""What decoding depends on beside settings: a medium, and the part of it that is meant."""


@dataclass(eq=False, repr=False)
class SupervisedDataset(Dataset["Example | BadSample"]):
    """Records as examples; media are decoded when an example is asked for."""

    records: Sequence[Record]
    tokenizer: PreTrainedTokenizerBase
    """Knows the visual tokens if there is vision."""
    vision: VisionConfig | None
    """None for a model without vision."""
    max_length: int
    """Most tokens of an example. Text is cut to it, visual spans never."""
    early_mix_text: bool = False
    """Whether ``modality_lengths`` counts text-only samples among the others."""
    text_format: Format = None  # type: ignore[assignment]
    """How conversations become ids and labels; ``plain_lm`` by default."""
    on_bad_sample: str = ERROR
    """``error`` raises over a sample that cannot be used, ``skip`` gives a ``BadSample`` in its place, also where there
    is nothing to learn (else ``check_samples`` is to look for that)."""
    decode_timeout: float = 0.0
    """Seconds that decoding a video may take; 0 sets no limit."""
    limits: MediaLimits = DEFAULT_LIMITS
    """How large an image or a video may be."""
    grounding: GroundingConfig | None = None
    """What coordinates are to the model; None for one without them."""
    features: RunFeatures | None = None
    """Features of the tower, which take the place of decoded media where there are any."""
    staged: StagedMedia | None = None
    """Copies of the media on a disk of this machine, which are read in their place."""

    def __post_init__(self) -> None:
        if self.on_bad_sample not in ON_BAD_SAMPLE:
            raise ValueError(f"--on_bad_sample is {self.on_bad_sample!r}; known: {', '.join(ON_BAD_SAMPLE)}")
        self.text_format = self.text_format or build_format(PLAIN_LM, self.tokenizer)
        has_prompts = self.text_format.has_prompts
        # The times of frames stand in the user's turn, and must be neither learned nor left out.
        tells_times = has_prompts and self.text_format.writes_user_text
        if self.vision is not None and self.vision.add_time_instruction and not tells_times:
            raise ValueError(
                "--add_time_instruction tells the times of frames in the user's turns, but this format "
                f"{'leaves their text out' if has_prompts else 'learns all text'}; give a --version that writes and "
                "does not learn them (chat, qwen, v1, ...)"
            )
        # Input coordinates are data that the model is given, so they are masked in the labels.
        tables = self.grounding.token_ids if self.grounding is not None and self.grounding.has_tables else {}
        self._input_coordinate_ids = {i for token, i in tables.items() if token.endswith("-INPUT>")}
        self._decoded: dict[DecodingKey, VisualInput | MediaError] | None = None  # of the batch that is being made

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example | BadSample:
        """Decode and tokenise one sample.

        Raises:
            BadSampleError: its media cannot be decoded or do not fit the context; names sample and file.
                With ``on_bad_sample="skip"`` the same comes back as a ``BadSample``.
            ValueError: the model has no vision or no coordinates, for which no sample is to blame.
        """
        record = self.records[index]
        self.check_model(record)  # Outside of the try: a model without vision is no sample's fault.
        try:
            return self.load_example(record)
        except (FeatureCacheError, StorageError):
            raise  # No sample is to blame.
        except ValueError as error:
            bad = BadSample.from_error(record, error)
            if self.on_bad_sample == ERROR:
                raise BadSampleError(str(bad)) from error
            return bad

    def __getitems__(self, indices: Sequence[int]) -> list[Example | BadSample]:
        """The samples of a batch, as ``self[index]`` gives each; a medium that several of them have is decoded once."""
        with self.decoding_once():
            examples = [self[index] for index in indices]
        progress.note(progress.LOADING, ())
        return examples

    @contextmanager
    def decoding_once(self) -> Iterator[None]:
        """Within it a medium that has been decoded is not decoded again."""
        self._decoded = {}
        try:
            yield
        finally:
            self._decoded = None

    def load_example(self, record: Record) -> Example:
        """Decode and tokenise a record; a ValueError if it cannot be used."""
        self.check_usable(record)
        # What may take long, and hang, is said before: each clip has --decode_timeout, where there is one.
        clips = sum(media.kind == "video" for media in record.media)
        tries = clips * (1 if self.staged is None else 2)  # What a copy does not give is read again.
        patience = (self.decode_timeout + progress.GRACE) * tries if self.decode_timeout else 0.0
        progress.note(progress.DECODING if record.media else progress.READING, [record.id], patience=patience)
        media = self.load_media(record)
        ids, labels, exposure = self._encode(record, media)
        return Example(record.id, ids, labels, media, self._place(record, media), exposure.cut_tokens, exposure)

    def measure(self, index: int) -> Exposure | None:
        """What ``self[index]`` presents to a model, by its media's files only where it must be; None for a bad sample.

        Raises:
            ValueError: as for ``self[index]``.
        """
        record = self.records[index]
        if self.on_bad_sample == SKIP or any(media.kind == "video" for media in record.media):
            example = self[index]  # How long a clip is, and whether a file is bad, shows when it is opened.
            return example.exposure if isinstance(example, Example) else None
        return self._encode(record)[2]

    def check_model(self, record: Record) -> None:
        """A ValueError that names the record if it has what the model does not know: media, or coordinates."""
        if record.media and self.vision is None:
            raise ValueError(f"{record} has an image or a video, but the model has no vision; give --vision_tower")
        if record.coordinates != NO_COORDINATES and self.grounding is None:
            raise ValueError(f"{record} has coordinates (variables), but the model has none; give --stage 2")

    def check_usable(self, record: Record) -> None:
        """A ValueError for a bad record; where these are skipped, also for one that nothing can be learned from."""
        if record.fault is not None:
            raise ValueError(record.fault)
        if self.on_bad_sample == SKIP and not self.has_target(record):
            raise ValueError(f"{record}: has no text to learn from: an answer is empty, or there is none")

    def load_media(self, record: Record) -> list[VisualInput]:
        """Decode the media of a record, in reading order; a text-only one has none."""
        loaded = []
        for media in record.media:
            assert self.vision is not None  # See check_model.
            decoded = self._decode(media, self.vision, record.split)
            if isinstance(decoded, MediaError):
                raise MediaError(f"{record}: {decoded}", media.path) from decoded
            loaded.append(decoded)
        if len({media.kind for media in loaded}) < 2:
            return loaded
        # Records list images and videos apart; the text says in which order the model reads them.
        return in_reading_order(loaded, [turn.text for turn in record.turns])

    def _decode(self, media: Media, vision: VisionConfig, split: tuple[int, int] | None) -> VisualInput | MediaError:
        """A medium, or why it cannot be used; from the batch that is being made, if it has been there already."""
        key = (media, split)
        if self._decoded is not None and key in self._decoded:
            return self._decoded[key]
        decoded: VisualInput | MediaError
        load = partial(self._load, vision=vision, split=split)
        read = partial(load, media) if self.staged is None else partial(self.staged.load, media, load)
        try:
            decoded = read_again(read, media.path)
        except MediaError as error:
            decoded = error
        if self._decoded is not None:
            self._decoded[key] = decoded
        return decoded

    def _load(self, media: Media, vision: VisionConfig, split: tuple[int, int] | None) -> VisualInput:
        try:
            return load_media(media, vision, split, self.decode_timeout, self.limits, self.features)
        except MediaError:
            check_mounted(media)
            raise

    def _place(self, record: Record, media: Sequence[VisualInput]) -> Coordinates:
        """The coordinates of a record in the tower's square; none for a model to which placeholders are words."""
        if self.grounding is None or not self.grounding.has_tables or self.vision is None:
            return NO_COORDINATES
        # Pictures are fitted to the tower's square, so what points into them moves along.
        return move_to_square(record.turns, record.coordinates, [m.original_size for m in media], self.vision)

    def tokenize(self, record: Record) -> tuple[list[int], list[int]]:
        """Ids and labels of a record, within ``max_length``, whose media are not decoded.

        Its videos have as many frames as the settings sample at most, with stand-ins for their times; the sizes of its
        images, where the number of tokens depends on them, are those that their files' headers say.
        """
        self.check_usable(record)
        return self._encode(record)[:2]

    def _encode(
        self, record: Record, media: Sequence[VisualInput] | None = None
    ) -> tuple[list[int], list[int], Exposure]:
        """Ids and labels of a record, and what of it they present; without its decoded media as for ``tokenize``."""
        if media is None:  # Videos count with the most frames that are sampled, see expand_placeholders.
            frame_counts, image_sizes = None, self.image_sizes(record)
        else:
            frame_counts = [len(m.frames) for m in media if m.kind == "video"]
            image_sizes = [m.original_size for m in media if m.kind == "image"]
        try:
            # Sentences with times first: they go before the placeholders of the turn, and these become spans.
            written = self.write_turns(record, media)
            turns = expand_placeholders(written, self.vision, frame_counts, image_sizes)
            segments, num_cut = self.text_format.encode_sample(turns, self.max_length)
        except ContextError as error:
            ways = [] if self.vision is None else self.vision.ways_to_shorten({media.kind for media in record.media})
            remedy = " or ".join(["raise --model_max_length (within the model's context)", *ways])
            raise ContextError(f"{record}: {error}; {remedy}") from error
        except ValueError as error:
            raise ValueError(f"{record}: {error}") from error
        ids, labels = label_segments(segments)
        labels = self.mask_input_coordinates(labels)
        exposure = self.expose(record, labels, media or ())
        if num_cut:
            kept = count_kept_words(self.text_format, record.turns, written, segments)
            exposure = cut_exposure(exposure, self.text_format, record.turns, kept, num_cut)
        return ids, labels, exposure

    def expose(self, record: Record, labels: list[int], media: Sequence[VisualInput] = ()) -> Exposure:
        """What a record presents whose text is whole."""
        return expose(self.text_format, record, labels, media, self._source_numbers.get(record.data_file, 0))

    @cached_property
    def _source_numbers(self) -> dict[str, int]:
        return number_sources(self.records)

    @property
    def sources(self) -> list[str]:
        """What samples are counted under, by the number of their ``Exposure.source``."""
        return list(dict.fromkeys(list_sources(self.records).values()))

    @property
    def presented_words(self) -> NDArray[np.int64]:
        """As ``count_presented_words``."""
        return count_presented_words(self)

    def write_turns(self, record: Record, media: Sequence[VisualInput] | None = None) -> Sequence[Turn]:
        """The turns of a record, with the times of its videos' frames if ``add_time_instruction`` asks for them.

        Args:
            record: the sample.
            media: decoded, in reading order; without them, the times are stand-ins, about as long as the real ones.
        """
        if self.vision is None or not self.vision.add_time_instruction:
            return record.turns
        if media is None:
            clips = [stand_in(self.vision.max_frames) for media in record.media if media.kind == "video"]
        else:
            clips = clips_of(media)
        return add_time_instruction(record.turns, clips)

    def mask_input_coordinates(self, labels: list[int]) -> list[int]:
        """Labels that are -100 at coordinates of the input, which are given and not to be written."""
        # Coordinates of a question inside an answer too: a model could only guess them.
        given = self._input_coordinate_ids
        return [IGNORE_INDEX if label in given else label for label in labels] if given else labels

    def image_sizes(self, record: Record) -> list[tuple[int, int]] | None:
        """The (height, width) of a record's images from their headers; None where no count depends on them."""
        if self.vision is None or self.vision.anyres is None:
            return None
        sizes = []
        for media in record.media:
            try:  # Only the header is read: lengths of a whole data set are counted so.
                if media.kind == "image":
                    sizes.append(read_image_size(media.path))
            except MediaError as error:
                raise MediaError(f"{record}: {error}", media.path) from error
        return sizes

    def visual_tokens(self, record: Record) -> int:
        """Positions that the media of a record take; 0 for text alone, and for a bad sample that is skipped."""
        if self.vision is None:
            return 0
        kinds = [media.kind for media in record.media]
        try:  # Without anyres all images take the same number of tokens, whatever their size.
            sizes: Sequence[tuple[int, int] | None] = self.image_sizes(record) or [None] * kinds.count("image")
        except MediaError:
            if self.on_bad_sample == SKIP:
                return 0
            raise
        # A video that was not opened counts with the most frames it can have.
        layout, frames = self.vision.layout, self.vision.max_frames
        images = sum(layout.num_tokens("image", image_size=size) for size in sizes)
        return images + sum(layout.num_tokens("video", frames) for kind in kinds if kind == "video")

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each example before truncation, its own media's positions included; 0 for a bad sample.

        They are exact, but for videos under ``video_fps``, which count with the most frames they may have, and
        under ``add_time_instruction``, which count with the times of a stand-in.
        All texts are tokenised for them when they are first asked for, and not again while there is an index.
        """
        return measure_lengths(self)

    def count_tokens(self, records: Sequence[Record]) -> list[int]:
        """Tokens of each record; their texts are tokenised in one call."""
        conversations = []
        for record in records:
            try:
                turns = self.write_turns(record)
                self.text_format.check(turns)
            except ValueError as error:
                raise ValueError(f"{record}: {error}") from error
            conversations.append(turns)
        # One call for all: a fast tokenizer shares them among its threads.
        counts = self.text_format.count_tokens(conversations)
        return [count + self.visual_tokens(record) for count, record in zip(counts, records, strict=True)]

    def count_kept(self, record: Record) -> int:
        """Words of a record that are left of its text once it is cut."""
        return self._encode(record)[2].words

    def has_target(self, record: Record) -> bool:
        """Whether a record has anything to learn; a ValueError that names it if the format cannot write its turns."""
        try:
            return self.text_format.has_target(self.write_turns(record))
        except ValueError as error:
            raise ValueError(f"{record}: {error}") from error

    @property
    def modality_lengths(self) -> NDArray[np.int32]:
        """``lengths``, negative for text-only samples (unless ``early_mix_text``)."""
        if self.early_mix_text:
            return self.lengths
        # LLaVA's convention: the sampler keeps samples with and without media in batches of their own.
        return np.where(count_media(self.records).any(axis=0), self.lengths, -self.lengths)


def find_unsupervised(dataset: SupervisedDataset) -> list[Record]:
    """Records that nothing can be learned from: without a text that the format supervises.

    Under ``plain_lm`` those are records without media and without text.
    """
    return [dataset.records[i] for i in np.flatnonzero(~find_targets(dataset)).tolist()]


def check_samples(dataset: SupervisedDataset) -> None:
    """Check before training that the model knows what samples have, and that each keeps something to learn.

    Only prompts can crowd out what is learned, so ``plain_lm``, which has none, is not tokenised for this; nor are
    texts that are short anyway. With ``on_bad_sample="skip"`` samples that do not fit, or have no text, are left out
    when their turn comes.

    Raises:
        ValueError: names the samples.
    """
    if dataset.grounding is None:
        # The first one is enough to say what is missing.
        for i in np.flatnonzero(count_coordinates(dataset.records))[:1].tolist():
            dataset.check_model(dataset.records[i])
    if dataset.on_bad_sample == SKIP:
        return
    if empty := find_unsupervised(dataset):
        more = f" and {len(empty) - _MOST_NAMED} more" if len(empty) > _MOST_NAMED else ""
        raise ValueError(
            f"{len(empty)} samples have no text to learn from: {', '.join(map(str, empty[:_MOST_NAMED]))}{more}; where "
            "an answer is empty, only the end of text would be learned: give them text, take them out, or leave them "
            "out with --on_bad_sample skip"
        )
    # plain_lm learns all of its text, so that what is left of a cut one still teaches.
    if dataset.text_format.has_prompts:
        check_room(dataset, count_cut_tokens(dataset) > 0)


def check_room(dataset: SupervisedDataset, among: NDArray[np.bool_]) -> None:
    """A ContextError that names the first of some samples which does not fit however much of its text is cut.

    Videos whose number of frames or times show only when they are opened are not judged.
    """
    vision = dataset.vision
    # Stand-ins for frames and times are an upper bound: a shorter video may fit all the same.
    open_ended = vision is not None and (vision.video_fps > 0 or vision.add_time_instruction)
    for i in np.flatnonzero(among).tolist():  # Long samples are few: the others are not tokenised.
        record = dataset.records[i]
        if not (open_ended and any(m.kind == "video" for m in record.media)):
            dataset.tokenize(record)
