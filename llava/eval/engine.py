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

from llava.data.feature_cache.cache import FeatureCacheError
from llava.data.media import load_media
from llava.data.media_files import DEFAULT_LIMITS, MediaError
from llava.eval.store import BadReason, EvalSample, Prediction, Row
from llava.eval.tasks import TASKS
from llava.io import append_json_lines
from llava.model.loading import choose_device
from llava.registry import import_plugins
from llava.serve.generate import Answer, Captioner, PromptTooLongError, Request
from llava.types import ERROR, BadSample, Coordinates, VisualInput

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from multiprocessing.queues import Queue

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
    feature_cache: str | None = None
    feature_cache_strict: bool = False

    def __call__(self, device: str) -> Answerer:
        return Captioner.from_checkpoint(
            self.model_path, self.vision_tower, device, self.model_base, self.bits, self.feature_cache,
            self.feature_cache_strict,
        )  # fmt: skip


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
    options: dict[str, object] = field(default_factory=dict)
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
                # By the place of the batch: whichever process answers it, and whatever was answered before.
                torch.manual_seed(asking.seed + batch.start)
            rows = _answer_batch([samples[index] for index in batch], answerer, asking)
            append_json_lines(file, [{"index": index, **row} for index, row in zip(batch, rows, strict=True)])
            on_batch(len(batch))


def _answer_batch(samples: Sequence[EvalSample], answerer: Answerer, asking: Asking) -> list[Row]:
    """The rows of a batch, in order."""
    # A row for every sample, asked or not, so that scores count all of them.
    rows: list[Row] = []
    requests: dict[int, Request] = {}
    outcomes: dict[int, Answer | BadReason] = {}
    for place, sample in enumerate(samples):
        # A faulty sample may lack what a template wants: it keeps its words, and its row says what is wrong.
        question, coordinates = sample.expression, sample.coordinates
        if sample.fault is None:
            question, coordinates = TASKS.get(asking.task).ask(sample, asking.template)
        rows.append(
            {
                "id": sample.id,
                "source": sample.source,
                "media": [media.path for media in sample.media],
                "question": question,
                "reference": sample.reference.to_row(),
            }
        )
        try:
            requests[place] = _build_request(sample, question, coordinates, answerer, asking)
        except FeatureCacheError:
            raise  # No sample is to blame.
        except ValueError as error:
            outcomes[place] = _tell_reason(error, sample, asking)
    outcomes |= _ask_model(requests, samples, answerer, asking)
    for place, outcome in outcomes.items():
        if isinstance(outcome, Answer):
            rows[place] |= Prediction(outcome.text, tuple(outcome.boxes), tuple(outcome.spans)).to_row()
        else:
            rows[place] |= Prediction("").to_row()
            rows[place]["bad"] = outcome
    return rows


def _build_request(
    sample: EvalSample, question: str, coordinates: Coordinates, answerer: Answerer, asking: Asking
) -> Request:
    """A sample with its media decoded; a ValueError if it cannot be used."""
    if sample.fault is not None:
        raise ValueError(sample.fault)
    media: list[VisualInput] = []
    for file in sample.media:
        assert answerer.vision is not None
        try:
            features = getattr(answerer, "features", None)
            limits = (asking.decode_timeout, DEFAULT_LIMITS)
            media.append(load_media(file, answerer.vision, sample.split, *limits, features))
        except MediaError as error:
            raise MediaError(str(error), file.path) from error
    return Request(media, question, sample.system, coordinates)


def _ask_model(
    requests: dict[int, Request], samples: Sequence[EvalSample], answerer: Answerer, asking: Asking
) -> dict[int, Answer | BadReason]:
    """The answer to each request, by the place of its sample in the batch, or why there is none."""
    if not requests:
        return {}
    # All of a batch in one call: one padding, and so the same answers every time.
    together = list(requests.values())
    try:
        answers = answerer.answer(together, len(together), sub_bin=asking.sub_bin, **asking.options)
    except PromptTooLongError as error:
        # Stops only itself, whatever bad samples do: the run fails when all others are answered.
        return {
            place: found[0] if found else BadReason(file="", reason=error.reasons[index])
            for index, (place, found) in enumerate(zip(requests, error.answers, strict=True))
        }
    except ValueError as error:
        if len(requests) == 1:
            return {place: _tell_reason(error, samples[place], asking) for place in requests}
        # One by one, to tell whose fault it is.
        outcomes: dict[int, Answer | BadReason] = {}
        for place, request in requests.items():
            outcomes |= _ask_model({place: request}, samples, answerer, asking)
        return outcomes
    return dict(zip(requests, answers, strict=True))


