"""Budgets of words: how many steps one takes, the step that ends a run, and the milestones on the way.

``--word_limit`` ends a run at the first step that brings its words to the limit. ``--milestones`` leaves the model of
the first step that brings them to each of some numbers, in ``chck_1M``, ``chck_2M``, ... in the output folder. Words
are counted in ``exposure_log.py``; what a word is, ``llava.data.words`` says.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from llava.data.samplers import DataOrder
from llava.train.arguments import TrainingArguments
from llava.train.checkpoint import list_milestones
from llava.train.data_order import count_steps
from llava.train.distributed import is_first_rank
from llava.train.exposure_log import EXPOSURE_STATE, MILESTONE, ExposureLog
from llava.train.milestones import Milestone, describe_words, milestone_name

logger = logging.getLogger(__name__)

MOST_EPOCHS = 10
"""Passes over the data that BabyLM's tracks allow."""


# How many steps a number of words takes.


@dataclass(frozen=True)
class WordPlan:
    """How the words of a run add up, told from its data and their order before the first step.

    Exact, but for samples that will turn out to be bad, and videos whose number of frames shows when they are opened.

    Attributes:
        words: that each sample presents, int64 (samples,).
        order: of the samples.
    """

    words: NDArray[np.int64]
    order: DataOrder

    @cached_property
    def per_epoch(self) -> int:
        """Words of the first epoch; with ``--dataloader_drop_last`` others may have a few more or fewer."""
        return int(self._of_steps(0).sum())

    def _of_steps(self, epoch: int) -> NDArray[np.int64]:
        """Words of each step of an epoch, int64 (steps,)."""
        cumulative = np.concatenate(([0], np.cumsum(self.words[self.order.order(epoch)])))
        return np.diff(cumulative[self.order.step_bounds(epoch)])

    def steps_to(self, words: int) -> int:
        """The first step with which so many words are reached.

        Raises:
            ValueError: they never are.
        """
        if self.per_epoch == 0:
            raise ValueError("the data have no words to count; leave --word_limit and --milestones out")
        # Every epoch has all samples, so whole ones need not be gone through, but for incomplete steps left out.
        epoch = 0 if self.order.drop_last else (words - 1) // self.per_epoch
        left = words - epoch * self.per_epoch
        while (cumulative := np.cumsum(self._of_steps(epoch)))[-1] < left:
            left -= int(cumulative[-1])
            epoch += 1
        return epoch * self.order.num_steps + int(np.searchsorted(cumulative, left)) + 1

    def words_after(self, steps: int) -> int:
        """Words of the first steps of a run."""
        epochs, rest = divmod(steps, self.order.num_steps)
        whole = sum(int(self._of_steps(e).sum()) for e in range(epochs)) if self.order.drop_last else None
        before = epochs * self.per_epoch if whole is None else whole
        return before + int(self._of_steps(epochs)[:rest].sum()) if rest else before


def plan_words(plan: WordPlan, args: TrainingArguments) -> list[str]:
    """Set the number of steps where ``--word_limit`` alone says how long a run is.

    Args:
        plan: of the run's data.
        args: of the run; ``max_steps`` is set where neither it nor ``num_train_epochs`` is given.

    Returns:
        What is to be said of it before the first step.

    Raises:
        ValueError: there are no words to count.
    """
    limit = args.word_limit_number
    lines = [f"words of an epoch: {plan.per_epoch:,}"]
    if limit is not None:
        steps = plan.steps_to(limit)
        share = limit / plan.per_epoch
        lines.append(f"--word_limit {limit:,} is {share:.2f} epochs, reached with step {steps:,}")
        if args.lasts_for_words:
            args.max_steps = steps
            lines[-1] += ", where the learning rate's schedule ends"
    asked = [*args.milestone_numbers, *([] if limit is None else [limit])]
    if not asked:
        return lines
    planned = count_steps(args, plan.order)
    total = plan.words_after(planned)
    end = total if limit is None else min(total, max(limit, 1))
    if limit is not None and total < limit:
        logger.warning(
            "--word_limit %s is never reached: --max_steps or --num_train_epochs ends the run at %s words", limit, total
        )
    elif limit is not None and planned > steps:
        logger.warning(
            "--word_limit ends the run at step %d, but --max_steps or --num_train_epochs lays the learning rate's "
            "schedule over %d steps; leave both out, and it ends with the words", steps, planned
        )  # fmt: skip
    if missed := [number for number in args.milestone_numbers if number > end]:
        names = ", ".join(describe_words(number) for number in missed)
        logger.warning("--milestones %s are never reached: the run ends at %s words", names, f"{end:,}")
    if end > MOST_EPOCHS * plan.per_epoch:
        logger.warning(
            "the run trains on %.1f epochs of its data; BabyLM's tracks allow %d", end / plan.per_epoch, MOST_EPOCHS
        )
    return lines


# While a run trains.


MilestoneHook = Callable[[Milestone], None]


