"""Texts one behind the other: every token once in order, every word in one window, files apart, media as they are."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llava.data.concatenation import ConcatenatedDataset
from llava.data.dataset import SupervisedDataset
from llava.data.records import read_records
from tests.train.test_training import write_json

TEXTS = [
    "Un uomo con una maglia nera",
    "muove",
    "le mani davanti al petto. Una ragazza con un maglione giallo",
    "è qui",
]
ASKED = [{"from": "human", "value": "che cosa fa?"}, {"from": "gpt", "value": "dorme sul divano"}]


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    samples = [{"id": 1, "conversations": ASKED}, {"id": 3, "conversations": [{"from": "gpt", "value": "il gatto"}]}]
    seen = {"id": 2, "image": "x.png", "conversations": [{"from": "gpt", "value": "<image>una stella"}]}
    names = [write_json(tmp_path / "b.json", samples), write_json(tmp_path / "c.json", [samples[0], seen, samples[1]])]
    return [str(tmp_path / "a.txt"), *map(str, names)]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("size", [2, 5, 8, 13, 400])
def test_every_token_and_every_word_once(
    paths, visual_tokenizer, tiny_vision, tmp_path, size: int, cached: bool
) -> None:
    """Of files of texts alone, and where there is room for a picture, of one that has a picture among its texts."""
    chosen = [paths[0], paths[2 if size == 400 else 1]]
    records = read_records(chosen, cache_dir=str(tmp_path / "cache") if cached else None)
    texts = SupervisedDataset(read_records(paths[:2]), visual_tokenizer, None, 512)
    documents = SupervisedDataset(records, visual_tokenizer, tiny_vision, size)
    dataset = pickle.loads(pickle.dumps(ConcatenatedDataset(documents)))
    present = [i for i in range(len(dataset)) if dataset.is_chunk(i)]
    windows = [dataset[i] for i in present]
    for source, (places, words, answers) in enumerate([(range(4), 20, 20), (range(4, 6), 8, 5)]):
        own = [window for window in windows if window.exposure.source == source]
        stream = [i for place in places for i in texts[place].input_ids]
        assert own[0].input_ids + [i for window in own[1:] for i in window.input_ids[1:]] == stream
        assert own[0].labels + [i for window in own[1:] for i in window.labels[1:]] == stream
        assert all(before.input_ids[-1] == behind.input_ids[0] for before, behind in pairwise(own))
        assert all(len(window.input_ids) == size for window in own[:-1])
        assert sum(window.exposure.words for window in own) == words
        assert sum(window.exposure.answer_words for window in own) == answers
    # A word belongs to the window that has its first token: all but the first window know only the words behind one.
    first = " ".join(visual_tokenizer.decode(windows[0].input_ids).split("<|endoftext|>"))
    assert windows[0].exposure.words == len(first.split())
    assert len({record.id for record in dataset.records}) == len(dataset)
    assert dataset.lengths[present].tolist() == [len(window.input_ids) for window in windows]
    assert dataset.presented_words[0][present].tolist() == [window.exposure.words for window in windows]
    assert (np.sign(dataset.modality_lengths) < 0).tolist() == [dataset.is_chunk(i) for i in range(len(dataset))]
    assert [dataset.measure(i) for i in present] == [window.exposure for window in windows]
    assert [dataset.records[i].id for i in range(len(dataset)) if not dataset.is_chunk(i)] == ["2"] * (size == 400)
