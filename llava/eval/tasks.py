"""The tasks: how each asks, what it needs to know to score an answer, and how it does."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from llava.config import GroundingConfig
from llava.draw import Place
from llava.eval.metrics import (
    CaptionScorer,
    bootstrap,
    find_tube,
    score_caption,
    score_elc,
    score_rec,
    score_stvg,
    score_svg,
    score_tvg,
    split_words,
)
from llava.eval.store import EvalSample, Prediction, Reference
from llava.geometry import Box, TimeSpan, Tube
from llava.grounding.syntax import BOX_AXES, LOCATIONS, box_text, parse_places, span_text
from llava.registry import Registry
from llava.types import Coordinates

TASKS: Registry[Task] = Registry("task")

EXPRESSION, SPAN, BOX = "{expression}", "{span}", "{box}"
FIELDS = (EXPRESSION, SPAN, BOX)
"""What a template may hold."""
_FIELD = re.compile(r"(\{\w*\})")

Scores = dict[str, float]


class Task(ABC):
    """What is asked and how answers are scored.

    Attributes:
        layout: what annotation files of the task hold, see ``read_annotations``.
        template: the question by default, with ``FIELDS``.
        main_score: by which the best and the worst answers are told.
        fields: those of ``FIELDS`` that a template may hold.
        needs: what a reference must have: "box" (exactly one), "boxes", "span", "caption".
        has_captions: whether the words of answers are scored.
    """

    layout: ClassVar[str]
    template: ClassVar[str]
    main_score: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    fields: ClassVar[tuple[str, ...]] = (EXPRESSION,)
    has_captions: ClassVar[bool] = False

    @abstractmethod
    def score(self, prediction: Prediction, reference: Reference) -> Scores:
        """The scores of one answer; those of its words aside."""

    def reference_places(self, reference: Reference) -> list[Place]:
        """What is to be drawn of a reference."""
        return [*reference.boxes, *([reference.span] if reference.span else [])]

    def answered_places(self, prediction: Prediction, reference: Reference) -> list[Place]:
        """What is to be drawn of an answer: what of it is scored."""
        # The first of each: others are not scored.
        return [*prediction.boxes[:1], *prediction.spans[:1]]

    def check_reference(self, sample: EvalSample) -> None:
        """A ValueError that names the sample if its reference lacks what the task is about."""
        found = {
            "box": len(sample.reference.boxes) == 1,
            "boxes": bool(sample.reference.boxes),
            "span": sample.reference.span is not None,
            "caption": bool(sample.reference.captions),
        }
        # A sample whose file is missing may lack the rest for that reason.
        missing = [what for what in self.needs if not found[what]]
        if missing and sample.fault is None:
            has = f"{len(sample.reference.boxes)} boxes, {'a' if found['span'] else 'no'} span and " + (
                f"{len(sample.reference.captions)} captions"
            )
            raise ValueError(f"{sample}: its reference needs {' and '.join(self.needs)}, but it has {has}")

    def check_template(self, template: str) -> None:
        """A ValueError for a template with fields that the task does not have."""
        unknown = [field for field in _FIELD.findall(template) if field not in self.fields]
        if unknown:
            raise ValueError(f"--prompt has {unknown[0]}; known for this task: {', '.join(self.fields)}")

    def ask(self, sample: EvalSample, template: str | None = None) -> tuple[str, Coordinates]:
        """The question, and the coordinates of its placeholders.

        A sample's own question is asked as it stands, unless a template takes its place.
        """
        if template is None and sample.question is not None:
            return sample.question, sample.coordinates
        # What is asked is written anew, field by field; numbers are gathered in the same order.
        template = self.template if template is None else template
        text: list[str] = []
        numbers: dict[str, list[float]] = {name: [] for name in LOCATIONS.values()}
        # The pattern has a group: split keeps the fields between the words.
        for piece in _FIELD.split(template):
            words, coordinates = _fill(piece, sample)
            text.append(words)
            for name, more in coordinates.to_variables().items():
                numbers[name] += more
        return "".join(text).strip(), Coordinates.from_variables(numbers)


def _fill(piece: str, sample: EvalSample) -> tuple[str, Coordinates]:
    """A piece of a template: a field's words and coordinates, or the piece itself."""
    reference = sample.reference
    if piece == EXPRESSION:
        return sample.expression, sample.coordinates
    if piece == SPAN:
        assert reference.span is not None
        # As placeholders, not as bins: the model gets the exact numbers of the reference.
        return span_text("INPUT"), Coordinates(temporal_input_locations=tuple(reference.span))
    if piece == BOX:
        numbers = list(zip(BOX_AXES, reference.boxes[0], strict=True))
        return box_text("INPUT"), Coordinates(
            spatial_width_input_locations=tuple(number for axis, number in numbers if axis == "WIDTH"),
            spatial_height_input_locations=tuple(number for axis, number in numbers if axis == "HEIGHT"),
        )
    return piece, Coordinates()


class ReferringExpression(Task):
    """REC: where in the image is what an expression refers to?"""

    layout, needs = "expressions", ("box",)
    template = "Where is {expression}?"
    main_score = "mIoU"

    def score(self, prediction: Prediction, reference: Reference) -> Scores:
        return score_rec(prediction.boxes, reference.boxes[0])


