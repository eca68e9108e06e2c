"""What is asked of the data before the first step: do media fit, are their files there, is the text known?

Each check names what is wrong in one line, for training and evaluation data alike.
"""

from __future__ import annotations

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from llava.data.dataset_stats import count_cut_tokens, count_media
from llava.data.index import Mixture
from llava.data.media_files import MediaError, check_file
from llava.data.placeholders import remove_placeholders
from llava.types import SKIP, Media, MediaKind, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava.data.dataset import SupervisedDataset

logger = logging.getLogger(__name__)

CHECK_DATA = ("files", "decode", "none")
"""What ``--check_data`` may do with media before training: look whether their files are there, decode them, nothing."""

_THREADS = 16
_FILES_AT_ONCE = 2048
_TEXTS_LOOKED_AT = 200
_TOKENS_NEEDED = 50
"""Tokens that a sample of the texts must have before anything is said of their distribution."""
_MOST_UNKNOWN, _SOME_UNKNOWN = 0.5, 0.05
"""Shares of a text that a tokenizer does not know: more than the first is an error, than the second a warning."""


@dataclass(frozen=True)
class SourceShare:
    """Of one data file: how many samples there are, how many of them have images, videos, and text alone."""

    label: str
    samples: int
    images: int
    videos: int
    text_only: int

    def __str__(self) -> str:
        counts = (("images", self.images), ("videos", self.videos), ("text alone", self.text_only))
        parts = [f"{count} {name} ({count / max(self.samples, 1):.1%})" for name, count in counts if count]
        return f"{self.label}: {self.samples} samples, with {', '.join(parts) or 'nothing'}"


def media_shares(dataset: SupervisedDataset) -> list[SourceShare]:
    """What the samples of each data file have, in the order of the files; samples with both kinds count twice."""
    images, videos = count_media(dataset.records)
    shares = []
    for label, rows in _rows_by_source(dataset.records).items():
        alone = int(((images[rows] == 0) & (videos[rows] == 0)).sum())
        shares.append(
            SourceShare(label, len(rows), int((images[rows] > 0).sum()), int((videos[rows] > 0).sum()), alone)
        )
    return shares


def media_table(dataset: SupervisedDataset) -> str:
    """How many samples of each data file have media, of which kind."""
    lines = ["media of the samples"]
    return "\n".join([*lines, *(f"  {share}" for share in media_shares(dataset))])


def cut_table(dataset: SupervisedDataset, whole: np.ndarray | None = None) -> str:
    """How many samples of each data file are cut to the context, and how many tokens of them; "" where none is.

    Args:
        dataset: the samples.
        whole: bool (samples,), which of them ``--text_chunking`` leaves as they are; None without it.
    """
    cut = count_cut_tokens(dataset) if whole is None else np.where(whole, count_cut_tokens(dataset), 0)
    if dataset.vision is not None and dataset.vision.video_fps > 0:
        cut = np.where(count_media(dataset.records)[1] > 0, 0, cut)  # Their frames show only when they are opened.
    if not cut.any():
        return ""
    lines = [f"text that is cut to {dataset.max_length} tokens"]
    for label, rows in _rows_by_source(dataset.records).items():
        if samples := int((cut[rows] > 0).sum()):
            lines.append(f"  {label}: {samples} of {len(rows)} samples lose {int(cut[rows].sum())} tokens")
    other = ", or train on all of a text with --text_chunking document"
    what = other if whole is None else "; text with images, videos or coordinates is not chunked"
    return "\n".join([*lines, f"  raise --model_max_length{what}"])


