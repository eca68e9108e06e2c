"""What is asked of all samples at once before any is decoded: their lengths, media and targets.

Answers are arrays, one number a sample. Of an indexed mixture they are computed once and mapped from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llava.data.index import NUMBERS
from llava.data.mixture import Mixture
from llava.types import ERROR, Record, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava.data.dataset import SupervisedDataset

_RECORDS_AT_ONCE = 1000
_MANY = 100_000
"""Records from which on going through all of them is shown with a progress bar."""


def survey_lengths(dataset: SupervisedDataset) -> NDArray[np.int32]:
    """Tokens of each sample, see ``SupervisedDataset.lengths``."""

    def compute() -> NDArray[Any]:
        return _go_through(dataset, _good_rows(dataset.records), dataset.count_tokens, 0, "measuring samples")

    return _remember(dataset.records, "lengths", describe_lengths(dataset), np.int32, compute)


def survey_long(dataset: SupervisedDataset) -> NDArray[np.bool_]:
    """Whether each sample is longer than ``max_length``."""
    return survey_cut(dataset) > 0


def survey_cut(dataset: SupervisedDataset) -> NDArray[np.int32]:
    """How many tokens each sample has beyond ``max_length``, which are cut off; 0 for a bad sample.

    Only those are tokenised whose bytes, and what their media and a format's markup may take, are more
    than that: a tokenizer of bytes makes at most one token of each.
    """

    def compute() -> NDArray[Any]:
        rows = np.intersect1d(_good_rows(dataset.records), np.flatnonzero(_most_tokens(dataset) > dataset.max_length))
        lengths = _go_through(dataset, rows, dataset.count_tokens, 0, "measuring long samples")
        return np.maximum(lengths - dataset.max_length, 0)

    return _remember(dataset.records, "cut", [*describe_lengths(dataset), dataset.max_length], np.int32, compute)


def survey_targets(dataset: SupervisedDataset) -> NDArray[np.bool_]:
    """Whether each sample has anything that its format supervises; a bad sample counts as if it had.

    Raises:
        ValueError: the format cannot write one of the conversations; names the sample.
    """

    def have_targets(records: Sequence[Record]) -> list[bool]:
        for record in records:
            dataset.check_turns(record)
        return [dataset.text_format.has_target(record.turns) for record in records]

    def compute() -> NDArray[Any]:
        return _go_through(dataset, _good_rows(dataset.records), have_targets, 1, "checking samples")

    # 2: since an empty answer counts as none.
    key = [2, dataset.text_format.fingerprint, dataset.on_bad_sample]
    return _remember(dataset.records, "targets", key, np.bool_, compute)


def survey_media(dataset: SupervisedDataset) -> NDArray[np.int32]:
    """How many images and videos each sample has."""
    images, videos = survey_kinds(dataset)
    return images + videos


def survey_kinds(dataset: SupervisedDataset) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """How many images each sample has, and how many videos."""
    records = dataset.records
    if isinstance(records, Mixture):
        return records.numbers("num_images"), records.numbers("num_videos")
    kinds = [[media.kind for media in record.media] for record in records]
    return (
        np.array([of_record.count("image") for of_record in kinds], np.int32),
        np.array([of_record.count("video") for of_record in kinds], np.int32),
    )


def survey_coordinates(dataset: SupervisedDataset) -> NDArray[np.int32]:
    """How many coordinates each sample has."""
    if isinstance(dataset.records, Mixture):
        return dataset.records.numbers("num_coordinates")
    return np.array([sum(map(len, vars(record.coordinates).values())) for record in dataset.records], np.int32)


def _go_through(
    dataset: SupervisedDataset,
    rows: NDArray[np.intp],
    ask: Callable[[Sequence[Record]], Sequence[int]],
    otherwise: int,
    what: str,
) -> NDArray[np.int64]:
    """The answers of some records, asked in blocks; ``otherwise`` for the others, and for those that are skipped."""
    from tqdm import tqdm

    answers = np.full(len(dataset.records), otherwise, np.int64)
    with tqdm(total=len(rows), desc=what, disable=None if len(rows) >= _MANY else True) as bar:
        for start in range(0, len(rows), _RECORDS_AT_ONCE):
            block = rows[start : start + _RECORDS_AT_ONCE]
            records = [dataset.records[i] for i in block.tolist()]
            try:
                answers[block] = ask(records)
            except ValueError:
                if dataset.on_bad_sample == ERROR:
                    raise
                answers[block] = [_ask_one(ask, record, otherwise) for record in records]
            bar.update(len(block))
    return answers


def _ask_one(ask: Callable[[Sequence[Record]], Sequence[int]], record: Record, otherwise: int) -> int:
    try:
        return ask([record])[0]
    except ValueError:
        return otherwise  # It is skipped when its turn comes, and its error is written down then.


def _remember(
    records: Sequence[Record], name: str, key: Sequence[Any], dtype: type[np.generic], compute: Callable[[], Any]
) -> NDArray[Any]:
    if isinstance(records, Mixture):
        return records.computed(name, key, dtype, compute)
    return compute().astype(dtype)


def _good_rows(records: Sequence[Record]) -> NDArray[np.intp]:
    """Indices of all but bad samples."""
    if isinstance(records, Mixture):
        return np.delete(np.arange(len(records)), list(records.faults))
    return np.array([i for i, record in enumerate(records) if record.fault is None], np.intp)


def _most_tokens(dataset: SupervisedDataset) -> NDArray[np.int64]:
    """Tokens that samples cannot have more of, if the tokenizer makes at most one of a byte."""
    if not isinstance(dataset.records, Mixture):
        return np.full(len(dataset.records), np.iinfo(np.int64).max)
    shortest = dataset.text_format.count_tokens([(Turn("user", "a"), Turn("assistant", "a"))])[0]
    numbers = {name: dataset.records.numbers(name).astype(np.int64) for name in NUMBERS}
    most = numbers["text_bytes"] + (numbers["num_turns"] + 1) * shortest
    if dataset.vision is not None:
        most += numbers["num_images"] * dataset.vision.most_image_tokens
        most += numbers["num_videos"] * dataset.vision.num_tokens("video", dataset.vision.max_frames)
    return most


def describe_lengths(dataset: SupervisedDataset) -> list[Any]:
    """What lengths depend on beside the records, as plain values."""
    vision = None if dataset.vision is None else asdict(dataset.vision)
    return [_describe_tokenizer(dataset.tokenizer), dataset.text_format.fingerprint, vision, dataset.on_bad_sample]


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return [type(tokenizer).__name__, vocabulary, tokenizer.bos_token, tokenizer.eos_token]
