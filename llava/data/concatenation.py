"""``--text_chunking concatenate``: the texts of a file one behind the other, cut to samples as long as the context.

Texts of tokens a b, c d e and f, each with its end of text ``.``, and a context of 4 become::

    window 0    a b . c    all learned
    window 1    c d e .    d e . learned, c is read only
    window 2    . f .      f . learned; what is left at the end of the file is a shorter sample

so that every token but the first is predicted once. Attention crosses from text to text, and none crosses a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava.constants import IGNORE_INDEX
from llava.data.chunking import CONCATENATE, D, RearrangedDataset
from llava.data.dataset_stats import count_answer_words, count_presented_words, describe_lengths, find_targets
from llava.data.index import Mixture, RecordSequence
from llava.data.words import count_answers, count_begun, words_of_turns
from llava.types import BadSample, Example, Exposure, Record

_TEXTS_AT_ONCE = 1000
_MANY = 100_000
"""Texts from which on tokenising them is shown with a progress bar."""


@dataclass(frozen=True)
class _File:
    """The samples of a data file: windows on its texts, then those that stay as they are."""

    first: int  # number of its first sample
    num_windows: int
    first_text: int  # its texts among those of all files, from here
    num_texts: int
    first_window: int  # its windows among those of all files, from here
    whole: NDArray[np.int64]  # documents that stay as they are

    @property
    def end(self) -> int:
        return self.first + self.num_windows + len(self.whole)


class ConcatenatedDataset(RearrangedDataset[D]):
    """Windows on the texts of each data file, as long as the context, and its other samples as they are."""

    way = CONCATENATE

    def __init__(self, documents: D) -> None:
        super().__init__(documents)
        records = documents.records
        bad = np.zeros(len(records), bool)
        bad[list(records.faults) if isinstance(records, Mixture) else []] = True
        # A bad sample, or one without a text, stays one: it is written down when its turn comes.
        is_text = ~self.is_whole & ~bad & find_targets(documents)
        self._texts = np.flatnonzero(is_text)  # (texts,)
        # (texts + 1,) where the tokens of each begin among those of all.
        self._offsets = np.concatenate(([0], np.cumsum(documents.lengths[self._texts], dtype=np.int64)))
        sizes = [len(part.rows) for part in records.parts] if isinstance(records, Mixture) else [len(records)]
        self._files: list[_File] = []
        step = documents.max_length - 1
        first = document = text = window = 0
        for size in sizes:
            of_file = is_text[document : document + size]
            num_texts = int(of_file.sum())
            num_tokens = int(self._offsets[text + num_texts] - self._offsets[text])
            num_windows = max(-(-(num_tokens - 1) // step), 1) if num_tokens else 0
            whole = document + np.flatnonzero(~of_file)
            self._files.append(_File(first, num_windows, text, num_texts, window, whole))
            first, document = self._files[-1].end, document + size
            text, window = text + num_texts, window + num_windows
        self._ends = np.array([file.end for file in self._files])
        self._num_windows = window

    def locate(self, index: int) -> tuple[_File, int]:
        """The data file of a sample, and its place among the file's windows, and behind these its other samples."""
        file = self._files[self._find_part(index)]
        return file, index - file.first

    def is_chunk(self, index: int) -> bool:
        file, place = self.locate(index)
        return place < file.num_windows

    def __getitem__(self, index: int) -> Example | BadSample:
        file, place = self.locate(index)
        if place >= file.num_windows:
            return self.documents[int(file.whole[place - file.num_windows])]
        begin, end = self._bounds(file, place)
        ids = self._tokens[begin:end].tolist()
        # The first token was learned at the end of the window before.
        labels = [IGNORE_INDEX, *ids[1:]] if place else list(ids)
        record = self.record_of(index)
        of_text = self.documents.expose(record, labels)
        words, answers = self._begun[:, file.first_window + place].tolist()
        return Example(record.id, ids, labels, exposure=replace(of_text, words=words, answer_words=answers))

    def _bounds(self, file: _File, window: int) -> tuple[int, int]:
        """Where a window of a file begins and ends among the tokens of all texts."""
        begin = int(self._offsets[file.first_text]) + window * (self.documents.max_length - 1)
        return begin, min(begin + self.documents.max_length, int(self._offsets[file.first_text + file.num_texts]))

    def record_of(self, index: int) -> Record:
        """The record of a sample; that of a window is the text that it begins in, with an id of its own."""
        file, place = self.locate(index)
        if place >= file.num_windows:
            return self.documents.records[int(file.whole[place - file.num_windows])]
        text = int(np.searchsorted(self._offsets, self._bounds(file, place)[0], side="right")) - 1
        record = self.documents.records[int(self._texts[text])]
        return replace(record, id=f"{record.id} (window {place})")

    def measure(self, index: int) -> Exposure | None:
        file, place = self.locate(index)
        if place >= file.num_windows:
            return self.documents.measure(int(file.whole[place - file.num_windows]))
        window = self[index]
        assert isinstance(window, Example)
        return window.exposure

    @property
    def records(self) -> Sequence[Record]:
        return _WindowRecords(self)

    # The tokens of all texts, and the words that begin in each window; of indexed data they are mapped.

    @cached_property
    def _tokens(self) -> NDArray[np.int32]:
        records = self.documents.records
        if not isinstance(records, Mixture):
            return self._tokenize()
        key = [1, *describe_lengths(self.documents)]
        return records.computed("stream", key, np.int32, self._tokenize, length=int(self._offsets[-1]))

    def _tokenize(self) -> NDArray[np.int32]:
        from tqdm import tqdm

        tokens = np.empty(int(self._offsets[-1]), np.int32)
        number = len(self._texts)
        with tqdm(total=number, desc="tokenising texts", disable=None if number >= _MANY else True) as bar:
            for start in range(0, number, _TEXTS_AT_ONCE):
                block = self._texts[start : start + _TEXTS_AT_ONCE].tolist()
                records = [self.documents.records[document] for document in block]
                rows = self.documents.text_format.encode_all([record.turns for record in records])
                for text, (record, ids) in enumerate(zip(records, rows, strict=True), start=start):
                    begin, end = self._offsets[text : text + 2].tolist()
                    if len(ids) != end - begin:
                        raise ValueError(f"{record}: has {len(ids)} tokens, but was counted with {end - begin}")
                    tokens[begin:end] = ids
                bar.update(len(block))
        return tokens

    @cached_property
    def _begun(self) -> NDArray[np.int32]:
        """Words, and answers' words, that begin in each window: int32 (2, windows)."""
        records = self.documents.records
        if not isinstance(records, Mixture):
            return self._count_begun().reshape(2, -1)
        key = [2, *describe_lengths(self.documents), self.documents.max_length]
        length = 2 * self._num_windows
        return records.computed("windows", key, np.int32, self._count_begun, length=length).reshape(2, -1)

    def _count_begun(self) -> NDArray[np.int32]:
        documents, text_format = self.documents, self.documents.text_format
        words = np.zeros((2, len(self._texts) + 1), np.int64)  # of all texts before each
        words[0, 1:] = np.cumsum(count_presented_words(documents, self.is_whole)[1][self._texts])
        words[1, 1:] = np.cumsum(count_answer_words(documents.records)[self._texts])
        begun = np.zeros((2, self._num_windows), np.int32)
        for file in self._files:
            before = words[:, file.first_text]
            for window in range(file.num_windows):
                # A window learns what stands behind its first token; that begins the words of a file's first window.
                end = self._bounds(file, window)[1]
                text = int(np.searchsorted(self._offsets, end, side="right")) - 1
                behind = words[:, text]
                if (inside := end - int(self._offsets[text])) and text < file.first_text + file.num_texts:
                    turns = documents.records[int(self._texts[text])].turns
                    of_turns = words_of_turns(text_format, turns)
                    ids = self._tokens[int(self._offsets[text]) :][:inside]
                    kept = min(count_begun(documents.tokenizer, ids), sum(of_turns))
                    behind = behind + np.array([kept, count_answers(of_turns, turns, kept)])
                behind = np.maximum(behind, before)  # See count_begun: a longer beginning may read as fewer words.
                begun[:, file.first_window + window] = behind - before
                before = behind
        return begun.ravel()

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample; those of a window are as many as the context has, but for a file's last."""
        return self._arrange(
            lambda file: [end - begin for begin, end in (self._bounds(file, w) for w in range(file.num_windows))],
            self.documents.lengths,
        ).astype(np.int32)

    def _arrange(self, of_windows: Callable[[_File], Iterable[Any]], of_documents: NDArray[Any]) -> NDArray[Any]:
        """A number of each sample from those of the windows of a file and of the documents."""
        pieces = [np.array([*of_windows(file), *of_documents[file.whole]], np.int64) for file in self._files]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    @property
    def modality_lengths(self) -> NDArray[np.int32]:
        if self.documents.early_mix_text:
            return self.lengths
        has_media = self._arrange(lambda file: [0] * file.num_windows, np.asarray(self._has_media))
        return np.where(has_media > 0, self.lengths, -self.lengths)

    @property
    def presented_words(self) -> NDArray[np.int64]:
        of_documents = count_presented_words(self.documents, self.is_whole)  # (2, documents)

        def of_windows(file: _File) -> NDArray[np.int32]:
            return self._begun[0, file.first_window : file.first_window + file.num_windows]

        return np.stack([self._arrange(of_windows, numbers) for numbers in of_documents])

    def describe(self) -> str:
        """How many texts are trained in how many windows."""
        number, files = len(self._texts), sum(file.num_windows > 0 for file in self._files)
        size = self.documents.max_length
        return (
            f"{number} texts of {files} {'file' if files == 1 else 'files'}, one behind the other, are trained in "
            f"{self._num_windows} windows of {size} tokens"
        )


class _WindowRecords(RecordSequence):
    def __init__(self, dataset: ConcatenatedDataset[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def _make_record(self, position: int) -> Record:
        return self._dataset.record_of(position)
