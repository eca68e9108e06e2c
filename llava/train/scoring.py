"""Scores of tasks while a model trains, on all ranks, and no weight changes for it.

Before the first step the tasks are read, and the longest item of each is scored, so that what cannot be scored is an
error then. Later a failure costs a score, not the run: it is said, and the checkpoint can be scored by hand.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava import progress
from llava.eval.babylm.results import check_pictures
from llava.eval.blind import BlindCheck
from llava.eval.likelihood import Choice, Scorer
from llava.io import read_json_lines
from llava.messages import explain_error
from llava.train.distributed import AgreedError, broadcast_from_rank0, gather_failures, gather_from_ranks, is_first_rank
from llava.train.evaluation import keeping_random_states
from llava.train.exposure_log import MILESTONE
from llava.train.preemption import ScoringStopped, StopRequest
from llava.train.score_plan import ScorePlan, Scores, TaskToScore
from llava.train.score_table import ScoreRow, ScoreTable

if TYPE_CHECKING:
    from llava.train.trainer import LlavaTrainer

logger = logging.getLogger(__name__)

_CHOICES_AT_ONCE = 4096
"""Choices of a rank between two meetings of the ranks."""


@dataclass(eq=False)
class ScoringCallback(TrainerCallback):
    """Scores the tasks of a plan, and puts what they come to in the log and in the run's folder.

    It is called behind ``StopCallback``: a run that stops leaves scores to the next start, which finds them missing.

    Attributes:
        trainer: whose model is scored.
        plan: what and when.
        table: of the run; only the first rank uses it.
    """

    trainer: LlavaTrainer
    plan: ScorePlan
    table: ScoreTable
    missed: list[int] = field(default_factory=list)
    _scorer: Scorer | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Try to score, take up the tables, and make up for scores that are due at the step gone on from."""
        self.missed = []
        self._scorer = self.plan.build_scorer()
        self._try_scoring()
        step = state.global_step
        broadcast_from_rank0(lambda: self.table.begin(step))
        if step and self.plan.is_due(step, self._was_milestone(step), step >= state.max_steps):
            # Raises ScoringStopped where a signal comes: no step is trained yet, and none is to be saved.
            self._score(state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        request, budget = self.trainer.stop_request, self.trainer.word_budget
        # A run that stops for a signal is gone on with at this step; one that stops for --word_limit is at its end.
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        if request.agreed or not self.plan.is_due(state.global_step, budget.at_milestone, is_last):
            return
        try:
            with self.trainer.throughput.paused():
                self._score(state, control)
        except ScoringStopped:
            control.should_save = control.should_training_stop = True
            request.evaluation_due |= control.should_evaluate
            control.should_evaluate = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.missed and is_first_rank():
            steps = ", ".join(map(str, self.missed))
            logger.warning(
                "scores of step %s are missing in %s: scoring failed there, see above; python -m llava.eval.babylm "
                "scores a checkpoint of that step", steps, self.table.folder
            )  # fmt: skip

    def _was_milestone(self, step: int) -> bool:
        """Whether the step that a run goes on behind had come to a milestone."""
        path = self.trainer.exposure.path
        lines = broadcast_from_rank0(lambda: read_json_lines(path))
        return any(line["step"] == step and line["event"] == MILESTONE for line in lines)

    def _try_scoring(self) -> None:
        """Score the longest item of each task, and one with media.

        Raises:
            AgreedError: the model cannot score it.
        """
        assert self._scorer is not None
        failure = None
        with looking_only(self.trainer.model, self.trainer.args.device):
            for task in self.plan.tasks:
                try:
                    self._scorer.score(_hardest(task.choices))
                except (ValueError, RuntimeError, OSError) as error:
                    failure = f"--score_data: {task.name} cannot be scored: {explain_error(error)}"
                    break
        if failures := gather_failures(failure):
            raise AgreedError(failures[0])

    def _score(self, state: TrainerState, control: TrainerControl) -> None:
        """Score the tasks that have no score of this step yet, each into the log and the tables as it is done.

        Raises:
            ScoringStopped: the run was asked to stop.
        """
        step, exposure = state.global_step, self.trainer.exposure
        words = exposure.count_words() if exposure.is_counting else None
        done = broadcast_from_rank0(lambda: self.table.tasks_at(step))
        should_log = control.should_log
        try:
            for task in self.plan.tasks:
                if task.name in done:
                    continue
                start = time.perf_counter()
                scores = self._score_choices(task.choices, task.name)
                other = None
                if scores is not None and task.swapped is not None:
                    # Where this alone fails, as with a larger picture before a long text, the score stays.
                    other = self._score_choices(task.swapped, f"{task.name} with other items' pictures")
                if scores is None or not self._record(task, step, words, scores, other):
                    self.missed += [step] if step not in self.missed else []
                elif is_first_rank():
                    logger.info("step %d: scored %s in %.1f s", step, task.name, time.perf_counter() - start)
        finally:
            # To log a score is to have logged the step, for transformers; its loss comes behind.
            control.should_log = should_log

    def _score_choices(self, choices: Sequence[Choice], name: str) -> list[tuple[float, ...]] | None:
        """The scores of choices, on every rank; None where one could not score its share."""
        assert self._scorer is not None
        trainer, device = self.trainer, self.trainer.args.device
        rank, num_ranks = trainer.args.process_index, trainer.args.world_size
        scores: list[tuple[float, ...]] = []
        at_once = _CHOICES_AT_ONCE * num_ranks
        mine = sum(len(choices[i : i + at_once][rank::num_ranks]) for i in range(0, len(choices), at_once))
        # None: no bar where standard error is no terminal, as a log would have a line for each of its moves.
        hidden = trainer.args.disable_tqdm or not is_first_rank() or None
        with (
            looking_only(trainer.model, device),
            tqdm(total=mine, desc=f"scoring {name}", unit=" items", disable=hidden, leave=False) as bar,
        ):
            for start in range(0, len(choices), at_once):
                together = choices[start : start + at_once]
                progress.note(progress.SCORING, (), event=True)
                share = _score_share(self._scorer, together[rank::num_ranks], bar, trainer.stop_request)
                # Every rank comes here, whatever became of its share: none waits for one that failed.
                shares = gather_from_ranks(share)
                if any(share.stopped for share in shares):
                    trainer.stop_request.agree(device)
                    raise ScoringStopped
                if failed := [(number, share.failure) for number, share in enumerate(shares) if share.failure]:
                    if is_first_rank():
                        said = "; ".join(f"rank {number}: {failure}" for number, failure in failed)
                        logger.warning("%s is not scored at this step, training goes on: %s", name, said)
                    return None
                block: list[tuple[float, ...]] = [()] * len(together)
                for number, share in enumerate(shares):
                    # As they were dealt: every rank takes each num_ranks-th choice.
                    block[number::num_ranks] = share.scores
                scores += block
        return scores

    def _record(
        self, task: TaskToScore, step: int, words: int | None, scores: Scores, other: Scores | None = None
    ) -> bool:
        """Put a task's scores, with ``other`` items' pictures too, in the tables and the log; whether that worked."""

        def write() -> tuple[ScoreRow, BlindCheck | None]:
            result = task.summarize(scores)
            blind = None if other is None else check_pictures(scores, other)
            try:
                return self.table.add(step, words, result, blind), blind
            except OSError as error:
                raise ValueError(explain_error(error)) from error

        try:
            row, blind = broadcast_from_rank0(write)
        except ValueError as error:  # An AgreedError, where there are several ranks.
            if is_first_rank():
                said = "the scores of %s at step %d could not be written, training goes on: %s"
                logger.warning(said, task.name, step, error)
            return False
        name = f"score/{task.name}"
        logs: Mapping[str, float | None] = {
            name: row.score, f"{name}_adjusted": row.adjusted, f"{name}_ties": row.ties, "words": words,
        }  # fmt: skip
        if blind is not None:
            logs = {**logs, f"{name}_other_pictures": blind.other_score, f"{name}_drop": blind.drop}
            if is_first_rank():
                logger.log(
                    logging.WARNING if blind.is_blind else logging.INFO, "step %d: %s", step, blind.describe(task.name)
                )
        self.trainer.log({key: value for key, value in logs.items() if value is not None})
        return True


def add_scoring(trainer: LlavaTrainer, plan: ScorePlan) -> None:
    """Let a trainer score its model as it trains; the first rank says what is scored, and when.

    Raises:
        ValueError: the tables would replace files of another kind.
    """
    table = ScoreTable(Path(str(trainer.args.output_dir)))
    broadcast_from_rank0(table.check)
    if trainer.checkpoints.identity is not None:
        trainer.checkpoints.identity.free["score_items"] = plan.hash_items()
    if is_first_rank():
        print(plan.describe(), flush=True)
    # Behind the callbacks of the trainer's own, which count words and know of signals.
    trainer.add_callback(ScoringCallback(trainer, plan, table))


@dataclass(frozen=True, slots=True)
class _Share:
    """What became of a rank's share: scores, or the failure in one line, or that the run was asked to stop."""

    scores: Scores = ()
    failure: str | None = None
    stopped: bool = False


def _score_share(scorer: Scorer, choices: Sequence[Choice], bar: tqdm, request: StopRequest) -> _Share:
    """Score a rank's choices; a signal is answered within them, as a full task may take longer than a job has left."""

    def on_scored(number: int) -> None:
        bar.update(number)
        progress.note(progress.SCORING)
        if request.is_asked:
            raise ScoringStopped

    try:
        scores = scorer.score(choices, on_scored)
    except ScoringStopped:
        return _Share(stopped=True)
    except (ValueError, RuntimeError, OSError) as error:
        return _Share(failure=explain_error(error))
    return _Share(scores, stopped=request.is_asked)


def _hardest(choices: Sequence[Choice]) -> list[Choice]:
    """The choices of a task that take most room: the longest, and of those with media the longest."""

    def length(choice: Choice) -> int:
        return max(len(candidate.text) for candidate in choice.candidates)

    hardest = [max(choices, key=length)]
    if with_media := [choice for choice in choices if choice.media and choice is not hardest[0]]:
        hardest.append(max(with_media, key=length))
    return hardest


@contextmanager
def looking_only(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it a model that trains may be run; afterwards it and all random numbers are as they were before."""
    modes = [(module, module.training) for module in model.modules()]
    python, legacy = random.getstate(), np.random.get_state()
    # accelerate has put one there that runs in 16 bits; a checkpoint's weights are scored as they are.
    forward = vars(model).pop("forward", None)
    try:
        with keeping_random_states(device), torch.no_grad():
            model.eval()
            yield
    finally:
        if forward is not None:
            model.forward = forward
        # Module by module: a frozen tower stays in evaluation mode while the rest trains.
        for module, training in modes:
            module.training = training
        random.setstate(python)
        np.random.set_state(legacy)
