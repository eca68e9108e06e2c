"""From samples to rows of answers, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llava.data.bad_samples import ERROR
from llava.data.files import MediaError
from llava.data.media import load_media
from llava.eval.samples import EvalSample, Prediction
from llava.eval.store import Row, write_rows
from llava.eval.tasks import TASKS
from llava.serve.answer import Answer
from llava.serve.generate import Captioner, PromptTooLongError
from llava.serve.requests import Request
from llava.types import BadSample, Coordinates, VisualInput

if TYPE_CHECKING:
    from llava.config import VisionConfig


class Answerer(Protocol):
    """What is asked: a ``Captioner``, or something that answers as one."""

    vision: VisionConfig | None

    def answer(
        self, requests: Sequence[Request], batch_size: int = 16, *, sub_bin: bool = False, **options: Any
    ) -> list[Answer]:
        """An answer to each request, in order."""
        ...


@dataclass(frozen=True)
class CaptionerSource:
    """Loads a checkpoint in the process that is to ask it; see ``Captioner.from_checkpoint``."""

    model_path: str
    vision_tower: str | None = None
    model_base: str | None = None
    bits: int = 16

    def __call__(self, device: str) -> Answerer:
        return Captioner.from_checkpoint(self.model_path, self.vision_tower, device, self.model_base, self.bits)


@dataclass(frozen=True)
class Asking:
    """How samples are asked.

    Attributes:
        task: its name.
        template: takes the place of the task's and of samples' own questions; None leaves both.
        batch_size: samples that are answered together.
        sub_bin: whether coordinates are told between bins.
        on_bad_sample: ``error`` or ``skip``.
        decode_timeout: seconds that decoding a video may take; 0 sets no limit.
        options: for ``answer``, such as ``max_new_tokens``: all that is in force.
        seed: of sampling; each batch begins with it, whichever process answers it.
    """

    task: str
    template: str | None = None
    batch_size: int = 16
    sub_bin: bool = False
    on_bad_sample: str = ERROR
    decode_timeout: float = 60.0
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


def find_batches(num_samples: int, batch_size: int, done: Container[int]) -> list[range]:
    """The batches that are still to answer.

    They are cut in one way, whatever is done already and however many processes share them, and one that is not
    wholly done is asked again as a whole: padding is the same, so that answers are, to the last bit.
    """
    batches = (range(start, min(start + batch_size, num_samples)) for start in range(0, num_samples, batch_size))
    return [batch for batch in batches if not all(index in done for index in batch)]


def answer_batches(
    answerer: Answerer,
    samples: Sequence[EvalSample],
    batches: Sequence[range],
    asking: Asking,
    path: Path,
    on_batch: Callable[[int], None],
) -> None:
    """Answer batches and append their rows to a file; each is on disk before the next begins.

    Args:
        on_batch: is called with the number of samples that were answered.

    Raises:
        ValueError: a sample cannot be used, and bad samples are an error; names it. Or the model cannot see.
    """
    if answerer.vision is None and any(sample.media for sample in samples):
        raise ValueError("the model was trained on text alone and cannot look at images and videos")
    with path.open("ab") as file:
        for batch in batches:
            if asking.options.get("do_sample"):
                torch.manual_seed(asking.seed + batch.start)
            answered = _answer([samples[index] for index in batch], answerer, asking)
            write_rows(file, [{"index": index, **row} for index, row in zip(batch, answered, strict=True)])
            on_batch(len(batch))


def _answer(samples: Sequence[EvalSample], answerer: Answerer, asking: Asking) -> list[Row]:
    """The rows of a batch, in order."""
    rows: list[Row] = [{} for _ in samples]
    requests: dict[int, Request] = {}
    for place, sample in enumerate(samples):
        question, coordinates = sample.expression, sample.coordinates
        if sample.fault is None:
            question, coordinates = TASKS.get(asking.task).ask(sample, asking.template)
        rows[place] = {
            "id": sample.id,
            "source": sample.source,
            "media": [media.path for media in sample.media],
            "question": question,
            "reference": sample.reference.to_json(),
        }
        try:
            requests[place] = _request(sample, question, coordinates, answerer, asking)
        except ValueError as error:
            rows[place] |= _bad(sample, error, asking)
    for place, answer in _ask_model(list(requests.values()), list(requests), samples, answerer, asking):
        rows[place] |= answer
    return rows


def _request(
    sample: EvalSample, question: str, coordinates: Coordinates, answerer: Answerer, asking: Asking
) -> Request:
    """A sample with its media decoded; a ValueError if it cannot be used."""
    if sample.fault is not None:
        raise ValueError(sample.fault)
    media: list[VisualInput] = []
    for medium in sample.media:
        assert answerer.vision is not None
        try:
            media.append(load_media(medium, answerer.vision, sample.split, asking.decode_timeout))
        except MediaError as error:
            raise MediaError(str(error), medium.path) from error
    return Request(media, question, sample.system, coordinates)


def _ask_model(
    requests: list[Request], places: list[int], samples: Sequence[EvalSample], answerer: Answerer, asking: Asking
) -> list[tuple[int, Row]]:
    """Answers with the places of their samples. A batch that fails is asked one by one, to tell whose fault it is."""
    if not requests:
        return []
    answers: list[Answer | ValueError]
    try:
        answers = [*answerer.answer(requests, len(requests), sub_bin=asking.sub_bin, **asking.options)]
    except PromptTooLongError as error:
        # Stops only itself, whatever bad samples do: the run fails when all others are answered.
        answers = [found[0] if found else ValueError(error.reasons[index]) for index, found in enumerate(error.answers)]
    except ValueError as error:
        if len(requests) == 1:
            return [(places[0], _bad(samples[places[0]], error, asking))]
        alone = zip(requests, places, strict=True)
        return [row for request, place in alone for row in _ask_model([request], [place], samples, answerer, asking)]
    return [
        (place, _without_answer(answer) if isinstance(answer, ValueError) else _answered(answer))
        for place, answer in zip(places, answers, strict=True)
    ]


def _answered(answer: Answer) -> Row:
    return Prediction(answer.text, tuple(answer.boxes), tuple(answer.spans)).to_json()


def _without_answer(error: ValueError) -> Row:
    """The row of a sample that cannot be used: an empty answer, the file whose fault it is if it is one's, and why."""
    file = error.path if isinstance(error, MediaError) else ""
    reason = " ".join(str(error).removeprefix(f"{file}: ").splitlines())
    return {**Prediction("").to_json(), "bad": {"file": file, "reason": reason}}


def _bad(sample: EvalSample, error: ValueError, asking: Asking) -> Row:
    """The row of a sample that cannot be used, whose answer is empty; or the error, where it is one."""
    row = _without_answer(error)
    if asking.on_bad_sample == ERROR:
        bad = BadSample(sample.id, sample.source, **row["bad"])
        raise ValueError(f"{bad}; leave such samples out of the answers (they count 0) with --on_bad_sample skip")
    return row
