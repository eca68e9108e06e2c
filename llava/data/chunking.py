"""``--text_chunking document``: a text that is longer than the context becomes several samples, and none of it is lost.

A text of tokens 0 to 9 and a context of 4 become::

    chunk 0    0 1 2 3    all learned
    chunk 1    3 4 5 6    4 5 6 learned, 3 is read only
    chunk 2    6 7 8 9    7 8 9 learned

so that every token but the first is predicted once, as in a context without end.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from llava.constants import IGNORE_INDEX
from llava.data.dataset_stats import (
    TokenizedRecords,
    count_coordinates,
    count_cut_tokens,
    count_media,
    count_presented_words,
    describe_lengths,
)
from llava.data.formats.base import label_segments
from llava.data.index import Mixture, RecordSequence
from llava.data.words import count_begun, expose_chunk, words_of_turns
from llava.types import BadSample, Example, Exposure, Record

NONE, DOCUMENT, CONCATENATE = "none", "document", "concatenate"
TEXT_CHUNKING = (NONE, DOCUMENT, CONCATENATE)
"""What ``--text_chunking`` may do with texts: cut off what is too long, go on with it in further samples, or fill every
sample with one text after the other (``concatenation.py``)."""


class Documents(TokenizedRecords, Protocol):
    """What is chunked: a ``SupervisedDataset``."""

    early_mix_text: bool

    @property
    def sources(self) -> list[str]: ...

    @property
    def lengths(self) -> NDArray[np.int32]: ...

    def __getitem__(self, index: int) -> Example | BadSample: ...

    def decoding_once(self) -> AbstractContextManager[None]: ...

    def expose(self, record: Record, labels: list[int]) -> Exposure: ...

    def measure(self, index: int) -> Exposure | None: ...


D = TypeVar("D", bound=Documents)


class RearrangedDataset(Dataset["Example | BadSample"], Generic[D]):
    """The samples of a data set, with their texts cut otherwise.

    Samples with media or coordinates stay as they are, and are cut.

    Attributes:
        is_whole: bool (documents,), whether each is one that stays as it is, however long.

    Args:
        documents: the samples; of a format that learns all text.

    Raises:
        ValueError: the format writes conversations, which cannot be cut where it happens.
    """

    way: ClassVar[str]
    """That of ``TEXT_CHUNKING``."""
    _ends: NDArray[np.int64]
    """The first sample behind each part: a document, or a data file."""

    def __init__(self, documents: D) -> None:
        if documents.text_format.has_prompts:
            raise ValueError(
                f"--text_chunking {self.way} cuts running text wherever the context ends, but this format writes "
                "conversations, whose answers would lose their questions; leave it out, or take --plain_lm true"
            )
        self.documents = documents
        self._has_media = count_media(documents.records).any(axis=0)  # bool (documents,)
        # Coordinates belong to the media or the text around them.
        self.is_whole = self._has_media | (count_coordinates(documents.records) > 0)

    def __getitem__(self, index: int) -> Example | BadSample:
        """A sample, or a part of the texts; errors are those of the documents."""
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int]) -> list[Example | BadSample]:
        """The samples of a batch, as ``self[index]`` gives each; media are decoded once."""
        with self.documents.decoding_once():
            return [self[index] for index in indices]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        # A worker maps the tokens itself.
        return {name: value for name, value in vars(self).items() if name not in ("_tokens", "_begun")}

    def _find_part(self, index: int) -> int:
        """Which of the parts that ``_ends`` bounds a sample lies in."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(np.searchsorted(self._ends, index, side="right"))

    def is_chunk(self, index: int) -> bool:
        """Whether a sample is a part of the texts, not a sample of the documents."""
        raise NotImplementedError

    def measure(self, index: int) -> Exposure | None:
        """What ``self[index]`` presents to a model; None for a bad sample."""
        raise NotImplementedError

    def describe(self) -> str:
        """What became of how many texts."""
        raise NotImplementedError

    @property
    def records(self) -> Sequence[Record]:
        """The record of each sample, with an id of its own."""
        raise NotImplementedError

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample."""
        raise NotImplementedError

    @property
    def modality_lengths(self) -> NDArray[np.int32]:
        """``lengths``, negative for text-only samples (unless ``early_mix_text``)."""
        raise NotImplementedError

    @property
    def presented_words(self) -> NDArray[np.int64]:
        """As ``count_presented_words``, of each sample: int64 (2, samples)."""
        raise NotImplementedError

    @property
    def sources(self) -> list[str]:
        """What samples are counted under, by the number of their ``Exposure.source``."""
        return self.documents.sources


class ChunkedDataset(RearrangedDataset[D]):
    """The samples of a data set, each text that is too long in as many chunks as it takes, one behind the other."""

    way = DOCUMENT

    def __init__(self, documents: D) -> None:
        super().__init__(documents)
        cut = np.where(self.is_whole, 0, count_cut_tokens(documents)).astype(np.int64)  # (documents,)
        # A chunk begins with the last token of the one before it, so each goes on by one token less than it holds.
        step = documents.max_length - 1
        self._counts = np.where(cut > 0, -(-(cut + step) // step), 1)  # (documents,) chunks of each
        self._ends = np.cumsum(self._counts)  # (documents,) the first sample behind each
        self._long = np.flatnonzero(cut)  # (long,) the documents that are chunked
        # (long + 1,) where the tokens of each begin among those of all.
        self._offsets = np.concatenate(([0], np.cumsum(cut[self._long] + documents.max_length)))

    def locate(self, index: int) -> tuple[int, int]:
        """The document of a sample, and which of its chunks it is."""
        document = self._find_part(index)
        return document, index - int(self._ends[document] - self._counts[document])

    def is_chunk(self, index: int) -> bool:
        """Whether a sample is a part of a text, not a sample of the documents."""
        return bool(self._counts[self.locate(index)[0]] > 1)

    def __getitem__(self, index: int) -> Example | BadSample:
        """A sample, or a chunk of one; errors are those of the documents."""
        document, number = self.locate(index)
        if self._counts[document] == 1:
            return self.documents[document]
        place = int(np.searchsorted(self._long, document))
        start, end = self._offsets[place : place + 2].tolist()
        size = self.documents.max_length
        first = start + number * (size - 1)
        ids = self._tokens[first : min(first + size, end)].tolist()
        # The first token was learned at the end of the chunk before.
        labels = [IGNORE_INDEX, *ids[1:]] if number else list(ids)
        record = self.documents.records[document]
        return Example(chunk_id(record, number), ids, labels, exposure=self._expose(record, place, number, labels))

    def _expose(self, record: Record, place: int, number: int, labels: list[int]) -> Exposure:
        """What a chunk of a text presents: the words that begin in it."""
        first = int(self._first_chunks[place])
        begun, behind = self._begun[first + number : first + number + 2].tolist()
        if number + 1 == self._counts[self._long[place]]:  # What stands there is the next text's.
            behind = sum(words_of_turns(self.documents.text_format, record.turns))
        return expose_chunk(self.documents.expose(record, labels), self.documents.text_format, record, begun, behind)

    def measure(self, index: int) -> Exposure | None:
        """What ``self[index]`` presents to a model; None for a bad sample."""
        document, _ = self.locate(index)
        if self._counts[document] == 1:
            return self.documents.measure(document)
        chunk = self[index]
        assert isinstance(chunk, Example)
        return chunk.exposure

    @property
    def presented_words(self) -> NDArray[np.int64]:
        """As ``count_presented_words``, of each sample: int64 (2, samples)."""
        of_documents = count_presented_words(self.documents, self.is_whole)  # (2, documents)
        words = np.repeat(of_documents, self._counts, axis=1)
        for place, document in enumerate(self._long.tolist()):
            first, count = int(self._first_chunks[place]), int(self._counts[document])
            begun = [*self._begun[first : first + count].tolist(), int(of_documents[1, document])]
            words[:, self._ends[document] - count : self._ends[document]] = np.diff(begun)
        return words

    @property
    def records(self) -> Sequence[Record]:
        """The record of each sample; those of chunks behind the first have ids of their own."""
        return _ChunkRecords(self)

    @cached_property
    def _tokens(self) -> NDArray[np.int32]:
        """The tokens of all texts that are too long, one behind the other, int32; of indexed data they are mapped."""
        records = self.documents.records
        if not isinstance(records, Mixture):
            return self._tokenize()
        key = [*describe_lengths(self.documents), self.documents.max_length]
        return records.computed("tokens", key, np.int32, self._tokenize, length=int(self._offsets[-1]))

    def _tokenize(self) -> NDArray[np.int32]:
        tokens = np.empty(int(self._offsets[-1]), np.int32)
        for document, start, end in zip(self._long.tolist(), self._offsets, self._offsets[1:], strict=False):
            record = self.documents.records[document]
            ids, _ = label_segments(self.documents.text_format.encode(record.turns))
            if len(ids) != end - start:
                raise ValueError(f"{record}: has {len(ids)} tokens, but was counted with {end - start}")
            tokens[start:end] = ids
        return tokens

    @cached_property
    def _first_chunks(self) -> NDArray[np.int64]:
        """Where the chunks of each long text begin among those of all, int64 (long + 1,)."""
        return np.concatenate(([0], np.cumsum(self._counts[self._long])))

    @cached_property
    def _begun(self) -> NDArray[np.int32]:
        """Words of a text that have begun before each of its chunks, int32 (chunks of long texts + 1,)."""
        records, length = self.documents.records, int(self._first_chunks[-1]) + 1
        if not isinstance(records, Mixture):
            return self._count_begun()
        key = [2, *describe_lengths(self.documents), self.documents.max_length]
        return records.computed("begun", key, np.int32, self._count_begun, length=length)

    def _count_begun(self) -> NDArray[np.int32]:
        begun = np.zeros(int(self._first_chunks[-1]) + 1, np.int32)
        step = self.documents.max_length - 1
        for place, document in enumerate(self._long.tolist()):
            start, end = self._offsets[place : place + 2].tolist()
            tokens = self._tokens[start:end]
            total = sum(words_of_turns(self.documents.text_format, self.documents.records[document].turns))
            words = 0
            # Chunk k learns what stands behind its first token, which belongs to the chunk before it.
            for number in range(1, int(self._counts[document])):
                learned = slice((number - 1) * step + (number > 1), number * step + 1)
                lead = max(learned.start - 1, 0)
                words += count_begun(self.documents.tokenizer, tokens[lead : learned.stop], learned.start - lead)
                begun[self._first_chunks[place] + number] = min(words, total)
        return begun

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample; those of a chunk are as many as the context has, but for the last."""
        lengths = np.repeat(self.documents.lengths, self._counts)
        size = self.documents.max_length
        numbers = np.arange(len(self)) - np.repeat(self._ends - self._counts, self._counts)  # 0, 1, ... of each text
        of_chunks = np.minimum(lengths - numbers * (size - 1), size)
        return np.where(np.repeat(self._counts, self._counts) > 1, of_chunks, lengths).astype(np.int32)

    @property
    def modality_lengths(self) -> NDArray[np.int32]:
        """``lengths``, negative for text-only samples (unless ``early_mix_text``)."""
        if self.documents.early_mix_text:
            return self.lengths
        return np.where(np.repeat(self._has_media, self._counts), self.lengths, -self.lengths)

    def describe(self) -> str:
        """How many texts were chunked, into how many samples."""
        chunks, number = int(self._counts[self._long].sum()), len(self._long)
        texts, are = ("text", "is") if number == 1 else ("texts", "are")
        return f"{number} {texts} longer than {self.documents.max_length} tokens {are} trained in {chunks} chunks"


class _ChunkRecords(RecordSequence):
    def __init__(self, dataset: ChunkedDataset[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def _make_record(self, position: int) -> Record:
        document, number = self._dataset.locate(position)
        record = self._dataset.documents.records[document]
        return replace(record, id=chunk_id(record, number))


def chunk_id(record: Record, number: int) -> str:
    """The id of a chunk: the first has that of its text."""
    return f"{record.id} (chunk {number})" if number else record.id