def _rows_by_source(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """The indices of the samples of each data file."""
    if not isinstance(records, Mixture):
        return {"data": np.arange(len(records))}
    rows: dict[str, list[np.ndarray]] = {}
    start = 0
    for part in records.parts:
        rows.setdefault(part.label, []).append(np.arange(start, start + len(part.rows)))
        start += len(part.rows)
    return {label: np.concatenate(pieces) for label, pieces in rows.items()}


def check_media(dataset: SupervisedDataset) -> None:
    """A ValueError if samples have media and the model no vision, or media that do not fit into a sample.

    Only of what the data hold is anything asked: images that fit are not refused for videos that are not there.
    """
    images, videos = count_media(dataset.records)
    vision = dataset.vision
    if vision is None:
        if rows := np.flatnonzero(images + videos).tolist():
            raise ValueError(
                f"{dataset.records[rows[0]]} has an image or a video, as {len(rows)} of {len(images)} samples have, "
                "but the model has no vision; give --vision_tower"
            )
        return
    limit = dataset.max_length
    # Without --frames_upbound a short clip may still fit; one that does not is named when it is opened.
    frames = vision.max_frames if vision.is_bounded else 1
    kinds: list[tuple[MediaKind, bool, str, int]] = [
        ("video", bool(videos.any()), f"a video of {frames} frames takes", vision.layout.num_tokens("video", frames)),
        ("image", bool(images.any()), "an image takes" if vision.anyres is None
         else f"the largest image, of {vision.anyres.most_views} views, takes", vision.layout.most_image_tokens),
    ]  # fmt: skip
    for kind, is_there, subject, tokens in kinds:
        if is_there and tokens + 1 >= limit:
            ways = ["raise --model_max_length (within the model's context)", *vision.ways_to_shorten({kind})]
            raise ValueError(f"{subject} {tokens} tokens, but a sample may have {limit}; {' or '.join(ways)}")


def check_media_files(dataset: SupervisedDataset) -> None:
    """Look whether the files of all media are there, which is done within seconds for a million of them.

    Raises:
        ValueError: some are not, or are empty or no files; names the first samples. With ``on_bad_sample="skip"``
            they are counted in the log, and left out when their turn comes.
    """
    missing = find_missing(dataset.records)
    if not missing:
        return
    number = f"{len(missing)} of {len(dataset)} samples"
    if dataset.on_bad_sample == SKIP:
        logger.warning("%s name files that cannot be used and are skipped, the first: %s", number, missing[0])
        return
    more = f"; and {len(missing) - 3} more" if len(missing) > 3 else ""
    raise ValueError(
        f"{'; '.join(missing[:3])}{more}: {number} name files that cannot be used; see --image_folder and "
        "--video_folder, or leave the samples out with --on_bad_sample skip (--check_data none does not look)"
    )


def find_missing(records: Sequence[Record]) -> list[str]:
    """What is wrong with the first file of each sample that is not there, in the order of the samples."""
    found: list[tuple[int, str]] = []
    waiting = _media_of(records)
    chunks = iter(lambda: list(islice(waiting, _FILES_AT_ONCE)), [])
    with ThreadPoolExecutor(_THREADS) as pool:
        # So many chunks at once, not all: the paths of a million files are not held together.
        while batch := list(islice(chunks, _THREADS)):
            for of_chunk in pool.map(_find_unusable, batch):
                found += of_chunk
    return [f"{records[i]}: {message}" for i, message in dict(reversed(found)).items()][::-1]


def _media_of(records: Sequence[Record]) -> Iterator[tuple[int, Media]]:
    """All media, each with the index of its sample."""
    if isinstance(records, Mixture):
        yield from ((i, medium) for i, media in records.media() for medium in media)
    else:
        yield from ((i, medium) for i, record in enumerate(records) for medium in record.media)


def _find_unusable(chunk: Sequence[tuple[int, Media]]) -> list[tuple[int, str]]:
    found = []
    for index, media in chunk:
        try:
            if not (media.kind == "video" and os.path.isdir(media.path)):
                check_file(media.path)
        except MediaError as error:
            found.append((index, str(error)))
    return found


def check_text_is_known(dataset: SupervisedDataset) -> None:
    """Compare the tokenizer with texts from all over the data.

    Raises:
        ValueError: it does not know most of them, or gives nearly everything one id: it is another language's or
            another model's, and what is trained would be noise. Where it loses a smaller part there is a warning.
    """
    texts = _some_texts(dataset.records)
    tokenizer = dataset.tokenizer
    encoded = [_encode(tokenizer, text) for text in texts]
    ids = [i for of_text in encoded for i in of_text]
    name = f"the tokenizer of {tokenizer.name_or_path!r}"
    remedy = "give the model's folder the tokenizer that it was made with, or train one on this text "
    remedy += "(python -m llava.data.train_tokenizer)"
    if texts and not ids:
        raise ValueError(f"{name} makes no token at all of the text of the data ({texts[0]!r:.60}); {remedy}")
    lost, example = _lost_share(tokenizer, texts, encoded)
    if lost > _MOST_UNKNOWN:
        raise ValueError(f"{name} does not know {lost:.0%} of the text of the data ({example!r:.60}); {remedy}")
    if lost > _SOME_UNKNOWN:
        logger.warning("%s does not know %.0f%% of the text of the data (%.60r); %s", name, 100 * lost, example, remedy)
    if len(ids) < _TOKENS_NEEDED:
        return
    most, count = Counter(ids).most_common(1)[0]
    words = Counter(word for text in texts for word in text.split())
    if count > len(ids) / 2 and max(words.values()) < sum(words.values()) / 4:
        raise ValueError(
            f"{name} makes {count} of {len(ids)} tokens of the text of the data the same, id {most} "
            f"({tokenizer.convert_ids_to_tokens(most)!r}); {remedy}"
        )


def _some_texts(records: Sequence[Record]) -> list[str]:
    """Texts of samples from the first to the last, evenly spread, without their media."""
    places = np.unique(np.linspace(0, len(records) - 1, min(len(records), _TEXTS_LOOKED_AT)).astype(int))
    turns = [turn for place in places.tolist() for turn in records[place].turns]
    return [text for turn in turns if (text := remove_placeholders(turn.text).strip()[:2000])]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[assignment]
    return ids


def _lost_share(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], encoded: Sequence[Sequence[int]]
) -> tuple[float, str]:
    """The share of unknown tokens or, if more, of letters that do not come back; and the text that loses most."""
    unknown, total = 0, 0
    letters, kept = 0, 0
    worst, example = -1.0, ""
    for text, ids in zip(texts, encoded, strict=True):
        given = _letters(text)
        back = (given & _letters(str(tokenizer.decode(list(ids), skip_special_tokens=False)))).total()
        missing = sum(i == tokenizer.unk_token_id for i in ids) if tokenizer.unk_token_id is not None else 0
        unknown, total = unknown + missing, total + len(ids)
        letters, kept = letters + given.total(), kept + back
        loss = max(missing / max(len(ids), 1), 1 - back / max(given.total(), 1))
        if loss > worst:
            worst, example = loss, text
    # GPT-2's unknown token is its end of text, which texts do not hold either.
    return max(unknown / max(total, 1), 1 - kept / max(letters, 1)), example


def _letters(text: str) -> Counter[str]:
    """The letters and digits of a text, without case and accents, which many tokenizers take off."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return Counter(character for character in plain if character.isalnum())
