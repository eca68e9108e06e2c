"""Texts that are longer than the context, in chunks: every token is predicted once, on any number of workers."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise

import pytest
from conftest import ITALIAN, turns

from llava.data.chunking import ChunkedDataset
from llava.data.dataset import SupervisedDataset
from llava.data.formats import build_format
from llava.data.records import read_records
from llava.train.train import main

LONG = " ".join(ITALIAN) * 2
SIZE = 20


@pytest.fixture
def data(tmp_path):
    samples = [
        {"id": name, "conversations": turns("", text)} for name, text in (("a", LONG), ("b", "ciao"), ("c", LONG[5:]))
    ]
    samples.insert(1, {"id": "v", "video": "a.mp4", "conversations": turns("<video>", "x")})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(samples))
    return str(path)


@pytest.fixture(params=[True, False])
def chunked(request, data, tokenizer, tmp_path):
    records = read_records(data, cache_dir=str(tmp_path / "cache") if request.param else None)
    return ChunkedDataset(SupervisedDataset(records, tokenizer, None, SIZE))


def whole_ids(dataset, row):
    wide = SupervisedDataset(dataset.documents.records, dataset.documents.tokenizer, None, 10_000)
    return wide.tokenize(wide.records[row])[0]


def test_every_token_of_a_text_is_learned_once_and_in_order(chunked):
    for row, name in ((0, "a"), (3, "c")):
        ids = whole_ids(chunked, row)
        chunks = [chunked[i] for i in range(len(chunked)) if chunked.records[i].id.split(" ")[0] == name]
        assert len(chunks) == -(-(len(ids) - 1) // (SIZE - 1)) > 3
        assert [label for chunk in chunks for label in chunk.labels if label != -100] == ids
        assert all(1 < len(chunk.input_ids) <= SIZE for chunk in chunks)
        assert all(len(chunk.input_ids) == SIZE for chunk in chunks[:-1])
        assert [sum(label != -100 for label in chunk.labels[1:]) for chunk in chunks][:-1] == [SIZE - 1] * (
            len(chunks) - 1
        )
        for before, behind in pairwise(chunks):
            assert behind.input_ids[0] == before.input_ids[-1]
        assert chunks[-1].input_ids[-1] == chunked.documents.tokenizer.eos_token_id


def test_lengths_and_ids_are_those_of_the_samples(chunked):
    text = [i for i in range(len(chunked)) if not chunked.records[i].media]
    assert [int(chunked.lengths[i]) for i in text] == [len(chunked[i].input_ids) for i in text]
    assert (chunked.modality_lengths[text] == -chunked.lengths[text]).all()
    ids = [chunked.records[i].id for i in range(len(chunked))]
    assert ids[:2] == ["a", "a (chunk 1)"]
    assert len(set(ids)) == len(ids)
    assert [chunked[i].id for i in text] == [ids[i] for i in text]
    assert ids.count("v") == 1
    with pytest.raises(IndexError):
        chunked[len(chunked)]


def test_a_worker_reads_the_same(chunked):
    before = [chunked[i] for i in range(3)]
    copy = pickle.loads(pickle.dumps(chunked))
    assert "_tokens" not in vars(copy)
    assert [copy[i] for i in range(3)] == before


def test_at_the_edge_of_the_context(data, tokenizer):
    records = read_records(data)
    length = len(SupervisedDataset(records, tokenizer, None, 10_000).tokenize(records[0])[0])
    sizes = {
        size: ChunkedDataset(SupervisedDataset(records[:1], tokenizer, None, size)) for size in range(2, length + 2)
    }
    for size, dataset in sizes.items():
        learned = [label for i in range(len(dataset)) for label in dataset[i].labels if label != -100]
        assert len(learned) == length, size
    assert [len(sizes[size]) for size in (length - 1, length, length + 1)] == [2, 1, 1]


def test_conversations_are_not_cut(data, tokenizer):
    records = read_records(data)
    with pytest.raises(ValueError, match=r"--text_chunking document cuts running text .* take --plain_lm true"):
        ChunkedDataset(SupervisedDataset(records, tokenizer, None, SIZE, text_format=build_format("v1", tokenizer)))


def test_a_run_trains_on_all_of_the_text_and_resumes_exactly(gpt2_dir, tmp_path, capsys):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": i, "conversations": turns("", LONG[i:])} for i in range(2)]))

    def train(folder, **flags):
        values = {
            "model_name_or_path": gpt2_dir, "data_path": path, "output_dir": tmp_path / folder, "report_to": "none",
            "use_cpu": "true", "disable_tqdm": "true", "model_max_length": SIZE, "text_chunking": "document",
            "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 3, "max_steps": 6, **flags,
        }  # fmt: skip
        return main([word for name, value in values.items() for word in (f"--{name}", str(value))])

    trainer = train("a")
    printed = capsys.readouterr().out
    assert "2 texts longer than 20 tokens are trained in" in printed
    preview = printed.partition("supervised tokens of the first samples\n")[2].splitlines()
    assert preview[0].startswith("  0: 20 of 20 tokens: ")
    assert preview[1].startswith("  0 (chunk 1): 19 of 20 tokens: ")
    assert "endoftext" not in preview[0]  # the text goes on in the next chunk
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert not any("cut_tokens" in entry for entry in trainer.state.log_history)
    resumed = train("b", resume_from_checkpoint=tmp_path / "a" / "checkpoint-3")
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == losses
    for name, weight in trainer.model.state_dict().items():
        assert (weight == resumed.model.state_dict()[name]).all(), name
    with pytest.raises(ValueError, match="--text_chunking is 'all'; known: none, document"):
        train("c", text_chunking="all")
