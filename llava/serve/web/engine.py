"""One or two models behind a queue: requests that come together are answered together, and tokens stream out.

Models run in one thread. A request takes a place in the queue (``Engine.admit``), its media are decoded in the caller's
thread (``Engine.load``, ``Engine.prepare``), and ``Engine.submit`` puts it behind those that wait. Those that wait for
one model, and are to be decoded alike, become a batch. After every step of it each request gets the text that it has
not had yet; one that has ended, or that nobody waits for any more, leaves the batch computing for the others.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, set_seed

from llava.messages import explain_error, is_out_of_memory
from llava.serve.generate import Answer, Captioner, Prompt, Request
from llava.serve.web.uploads import Upload, Uploads
from llava.types import VisualInput

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled"]
P = ParamSpec("P")
T = TypeVar("T")

_UNFINISHED = "\ufffd"
"""What decoders write for a letter of which a token has only the first bytes."""


class BusyError(RuntimeError):
    """The queue is full."""


class UnknownModelError(ValueError):
    """There is no model of that name."""


@dataclass(frozen=True)
class QueueLimits:
    """The most that waits and that runs together; the fields are flags."""

    max_queue: int = 32
    """Most requests that wait or run; one more is told to come again later."""
    max_batch: int = 8
    """Most requests that are answered together."""
    max_new_tokens: int = 512
    """Longest answer that a request may ask for."""


@dataclass(frozen=True)
class Settings:
    """How an answer is decoded.

    Attributes:
        max_new_tokens: the longest answer; one that the context has no room for is shorter.
        temperature: 0 is greedy search, above it samples.
        top_p, top_k: sample from the likeliest tokens alone; 1 and 0 are all.
        repetition_penalty: as of transformers; 1 is none.
        seed: of sampling; such a request is not batched, so that the same one gives the same answer.
        stop: texts that end an answer, and are not part of it.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """Those that all of a batch have in common, for transformers' ``generate``."""
        options: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.repetition_penalty != 1:
            options["repetition_penalty"] = self.repetition_penalty
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return options


# What a request is told, in order: texts, then one end.


@dataclass(frozen=True)
class Delta:
    """Text that follows what was told before."""

    text: str


@dataclass(frozen=True)
class Done:
    """The end of an answer.

    Attributes:
        text: all of it, with numbers in the place of bins; what the deltas make together.
        answer: with boxes and spans.
        ids: of its tokens, the one that ended it left out.
        reason: "stop" at its own end or a stop text, "length" where it was cut.
        num_tokens: that were generated.
    """

    text: str
    answer: Answer
    ids: tuple[int, ...]
    reason: FinishReason
    num_tokens: int


@dataclass(frozen=True)
class Failed:
    """No answer: a line for people, and whether it is the request's fault."""

    message: str
    is_users: bool = False