@dataclass(eq=False)
class WordBudget(TrainerCallback):
    """Ends a run with its words, and leaves the milestones on the way.

    After each step, before anything of it is logged, evaluated or saved: so what a milestone's hooks do is done again
    when the run is killed before its next checkpoint has a name, and never left out.

    Attributes:
        exposure: counts the words.
        write_milestone: writes the model to a folder of that name; called on all ranks.
        paused: what stops the clock of training while milestones are written and hooks run.
        hooks: called on **all ranks**, in order, with every ``Milestone`` once its folder is complete. Append to it
            before ``train``: ``trainer.word_budget.hooks.append(score)``. They must leave model and random states as
            they were. A run that is resumed before a milestone calls them for it again.
        reached: whether the run has come to ``--word_limit``.
        at_milestone: whether the newest step has come to a milestone.
    """

    exposure: ExposureLog
    write_milestone: Callable[[Milestone], None]
    paused: Callable[[], AbstractContextManager[None]] = nullcontext
    hooks: list[MilestoneHook] = field(default_factory=list)
    reached: bool = False
    at_milestone: bool = False
    _words: int = 0  # at the step before

    def check(self, args: TrainingArguments) -> None:
        """A ValueError for a data set that does not say its words, where a flag asks for them."""
        if (flag := counting_flag(args)) and not self.exposure.is_counting:
            raise ValueError(f"{flag} counts words, which this program's own data set does not tell")

    def begin(self, args: TrainingArguments, step: int = 0) -> bool:
        """Take up what was counted before the first step; whether nothing is left to train.

        Args:
            args: of the run.
            step: of the checkpoint that it goes on from.
        """
        self._words = self.exposure.count_words()
        # Written before the checkpoint of its step, so a milestone of this step is there.
        found = [path / EXPOSURE_STATE for path in list_milestones(str(args.output_dir))] if step else []
        steps = {p.parent.name: json.loads(p.read_text("utf-8"))["step"] for p in found if p.is_file()}
        self.at_milestone = step in steps.values()
        if step and is_first_rank():
            self._warn_of_gaps(args, step, steps)
        self.reached = args.word_limit_number is not None and self._words >= args.word_limit_number
        return self.reached

    def _warn_of_gaps(self, args: TrainingArguments, step: int, steps: Mapping[str, int]) -> None:
        """Say which milestones a run that goes on behind a step will not write, and which are of steps it may not take.

        Args:
            args: of the run.
            step: of the checkpoint that it goes on from.
            steps: of the milestones that are there.
        """
        asked = {milestone_name(number): number for number in args.milestone_numbers}
        if gone := [name for name, number in asked.items() if number <= self._words and name not in steps]:
            logger.warning(
                "--milestones: %s will not be written: the run goes on behind %s words; start anew to have them",
                ", ".join(gone), f"{self._words:,}",
            )  # fmt: skip
        limit = args.word_limit_number or sys.maxsize
        later = [name for name, at in steps.items() if at > step and not asked.get(name, sys.maxsize) <= limit]
        if later:
            logger.warning(
                "%s: %s is of a step behind %d, from where the run goes on, and will not be written anew; remove it if "
                "this is another run (--resume_changed)", args.output_dir, ", ".join(later), step,
            )  # fmt: skip

    def on_step_end(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Count, write the milestones that this step has come to, and end the run at its limit."""
        if counting_flag(args) is None:
            return
        before, self._words = self._words, self.exposure.count_words()
        passed = [number for number in args.milestone_numbers if before < number <= self._words]
        self.at_milestone = bool(passed)
        if passed:
            with self.paused():
                self._leave_milestones(args, state, passed)
        if args.word_limit_number is None or self._words < args.word_limit_number:
            return
        self.reached = True
        if state.global_step >= state.max_steps:
            return  # transformers ends the run itself.
        # As transformers' DefaultFlowCallback does behind the last step.
        control.should_training_stop = True
        control.should_save |= args.save_strategy == SaveStrategy.STEPS
        control.should_evaluate |= args.eval_strategy == IntervalStrategy.STEPS and args.eval_delay <= state.global_step
        state.max_steps = state.global_step  # The run is finished, not broken off.

    def _leave_milestones(self, args: TrainingArguments, state: TrainerState, passed: Sequence[int]) -> None:
        """Write the milestones that a step has come to, and call the hooks for each."""
        output_dir = Path(str(args.output_dir))
        names = [milestone_name(number) for number in passed]
        if is_first_rank():
            same = " (one step, the same weights)" if len(names) > 1 else ""
            logger.info("step %d, %s words: %s%s", state.global_step, f"{self._words:,}", ", ".join(names), same)
        self.exposure.write(MILESTONE, state, milestones=names)
        for name, number in zip(names, passed, strict=True):
            milestone = Milestone(name, output_dir / name, state.global_step, self._words, number)
            self.write_milestone(milestone)
            for hook in self.hooks:
                hook(milestone)


def counting_flag(args: TrainingArguments) -> str | None:
    """The flag that needs the words of every step; None where there is none."""
    if args.word_limit_number is not None:
        return "--word_limit"
    return "--milestones" if args.milestone_numbers else None
