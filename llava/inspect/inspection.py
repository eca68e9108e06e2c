"""An inspection as a whole: everything that is looked at, in the order in which it can be, and the text about it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from llava.inspect.batches import KINDS, SampledBatch, SampledExample, check_batches, decode, sample_batches
from llava.inspect.costs import Costs, estimate_costs
from llava.inspect.findings import Findings
from llava.inspect.model_checks import check_frozen, check_tower
from llava.inspect.passes import Passes, make_passes
from llava.inspect.run import InspectedRun, build_run, hearing
from llava.inspect.sources import MediaFacts, SourceFacts, check_sources, describe_sources
from llava.messages import explain_error, is_out_of_memory, shorten_text
from llava.train.parts import parts_table
from llava.train.report import budget_table
from llava.types import VisualInput

_GIB = 2**30
_SHOWN_TEXT = 160


@dataclass
class Inspection:
    """What an inspection has seen; what it did not come to is None or empty."""

    run: InspectedRun
    findings: Findings
    sources: list[SourceFacts] = field(default_factory=list)
    batches: list[SampledBatch] = field(default_factory=list)
    passes: Passes | None = None
    costs: Costs | None = None

    @property
    def examples(self) -> list[SampledExample]:
        """The examples of all batches."""
        return [example for batch in self.batches for example in batch.examples]


def inspect_run(
    run: InspectedRun, findings: Findings, fast: bool, num_batches: int, memory: float | None = None
) -> Inspection:
    """Look at a run.

    Args:
        run: its flags, read.
        findings: filled.
        fast: whether to leave out what takes long.
        num_batches: micro-batches to look at.
        memory: GiB of the device that the run is for; None where it is not told.
    """
    seen = Inspection(run, findings)
    build_run(run, findings)
    if run.loaded is None:
        return seen
    check_frozen(run, findings)
    if run.dataset is None:
        check_tower(run, [], findings)
        return seen
    with hearing(findings):
        with looking("the data files", findings):
            seen.sources = describe_sources(run.dataset, fast)
            check_sources(run.dataset, seen.sources, bool(run.model_args.vision_tower), findings)
        with looking("batches", findings):
            seen.batches = sample_batches(run, num_batches)
            check_batches(run, seen.batches, findings)
        check_tower(run, seen.examples, findings)
        if seen.examples:
            with looking("the model", findings), stepping(findings):
                seen.passes = make_passes(run, seen.examples, fast, findings)
            with looking("costs", findings), stepping(findings):
                seen.costs = estimate_costs(run, seen.examples, memory, fast, findings)
    return seen


@contextlib.contextmanager
def looking(what: str, findings: Findings) -> Iterator[None]:
    """Within it a ValueError is a finding: a run that is refused in one way may have more that is wrong with it."""
    try:
        yield
    except ValueError as error:
        if findings.num_errors:
            findings.note("inspection", f"{what} could not be looked at: {error}")
        else:
            findings.error("bad_samples", str(error))


@contextlib.contextmanager
def stepping(findings: Findings) -> Iterator[None]:
    """Within it an error of a model's pass is a finding: a step of training would end with it."""
    try:
        yield
    except (RuntimeError, IndexError, TypeError) as error:
        if is_out_of_memory(error):
            findings.warn("inspection", f"this machine has no memory for a pass: {explain_error(error)}")
        elif all(finding.code != "step_failed" for finding in findings):
            findings.error("step_failed", f"a step ends with {type(error).__name__}: {explain_error(error)}")


# The text.


def describe(seen: Inspection) -> Iterator[str]:
    """The sections of the text, one by one."""
    run = seen.run
    if run.report:
        yield run.report
    elif run.loaded is not None:
        # The trainer has stopped before it came to its own tables.
        yield parts_table(run.loaded.model, run.training_args.part_learning_rates())
        context = run.loaded.model.config.max_position_embeddings
        if run.max_length:
            yield budget_table(run.loaded.vision, run.max_length, context)
    if seen.sources:
        yield "\n".join(["data files", *(line for source in seen.sources for line in describe_source(source))])
    for batch in seen.batches:
        yield "\n".join(describe_batch(seen, batch))
    if seen.passes is not None:
        yield "\n".join(describe_passes(seen.passes))
    if seen.costs is not None:
        yield "\n".join(["costs", *(f"  {line}" for line in seen.costs.lines())])
    yield "\n".join(["findings", *(f"  {finding}" for finding in seen.findings)])


