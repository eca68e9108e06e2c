"""A forward and a backward pass of a run's model on some of its samples: what learns, and what the loss depends on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX
from llava.data.collator import model_inputs
from llava.data.dataset_stats import count_media
from llava.inspect.batches import SampledExample
from llava.inspect.findings import Findings
from llava.inspect.run import InspectedRun
from llava.messages import list_names
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.visual import vision_module_of
from llava.train.data_order import choose_collator
from llava.train.flops import ModelFlops
from llava.train.parts import part_of
from llava.types import Example, MediaKind, VisualInput, holds_features

_OF_EACH_KIND = 2
"""Samples of each kind that passes are made with: two, so that each can be shown what the other shows."""
_MOST_FAST = 3e12
"""Operations of a backward pass up to which ``--fast`` makes it: some ten seconds of two cores."""
_ABOVE_CHANCE = 0.5
"""How much more than that of a uniform guess the loss of text may be before the tokenizer is taken for another's."""
_NAMED = 6
_TRIED = 8
_TEXT_TOKENS = 2048


@dataclass
class PartGradient:
    """Gradients of one part after a backward pass.

    Attributes:
        part: as ``--mm_tunable_parts`` spells it.
        tensors: that train.
        norm: of all of its gradient.
        without: names of parameters that got none.
        zero: names of those that got exact zeros.
    """

    part: str
    tensors: int = 0
    squares: float = 0.0
    without: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)

    @property
    def norm(self) -> float:
        return math.sqrt(self.squares)


@dataclass(frozen=True)
class Probe:
    """How far the loss moves where one stream is another one.

    Attributes:
        kind: image or video.
        stream: fast, slow, or all of an image or clip.
        change: what was done to it.
        loss: of these samples, with the change.
        moved: the most that the log-probability of a learned token has moved.
    """

    kind: MediaKind
    stream: str
    change: str
    loss: float
    moved: float


@dataclass
class Passes:
    """What the passes have shown; None and empty where one was not made.

    Attributes:
        text_loss: of the samples' text without its media.
        chance: the loss of a uniform guess.
        loss: of the samples as they are.
        seen_loss: of those with media.
        gradients: by part.
        probes: of the streams.
        skipped: why passes were left out.
    """

    text_loss: float | None = None
    chance: float = math.nan
    loss: float | None = None
    seen_loss: float | None = None
    gradients: list[PartGradient] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    skipped: str = ""


def make_passes(run: InspectedRun, sampled: Sequence[SampledExample], fast: bool, findings: Findings) -> Passes:
    """Run the model on some of the sampled examples; what is wrong with it is found on the way."""
    loaded, documents = run.loaded, run.documents
    assert loaded is not None
    assert documents is not None
    model = loaded.model
    passes = Passes(chance=math.log(model.config.vocab_size))
    examples = choose_examples(run, sampled)
    if not examples or not any(label != IGNORE_INDEX for e in examples for label in e.labels[1:]):
        passes.skipped = "no sample has a label"
        return passes
    model.eval()
    operations = count_operations(run, examples)
    passes.text_loss = measure_text(run, [e.example for e in sampled] or examples)
    check_text(run, passes, findings)
    if fast and operations > _MOST_FAST:
        passes.skipped = f"--fast makes no passes of {operations / 1e12:.0f} * 10^12 operations"
        findings.note("inspection", f"{passes.skipped}: gradients and streams of media were not looked at")
        return passes
    examples = encode_once(model, examples)
    passes.loss, passes.gradients = measure_gradients(run, examples)
    check_gradients(run, passes, findings)
    seeing = [example for example in examples if example.media]
    if seeing:
        passes.seen_loss, passes.probes = probe_streams(run, seeing)
        check_streams(passes, findings)
    return passes


def choose_examples(run: InspectedRun, sampled: Sequence[SampledExample]) -> list[Example]:
    """Examples to make passes with: two of each kind of media, with other media of the same shapes, and one of text."""
    chosen: list[Example] = []
    kinds: tuple[MediaKind, ...] = ("image", "video")
    for kind in kinds:
        of_kind = [s.example for s in sampled if any(medium.kind == kind for medium in s.media)]
        if not of_kind:
            continue
        first, *others = of_kind
        # The other is to have as many tokens, so that each can take the place of the other's.
        others = [other for other in others if _is_other(other, first)] or _find_another(run, first, kind)
        chosen += [first, *others][:_OF_EACH_KIND]
    texts = [s.example for s in sampled if not s.media]
    chosen += texts[: 1 if chosen else _OF_EACH_KIND]
    return list({id(example): example for example in chosen}.values())


