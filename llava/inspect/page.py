"""The page of an inspection: one HTML file with its findings, data, batches token by token, frames, and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from llava.html import (
    BAD,
    GOOD,
    WARNING,
    Markup,
    bars,
    code,
    details,
    figure,
    grid,
    join,
    mark,
    note,
    page,
    paragraph,
    row,
    table,
    tag,
)
from llava.inspect.batches import CUT, KINDS, PADDING, PROMPT, SUPERVISED, VISUAL, SampledBatch, SampledExample, decode
from llava.inspect.findings import CODES, ERROR, Findings
from llava.inspect.inspection import Inspection, describe_media
from llava.inspect.passes import Passes
from llava.inspect.sources import Histogram, SourceFacts, describe_budget
from llava.train.parts import count_parts
from llava.types import VisualInput, holds_features

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLOURS = {SUPERVISED: "#b7e1c0", PROMPT: "#fbe9b7", VISUAL: "#c3d6f5", PADDING: "#e2dfd7", CUT: "#f6c6c2"}
_MEANINGS = {
    SUPERVISED: "learned: the loss is made of these",
    PROMPT: "given, and not learned",
    VISUAL: "places that features of an image or clip take",
    PADDING: "nothing",
    CUT: "cut off, as the context is too small",
}
_MOST_TOKENS = 600
_MOST_FRAMES = 16
_FRAME_SIDE = 168
_BROKEN = "\ufffd"


def build_page(seen: Inspection, command: str) -> str:
    """The page.

    Args:
        command: that it was made with.
    """
    run = seen.run
    sections: list[tuple[str, Sequence[object]]] = [
        ("Data files", [join(map(show_source, seen.sources))] if seen.sources else []),
        ("Batches", show_batches(seen)),
        ("Context", show_context(seen)),
        ("Parts and gradients", show_parts(seen)),
        ("Streams", [] if seen.passes is None else show_probes(seen.passes)),
        ("Costs", [] if seen.costs is None else [tag("ul", *(tag("li", line) for line in seen.costs.lines()))]),
        ("What the trainer says", [code(run.report)] if run.report else []),
    ]
    lead = [show_findings(seen.findings), details("The command", code(command))]
    return page(f"Before the run: {run.training_args.output_dir}", sections, lead)


def show_findings(findings: Findings) -> Markup:
    """Each finding in a box, the worst first; notes are folded."""
    boxes = [note(BAD if findings.num_errors else GOOD, tag("strong", findings.conclude()))]
    notes = []
    for finding in findings:
        text = join([tag("strong", f"{finding.level}: {CODES[finding.code]}"), " ", f"({finding.code})"])
        if finding.level == "note":
            notes.append(tag("li", finding.text))
        else:
            kind = BAD if finding.level == ERROR else WARNING
            boxes.append(note(kind, text, tag("br"), finding.text))
    if notes:
        boxes.append(details("1 note" if len(notes) == 1 else f"{len(notes)} notes", tag("ul", *notes)))
    return join(boxes)


# Data.


def show_source(source: SourceFacts) -> Markup:
    """A data file: numbers in a table, histograms beside each other."""
    rows: list[tuple[object, object]] = [
        ("samples", source.samples),
        ("of text alone", source.text_only),
        ("words", source.words + source.cut_words),
        ("of answers", source.answer_words),
    ]
    if source.cut_words:
        rows.append(("of all words, cut off", source.cut_words))
    for kind, media in source.media.items():
        rows.append((f"{kind}s", f"{media.number:,}{describe_media(media)}"))
    charts: list[object] = [show_histogram("tokens of a sample", Histogram.of(source.lengths))]
    for media in source.media.values():
        charts.append(show_histogram("seconds of a clip", Histogram.of(media.seconds)))
    return join([tag("h3", source.label), table(("", ""), rows), grid(*filter(None, charts))])


def show_histogram(title: str, histogram: Histogram | None) -> Markup:
    """A histogram, nothing without values."""
    if histogram is None:
        return Markup("")
    entries = list(zip(histogram.labels, histogram.counts, strict=True))
    return join([paragraph(title, faint=True), bars(entries)])


# Batches.


def show_batches(seen: Inspection) -> list[object]:
    """All batches, below the colours of their tokens."""
    if not seen.batches:
        return []
    legend = [
        tag("span", f"{kind}: {_MEANINGS[kind]}", class_="key", style=f"--colour:{COLOURS[kind]}") for kind in KINDS
    ]
    shown = [show_batch(seen, batch, is_open=i == 0) for i, batch in enumerate(seen.batches)]
    return [tag("div", *legend, class_="keys"), *shown]


def show_batch(seen: Inspection, batch: SampledBatch, is_open: bool) -> Markup:
    """A batch: its examples one below the other."""
    loaded = seen.run.loaded
    assert loaded is not None
    left_out = batch.size - len(batch.examples) - len(batch.bad)
    title = f"{batch.name}: {batch.size} samples" + (f", {left_out} of them not shown" if left_out else "")
    bad = [note(BAD, str(sample)) for sample in batch.bad]
    return details(title, *bad, *(show_example(s, loaded.tokenizer) for s in batch.examples), is_open=is_open)


def show_example(sampled: SampledExample, tokenizer: PreTrainedTokenizerBase) -> Markup:
    """An example: its frames with their times, and its tokens by kind."""
    counts = ", ".join(f"{count} {kind}" for kind in KINDS if (count := sampled.count(kind)))
    frames = [row(*show_frames(medium)) for medium in sampled.media]
    left, pieces = _MOST_TOKENS, []
    for run in sampled.runs:
        if run.kind in (VISUAL, PADDING):
            pieces.append(mark(_count_alike(run.ids, tokenizer), COLOURS[run.kind], f"{len(run.ids)} {run.kind}"))
            continue
        pieces += [
            mark(text, COLOURS[run.kind], f"{run.kind}, {ids}") for text, ids in split_text(run.ids[:left], tokenizer)
        ]
        left -= min(len(run.ids), left)
    if left == 0:
        pieces.append(tag("span", " ... more is not shown", class_="faint"))
    head = tag("h3", sampled.example.id, " ", tag("span", counts, class_="faint"))
    return join([head, *frames, tag("p", *pieces)])


def _count_alike(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Tokens with their repetitions counted: a span has hundreds of patches."""
    words = []
    for token, alike in groupby(ids):
        number = len(list(alike))
        words.append(str(tokenizer.convert_ids_to_tokens(token)) + (f" x {number}" if number > 1 else ""))
    return " ".join(words)


