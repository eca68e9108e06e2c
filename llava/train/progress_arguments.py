"""Flags of what is looked at while a model trains and of what its card says: groups of ``TrainingArguments``.

They are written as ``arguments.py`` says, and checked here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llava.train.reliability_arguments import ReliabilityArguments

MILESTONES, STEPS = "milestones", "steps"
"""What ``--score_at`` may name; the second with a number: steps:500."""
NO_TASKS = "none"
"""What ``--score_tasks`` names for no scores, where a recipe asks for some."""


@dataclass
class ScoringArguments:
    """Which tasks score the model while it trains, and when."""

    # --- scores while training ---
    score_data: list[str] | None = None
    """Folders, zips or files of the tasks that score the model while it trains, as for python -m llava.eval.babylm: how
    probable it finds right and wrong sentences. Scores go to the log and to scores.csv and scores.png in
    --output_dir; what is trained stays the same, bit for bit."""
    score_tasks: list[str] | None = None
    """Names of the tasks, such as blimp (default: all that --score_data holds). italian is part of the library and
    needs no --score_data; none scores nothing, where a recipe asks for scores."""
    score_at: list[str] | None = None
    """When: milestones (each of --milestones), steps:N (after every N steps), or both. The last step is always scored
    (default: milestones where there are any, else the last step alone)."""
    score_fast: bool = False
    """Score a part of each task, of the official fast sizes (200 pairs of each paradigm of BLiMP); the same items in
    every run."""

    def check_scoring(self) -> None:
        """A ValueError for flags of scoring that say nothing, or nothing that can be done."""
        if NO_TASKS in (self.score_tasks or []) and self.score_tasks != [NO_TASKS]:
            raise ValueError(f"--score_tasks {' '.join(self.score_tasks or [])}: none goes with no other task")
        if self.score_data is None and self.score_tasks is None and (self.score_at is not None or self.score_fast):
            name = "score_fast" if self.score_at is None else "score_at"
            raise ValueError(f"--{name} is given without --score_data; give the tasks' data, or --score_tasks italian")
        parse_score_times(self.score_at or [])

    @property
    def wants_scores(self) -> bool:
        """Whether there is anything to score the model on."""
        return (self.score_data is not None or self.score_tasks is not None) and self.score_tasks != [NO_TASKS]


@dataclass
class CardArguments:
    """What the card of a model, README.md beside its weights, cannot know by itself."""

    # --- model card ---
    card_license: str | None = None
    """Licence of the weights, by its identifier on the hub, such as apache-2.0 (default: none is stated)."""
    card_language: list[str] | None = None
    """Language of the data, as a code such as it or en; several are possible (default: none is stated)."""

    def check_card(self) -> None:
        """A ValueError for what is no identifier of a licence, and no code of a language."""
        if self.card_license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.card_license):
            raise ValueError(
                f"--card_license is {self.card_license!r}; expected an identifier of the hub, such as apache-2.0, "
                "cc-by-4.0 or other"
            )
        for code in self.card_language or []:
            if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?", code):
                raise ValueError(f"--card_language is {code!r}; expected a code of two or three letters, such as it")


@dataclass
class SampleArguments:
    """What the model says of a few samples while it trains."""

    # --- samples while training ---
    sample_every: int | None = None
    """Write what the model says of a few samples, always the same ones, with their frames and boxes, to
    OUTPUT_DIR/samples: after every so many steps, before the first and after the last (default: never). What is trained
    stays the same, bit for bit."""
    num_samples: int = 4
    """How many samples that are, clips, images and texts in turn (default 4)."""
    sample_data_path: list[str] | None = None
    """Data that they are taken from, in the forms of --data_path (default: --eval_data_path, else --data_path)."""
    sample_max_new_tokens: int = 64
    """Most tokens that the model says of each (default 64)."""
    sample_temperature: float = 0.0
    """Above 0 draws tokens at this temperature, from the same random numbers each time; 0 (default) takes the most
    probable ones."""

    def check_samples(self) -> None:
        """A ValueError for flags that say nothing, or nothing that can be done."""
        for name in ("sample_every", "num_samples", "sample_max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1, or leave it out")
        if not 0 <= self.sample_temperature < 100:
            raise ValueError(f"--sample_temperature is {self.sample_temperature}; it is 0 or more, as a rule below 2")
        if self.sample_every is None:
            if self.sample_data_path is not None:
                raise ValueError("--sample_data_path is given without --sample_every; give it too, such as 500")
            return
        if not getattr(self, "do_train", True):
            raise ValueError(
                "--sample_every is for a model that trains, but --do_train is false; leave it out: python -m "
                "llava.serve.cli and llava.eval.run ask a model as it is"
            )
        engine = getattr(self, "hf_deepspeed_config", None)
        if engine is not None and engine.is_zero3():
            raise ValueError(
                "--sample_every needs whole weights, and --deepspeed shares them out to ranks (ZeRO-3); give zero2, or "
                "leave it out and ask the checkpoints with python -m llava.serve.cli"
            )


@dataclass
class ProgressArguments(ScoringArguments, SampleArguments, CardArguments, ReliabilityArguments):
    """All of these groups."""

    # --- report of the run ---
    run_report: bool = True
    """Write report.html in --output_dir while the run goes on and at its end: losses, rates, gradients, scores,
    samples, command and versions on one page (default true)."""

    def check_progress(self) -> None:
        """Check each group; a ValueError names the flag."""
        self.check_scoring()
        self.check_card()
        self.check_samples()
        self.check_reliability()


def parse_score_times(words: list[str]) -> tuple[bool, list[int]]:
    """What ``--score_at`` asks for: whether milestones are scored, and the intervals of steps.

    Raises:
        ValueError: a word says neither.
    """
    at_milestones, intervals = False, []
    for word in words:
        name, _, number = word.partition(":")
        if word == MILESTONES:
            at_milestones = True
        elif name == STEPS and number.isdecimal() and int(number) > 0:
            intervals.append(int(number))
        else:
            raise ValueError(f"--score_at {word!r}: known are {MILESTONES} and {STEPS}:N, with N of 1 or more")
    return at_milestones, intervals
