"""What of the data comes together: packs, batches, chunks and windows hold all of it once, and mix no samples."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from fuzzing import attempt, cases
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import free_texts
from test_fuzz_conversations import naive_words

from llava.constants import IGNORE_INDEX
from llava.data.batch_plan import plan_in_order, plan_packs, plan_token_batches, take_units
from llava.data.chunking import ChunkedDataset
from llava.data.collator import SupervisedCollator
from llava.data.concatenation import ConcatenatedDataset
from llava.data.dataset import SupervisedDataset
from llava.data.index import Mixture, Part, RecordStore
from llava.types import BadSample, Coordinates, Example, Record, Turn

lengths_and_capacity = st.integers(1, 200).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), min_size=1, max_size=60), st.just(capacity))
)


@cases(offline=700, in_ci=60)
@given(lengths_and_capacity, st.sampled_from(("packs", "batches", "in order", "in order, padded")), st.integers(0, 99))
def test_a_plan_has_room_for_every_sample_and_puts_each_in_once(drawn, way, seed):
    lengths, capacity = np.array(drawn[0]), drawn[1]
    if way.startswith("in order"):
        plan = plan_in_order(lengths, capacity, padded=way.endswith("padded"))
    else:
        plan = (plan_packs if way == "packs" else plan_token_batches)(lengths, capacity)
    assert sorted(plan.lengths.tolist()) == sorted(lengths.tolist())
    assert plan.bounds[0] == 0
    assert plan.bounds[-1] == len(lengths)
    assert all(start < end for start, end in pairwise(plan.bounds.tolist()))
    samples = np.arange(1000, 1000 + len(lengths))
    filled = [plan.fill(samples, lengths, torch.Generator().manual_seed(seed + i)) for i in (0, 0, 1)]
    assert all(np.array_equal(a, b) for a, b in zip(filled[0], filled[1], strict=True))
    for chosen, bounds in filled:
        assert sorted(chosen.tolist()) == samples.tolist()
        assert len(bounds) == len(plan) + 1
        for start, end in pairwise(bounds.tolist()):
            unit = lengths[chosen[start:end] - 1000]
            padded = way in ("batches", "in order, padded")
            assert (unit.max() * len(unit) if padded else unit.sum()) <= capacity
    units = np.random.default_rng(seed).permutation(len(plan))[: seed % (len(plan) + 1)]
    taken, bounds = take_units(filled[0][0], filled[0][1], units)
    ends = filled[0][1]
    assert [taken[a:b].tolist() for a, b in pairwise(bounds.tolist())] == [
        filled[0][0][ends[unit] : ends[unit + 1]].tolist() for unit in units
    ]


@st.composite
def examples(draw: st.DrawFn, number: int) -> Example | BadSample:
    """A sample whose ids tell whose they are."""
    if draw(st.integers(0, 9)) == 0:
        return BadSample(str(number), "f, line 1", "", "bad")
    length = draw(st.integers(1, 12))
    ids = [100 * (number + 1) + i for i in range(length)]
    labels = [i if draw(st.booleans()) else IGNORE_INDEX for i in ids]
    coordinates = Coordinates(temporal_input_locations=tuple(draw(st.lists(st.floats(0, 1), max_size=2))))
    return Example(str(number), ids, labels, coordinates=coordinates)


@cases(offline=400, in_ci=40)
@given(st.data(), st.integers(0, 8), st.sampled_from((0, 12, 13, 24, 50)))
def test_a_batch_keeps_samples_apart(data, count, pack_length):
    drawn = [data.draw(examples(number)) for number in range(count)]
    good = [one for one in drawn if isinstance(one, Example)]
    batch = SupervisedCollator(0, pack_length)(drawn)
    assert batch["sample_ids"] == [one.id for one in good]
    assert batch.get("bad_samples", []) == [one for one in drawn if isinstance(one, BadSample)]
    rows = batch["input_ids"].tolist()
    lengths = batch.get("pack_lengths", [[len(one.input_ids)] for one in good]) if good else [[1]]
    waiting = iter(good)
    for row, labels, mask, of_row in zip(
        rows, batch["labels"].tolist(), batch["attention_mask"].tolist(), lengths, strict=True
    ):
        total = sum(of_row)
        assert mask == [1] * total + [0] * (len(row) - total)
        assert labels[total:] == [IGNORE_INDEX] * (len(row) - total)
        assert not pack_length or total <= pack_length or not good
        place = 0
        for length in of_row if good else ():
            one = next(waiting)
            assert row[place : place + length] == one.input_ids
            # In a pack the first token of a sample is predicted by another's last, and so by nothing.
            assert labels[place + (pack_length > 0) : place + length] == one.labels[(pack_length > 0) :]
            assert not pack_length or labels[place] == IGNORE_INDEX
            place += length
    assert next(waiting, None) is None
    if any(one.coordinates for one in good):
        given_numbers = [n for row in batch["variables"] for n in row["temporal_input_locations"]]
        assert given_numbers == [n for one in good for n in one.coordinates.temporal_input_locations]
    else:
        assert "variables" not in batch


texts = st.lists(st.one_of(free_texts, st.just("gatto cane "), st.text("ab \n", max_size=120)), max_size=4).map(
    " ".join
)


def mix(contents: list[list[str]]) -> Mixture:
    """Data files of texts."""
    parts = []
    for number, of_file in enumerate(contents):
        records = [
            Record(f"{number}.{i}", (Turn("assistant", text),), source=f"f{number}, line {i}")
            for i, text in enumerate(of_file)
        ]
        parts.append(Part(RecordStore.write(records), range(len(records)), {}, f"f{number}"))
    return Mixture(parts)


@cases(offline=500, in_ci=25)
@example([["<|endoftext|>\xa0<|endoftext|>"]], 2, False)  # a window had -1 words
@given(
    st.lists(st.lists(texts.filter(str.strip), max_size=5), min_size=1, max_size=3), st.integers(2, 30), st.booleans()
)
def test_no_token_and_no_word_is_lost_or_there_twice(tokenizer, contents, size, by_document):
    records = mix(contents)
    if not len(records):
        return
    documents = SupervisedDataset(records, tokenizer, None, size)
    wide = SupervisedDataset(records, tokenizer, None, 10**6)
    whole = [wide[i].input_ids for i in range(len(wide))]
    arranged = attempt(ChunkedDataset if by_document else ConcatenatedDataset, documents)
    assert not isinstance(arranged, ValueError), arranged
    samples = [arranged[i] for i in range(len(arranged))]
    assert all(0 < len(one.input_ids) <= size for one in samples)
    assert arranged.lengths.tolist() == [len(one.input_ids) for one in samples]
    assert [one.id for one in samples] == [record.id for record in arranged.records]
    assert len({one.id for one in samples}) == len(samples)
    for one in samples:
        assert all(label in (i, IGNORE_INDEX) for i, label in zip(one.input_ids, one.labels, strict=True))
    # Every token but a text's (or a file's) first is learned once, in its place.
    learned = Counter(label for one in samples for label in one.labels if label != IGNORE_INDEX)
    assert learned == Counter(i for ids in whole for i in ids)
    stream = [i for one in samples for i in (one.input_ids if one.labels[0] != IGNORE_INDEX else one.input_ids[1:])]
    assert stream == [i for ids in whole for i in ids]
    # Words, too, are counted in one sample each.
    words = sum(naive_words(text) for of_file in contents for text in of_file)
    assert sum(one.exposure.words for one in samples) == words
    assert all(one.exposure.words >= 0 for one in samples)
    assert arranged.presented_words[1].tolist() == [one.exposure.words for one in samples]
    assert [arranged.measure(i) for i in range(len(arranged))] == [one.exposure for one in samples]
    if not by_document:  # None crosses a file.
        firsts = {tuple(ids) for ids in whole}
        assert firsts or not samples


@cases(offline=200, in_ci=20)
@given(st.lists(texts, min_size=1, max_size=6), st.integers(3, 40), st.sampled_from(("error", "skip")))
def test_lengths_and_words_are_counted_ahead_as_they_come(tokenizer, contents, size, on_bad_sample):
    records = mix([contents])
    dataset = replace(SupervisedDataset(records, tokenizer, None, size), on_bad_sample=on_bad_sample)
    measured = dataset.lengths.tolist()
    wide = SupervisedDataset(records, tokenizer, None, 10**6)
    words = dataset.presented_words
    for i, text in enumerate(contents):
        one = dataset[i]
        if isinstance(one, BadSample):
            assert on_bad_sample == "skip"
            assert not text.strip()
            continue
        full = wide[i]
        assert measured[i] == len(full.input_ids)
        assert one.num_cut == max(len(full.input_ids) - size, 0)
        assert one.exposure.words + one.exposure.cut_words == naive_words(text)
        assert words[1, i] in (one.exposure.words, naive_words(text))
        assert one.exposure.tokens == len(one.input_ids)
        assert one.exposure.supervised_tokens == len(one.labels) - 1 - one.labels[1:].count(IGNORE_INDEX)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    from llava.model.vocabulary import load_tokenizer

    return load_tokenizer(str(tokenizer_dir))