def _tell_reason(error: ValueError, sample: EvalSample, asking: Asking) -> BadReason:
    """Why a sample cannot be used; where bad samples are an error, it is raised with the sample's name."""
    # The file has a field of its own in the row; the reason does not repeat it.
    file = error.path if isinstance(error, MediaError) else ""
    reason = BadReason(file=file, reason=" ".join(str(error).removeprefix(f"{file}: ").splitlines()))
    if asking.on_bad_sample == ERROR:
        bad = BadSample(sample.id, sample.source, **reason)
        raise ValueError(f"{bad}; leave such samples out of the answers (they count 0) with --on_bad_sample skip")
    return reason


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


class Work(Protocol):
    """What ``run_shares`` gives to a process: a ``Share``, or something that is done as one."""

    @property
    def plugins(self) -> Sequence[str]: ...

    @property
    def num_threads(self) -> int: ...

    def answer(self, on_batch: Callable[[int], None]) -> None:
        """Do it, and tell how many samples are done since the last call."""
        ...


def run_shares(shares: Sequence[Work], on_batch: Callable[[int], None]) -> None:
    """Do all shares: a single one here, several in processes of their own.

    Args:
        on_batch: is called, in this process, with the number of samples that were answered.

    Raises:
        ValueError: the first error of a share, or a process has died. The others are ended; what they wrote stays.
    """
    if len(shares) == 1:
        shares[0].answer(on_batch)
        return
    # CUDA cannot be used in a process that was forked from one that used it.
    context = multiprocessing.get_context("spawn")
    messages: Queue[int | str | None] = context.Queue()
    processes = [context.Process(target=_work, args=(share, messages, os.getpid()), daemon=True) for share in shares]
    try:
        for process in processes:
            process.start()
        _follow(processes, messages, on_batch)
    finally:
        for process in processes:
            # Also after an error or ^C here: a share that goes on would hold its GPU.
            if process.is_alive():
                process.terminate()
        for process in processes:
            # It was started: join of a process that never was is an error.
            if process.pid is not None:
                process.join()


def _follow(
    processes: Sequence[BaseProcess], messages: Queue[int | str | None], on_batch: Callable[[int], None]
) -> None:
    """Hand on what the processes say until all have ended."""
    finished = 0
    while finished < len(processes):
        # Who died is looked up before the queue is: what a process said before its end is read first.
        dead = [process.exitcode for process in processes if process.exitcode]
        try:
            message = messages.get(timeout=_PATIENCE)
        except queue.Empty:
            if dead:
                raise ValueError(_describe_end(dead[0])) from None
            continue
        if isinstance(message, str):
            raise ValueError(message)
        # None is the last word of a process, a number what it has done since.
        finished += message is None
        on_batch(message or 0)


def _describe_end(code: int) -> str:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}, see its traceback above"
    hint = " (for want of memory, it may be)" if -code == getattr(signal, "SIGKILL", None) else ""
    return f"a process of --num_processes ended with {how}{hint}; the same command goes on where it stopped"


def _work(share: Work, messages: Queue[int | str | None], parent: int) -> None:
    """A process of its own: sends numbers of samples, at last None, or the text of an error."""
    # Control-C goes to all processes of a terminal: the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if share.num_threads:
        torch.set_num_threads(share.num_threads)

    def on_batch(count: int) -> None:
        messages.put(count)
        if os.getppid() != parent:  # Nobody follows any more, and another run may begin.
            os._exit(1)

    try:
        # A spawned process begins with nothing registered.
        import_plugins(share.plugins)
        share.answer(on_batch)
        messages.put(None)
    except ValueError as error:
        messages.put(str(error))
