"""What a model says of a few samples while it trains: always the same ones, in ``OUTPUT_DIR/samples``.

They are chosen, and their media decoded, before the first step. The first rank asks its model one sample at a time,
while the others wait: under DDP and ZeRO-1 and 2 each rank has whole weights. No random number that training draws is
another for it, and no module is left in another mode.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava import progress
from llava.data.dataset import SupervisedDataset
from llava.data.dataset_stats import count_media
from llava.data.feature_cache.cache import FeatureCacheError
from llava.data.media import decode_media
from llava.data.module import build_dataset, documents_of
from llava.data.placeholders import placeholder_kinds
from llava.draw import Place, draw_case, fit
from llava.eval.annotations.captions import build_sample, split_media
from llava.eval.engine import Captioner, Request
from llava.eval.store import EvalSample, Numbers, Prediction, Reference
from llava.geometry import Box, TimeSpan
from llava.io import append_json_lines, appending, cut_unfinished_line, read_json_lines, write_beside
from llava.messages import escape_controls, explain_error, shorten, shorten_text
from llava.model.loading import LoadedModel
from llava.storage import naming
from llava.train.distributed import broadcast_from_rank0
from llava.train.scoring import looking_only
from llava.types import Record, Turn

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava.data.feature_cache.run import RunFeatures
    from llava.data.module import DataModule, DataSettings
    from llava.train.arguments import TrainingArguments as OwnArguments
    from llava.train.trainer import LlavaTrainer

logger = logging.getLogger(__name__)

SAMPLES_FOLDER, SAMPLES_FILE = "samples", "samples.jsonl"
_STEP_FOLDER = "step-{:06d}"
_STEP_FOLDERS = re.compile(r"step-(\d{6,})")
_MOST_TRIES = 50
"""Samples that are looked at, for each that is wanted, before those that can be used have to do."""
_PROMPT_WORDS = 8
"""Most words of a plain text that the model is given to go on from."""
_MOST_FRAMES = 8
_FRAME_SIDE = 320


class SampleRow(TypedDict):
    """A line of ``samples.jsonl``: what was asked, what should come, and what came at a step."""

    step: int
    words: int | None
    id: str
    source: str
    media: list[str]
    question: str
    reference: str
    answer: str
    boxes: list[Numbers]
    spans: list[Numbers]


@dataclass(frozen=True, eq=False)
class WatchedSample:
    """A sample that is asked again and again.

    Attributes:
        sample: its question and its reference.
        request: the same with its media decoded.
        frames: of its media, small, in the order in which they are shown; of a clip at most eight.
        labels: of the frames: their times in a clip.
        places: the first and the last of them that are of the medium which boxes speak of, and their times in [0, 1].
    """

    sample: EvalSample
    request: Request
    frames: Sequence[Image] = ()
    labels: Sequence[str] = ()
    last: slice = field(default_factory=lambda: slice(0, 0))
    times: Sequence[float] | None = None

    @property
    def reference(self) -> str:
        return " | ".join(self.sample.reference.captions)

    @property
    def places(self) -> list[Place]:
        """Boxes and spans of the reference."""
        reference = self.sample.reference
        return [*reference.boxes, *([reference.span] if reference.span else [])]

    def draw(self, row: SampleRow) -> Image:
        """What was said of it at a step, below its frames, with boxes and spans."""
        texts = {"question": self.sample.expression, "answer": row["answer"], "reference": self.reference}
        boxes, spans = (Box(*box) for box in row["boxes"]), (TimeSpan(*span) for span in row["spans"])
        said: list[Place] = [*boxes, *spans]
        shown = {label: text for label, text in texts.items() if text}
        return draw_case(list(self.frames[self.last]), self.places, said, shown, self.times)


# The choice.


def plan_samples(
    args: OwnArguments,
    data_args: DataSettings,
    data: DataModule,
    loaded: LoadedModel,
    max_length: int,
    features: RunFeatures | None = None,
) -> list[WatchedSample]:
    """The samples of ``--sample_every``. Only the first rank has them.

    Raises:
        ValueError: the data cannot be read, or none of it can be shown to the model.
    """
    every = args.sample_every
    assert every is not None

    def plan() -> list[WatchedSample]:
        flag, dataset = "eval_data_path", data["eval_dataset"]
        documents = None if dataset is None else documents_of(dataset)
        if args.sample_data_path is not None:
            flag, trained = "sample_data_path", data["train_dataset"]
            assert trained is not None
            settings = (loaded.tokenizer, data_args, loaded.vision, max_length, documents_of(trained).text_format)
            seed = args.seed if args.data_seed is None else args.data_seed
            grounding = loaded.model.grounding
            own = build_dataset(flag, args.sample_data_path, *settings, seed, grounding, features)
            documents = documents_of(own)
        elif documents is None:
            flag, trained = "data_path", data["train_dataset"]
            assert trained is not None
            documents = documents_of(trained)
        chosen = choose_samples(documents, args.num_samples, f"--{flag}")
        print(escape_controls(describe_samples(chosen, f"--{flag}", every)), flush=True)
        return chosen

    decided: list[list[WatchedSample]] = []
    broadcast_from_rank0(lambda: decided.append(plan()))  # Pixels are not sent around.
    return decided[0] if decided else []


def describe_samples(chosen: Sequence[WatchedSample], flag: str, every: int) -> str:
    """What will be asked, for the report before the first step."""
    names = ", ".join(shorten(watched.sample.id) for watched in chosen[:10])
    of = f"{flag}, which it trains on (there is no --eval_data_path)" if flag == "--data_path" else flag
    return f"asked every {every} steps what is in {len(chosen)} samples of {of}: {names}"


def choose_samples(dataset: SupervisedDataset, number: int, flag: str) -> list[WatchedSample]:
    """So many samples of a data set: clips, images and texts in turn, spread over the data; the same in every run.

    Raises:
        ValueError: not one of them can be shown to the model.
    """
    chosen: list[WatchedSample] = []
    reasons: list[str] = []
    for index in spread(dataset)[: _MOST_TRIES * number]:
        record = dataset.records[index]
        try:
            chosen.append(watch(record, dataset))
        except FeatureCacheError:
            raise  # No sample is to blame.
        except ValueError as error:
            reasons.append(explain_error(error))
        if len(chosen) == number:
            break
    if not chosen:
        raise ValueError(f"--sample_every: no sample of {flag} can be asked; the first: {reasons[0]}")
    if reasons:
        logger.warning(
            "--sample_every: %d samples of %s cannot be asked; the first: %s", len(reasons), flag, reasons[0]
        )
    return chosen


def spread(dataset: SupervisedDataset) -> list[int]:
    """The order in which samples are looked at: kind by kind in turn, and of each kind ever finer over the data."""
    images, videos = count_media(dataset.records)
    kinds = [np.flatnonzero(kind) for kind in (videos > 0, (images > 0) & (videos == 0), images + videos == 0)]
    # 0, 1/2, 1/4, 3/4, 1/8 ...: whatever is taken of it lies all over the data.
    turns = [dict.fromkeys(int(of[int(share * len(of))]) for share in _halves(min(len(of), 4096))) for of in kinds]
    order: list[int] = []
    waiting = [iter(turn) for turn in turns if turn]
    while waiting:
        for turn in list(waiting):
            if (index := next(turn, None)) is None:
                waiting.remove(turn)
            else:
                order.append(index)
    return order


def _halves(least: int) -> list[float]:
    """The van der Corput sequence in base 2, at least so many numbers of it, up to a power of two."""
    shares = [0.0]
    while len(shares) < least:
        shares += [share + 0.5 / len(shares) for share in shares]
    return shares if least else []


def watch(record: Record, dataset: SupervisedDataset) -> WatchedSample:
    """A record as a question to the model; a ValueError if it cannot be asked, or its media cannot be decoded."""
    dataset.check_model(record)
    loaded = dataset.load_example(record).media  # It is one that can be trained on, and fits the context.
    sample = _to_question(record, dataset.text_format.has_prompts)
    question = sample.question or ""
    if placeholder_kinds(question) != [item.kind for item in loaded]:
        raise ValueError(f"{record}: shows media behind its first question")
    request = Request(loaded, question, sample.system, sample.coordinates)
    if not sample.media:
        return WatchedSample(sample, request)
    assert dataset.vision is not None
    frames: list[Image] = []
    labels: list[str] = []
    for media in sample.media:
        vision, split = dataset.vision, sample.split
        limits = (dataset.decode_timeout, dataset.limits)
        sampling = (vision.num_frames, vision.video_fps, vision.frames_upbound)
        clip = decode_media(media, *sampling, split, *limits)
        shown = np.linspace(0, len(clip.frames) - 1, min(len(clip.frames), _MOST_FRAMES)).round().astype(int).tolist()
        small = [_thumbnail(clip.frames[i].numpy()) for i in shown]
        frames, labels = (
            frames + small,
            labels + [f"{clip.times[i]:.1f} s" if media.kind == "video" else "" for i in shown],
        )
    # Of several media it is the last that places speak of.
    first, last = clip.times[0], clip.times[-1]
    times = [(clip.times[i] - first) / (last - first) if last > first else 0.0 for i in shown]
    of_last = slice(len(frames) - len(shown), len(frames))
    return WatchedSample(sample, request, frames, labels, of_last, times if media.kind == "video" else None)


def _thumbnail(pixels: Any) -> Image:
    from PIL import Image

    picture = Image.fromarray(pixels)
    scale = min(1.0, _FRAME_SIDE / max(picture.size))
    return fit(picture, round(picture.width * scale), round(picture.height * scale))


def _to_question(record: Record, has_prompts: bool) -> EvalSample:
    """The first question of a record and its answer; of a plain text, its beginning and what follows."""
    turns = [turn for turn in record.turns if turn.role != "system"]
    if not record.media and not has_prompts:
        words = " ".join(turn.text for turn in turns).split()
        if len(words) < 2 or record.coordinates:
            raise ValueError(f"{record}: has too few words to begin with some and go on, or coordinates without media")
        begun = min(_PROMPT_WORDS, len(words) // 2)
        start, rest = " ".join(words[:begun]), " ".join(words[begun:])
        return EvalSample(record.id, record.source, (), Reference(captions=(rest,)), start, start)
    system = [turn for turn in record.turns[:1] if turn.role == "system"]
    if [turn.role for turn in turns] == ["assistant"]:
        shown, said = split_media(turns[0].text)
        turns = [Turn("user", shown), Turn("assistant", said)]
    return build_sample(replace(record, turns=(*system, *turns[:2])))


# The folder.


@dataclass
class SampleLog:
    """What was said, in ``samples.jsonl``, and a folder of pictures for each step; used by the first rank alone."""

    folder: Path
    rows: list[SampleRow] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder / SAMPLES_FILE

    def begin(self, step: int) -> None:
        """Take up what a run that goes on behind a step has left; what was said later will be said again.

        Raises:
            OSError: the folder cannot be written to.
            ValueError: the file is none that a run has written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        cut_unfinished_line(self.path)
        rows = read_json_lines(self.path)
        if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
            raise ValueError(f"{self.path} is none that a run has written; move it away, or give another --output_dir")
        self.rows = [row for row in rows if row["step"] <= step and step]
        if len(self.rows) < len(rows):
            with write_beside(self.path) as beside, beside.open("wb") as file:
                append_json_lines(file, self.rows)
        known = {row["step"] for row in self.rows}
        for folder in self.folder.iterdir():
            if (found := _STEP_FOLDERS.fullmatch(folder.name)) and int(found[1]) not in known:
                shutil.rmtree(folder)

    def steps(self) -> set[int]:
        return {row["step"] for row in self.rows}

    def add(self, watched: Sequence[WatchedSample], rows: Sequence[SampleRow]) -> None:
        """Write what was said at a step: the pictures first, the lines last, which say that it was."""
        folder = self.folder / _STEP_FOLDER.format(rows[0]["step"])
        for number, (sample, row) in enumerate(zip(watched, rows, strict=True), start=1):
            if sample.frames:
                folder.mkdir(exist_ok=True)
                name = re.sub(r"[^\w.-]+", "_", row["id"], flags=re.ASCII)[:60]
                picture = folder / f"{number:02d}_{name}.jpg"
                with naming(picture):
                    sample.draw(row).save(picture, quality=85)
        with appending(self.path) as file:
            append_json_lines(file, rows)
        self.rows = [*self.rows, *rows]