class TemporalGrounding(Task):
    """TVG: when in the video does it happen?"""

    layout, needs = "moments", ("span",)
    template = "When does this happen: {expression}"
    main_score = "mIoU"

    def score(self, prediction: Prediction, reference: Reference) -> Scores:
        assert reference.span is not None
        return score_tvg(prediction.spans, reference.span)


class TubeTask(Task):
    """A task whose answer, and reference, is a box that moves over a stretch of time."""

    layout = "tubes"
    needs: ClassVar[tuple[str, ...]] = ("span", "boxes")
    main_score = "vIoU"
    gives_span: ClassVar[bool] = False
    """Whether the question tells the time, so that all boxes of an answer count, and no span of it."""

    def answered_tube(self, prediction: Prediction, reference: Reference) -> Tube | None:
        """The tube that an answer tells, see ``find_tube``."""
        # The text says in which order boxes and spans come, the prediction which numbers they have.
        order = parse_places(prediction.text, GroundingConfig())
        if len(order) != len(prediction.boxes) + len(prediction.spans):
            return None  # The model has no coordinates: what looks like one is a word.
        boxes, spans = iter(prediction.boxes), iter(prediction.spans)
        places = [next(boxes) if isinstance(place, Box) else next(spans) for place in order]
        # For SVG the question has told the time, and any span of the answer is passed over.
        return find_tube(places, reference.span if self.gives_span else None)

    def reference_places(self, reference: Reference) -> list[Place]:
        return [reference_tube(reference)]

    def answered_places(self, prediction: Prediction, reference: Reference) -> list[Place]:
        tube = self.answered_tube(prediction, reference)
        return [*prediction.boxes, *prediction.spans[:1]] if tube is None else [tube]


class SpatioTemporalGrounding(TubeTask):
    """STVG: when in the video, and where all that time?"""

    template = "When and where does this happen: {expression}"

    def score(self, prediction: Prediction, reference: Reference) -> Scores:
        return score_stvg(self.answered_tube(prediction, reference), reference_tube(reference))


class SpatialGrounding(TubeTask):
    """SVG: where, over a time that the question gives?"""

    template = "During {span}, where does this happen: {expression}"
    fields = (EXPRESSION, SPAN)
    gives_span = True

    def score(self, prediction: Prediction, reference: Reference) -> Scores:
        return score_svg(self.answered_tube(prediction, reference), reference_tube(reference))


class EventCaptioning(TubeTask):
    """ELC: what happens to the thing in a box, when and where?"""

    needs = ("span", "boxes", "caption")
    template = "When, where and what happens to {box}?"
    fields = FIELDS
    has_captions = True

    def score(self, prediction: Prediction, reference: Reference) -> Scores:
        words = split_words(prediction.text)
        return score_elc(self.answered_tube(prediction, reference), words, reference_tube(reference))


class Captioning(Task):
    """Captions: what does the image or the video show?"""

    layout, needs = "captions", ("caption",)
    template = ""
    main_score = "CIDEr"
    has_captions = True

    def score(self, prediction: Prediction, reference: Reference) -> Scores:
        return score_caption(split_words(prediction.text))


for _name, _task in {
    "rec": ReferringExpression(),
    "tvg": TemporalGrounding(),
    "stvg": SpatioTemporalGrounding(),
    "svg": SpatialGrounding(),
    "elc": EventCaptioning(),
    "caption": Captioning(),
}.items():
    TASKS.register(_name)(_task)


def reference_tube(reference: Reference) -> Tube:
    assert reference.span is not None
    return Tube(reference.span, reference.boxes)


_UNKNOWN = Reference((Box(0, 0, 1, 1),), TimeSpan(0, 1))
"""Of a sample that could not be asked: its answer is empty, which scores 0 against any."""


@dataclass(frozen=True)
class Scored:
    """The scores of each sample, and of all with ``{"value", "low", "high"}`` each."""

    rows: list[Scores]
    report: dict[str, dict[str, float]]


def score_all(
    task: Task,
    predictions: Sequence[Prediction],
    samples: Sequence[EvalSample],
    num_resamples: int = 1000,
    seed: int = 0,
) -> Scored:
    """Score the answers of a task; an empty prediction is unparsable and counts 0."""
    references = [sample.reference if sample.fault is None else _UNKNOWN for sample in samples]
    # Captions are scored as a corpus, below: BLEU and CIDEr are no means over samples.
    rows = [task.score(*pair) for pair in zip(predictions, references, strict=True)]
    report = bootstrap(rows, seed, num_resamples)
    if task.has_captions:
        scorer = CaptionScorer.from_texts(
            [prediction.text for prediction in predictions], [sample.reference.captions for sample in samples]
        )
        # The same seed draws the same resamples, so that intervals can be compared.
        report |= bootstrap(scorer, seed, num_resamples)
        # Both kinds in one row: a picture shows where an answer is, and what it says.
        rows = [row | more for row, more in zip(rows, scorer.rows, strict=True)]
    return Scored(rows, report)