Event = Delta | Done | Failed


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        model: the name of its model.
        prompt: with its media loaded.
        settings: with ``max_new_tokens`` that the context has room for.
        tell: called in the model's thread with each event; must not wait.
    """

    model: str
    captioner: Captioner
    prompt: Prompt
    settings: Settings
    tell: Callable[[Event], None]
    ids: list[int] = field(default_factory=list)
    is_over: bool = False
    _reason: FinishReason = "length"
    _told: str = ""
    _is_cancelled: bool = False

    def cancel(self) -> None:
        """Nobody waits any more: it ends with the step that is computed now."""
        self._is_cancelled = True

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled

    def may_join(self, other: Job, longest: int, room: int) -> bool:
        """Whether it can be in a batch with another, whose batch has such a prompt and such an answer at most."""
        mine, others = self.settings, other.settings
        same = ("temperature", "top_p", "top_k", "repetition_penalty")
        if self.model != other.model or any(getattr(mine, name) != getattr(others, name) for name in same):
            return False
        if mine.temperature > 0 and (mine.seed is not None or others.seed is not None):
            return False
        # A batch has the length of its longest prompt and its longest answer.
        longest, room = max(longest, len(self.prompt.ids)), max(room, mine.max_new_tokens)
        return longest + room <= self.captioner.context

    def take(self, token: int) -> None:
        """The next token that was generated."""
        if self.is_over:
            return
        if self._is_cancelled:
            self._end("cancelled")
        elif token in self.captioner.text_format.stop_token_ids:
            self.ids.append(token)
            self._end("stop")
        else:
            self.ids.append(token)
            text = str(self.captioner.read(self.prompt, self._settled()))
            if any(stop in text for stop in self.settings.stop):
                self._end("stop")
            elif len(self.ids) >= self.settings.max_new_tokens:
                self._end("length")
            else:
                # What may still become a stop text, or another letter, waits.
                held = max((len(stop) for stop in self.settings.stop), default=1) - 1
                self._tell_text(text.rstrip(_UNFINISHED)[: len(text) - held])

    def _settled(self) -> list[int]:
        """The tokens whose text is final: a box or a span is told when it is closed."""
        if self.captioner.syntax is None:
            return self.ids
        still_open = self.captioner.syntax.count_open([*self.prompt.ids, *self.ids])
        return self.ids[: max(len(self.ids) - still_open, 0)]

    def _tell_text(self, text: str) -> None:
        if len(text) > len(self._told) and text.startswith(self._told):
            self.tell(Delta(text[len(self._told) :]))
            self._told = text

    def _end(self, reason: FinishReason) -> None:
        self.is_over, num_tokens = True, len(self.ids)
        ids = [i for i in self.ids if i not in self.captioner.text_format.stop_token_ids]
        answer = self.captioner.read(self.prompt, ids)
        text = str(answer)
        places = [text.index(stop) for stop in self.settings.stop if stop in text]
        if places:
            text = text[: min(places)]
        self._tell_text(text)
        self.tell(Done(text, answer, tuple(ids), reason, num_tokens))

    def finish(self) -> None:
        """At the end of its batch."""
        if not self.is_over:
            self._end("length")

    def fail(self, message: str, is_users: bool = False) -> None:
        if not self.is_over:
            self.is_over = True
            self.tell(Failed(message, is_users))


class _Steps(StoppingCriteria):
    """Hands each step's tokens to the jobs of a batch, and says which rows are over."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:  # type: ignore[override]
        for job, token in zip(self._jobs, input_ids[:, -1].tolist(), strict=True):
            job.take(token)
        return torch.tensor([job.is_over for job in self._jobs], device=input_ids.device)