# While a run trains.


@dataclass(eq=False)
class SampleCallback(TrainerCallback):
    """Asks the model, before the first step, after every so many and after the last; called on all ranks.

    It comes behind ``StopCallback``: a run that stops is asked nothing, and the next start makes up for it.
    """

    trainer: LlavaTrainer
    watched: list[WatchedSample]
    log: SampleLog

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take up the file, and ask where that is due; what cannot be asked before the first step is an error."""

        def begin() -> bool:
            try:
                self.log.begin(state.global_step)
            except OSError as error:
                raise ValueError(explain_error(error)) from error
            return state.global_step not in self.log.steps()

        if broadcast_from_rank0(begin) and (state.global_step == 0 or self._is_due(state, control)):
            self._ask(state, must=state.global_step == 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not self.trainer.stop_request.agreed and self._is_due(state, control):
            with self.trainer.throughput.paused():
                self._ask(state)

    def _is_due(self, state: TrainerState, control: TrainerControl) -> bool:
        assert self.trainer.args.sample_every is not None
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        return is_last or state.global_step % self.trainer.args.sample_every == 0

    def _ask(self, state: TrainerState, must: bool = False) -> None:
        """Ask the samples; a failure is said and training goes on, or is a ValueError if they ``must`` be asked."""
        exposure = self.trainer.exposure
        words = exposure.count_words() if exposure.is_counting else None

        def ask() -> None:
            try:
                rows = list(self._answers(state.global_step, words))
                self.log.add(self.watched, rows)
            except (ValueError, RuntimeError, OSError) as error:
                if must:
                    raise ValueError(f"--sample_every: the samples cannot be asked: {explain_error(error)}") from error
                said = "the samples could not be asked at step %d, training goes on: %s"
                logger.warning(said, state.global_step, explain_error(error))
                return
            for row in rows:
                logger.info(
                    "step %d, %s: %s", row["step"], shorten_text(row["id"], 40), shorten_text(row["answer"], 200)
                )

        broadcast_from_rank0(ask)

    def _answers(self, step: int, words: int | None) -> Iterator[SampleRow]:
        """What the model says now, sample by sample: alone, so that none depends on which others there are."""
        trainer, args = self.trainer, self.trainer.args
        options: dict[str, Any] = {"max_new_tokens": args.sample_max_new_tokens}
        if args.sample_temperature > 0:
            options |= {"do_sample": True, "temperature": args.sample_temperature, "top_k": 0, "top_p": 1.0}
        eager = torch.compiler.set_stance("force_eager") if args.torch_compile else contextlib.nullcontext()
        with looking_only(trainer.model, args.device), eager:
            tokenizer: Any = trainer.processing_class
            captioner = Captioner(LoadedModel(trainer.model, tokenizer, trainer.model.vision, []), str(args.device))
            for number, watched in enumerate(self.watched):
                progress.note(progress.SAMPLING, [watched.sample.id])
                torch.manual_seed(args.seed + number)
                answer = captioner.answer([watched.request], 1, **options)[0]
                places = Prediction(answer.text, tuple(answer.boxes), tuple(answer.spans)).to_row()
                sample = watched.sample
                yield {
                    "step": step, "words": words, "id": sample.id, "source": sample.source,
                    "media": [media.path for media in sample.media], "question": sample.expression,
                    "reference": watched.reference, "answer": str(answer),
                    "boxes": places["boxes"], "spans": places["spans"],
                }  # fmt: skip


def add_samples(trainer: LlavaTrainer, watched: list[WatchedSample]) -> SampleCallback:
    """Let a trainer ask its model about samples as it trains."""
    callback = SampleCallback(trainer, watched, SampleLog(Path(str(trainer.args.output_dir)) / SAMPLES_FOLDER))
    trainer.add_callback(callback)
    return callback
