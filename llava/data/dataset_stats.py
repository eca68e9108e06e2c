"""Dataset statistics: lengths, cut tokens, words, media, coordinates and targets of all samples, before any is decoded.

Each is an array with one number a sample. Those of indexed data are computed once and mapped from then on.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llava.config import VisionConfig
from llava.data.formats.base import Format
from llava.data.index import Mixture
from llava.data.record_rows import NUMBERS, count_parts
from llava.types import ERROR, Record, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RECORDS_AT_ONCE = 1000
_MOST_SOURCES = 100
"""Data files that are counted one by one; of more of them, their folders are."""
_MANY = 100_000
"""Records from which on going through all of them is shown with a progress bar."""


class TokenizedRecords(Protocol):
    """What a ``SupervisedDataset`` says of its samples."""

    records: Sequence[Record]
    tokenizer: PreTrainedTokenizerBase
    vision: VisionConfig | None
    max_length: int
    text_format: Format
    on_bad_sample: str

    def has_target(self, record: Record) -> bool: ...

    def count_tokens(self, records: Sequence[Record]) -> list[int]: ...

    def count_kept(self, record: Record) -> int: ...


def count_media(records: Sequence[Record]) -> NDArray[np.int32]:
    """How many images each sample has, and how many videos: int32 (2, samples)."""
    return np.stack([_numbers(records, "num_images"), _numbers(records, "num_videos")])


def count_coordinates(records: Sequence[Record]) -> NDArray[np.int32]:
    """How many coordinates each sample has: int32 (samples,)."""
    return _numbers(records, "num_coordinates")


def measure_lengths(dataset: TokenizedRecords) -> NDArray[np.int32]:
    """Tokens of each sample before it is cut, int32 (samples,); 0 for a bad sample."""
    key = describe_lengths(dataset)
    return _ask_all(dataset, "lengths", key, np.int32, dataset.count_tokens, 0, "measuring samples")


def count_cut_tokens(dataset: TokenizedRecords) -> NDArray[np.int32]:
    """How many tokens each sample has beyond ``max_length``, which are cut off, int32 (samples,); 0 for a bad sample.

    Only those are tokenised whose bytes, and what their media and a format's markup may take, are more
    than that: a tokenizer of bytes makes at most one token of each.
    """
    limit = dataset.max_length

    def count_cut(records: Sequence[Record]) -> list[int]:
        return [max(length - limit, 0) for length in dataset.count_tokens(records)]

    def may_be_long() -> NDArray[np.bool_]:
        return _bound_lengths(dataset) > limit

    key = [*describe_lengths(dataset), limit]
    return _ask_all(dataset, "cut", key, np.int32, count_cut, 0, "measuring long samples", may_be_long)


def find_targets(dataset: TokenizedRecords) -> NDArray[np.bool_]:
    """Whether each sample has anything that its format supervises, bool (samples,); true for a bad sample.

    Raises:
        ValueError: the format cannot write one of the conversations; names the sample.
    """

    def have_targets(records: Sequence[Record]) -> list[bool]:
        return list(map(dataset.has_target, records))

    # 2: since an empty answer counts as none.
    key = [2, dataset.text_format.fingerprint, dataset.on_bad_sample]
    return _ask_all(dataset, "targets", key, np.bool_, have_targets, 1, "checking samples")


def describe_lengths(dataset: TokenizedRecords) -> list[Any]:
    """What lengths depend on beside the records, as plain values."""
    tokenizer = dataset.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # All that a fast tokenizer does is in its JSON; of a slow one at least the words.
    vocabulary = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    words = [type(tokenizer).__name__, vocabulary, tokenizer.bos_token, tokenizer.eos_token]
    vision = None if dataset.vision is None else asdict(dataset.vision)
    return [words, dataset.text_format.fingerprint, vision, dataset.on_bad_sample]


def count_presented_words(dataset: TokenizedRecords, cuts: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """Words that each sample presents, those cut off left out, and how many the file has of it: int64 (2, samples).

    No media are opened: exact but for videos whose number of frames shows only then.

    Args:
        dataset: the samples.
        cuts: bool (samples,), which of them are cut where they are too long; by default all. The others, which
            ``--text_chunking`` goes on with, count as a whole.
    """
    whole = _numbers(dataset.records, "num_words").astype(np.int64)  # (samples,)
    if not dataset.text_format.writes_user_text:
        whole -= _numbers(dataset.records, "num_user_words")
    whole[_find_bad(dataset.records)] = 0
    cut = count_cut_tokens(dataset) > 0
    if cuts is not None:
        cut &= cuts
    if not cut.any():
        return np.stack([whole, whole])

    def count_kept(records: Sequence[Record]) -> list[int]:
        return [dataset.count_kept(record) for record in records]

    key = [1, *describe_lengths(dataset), dataset.max_length, cuts is None]
    kept = _ask_all(dataset, "kept", key, np.int32, count_kept, 0, "counting words of long samples", lambda: cut)
    return np.stack([np.where(cut, kept, whole), whole])


def count_answer_words(records: Sequence[Record]) -> NDArray[np.int64]:
    """Words of the assistant's turns of each sample, int64 (samples,)."""
    return _numbers(records, "num_answer_words").astype(np.int64)