class Engine:
    """Models, their queue and their uploads.

    Args:
        captioners: the models by name, in the order in which they are listed.
        uploads: decodes what comes in.
        limits: of the queue.
        gather: seconds that the first of a batch waits for others.
    """

    def __init__(
        self,
        captioners: Mapping[str, Captioner],
        uploads: Uploads,
        limits: QueueLimits = QueueLimits(),
        gather: float = 0.01,
    ) -> None:
        self.captioners, self.uploads, self.limits = dict(captioners), uploads, limits
        self._gather = gather
        self._places = threading.BoundedSemaphore(limits.max_queue)
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._lock = threading.Lock()
        # One thread for all models: they share the device and torch's random numbers.
        self._thread = ThreadPoolExecutor(1, "model")
        self.batch_sizes: deque[int] = deque(maxlen=100)

    def close(self) -> None:
        """End what runs, and delete all uploads."""
        with self._lock:
            for job in (*self._waiting, *self._running):
                job.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.uploads.close()

    def captioner(self, model: str) -> Captioner:
        """The model of a name; an UnknownModelError names those that there are."""
        if model not in self.captioners:
            raise UnknownModelError(f"there is no model {model!r:.80}; there is {', '.join(self.captioners)}")
        return self.captioners[model]

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """A place in the queue, for as long as the ``with`` lasts; a BusyError where there is none."""
        if not self._places.acquire(blocking=False):
            raise BusyError(f"{self.limits.max_queue} requests are waiting or running already; try again later")
        try:
            yield
        finally:
            self._places.release()

    def load(self, model: str, uploads: Sequence[Upload]) -> list[VisualInput]:
        """The media of a request as a model's tower sees them; a ValueError names what cannot be used."""
        vision = self.captioner(model).vision
        if uploads and vision is None:
            raise ValueError(f"the model {model} was trained on text alone and cannot look at images and videos")
        if len(uploads) > self.uploads.limits.max_media:
            raise ValueError(
                f"the request has {len(uploads)} images and videos, but at most {self.uploads.limits.max_media} are "
                "taken; raise --max_media"
            )
        assert vision is not None or not uploads
        return [self.uploads.load(upload, vision) for upload in uploads]  # type: ignore[arg-type]

    def prepare(self, model: str, request: Request, settings: Settings) -> tuple[Prompt, Settings]:
        """Write the prompt of a request whose media are loaded, and see that it and an answer fit the context.

        Raises:
            ValueError: it does not fit, or is no request that this model can answer.
        """
        captioner = self.captioner(model)
        prompt = captioner.prompts.write(request)
        room = captioner.context - len(prompt.ids)
        if room < 1:
            raise ValueError(
                f"the question has {len(prompt.ids)} tokens, those of images and videos included, but the context of "
                f"{model} is {captioner.context}; shorten it"
            )
        _check_visual_tokens(captioner, prompt)
        return prompt, replace(settings, max_new_tokens=min(settings.max_new_tokens, room))

    def submit(self, model: str, prompt: Prompt, settings: Settings, tell: Callable[[Event], None]) -> Job:
        """Put a prompt of ``prepare`` into the queue; ``tell`` is called with its events in the model's thread."""
        job = Job(model, self.captioner(model), prompt, settings, tell)
        with self._lock:
            self._waiting.append(job)
        self._thread.submit(self._run_next).add_done_callback(_log_error)
        return job

    def stream(self, model: str, prompt: Prompt, settings: Settings) -> Iterator[Event]:
        """The events of a prompt, one by one; a generator that is closed cancels its job."""
        events: queue.Queue[Event] = queue.Queue()
        job = self.submit(model, prompt, settings, events.put)
        try:
            while True:
                event = events.get()
                yield event
                if not isinstance(event, Delta):
                    return
        finally:
            job.cancel()

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Let a function use the models, when nothing else does."""
        return self._thread.submit(function, *args, **kwargs)

    # In the model's thread.

    def _run_next(self) -> None:
        with self._lock:
            alone = len(self._waiting) == 1
        if alone and self._gather:
            time.sleep(self._gather)
        batch = self._take_batch()
        if not batch:
            return  # Its jobs were in a batch of an earlier call.
        self.batch_sizes.append(len(batch))
        try:
            self._answer(batch)
        except ValueError as error:
            if len(batch) > 1 and not any(job.ids for job in batch):
                self._answer_one_by_one(batch)
            else:
                _fail(batch, explain_error(error), is_users=True)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            _fail(batch, "the device has no memory for this request; send fewer or smaller images, or ask later")
        finally:
            # Nobody waits for ever, whatever happened.
            _fail(batch, "the model failed; the server's log says why")

    def _take_batch(self) -> list[Job]:
        """The first job that waits, and those behind it that can be answered with it."""
        batch: list[Job] = []
        with self._lock:
            left: deque[Job] = deque()
            longest = room = 0
            for job in self._waiting:
                if job.is_cancelled:
                    continue
                if batch and (len(batch) == self.limits.max_batch or not job.may_join(batch[0], longest, room)):
                    left.append(job)
                    continue
                batch.append(job)
                longest, room = max(longest, len(job.prompt.ids)), max(room, job.settings.max_new_tokens)
            self._waiting, self._running = left, batch
        return batch

    def _answer_one_by_one(self, batch: Sequence[Job]) -> None:
        """A batch that failed before its first token: what one request is at fault for is none of the others'."""
        for job in batch:
            try:
                self._answer([job])
            except ValueError as error:
                job.fail(explain_error(error), is_users=True)

    def _answer(self, batch: Sequence[Job]) -> None:
        captioner, settings = batch[0].captioner, batch[0].settings
        if settings.seed is not None:
            set_seed(settings.seed)
        processors = [] if captioner.syntax is None else [captioner.syntax]
        options = settings.options() | {
            "logits_processor": LogitsProcessorList(processors),
            "stopping_criteria": StoppingCriteriaList([_Steps(batch)]),
        }
        room = max(job.settings.max_new_tokens for job in batch)
        captioner.answer_prompts([job.prompt for job in batch], room, False, options)
        for job in batch:
            job.finish()


def _fail(jobs: Sequence[Job], message: str, is_users: bool = False) -> None:
    for job in jobs:
        job.fail(message, is_users)


def _log_error(future: Future[None]) -> None:
    """What the model's thread raised is a fault of the program: its traceback goes to the log."""
    if not future.cancelled() and (error := future.exception()) is not None:
        logger.error("a batch failed", exc_info=error)


def _check_visual_tokens(captioner: Captioner, prompt: Prompt) -> None:
    """A ValueError for a text with visual tokens of its own, which the model would find too late, for a whole batch."""
    if captioner.vision is None:
        return
    layout, visual = captioner.vision.layout, set(captioner.vision.visual_token_ids)
    expected = sum(layout.num_tokens(item.kind, len(item.frames), item.original_size) for item in prompt.media)
    found = sum(i in visual for i in prompt.ids)
    if found != expected:
        raise ValueError(
            f"the text has {found - expected} visual tokens of its own, which only images and videos are made of; "
            "leave them out"
        )
