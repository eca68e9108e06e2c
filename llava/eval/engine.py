"""From samples to rows of answers, batch by batch."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llava.data.media import load_media
from llava.data.media_files import MediaError
from llava.eval.store import EvalSample, Prediction, Row, write_rows
from llava.eval.tasks import TASKS
from llava.model.loading import choose_device
from llava.serve.generate import Answer, Captioner, PromptTooLongError, Request
from llava.types import ERROR, BadSample, Coordinates, VisualInput

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


# Several processes that share the samples of an evaluation.

_PATIENCE = 0.5
"""Seconds between two looks at whether all processes are alive."""

AnswererSource = Callable[[str], Answerer]
"""Makes what is asked, on a device; it is pickled on its way to another process."""


@dataclass(frozen=True)
class Share:
    """What one process has to do: answer batches on a device and append to a file.

    ``num_threads`` are for arithmetic on the CPU; 0 leaves them as they are.
    """

    source: AnswererSource
    samples: Sequence[EvalSample]
    batches: Sequence[range]
    asking: Asking
    device: str
    path: Path
    plugins: Sequence[str] = ()
    num_threads: int = 0

    def answer(self, on_batch: Callable[[int], None]) -> None:
        answer_batches(self.source(self.device), self.samples, self.batches, self.asking, self.path, on_batch)


def choose_devices(device: str | None, num_processes: int) -> list[str]:
    """A device for each process: the CPU, or a GPU of its own.

    Raises:
        ValueError: there are fewer GPUs than processes, or one was named for several.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if num_processes == 1 or device == "cpu":
        choose_device(device)
        return [device] * num_processes
    if device != "cuda":
        raise ValueError(
            f"--device {device} with --num_processes {num_processes}: give --device cuda for a GPU each, or one process"
        )
    if num_processes > torch.cuda.device_count():
        raise ValueError(
            f"--num_processes is {num_processes}, but there are {torch.cuda.device_count()} GPUs; lower it"
        )
    return [f"cuda:{number}" for number in range(num_processes)]


def run_shares(shares: Sequence[Share], on_batch: Callable[[int], None]) -> None:
    """Do all shares: a single one here, several in processes of their own.

    Args:
        on_batch: is called, in this process, with the number of samples that were answered.

    Raises:
        ValueError: the first error of a share, or a process has died. The others are ended; what they wrote stays.
    """
    if len(shares) == 1:
        shares[0].answer(on_batch)
        return
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    processes = [context.Process(target=_work, args=(share, messages, os.getpid()), daemon=True) for share in shares]
    try:
        for process in processes:
            process.start()
        _follow(processes, messages, on_batch)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()


def _follow(processes: Sequence[Any], messages: Any, on_batch: Callable[[int], None]) -> None:
    """Hand on what the processes say until all have ended."""
    finished = 0
    while finished < len(processes):
        # Who died is looked up before the queue is: what a process said before its end is read first.
        dead = [process for process in processes if process.exitcode not in (None, 0)]
        try:
            message = messages.get(timeout=_PATIENCE)
        except queue.Empty:
            if dead:
                raise ValueError(_describe_end(dead[0])) from None
            continue
        if isinstance(message, str):
            raise ValueError(message)
        finished += message is None
        on_batch(message or 0)


def _describe_end(process: Any) -> str:
    code = process.exitcode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}, see its traceback above"
    hint = " (for want of memory, it may be)" if -code == getattr(signal, "SIGKILL", None) else ""
    return f"a process of --num_processes ended with {how}{hint}; the same command goes on where it stopped"


def _work(share: Share, messages: Any, parent: int) -> None:
    """A process of its own: sends numbers of samples, at last None, or the text of an error."""
    from llava.registry import import_plugins

    # Control-C goes to all processes of a terminal: the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if share.num_threads:
        torch.set_num_threads(share.num_threads)

    def on_batch(count: int) -> None:
        messages.put(count)
        if os.getppid() != parent:  # Nobody follows any more, and another run may begin.
            os._exit(1)

    try:
        import_plugins(share.plugins)
        share.answer(on_batch)
        messages.put(None)
    except ValueError as error:
        messages.put(str(error))
