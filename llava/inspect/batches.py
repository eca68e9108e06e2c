"""Batches as the trainer makes them, with what each token is: supervised, prompt, visual, padding; and what was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from llava.constants import IGNORE_INDEX
from llava.data.dataset import SupervisedDataset
from llava.data.dataset_stats import count_coordinates, count_media
from llava.data.module import RunDataset, documents_of
from llava.inspect.findings import Findings
from llava.inspect.run import InspectedRun
from llava.train.data_order import TrainingData, choose_collator
from llava.train.report import by_source
from llava.types import SKIP, BadSample, Batch, Example, Record, VisualInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUPERVISED, PROMPT, VISUAL, PADDING, CUT = "supervised", "prompt", "visual", "padding", "cut"
KINDS = (SUPERVISED, PROMPT, VISUAL, PADDING, CUT)
_MOST_EXAMPLES = 8
"""Examples of a batch that are shown and looked at; larger batches are cut to so many."""


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind.

    Attributes:
        kind: of ``KINDS``.
        ids: the tokens.
    """

    kind: str
    ids: list[int]


@dataclass
class SampledExample:
    """An example of a batch, and what its tokens are.

    Attributes:
        record: that it was made of.
        runs: its tokens in order, padding and what was cut included.
    """

    example: Example
    record: Record
    runs: list[Run]

    @property
    def media(self) -> list[VisualInput]:
        return self.example.media

    def count(self, kind: str) -> int:
        return sum(len(run.ids) for run in self.runs if run.kind == kind)


@dataclass
class SampledBatch:
    """One batch: what the model is given, and its examples.

    Attributes:
        name: what it is.
        size: samples that the trainer would put into it, of which some may have been left out here.
    """

    name: str
    batch: Batch
    examples: list[SampledExample]
    bad: list[BadSample]
    size: int


def sample_batches(run: InspectedRun, number: int) -> list[SampledBatch]:
    """The first micro-batches of a run, and one with a sample of each kind that they lack.

    Args:
        number: of micro-batches.
    """
    dataset = run.dataset
    assert dataset is not None
    indices = list(islice(TrainingData(dataset, run.training_args).build_batches(), number))
    batches = [
        make_batch(run, f"batch {i} of the first epoch", of_one) for i, of_one in enumerate(indices, start=1) if of_one
    ]
    seen = [i for of_one in indices for i in of_one[:_MOST_EXAMPLES]]
    if rest := find_unseen(dataset, seen):
        batches.append(make_batch(run, "samples of other kinds", rest))
    return batches


def find_unseen(dataset: RunDataset, seen: Sequence[int]) -> list[int]:
    """Indices of samples of those kinds (by data file, media and coordinates) that none of some samples has."""
    documents = documents_of(dataset)
    if dataset is not documents:  # Chunks of texts are numbered otherwise.
        return []
    images, videos = count_media(documents.records)  # (samples,) each
    kinds = (images > 0) + 2 * (videos > 0) + 4 * (count_coordinates(documents.records) > 0)  # (samples,)
    found: list[int] = []
    for indices in by_source(documents.records).values():
        # The first sample of each kind.
        values, first = np.unique(kinds[indices], return_index=True)
        known = set(kinds[np.intersect1d(indices, np.asarray(seen, int))].tolist())
        candidates = [indices[i] for value, i in zip(values.tolist(), first, strict=True) if value not in known]
        found += [int(i) for i in candidates if documents.records[int(i)].fault is None]
    return found[:_MOST_EXAMPLES]


def make_batch(run: InspectedRun, name: str, indices: Sequence[int]) -> SampledBatch:
    """A batch of some samples, by the run's data set and collator."""
    dataset, data = run.dataset, run.data
    assert dataset is not None
    assert data is not None
    taken = list(indices[:_MOST_EXAMPLES])
    examples = dataset.__getitems__(taken) if hasattr(dataset, "__getitems__") else [dataset[i] for i in taken]
    batch = choose_collator(data["data_collator"], dataset, run.training_args)(examples)
    good = [(example, i) for example, i in zip(examples, taken, strict=True) if isinstance(example, Example)]
    width = 0 if run.training_args.packing else max((len(example.input_ids) for example, _ in good), default=0)
    sampled = [
        SampledExample(example, dataset.records[i], find_runs(run, example, dataset.records[i], width))
        for example, i in good
    ]
    bad = [example for example in examples if isinstance(example, BadSample)]
    return SampledBatch(name, batch, sampled, bad, len(indices))


def find_runs(run: InspectedRun, example: Example, record: Record, width: int) -> list[Run]:
    """What each token of an example is.

    Args:
        width: of its batch, up to which it is padded.
    """
    documents, loaded = run.documents, run.loaded
    assert documents is not None
    assert loaded is not None
    visual = set() if loaded.vision is None else set(loaded.vision.token_ids.values())
    runs: list[Run] = []
    for i, label in zip(example.input_ids, example.labels, strict=True):
        # A visual token that is supervised is shown as what it is to the loss.
        kind = SUPERVISED if label != IGNORE_INDEX else VISUAL if i in visual else PROMPT
        if not runs or runs[-1].kind != kind:
            runs.append(Run(kind, []))
        runs[-1].ids.append(i)
    if example.num_cut:
        runs.append(Run(CUT, find_cut(documents, example, record)))
    padding = max(width - len(example.input_ids), 0)
    pad = loaded.tokenizer.pad_token_id
    return [*runs, Run(PADDING, [pad] * padding)] if padding else runs


