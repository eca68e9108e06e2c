"""What scores a model while it trains, and when: read and checked before the first step."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from llava.eval.babylm.model_scores import hash_items
from llava.eval.babylm.results import TaskResult, summarize
from llava.eval.babylm.tasks import TASKS, Item, TaskData, describe_repeats, find_tasks, read_items
from llava.eval.blind import swap_media
from llava.eval.likelihood import Choice, LikelihoodScorer, Scorer
from llava.train.distributed import broadcast_from_rank0
from llava.train.progress_arguments import parse_score_times

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llava.train.arguments import TrainingArguments

logger = logging.getLogger(__name__)

Scores = Sequence[tuple[float, ...]]
"""Of each choice, one a candidate."""


class TaskToScore(Protocol):
    """A task that is read: what of it is scored, and what its scores come to."""

    @property
    def name(self) -> str: ...

    @property
    def choices(self) -> Sequence[Choice]: ...

    @property
    def swapped(self) -> Sequence[Choice] | None:
        """The choices with others' media, for the blind check; None where there are none, or no others."""
        ...

    def summarize(self, scores: Scores) -> TaskResult:
        """What the scores of the choices come to."""
        ...


@dataclass(frozen=True)
class BabyLMTask:
    """A task of ``llava.eval.babylm``.

    Attributes:
        data: as ``find_tasks`` found it.
        items: that are scored.
    """

    data: TaskData
    items: Sequence[Item]

    @property
    def name(self) -> str:
        return self.data.name

    @cached_property
    def choices(self) -> list[Choice]:
        """Of the items, in their order."""
        return [item.choice for item in self.items]

    @cached_property
    def swapped(self) -> list[Choice] | None:
        """As ``python -m llava.eval.babylm`` swaps them; the same on every rank."""
        return swap_media(self.choices, seed=0) if self.data.task.needs_images else None

    def summarize(self, scores: Scores) -> TaskResult:
        return summarize(self.data, self.items, scores)


@dataclass(frozen=True)
class ScorePlan:
    """What scores a model while it trains, and when.

    Attributes:
        tasks: that are scored.
        build_scorer: what scores them with the model that trains, once that lies on its device.
        intervals: of steps, after each of which they are.
        at_milestones: whether they are at milestones.
        milestones: how many there are.
    """

    tasks: Sequence[TaskToScore]
    build_scorer: Callable[[], Scorer]
    intervals: Sequence[int]
    at_milestones: bool
    milestones: int = 0

    def is_due(self, step: int, at_milestone: bool, is_last: bool) -> bool:
        """Whether a step's model is scored."""
        return is_last or (at_milestone and self.at_milestones) or any(step % number == 0 for number in self.intervals)

    def hash_items(self) -> dict[str, str]:
        """Of each task a hash of its items: a run that is gone on with says where they have changed."""
        return {task.name: hash_items(task.choices) for task in self.tasks}

    def describe(self) -> str:
        """What is scored and when, for the report before the first step."""
        again = {task.name: ", and again with other items' pictures" if task.swapped else "" for task in self.tasks}
        names = [f"{task.name} ({len(task.choices):,} items{again[task.name]})" for task in self.tasks]
        shown = [choices for task in self.tasks for choices in (task.choices, task.swapped or ())]
        num_texts = sum(len(choice.candidates) for choices in shown for choice in choices)
        times = [f"after every {number} steps" for number in self.intervals]
        times += [f"at each of {self.milestones} milestones"] if self.at_milestones else []
        when = " and ".join([", ".join(times), "after the last step"] if times else ["after the last step"])
        return f"scored {when}, {num_texts:,} sentences each time: {', '.join(names)}"


def plan_scores(args: TrainingArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ScorePlan:
    """What ``--score_data`` and ``--score_tasks`` ask for, where ``args.wants_scores``.

    Raises:
        ValueError: data are missing, a task is not known, or the model cannot be scored as it trains.
    """
    flag = "--score_tasks" if args.score_data is None else "--score_data"
    if not args.do_train:
        raise ValueError(
            f"{flag} scores a model while it trains, but --do_train is false; leave it out, or give --score_tasks none "
            "where a recipe has it: python -m llava.eval.babylm scores a model as it is"
        )
    engine = getattr(args, "hf_deepspeed_config", None)
    if engine is not None and engine.is_zero3():
        raise ValueError(
            f"{flag} needs whole weights, and --deepspeed shares them out to ranks (ZeRO-3); give zero2, or "
            "--score_tasks none, and score the checkpoints with python -m llava.eval.babylm"
        )

    def build_scorer() -> LikelihoodScorer:
        return LikelihoodScorer(model, tokenizer, name=f"--model_name_or_path {model.name_or_path}")

    scorer = build_scorer()  # Refuses a tokenizer before any file is read.
    at_milestones, intervals = parse_score_times(args.score_at or [])
    if args.score_at is None:
        at_milestones = bool(args.milestone_numbers)
    elif at_milestones and not args.milestone_numbers:
        raise ValueError("--score_at milestones needs --milestones; give them, or --score_at steps:N")
    # Read once: other ranks may see the files later, or other ones.
    tasks = broadcast_from_rank0(lambda: read_tasks(args, scorer))
    return ScorePlan(tasks, build_scorer, intervals, at_milestones, len(args.milestone_numbers))


def read_tasks(args: TrainingArguments, scorer: LikelihoodScorer) -> list[BabyLMTask]:
    """The tasks of ``--score_data``, each item of which is seen to be one that can be scored.

    Raises:
        ValueError: see ``plan_scores``.
    """
    read = []
    try:
        found = find_tasks(args.score_data or (), args.score_tasks, args.score_fast)
        missing = list(found.missing)
        for data in found.tasks:
            if data.task.needs_images and getattr(scorer.model, "vision", None) is None and not args.score_tasks:
                missing.append(f"{data.name}: the model reads text alone, and cannot look at its pictures")
                continue
            read.append(BabyLMTask(data, read_items(data, args.score_fast)))
            # Here a text that is too long costs a minute; at the first milestone it would cost a day.
            scorer.check(read[-1].choices)
            for line in describe_repeats(data.name, read[-1].items):
                logger.warning("%s", line)
            if data.task.needs_images and read[-1].swapped is None:
                logger.warning("%s: too few different pictures for the blind check", data.name)
    except ValueError as error:
        raise ValueError(_in_flags_of_training(str(error))) from error
    missing = list(map(_in_flags_of_training, missing))
    if missing and (args.score_tasks or not read):
        raise ValueError(f"--score_tasks: {'; '.join(missing)}")
    if not read:
        raise ValueError(f"--score_data {' '.join(args.score_data or ())}: holds no task; known are {', '.join(TASKS)}")
    for line in missing:
        logger.warning("not scored: %s", line)
    return read


def _in_flags_of_training(text: str) -> str:
    """An error of ``python -m llava.eval.babylm``, with the names that its flags have here."""
    text = text.replace("give their folder with --image_folder", "put their folder, called images, beside the items")
    return re.sub(r"--(data|tasks)\b", r"--score_\1", text)