def split_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Tokens as pieces of text with their ids; those that share a letter stay together."""
    pieces, waiting = [], list[int]()
    for i, token in enumerate(ids):
        waiting.append(token)
        text = decode(tokenizer, waiting)
        if text.endswith(_BROKEN) and len(waiting) < 4 and i + 1 < len(ids):
            continue
        pieces.append((text, " ".join(map(str, waiting))))
        waiting = []
    return pieces


def show_frames(medium: VisualInput) -> list[Markup]:
    """The frames of an image or clip as the tower sees them, with their times."""
    if holds_features(medium.frames):
        return [paragraph("features of the tower, and no pixels", faint=True)]
    shown = []
    for i, frame in enumerate(medium.frames[:_MOST_FRAMES]):
        caption = f"{medium.times[i]:.2f} s" if medium.kind == "video" and i < len(medium.times) else medium.kind
        shown.append(figure(to_picture(frame), caption, _FRAME_SIDE))
    if len(medium.frames) > _MOST_FRAMES:
        shown.append(paragraph(f"and {len(medium.frames) - _MOST_FRAMES} more", faint=True))
    return shown


def to_picture(frame: Tensor) -> Image.Image:
    """A uint8 (3, height, width) frame as a picture."""
    return Image.fromarray(np.ascontiguousarray(frame.permute(1, 2, 0).numpy()))


# Model.


def show_context(seen: Inspection) -> list[object]:
    """What media take of the context, and what would make it less."""
    run = seen.run
    if run.loaded is None or not run.max_length:
        return []
    context = run.loaded.model.config.max_position_embeddings
    rows = [
        (part.kind, part.tokens, part.spans, part.left, part.remedy)
        for part in describe_budget(run.loaded.vision, run.max_length)
    ]
    text = f"A sample may have {run.max_length:,} tokens, of a context of {context:,}."
    if not rows:
        return [paragraph(text)]
    return [paragraph(text), table(("", "tokens", "of which", "left for the rest", "to make them fewer"), rows)]


def show_parts(seen: Inspection) -> list[object]:
    """The parts of the model, what trains of them, and the gradients of a step."""
    loaded = seen.run.loaded
    if loaded is None:
        return []
    rates = seen.run.training_args.part_learning_rates()
    gradients = {} if seen.passes is None else {gradient.part: gradient for gradient in seen.passes.gradients}
    rows: list[tuple[object, ...]] = []
    for part, total, trainable in count_parts(loaded.model):
        gradient = gradients.get(part)
        told: tuple[object, ...] = (None, None, None)
        if gradient is not None:
            told = (f"{gradient.norm:.3g}", len(gradient.without), len(gradient.zero))
        rows.append((part, total, trainable, f"{rates[part]:g}" if trainable else "frozen", *told))
    head = ("part", "parameters", "that train", "learning rate", "gradient norm", "without one", "exact zeros")
    content: list[object] = [table(head, rows)]
    passes = seen.passes
    if passes is not None and passes.text_loss is not None:
        content.append(
            paragraph(
                f"Loss of the text alone {passes.text_loss:.3f}, of a blind guess {passes.chance:.3f}",
                "" if passes.loss is None else f", of a step {passes.loss:.3f}",
                ". Tensors without a gradient, or with exact zeros, are counted.",
            )
        )
    if passes is not None and passes.skipped:
        content.append(note(WARNING, passes.skipped))
    for gradient in gradients.values():
        if names := [*gradient.without, *gradient.zero]:
            content.append(details(f"{gradient.part}: without a gradient or with exact zeros", code("\n".join(names))))
    return content


def show_probes(passes: Passes) -> list[object]:
    """How far the loss moves where a stream is changed."""
    if passes.seen_loss is None:
        return []
    rows = [
        (p.kind, p.stream, p.change, f"{p.loss:.4f}", f"{p.loss - passes.seen_loss:+.2g}", f"{p.moved:.2g}")
        for p in passes.probes
    ]
    return [
        paragraph(
            f"Samples with media have the loss {passes.seen_loss:.4f}. Where a stream of visual tokens is changed it "
            "moves; before any training a little, and not at all where the stream is not connected."
        ),
        table(("", "stream", "changed to", "loss", "moves by", "a token by up to"), rows),
    ]