def find_cut(documents: SupervisedDataset, example: Example, record: Record) -> list[int]:
    """The tokens that an example has lost to the context."""
    whole = replace(documents, max_length=2**31)
    try:
        ids, _ = whole.tokenize(record)
    except ValueError:
        return []
    # The cut takes the end of the text, but leaves spans and the end of text: the first difference is where it begins.
    kept = example.input_ids
    begin = next((i for i, (a, b) in enumerate(zip(ids, kept, strict=False)) if a != b), len(kept) - 1)
    return ids[begin : begin + example.num_cut]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Tokens as text, special ones included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))


# What is wrong with them.


def check_batches(run: InspectedRun, batches: Sequence[SampledBatch], findings: Findings) -> None:
    """Find labels that teach the wrong thing, or nothing."""
    examples = [example for batch in batches for example in batch.examples]
    bad = [bad for batch in batches for bad in batch.bad]
    documents, loaded = run.documents, run.loaded
    assert documents is not None
    assert loaded is not None
    if bad:
        share = len(bad) / (len(bad) + len(examples))
        skips = documents.on_bad_sample == SKIP and share <= run.data_args.max_bad_share
        level = findings.warn if skips else findings.error
        level("bad_samples", f"{len(bad)} of {len(bad) + len(examples)} samples cannot be used, the first: {bad[0]}")
    if not examples:
        return
    visual = set() if loaded.vision is None else set(loaded.vision.token_ids.values())
    _check_visual(examples, visual, findings)
    of_nothing = [e for e in examples if not any(label != IGNORE_INDEX for label in e.example.labels[1:])]
    if of_nothing:
        found = f"{len(of_nothing)} of {len(examples)} samples have no label, {of_nothing[0].record} among them"
        level = findings.error if len(of_nothing) > len(examples) / 2 else findings.warn
        format_name = run.data_args.format_name
        level(
            "nothing_supervised",
            f"{found}: nothing is learned from them; take a --version whose format learns the answers (this is "
            f"{format_name}), or give the samples answers",
        )
        if len(of_nothing) == len(examples):
            return
    stops = {*documents.text_format.stop_token_ids, loaded.tokenizer.eos_token_id}
    if not any(label in stops for e in examples for label in e.example.labels):
        findings.warn(
            "end_not_learned",
            f"none of {len(examples)} samples has an end of text among its labels: they would never end; see --version",
        )
    _check_order(examples, visual, findings)


def _check_visual(examples: Sequence[SampledExample], visual: set[int], findings: Findings) -> None:
    wrong = [e for e in examples if any(label in visual for label in e.example.labels)]
    if wrong:
        number = sum(label in visual for e in wrong for label in e.example.labels)
        findings.error(
            "visual_supervised",
            f"{number} visual tokens have labels, in {len(wrong)} of {len(examples)} samples ({wrong[0].record}): "
            "placeholders would be learned as text; their labels must be -100, as the library's own formats have "
            "it: see --version",
        )


def _check_order(examples: Sequence[SampledExample], visual: set[int], findings: Findings) -> None:
    """Find samples that learn nothing behind their media, to which a causal model's loss is blind."""
    blind, seeing = [], 0
    for sampled in examples:
        ids, labels = sampled.example.input_ids, sampled.example.labels
        places = [i for i, token in enumerate(ids) if token in visual]
        if not places:
            continue
        # The first token behind a span is already predicted from it.
        if any(label != IGNORE_INDEX and labels[i] not in visual for i, label in enumerate(labels) if i > places[0]):
            seeing += 1
        else:
            blind.append(sampled)
    end_alone = [s for s in examples if s.media and s not in blind and _learns_end_alone(s, visual)]
    if blind or end_alone:
        first = [*blind, *end_alone][0]
        number = len(blind) + len(end_alone)
        level = findings.error if number > (len(blind) + seeing) / 2 else findings.warn
        level(
            "media_behind_text",
            f"{number} of {len(blind) + seeing} samples with media learn no text behind these ({first.record} first): "
            "a causal model reads from left to right, so that nothing it learns there depends on what it sees; put "
            "<image> or <video> before the text",
        )


def _learns_end_alone(sampled: SampledExample, visual: set[int]) -> bool:
    """Whether the end of text alone is learned behind the media."""
    ids, labels = sampled.example.input_ids, sampled.example.labels
    first = next((i for i, token in enumerate(ids) if token in visual), None)
    if first is None:
        return False
    learned = [i for i in range(first + 1, len(ids)) if labels[i] != IGNORE_INDEX and labels[i] not in visual]
    return learned == [len(ids) - 1]