def list_sources(records: Sequence[Record]) -> dict[str, str]:
    """What the samples of each data file are counted under, by the file's full path, in the order of the data.

    It is the file's name, or as much of its path as tells it from the others; of very many files, that of their folder.
    """
    if not isinstance(records, Mixture):
        return {"": "data"}
    files = list(dict.fromkeys(os.path.abspath(part.label) for part in records.parts))
    places = files if len(files) <= _MOST_SOURCES else [os.path.dirname(file) for file in files]  # noqa: PTH120
    names = _shorten(list(dict.fromkeys(places)))
    return {file: names[place] for file, place in zip(files, places, strict=True)}


def _shorten(paths: Sequence[str]) -> dict[str, str]:
    """The last parts of each path, as many as it takes for all to differ."""
    parts = {path: PurePath(path).parts for path in paths}
    named: dict[str, str] = {}
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        tails = {path: "/".join(of_path[-depth:]) for path, of_path in parts.items()}
        counts = Counter(tails.values())
        named |= {path: tail for path, tail in tails.items() if counts[tail] == 1 and path not in named}
    return {path: named.get(path, path) for path in paths}


def number_sources(records: Sequence[Record]) -> dict[str, int]:
    """The number of the source of each data file, by the file's full path; names in their order, each once."""
    names = list_sources(records)
    order = list(dict.fromkeys(names.values()))
    return {file: order.index(name) for file, name in names.items()}


def _numbers(records: Sequence[Record], name: str) -> NDArray[np.int32]:
    """One of ``NUMBERS`` of each record."""
    if isinstance(records, Mixture):
        return records.numbers(name)
    return np.array([count_parts(record)[NUMBERS.index(name)] for record in records], np.int32)


def _bound_lengths(dataset: TokenizedRecords) -> NDArray[np.int64]:
    """Tokens that samples cannot have more of, if the tokenizer makes at most one of a byte."""
    shortest = dataset.text_format.count_tokens([(Turn("user", "a"), Turn("assistant", "a"))])[0]
    # All from the index: no record is made for a bound.
    images, videos, turns, text_bytes = (_numbers(dataset.records, name).astype(np.int64) for name in NUMBERS[:4])
    # Markup around a turn, or at both ends, takes no more than a whole conversation of two short turns.
    most = text_bytes + (turns + 1) * shortest  # (samples,)
    if dataset.vision is not None:
        # An upper bound for any size of picture and length of video.
        most += images * dataset.vision.layout.most_image_tokens
        most += videos * dataset.vision.layout.num_tokens("video", dataset.vision.max_frames)
    return most


def _ask_all(
    dataset: TokenizedRecords,
    name: str,
    key: Sequence[object],
    dtype: type[np.generic],
    ask: Callable[[Sequence[Record]], Sequence[int]],
    otherwise: int,
    progress: str,
    choose: Callable[[], NDArray[np.bool_]] | None = None,
) -> NDArray[Any]:
    """A number of each sample, out of the index folder or asked for.

    Args:
        dataset: the samples.
        name, key: of the numbers in the index folder, and what they depend on beside the records.
        dtype: of the numbers.
        ask: gives the numbers of some records.
        otherwise: the number of bad samples, and of those that are not asked for.
        progress: what a progress bar says.
        choose: which samples are asked for, bool (samples,); by default all but bad ones.
    """
    records = dataset.records

    def ask_one(record: Record) -> int:
        try:
            return ask([record])[0]
        except ValueError:
            return otherwise  # It is skipped when its turn comes, and its error is written down then.

    def compute() -> NDArray[Any]:
        from tqdm import tqdm

        good = np.ones(len(records), bool) if choose is None else choose()  # (samples,)
        good[_find_bad(records)] = False
        indices = np.flatnonzero(good)
        answers = np.full(len(records), otherwise, np.int64)
        with tqdm(total=len(indices), desc=progress, disable=None if len(indices) >= _MANY else True) as bar:
            for start in range(0, len(indices), _RECORDS_AT_ONCE):
                block = indices[start : start + _RECORDS_AT_ONCE]
                asked = [records[i] for i in block.tolist()]
                try:
                    answers[block] = ask(asked)
                except ValueError:
                    # One bad sample spoils its block: ask for each alone, and leave out those that fail.
                    if dataset.on_bad_sample == ERROR:
                        raise
                    answers[block] = [ask_one(record) for record in asked]
                bar.update(len(block))
        return answers

    return records.computed(name, key, dtype, compute) if isinstance(records, Mixture) else compute().astype(dtype)


def _find_bad(records: Sequence[Record]) -> list[int]:
    """Indices of bad samples."""
    if isinstance(records, Mixture):
        return list(records.faults)
    return [i for i, record in enumerate(records) if record.fault is not None]
