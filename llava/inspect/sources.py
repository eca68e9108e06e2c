"""What the data files of a run hold: samples, lengths, words, media with their sizes and durations, and unread keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llava.config import VisionConfig
from llava.data.chunking import RearrangedDataset
from llava.data.dataset import SupervisedDataset
from llava.data.dataset_stats import count_answer_words, count_media, count_presented_words
from llava.data.decoding import FrameRequest, decode_frames, decode_within
from llava.data.images import read_image_size
from llava.data.index import Mixture
from llava.data.media_files import MediaError
from llava.data.module import RunDataset, documents_of
from llava.data.records import describe_notes
from llava.inspect.findings import Findings
from llava.train.report import by_source
from llava.types import Media, MediaKind

_LENGTHS_LOOKED_AT = (1000, 20_000)
"""Samples of a source whose tokens are counted: fast, and otherwise."""
_FILES_LOOKED_AT = (8, 100)
"""Files of media of a source that are opened: fast, and otherwise."""
_NUM_BINS = 12
_MOST_CUT = 0.25
"""Share of the words of a source that are cut off, from which on it is an error."""


@dataclass
class Histogram:
    """How many values lie in each of some stretches, which labels name."""

    labels: list[str]
    counts: list[int]

    @classmethod
    def of(cls, values: Sequence[float] | NDArray[np.int32]) -> Histogram | None:
        """The histogram of some values; None without any."""
        numbers = np.asarray(values)
        if not len(numbers):
            return None
        low, high = numbers.min(), numbers.max()
        if numbers.dtype.kind == "i":  # Stretches of whole numbers.
            step = -(-(int(high) - int(low) + 1) // _NUM_BINS)
            edges = np.arange(low, high + step + 1, step)
            labels = [f"{a:,} to {a + step - 1:,}" if step > 1 else f"{a:,}" for a in edges[:-1].tolist()]
        else:
            edges = np.linspace(low, high, min(_NUM_BINS, len(numbers)) + 1) if high > low else np.array([low, low + 1])
            labels = [f"{a:.3g} to {b:.3g}" for a, b in pairwise(edges.tolist())]
        return cls(labels, np.histogram(numbers, edges)[0].tolist())


@dataclass
class MediaFacts:
    """Images, or clips, of a source, told from some of their files: of an image its header, of a clip one frame.

    Attributes:
        number: in all samples.
        opened: how many files were looked at.
        sizes: (height, width) of these.
        seconds: that these clips last.
        bytes: of these files.
    """

    number: int = 0
    opened: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


@dataclass
class SourceFacts:
    """What one data file holds.

    Attributes:
        label: its name.
        samples, text_only: how many.
        words, answer_words, cut_words: of an epoch, those of answers, and those that are cut off.
        lengths: in tokens, visual ones included and before the cut, of some samples.
        media: by kind.
    """

    label: str
    samples: int
    text_only: int
    words: int
    answer_words: int
    cut_words: int
    lengths: NDArray[np.int32]
    media: dict[MediaKind, MediaFacts]


def describe_sources(dataset: RunDataset, fast: bool) -> list[SourceFacts]:
    """The facts of each data file, in their order."""
    documents = documents_of(dataset)
    whole = dataset.is_whole if isinstance(dataset, RearrangedDataset) else None
    presented, all_words = count_presented_words(documents, whole)  # (samples,) each
    answers = count_answer_words(documents.records)  # (samples,)
    counts = dict(zip(("image", "video"), count_media(documents.records), strict=True))
    facts = []
    for label, indices in by_source(documents.records).items():
        media: dict[MediaKind, MediaFacts] = {}
        for kind in ("image", "video"):
            of_kind = counts[kind][indices]
            if of_kind.any():
                having = indices[of_kind > 0].tolist()
                media[kind] = describe_media(documents, having, kind, int(of_kind.sum()), fast)
        has_media = sum(of_kind[indices] for of_kind in counts.values()) > 0
        words = int(presented[indices].sum())
        facts.append(
            SourceFacts(
                label=label,
                samples=len(indices),
                text_only=int((~has_media).sum()),
                words=words,
                answer_words=int(answers[indices].sum()),
                cut_words=int(all_words[indices].sum()) - words,
                lengths=measure_some(documents, indices, fast),
                media=media,
            )
        )
    return facts


def measure_some(documents: SupervisedDataset, indices: NDArray[np.intp], fast: bool) -> NDArray[np.int32]:
    """Tokens of some samples, evenly spread, before they are cut; bad ones are left out."""
    limit = _LENGTHS_LOOKED_AT[not fast]
    places = indices[np.unique(np.linspace(0, len(indices) - 1, min(len(indices), limit)).astype(int))]
    lengths = []
    for start in range(0, len(places), limit):
        records = [documents.records[i] for i in places[start : start + limit].tolist()]
        try:
            lengths += documents.count_tokens([record for record in records if record.fault is None])
        except ValueError:  # Of one of them, which is named when its turn comes.
            continue
    return np.array(lengths, np.int32)


def describe_media(
    documents: SupervisedDataset, having: Sequence[int], kind: MediaKind, number: int, fast: bool
) -> MediaFacts:
    """Sizes and durations of some of the images, or clips, of samples.

    Args:
        having: indices of samples that have some of the kind.
        number: of images, or clips, in all of them.
    """
    facts = MediaFacts(number)
    limit = _FILES_LOOKED_AT[not fast]
    places = np.unique(np.linspace(0, len(having) - 1, min(len(having), limit)).astype(int)).tolist()
    waiting = (media for place in places for media in documents.records[having[place]].media if media.kind == kind)
    for media in islice(dict.fromkeys(waiting), limit):
        facts.opened += 1
        try:
            _measure(media, documents, facts)
        except MediaError as error:
            facts.unreadable.append(str(error))
    return facts


def _measure(media: Media, documents: SupervisedDataset, facts: MediaFacts) -> None:
    if media.kind == "image":
        facts.sizes.append(read_image_size(media.path))
    else:
        request = FrameRequest(media.path, 1, limits=documents.limits, frame_files=media.frames, frame_rate=media.fps)
        timeout = documents.decode_timeout
        frames = decode_within(request, timeout) if timeout > 0 else decode_frames(request)
        height, width = frames.pixels.shape[1:3]
        facts.seconds.append(frames.duration)
        facts.sizes.append((height, width))
    if not media.frames and (path := Path(media.path)).is_file():
        facts.bytes.append(path.stat().st_size)


@dataclass(frozen=True)
class MediaBudget:
    """What an image or a clip takes of a sample's tokens.

    Attributes:
        kind: in words.
        tokens: all that it takes.
        spans: what these are.
        left: for the rest of the sample.
        remedy: flags that make them fewer.
    """

    kind: str
    tokens: int
    spans: str
    left: int
    remedy: str


def describe_budget(vision: VisionConfig | None, max_length: int) -> list[MediaBudget]:
    """What an image and a clip take of the tokens of a sample."""
    if vision is None:
        return []
    image = "an image" if vision.anyres is None else f"the largest image, of {vision.anyres.most_views} views"
    clip = f"a clip of {vision.max_frames} frames" + ("" if vision.is_bounded else " (it may have more)")
    spans = [span.length for span in vision.layout.spans("video", vision.max_frames)]
    names = ("fast", "slow") if len(spans) == 2 else ("in one span",)
    budgets = []
    kinds: tuple[MediaKind, ...] = ("image", "video")
    for kind in kinds:
        lengths = [vision.layout.most_image_tokens] if kind == "image" else spans
        told = ["in one span"] if kind == "image" else names
        listed = " + ".join(f"{length} {name}" for length, name in zip(lengths, told, strict=True))
        remedy = " or ".join(vision.ways_to_shorten({kind}))
        budgets.append(
            MediaBudget(image if kind == "image" else clip, sum(lengths), listed, max_length - sum(lengths), remedy)
        )
    return budgets


# What is wrong with them.


def check_sources(dataset: RunDataset, facts: Sequence[SourceFacts], asked_to_see: bool, findings: Findings) -> None:
    """Find what the trainer would not stop at: media that nothing reads, text that is cut, files that cannot be opened.

    Args:
        facts: of its data files.
        asked_to_see: whether ``--vision_tower`` was given.
    """
    documents = documents_of(dataset)
    check_unread(documents, facts, asked_to_see, findings)
    for source in facts:
        whole = source.words + source.cut_words
        if source.cut_words:
            share = source.cut_words / whole
            found = f"{source.label}: {share:.0%} of its words ({source.cut_words:,} of {whole:,}) are cut off"
            media: list[MediaKind] = list(source.media)
            ways = [] if documents.vision is None else documents.vision.ways_to_shorten(media)
            if not media:
                ways = ["give --text_chunking document"]
            remedy = " or ".join(["raise --model_max_length (within the model's context)", *ways])
            level = findings.error if share > _MOST_CUT else findings.warn
            level("context_too_small", f"{found}, as a sample may have {documents.max_length} tokens; {remedy}")
        for kind, of_kind in source.media.items():
            if of_kind.unreadable:
                number = f"{len(of_kind.unreadable)} of {of_kind.opened} {kind}s that were opened cannot be used"
                skips = documents.on_bad_sample == "skip"
                level = findings.warn if skips else findings.error
                level("bad_samples", f"{source.label}: {number}, the first: {of_kind.unreadable[0]}")


def check_unread(
    documents: SupervisedDataset, facts: Sequence[SourceFacts], asked_to_see: bool, findings: Findings
) -> None:
    """Find keys that nothing reads, and data without media for a model that is to see."""
    if isinstance(documents.records, Mixture):
        for note in describe_notes(documents.records):
            findings.note("media_unread", note)
    unread = _unread_keys(documents)
    if documents.vision is None:
        return
    if any(source.media for source in facts):
        for source in facts:
            if not source.media and (keys := unread.get(source.label)):
                findings.warn(
                    "media_unread",
                    f"{source.label}: none of its {source.samples} samples has an image or a video, and nothing reads "
                    f"its keys {_quote(keys)}; if one of them names media, call it image or video",
                )
        return
    found = f"not one of the {len(documents)} samples has an image or a video"
    if unread:
        every = dict.fromkeys(key for keys in unread.values() for key in keys)
        findings.error(
            "media_unread",
            f"{found}, and nothing reads the keys {_quote(every)} of the data: the model would be trained blind. Media "
            'are read from "image", "images", "video", "videos" and from parts of turns (docs/data.md); rename the key',
        )
    elif asked_to_see:
        findings.error(
            "media_unread",
            f"--vision_tower is given, but {found}: the model would be trained blind; give data with media, or leave "
            "the flag out",
        )
    else:
        findings.warn("media_unread", f"{found}: the model's vision modules do not train")


def _unread_keys(documents: SupervisedDataset) -> dict[str, list[str]]:
    """Keys that nothing reads, of each data file that has some."""
    if not isinstance(documents.records, Mixture):
        return {}
    notes = {part.label: part.store.footer.notes.get("unread", {}) for part in documents.records.parts}
    found = {label: list(dict.fromkeys(key.rpartition(".")[2] for key in unread)) for label, unread in notes.items()}
    return {label: keys for label, keys in found.items() if keys}


def _quote(keys: Iterable[str]) -> str:
    return ", ".join(f'"{key}"' for key in keys)