def _find_another(run: InspectedRun, example: Example, kind: MediaKind) -> list[Example]:
    """Another example with media like those of one, of a kind; none if a few that are tried have none."""
    documents = run.documents
    assert documents is not None
    having = count_media(documents.records)[0 if kind == "image" else 1].nonzero()[0]  # (samples,)
    for i in having[:: max(len(having) // _TRIED, 1)][:_TRIED].tolist():
        if documents.records[i].id != example.id:
            other = documents[i]
            if isinstance(other, Example) and _is_other(other, example):
                return [other]
    return []


def _is_other(a: Example, b: Example) -> bool:
    """Whether two examples have media of the same shapes that are not the same."""
    return [m.frames.shape for m in a.media] == [m.frames.shape for m in b.media] and not all(
        bool(torch.equal(x.frames, y.frames)) for x, y in zip(a.media, b.media, strict=True)
    )


def count_operations(run: InspectedRun, examples: Sequence[Example]) -> float:
    """Floating point operations of a forward and a backward pass over some examples."""
    assert run.loaded is not None
    media = [medium for example in examples for medium in example.media]
    batch = {"images": [medium.frames for medium in media], "modalities": [medium.kind for medium in media]}
    tokens = sum(len(example.input_ids) for example in examples)
    targets = sum(label != IGNORE_INDEX for example in examples for label in example.labels[1:])
    return ModelFlops(run.loaded.model).count(batch if media else {}, tokens, targets)


def encode_once(model: LlavaMetaForCausalLM, examples: Sequence[Example]) -> list[Example]:
    """The examples with features of a frozen tower in place of pixels, so that it runs once for all passes."""
    tower = model.get_vision_tower()
    if tower is None or tower.trainable:
        return list(examples)

    def encode(medium: VisualInput) -> VisualInput:
        if holds_features(medium.frames):
            return medium
        with torch.no_grad():
            features = tower(medium.frames.to(model.device))  # (frames, patches, tower width)
        return replace(medium, frames=features.unsqueeze(1))

    return [replace(example, media=[encode(medium) for medium in example.media]) for example in examples]


# Text alone: does the language model know the tokens?


def measure_text(run: InspectedRun, examples: Sequence[Example]) -> float | None:
    """The loss of the examples' text, their media and coordinates left out; None without any."""
    assert run.loaded is not None
    model, vision = run.loaded.model, run.loaded.vision
    visual = set() if vision is None else set(vision.token_ids.values())
    rows: list[Tensor] = []
    left = _TEXT_TOKENS
    for example in examples:
        # Prompts count too: whether the model knows the tokens shows in any text.
        text = [] if example.coordinates else [i for i in example.input_ids if i not in visual][:left]
        left -= len(text)
        if len(text) > 1:
            rows.append(torch.tensor(text))
    if not rows:
        return None
    ids = pad_sequence(rows, batch_first=True)  # (rows, longest)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    with torch.no_grad():
        output: Any = model(input_ids=ids, attention_mask=mask, labels=labels, return_logits=False)
    return float(output.loss)


def check_text(run: InspectedRun, passes: Passes, findings: Findings) -> None:
    """Find a language model that gives text less than a blind guess would: its tokenizer is another one's."""
    loss, chance = passes.text_loss, passes.chance
    if loss is None:
        return
    if not math.isfinite(loss):
        findings.error("bad_numbers", f"the loss of the text alone is {loss}: the model's weights give no numbers")
    elif loss > chance + _ABOVE_CHANCE:
        findings.error(
            "tokenizer",
            f"the model finds the text of the data less probable than a blind guess would (loss {loss:.2f}, and "
            f"ln({round(math.exp(chance)):,}) is {chance:.2f}): the tokenizer in {run.model_args.model_name_or_path!r} "
            "is another model's; put the one that the model was trained with into its folder",
        )


# Gradients.


def measure_gradients(run: InspectedRun, examples: Sequence[Example]) -> tuple[float, list[PartGradient]]:
    """The loss of a training step, and the gradients of each part; the model is left as it was."""
    assert run.loaded is not None
    assert run.data is not None
    model = run.loaded.model
    collate = choose_collator(run.data["data_collator"], run.dataset, run.training_args)
    inputs = model_inputs(collate(list(examples)))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            output: Any = model(**inputs, return_logits=False)
            output.loss.backward()
        parts: dict[str, PartGradient] = {}
        for name, parameter in trained.items():
            gradient = parts.setdefault(part_of(name), PartGradient(part_of(name)))
            gradient.tensors += 1
            if parameter.grad is None:
                gradient.without.append(name)
                continue
            square = float(parameter.grad.float().square().sum())
            gradient.squares += square
            if square == 0:
                gradient.zero.append(name)
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()
    return float(output.loss.detach()), list(parts.values())


def check_gradients(run: InspectedRun, passes: Passes, findings: Findings) -> None:
    """Find a loss or gradients that are no numbers, and parameters that never learn."""
    numbers = {"the loss of the first samples": passes.loss}
    numbers |= {f"the norm of {gradient.part}'s gradient": gradient.norm for gradient in passes.gradients}
    for name, value in numbers.items():
        if value is not None and not math.isfinite(value):
            findings.error("bad_numbers", f"{name} is {value}: training would stop at its first step")
    documents = run.documents
    assert documents is not None
    images, videos = (bool(of_kind.any()) for of_kind in count_media(documents.records))
    check_zeros(run, passes, findings)
    for gradient in passes.gradients:
        if not gradient.without:
            continue
        found = (
            f"{len(gradient.without)} of {gradient.tensors} tensors of {gradient.part} train and get no gradient: "
            f"{list_names(gradient.without, _NAMED)}"
        )
        absent = " and ".join(name for name, there in (("images", images), ("videos", videos)) if not there)
        of_experts = all("expert" in name for name in gradient.without)
        if of_experts:
            findings.warn("no_gradient", f"{found}; experts that no token of these samples was sent to")
        elif absent and all(vision_module_of(name) for name in gradient.without):
            findings.warn("no_gradient", f"{found}; they may be for {absent}, of which the data have none")
        else:
            findings.error(
                "no_gradient",
                f"{found}: they stay as they are, and several ranks would wait for them for ever; use them in the "
                "model's forward, or freeze them",
            )


def check_zeros(run: InspectedRun, passes: Passes, findings: Findings) -> None:
    """Find modules of a vision part whose every gradient is exactly zero: nothing that they compute is used."""
    assert run.loaded is not None
    zero = {name for gradient in passes.gradients for name in (*gradient.zero, *gradient.without)}
    silent = {name for gradient in passes.gradients for name in gradient.zero}
    modules: dict[str, list[str]] = {}
    for name, parameter in run.loaded.model.named_parameters():
        below = name.partition(f".{vision_module_of(name)}.")[2].split(".")
        if parameter.requires_grad and len(below) > 2:
            modules.setdefault(f"{vision_module_of(name)}.{below[0]}", []).append(name)
    for module, names in modules.items():
        if zero.issuperset(names) and not silent.isdisjoint(names):
            findings.warn(
                "no_gradient",
                f"all {len(names)} tensors of {module} get exact zeros as gradients: nothing that it computes reaches "
                "the loss, unless it is multiplied by something that begins at zero",
            )


# Streams.


def probe_streams(run: InspectedRun, examples: Sequence[Example]) -> tuple[float, list[Probe]]:
    """The loss of examples with media, and what becomes of it where their streams are zeros or another sample's."""
    assert run.loaded is not None
    assert run.data is not None
    model, vision = run.loaded.model, run.loaded.vision
    assert vision is not None
    batch = run.data["data_collator"](list(examples))
    inputs = model_inputs(batch)
    media = [medium for example in examples for medium in example.media]
    with torch.no_grad():
        features = _encode(model, inputs)
        before, reference = _score(model, inputs, features)
    probes = []
    for kind, stream, places in _find_streams(run, media, features):
        for change, edited in _edit(features, places):
            with torch.no_grad():
                loss, scores = _score(model, inputs, edited)
            moved = float((scores - reference).abs().max())
            probes.append(Probe(kind, stream, change, loss, moved))
    return before, probes


Places = dict[int, slice]
"""By the number of an image or clip, the tokens of its stream."""


def _find_streams(
    run: InspectedRun, media: Sequence[VisualInput], features: Sequence[Tensor]
) -> Iterator[tuple[MediaKind, str, Places]]:
    """Each stream of each kind: fast and slow of clips that have both, and all of an image or clip."""
    assert run.loaded is not None
    vision = run.loaded.vision
    assert vision is not None
    kinds: tuple[MediaKind, ...] = ("image", "video")
    for kind in kinds:
        numbers = [i for i, medium in enumerate(media) if medium.kind == kind]
        if not numbers:
            continue
        spans = {
            i: [s.length for s in vision.layout.spans(kind, len(media[i].frames), media[i].original_size)]
            for i in numbers
        }
        if all(len(lengths) == 2 for lengths in spans.values()):
            yield kind, "fast", {i: slice(0, lengths[0]) for i, lengths in spans.items()}
            yield kind, "slow", {i: slice(lengths[0], None) for i, lengths in spans.items()}
        yield kind, f"the whole {kind}", {i: slice(0, len(features[i])) for i in numbers}


def _edit(features: Sequence[Tensor], places: Places) -> Iterator[tuple[str, list[Tensor]]]:
    """The features with a stream changed, in each way that there is."""
    zeros = list(features)
    for i, place in places.items():
        zeros[i] = features[i].clone()
        zeros[i][place] = 0
    yield "zeros", zeros
    swapped = list(features)
    numbers = list(places)
    changed = False
    for i, other in zip(numbers, [*numbers[1:], *numbers[:1]], strict=True):
        theirs = features[other][places[other]]
        if i != other and theirs.shape == features[i][places[i]].shape:
            swapped[i] = features[i].clone()
            swapped[i][places[i]] = theirs
            changed = True
    if changed:
        yield "another sample's", swapped


def _encode(model: LlavaMetaForCausalLM, inputs: dict[str, Any]) -> list[Tensor]:
    """The features of a batch's media, as the model makes them."""
    decoder = model.get_model()
    tables = decoder.coordinate_embeddings()
    return list(decoder.encode_media(inputs["images"], inputs["modalities"], inputs["image_sizes"], tables))


def _score(model: LlavaMetaForCausalLM, inputs: dict[str, Any], features: list[Tensor]) -> tuple[float, Tensor]:
    """The loss of a batch whose media have these features, and the log-probability of each label, (labels,)."""
    labels = inputs["labels"]
    learned = (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero().flatten()  # positions that predict something
    with _giving(model, lambda *_, **__: features):
        output: Any = model(**{k: v for k, v in inputs.items() if k != "labels"}, logits_to_keep=learned)
    targets = model.target_ids(inputs["input_ids"], labels, inputs.get("variables"))[:, learned + 1]
    is_label = targets != IGNORE_INDEX  # (batch, positions)
    scores = output.logits.float().log_softmax(-1)  # (batch, positions, vocabulary)
    chosen = scores.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)[is_label]  # (labels,)
    return float(-chosen.mean()), chosen


@contextlib.contextmanager
def _giving(model: LlavaMetaForCausalLM, encode: Callable[..., list[Tensor]]) -> Iterator[None]:
    """Within it a model's media have the features that a function gives."""
    decoder = model.get_model()
    object.__setattr__(decoder, "encode_media", encode)  # Hides the method of the class.
    try:
        yield
    finally:
        object.__delattr__(decoder, "encode_media")


def check_streams(passes: Passes, findings: Findings) -> None:
    """Find streams that change nothing."""
    dead: dict[tuple[str, str], list[str]] = {}
    for probe in passes.probes:
        # Exactly zero: what is not connected gives the very same numbers.
        if probe.moved == 0:
            dead.setdefault((probe.kind, probe.stream), []).append(probe.change)
    if (kinds := {p.kind for p in passes.probes} - {p.kind for p in passes.probes if p.change != "zeros"}) and not dead:
        findings.note(
            "inspection",
            f"no two samples with other media of the same length were found ({', '.join(sorted(kinds))}): whether "
            "features say anything of the pixels was not looked at",
        )
    for (kind, stream), changes in dead.items():
        name = stream if stream.startswith("the whole") else f"the {stream} stream of a {kind}"
        what = " and ".join(f"to {change}" for change in changes)
        findings.error(
            "stream_disconnected",
            f"the loss does not depend on {name}: changing it {what} moves no token's probability at all. It is "
            "not connected: look at the resampler, the attention mask and where the text stands (docs/inspect.md)",
        )