def describe_source(source: SourceFacts) -> list[str]:
    """A data file in a few lines."""
    cut = f"; {source.cut_words:,} of all are cut off" if source.cut_words else ""
    lines = [
        f"  {source.label}: {source.samples:,} samples, {source.text_only:,} of text alone",
        f"    words: {source.words + source.cut_words:,} ({source.answer_words:,} of answers{cut})",
    ]
    if len(source.lengths):
        lines.append(f"    tokens of a sample: {describe_numbers(source.lengths)}")
    for kind, media in source.media.items():
        lines.append(f"    {kind}s: {media.number:,}{describe_media(media)}")
    return lines


def describe_numbers(values: Sequence[float] | np.ndarray, unit: str = "") -> str:
    """Least, median and most of some numbers."""
    least, median, most = (f"{value:.3g}{unit}" for value in np.percentile(np.asarray(values, float), (0, 50, 100)))
    return least if least == most else f"{least} to {most}, median {median}"


def describe_media(media: MediaFacts) -> str:
    """Sizes, durations and bytes of the media that were opened."""
    parts = []
    if media.sizes:
        sides = np.array(media.sizes)  # (media, 2): height, width
        least, most = (f"{size[1]} x {size[0]}" for size in (sides.min(0), sides.max(0)))
        parts.append(least if least == most else f"{least} to {most} pixels")
    if media.seconds:
        parts.append(describe_numbers(media.seconds, " s"))
    if media.bytes:
        parts.append(f"{describe_numbers(np.array(media.bytes) / 2**20, ' MiB')}")
    return f" ({media.opened} opened: {'; '.join(parts)})" if parts else ""


def describe_batch(seen: Inspection, batch: SampledBatch) -> list[str]:
    """A batch: how many tokens of each kind, and the first text of each of its examples."""
    loaded = seen.run.loaded
    assert loaded is not None
    shown = "" if batch.size == len(batch.examples) + len(batch.bad) else f", {len(batch.examples)} of them looked at"
    lines = [f"{batch.name}: {batch.size} samples{shown}"]
    for sampled in batch.examples:
        counts = {kind: sampled.count(kind) for kind in KINDS}
        listed = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        learned = " ... ".join(
            decode(loaded.tokenizer, run.ids).strip() for run in sampled.runs if run.kind == "supervised"
        )
        lines.append(f"  {sampled.example.id}: {listed}: {shorten_text(learned, _SHOWN_TEXT)!r}")
        for medium in sampled.media:
            height, width = medium.original_size
            lines.append(f"    {medium.kind} of {width} x {height}{describe_frames(medium)}")
    return lines


def describe_frames(medium: VisualInput) -> str:
    """How many frames of a clip the model is given, and when they are shown; of an image, how many views."""
    number = len(medium.frames)
    if medium.kind == "image":
        return f", {number} views" if number > 1 else ""
    return f", {number} frames at {', '.join(f'{time:.2f}' for time in medium.times)} s"


def describe_passes(passes: Passes) -> list[str]:
    """What the passes have shown."""
    lines = ["passes"]
    if passes.text_loss is not None:
        lines.append(f"  loss of the text alone: {passes.text_loss:.3f} (a blind guess: {passes.chance:.3f})")
    if passes.skipped:
        lines.append(f"  {passes.skipped}")
    if passes.loss is not None:
        lines.append(f"  loss of a step: {passes.loss:.3f}")
    for gradient in passes.gradients:
        zero = f", {len(gradient.zero)} with exact zeros" if gradient.zero else ""
        without = f", {len(gradient.without)} without any" if gradient.without else ""
        lines.append(
            f"  gradient of {gradient.part}: norm {gradient.norm:.3g}, {gradient.tensors} tensors{zero}{without}"
        )
    if passes.seen_loss is not None:
        lines.append(f"  loss of samples with media: {passes.seen_loss:.4f}; where a stream is changed:")
    for probe in passes.probes:
        delta = probe.loss - (passes.seen_loss or 0.0)
        lines.append(
            f"    {probe.kind}, {probe.stream}, {probe.change}: loss {delta:+.2g}, a token by up to {probe.moved:.2g}"
        )
    return lines
