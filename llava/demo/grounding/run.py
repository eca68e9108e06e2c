"""The demo of grounding from an empty folder to figures: reads as its table of contents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.data.records import read_records
from llava.demo.grounding.base_model import write_base_model
from llava.demo.grounding.dataset import Amounts, GroundingData, write_dataset
from llava.demo.grounding.evaluation import Case, answer_questions, choose_examples, summarise
from llava.demo.grounding.picture import write_pictures
from llava.demo.grounding.report import case_lines, score_lines
from llava.demo.report import time_lines
from llava.demo.run import TOWER_FOLDER
from llava.demo.timing import phase
from llava.grounding.syntax import LAPE, PLACEHOLDER

_NUM_EXAMPLES = 6


@dataclass(frozen=True)
class GroundingSettings:
    """What the command line sets."""

    output_dir: Path
    seed: int
    train: Amounts
    held_out: Amounts
    compare_placeholder: bool = False
    max_steps: int | None = None
    """Steps of each training; by default one pass over the data."""


@dataclass(frozen=True)
class Outcome:
    """The cases of one model."""

    pictures: list[Case]
    clips: list[Case]


def run_grounding_demo(settings: GroundingSettings) -> Outcome:
    """Write data, train, ask about held-out pictures and clips, and report."""
    seconds: dict[str, float] = {}
    output = settings.output_dir
    with phase("writing pictures and clips", seconds):
        data = write_dataset(output / "data", seed=settings.seed, train=settings.train, held_out=settings.held_out)
    with phase("tokenizer and model", seconds):
        write_base_model(output / "base_model", questions_of(data.train), seed=settings.seed)
    outcomes = {LAPE: train_and_ask(settings, data, LAPE, seconds)}
    if settings.compare_placeholder:
        outcomes[PLACEHOLDER] = train_and_ask(settings, data, PLACEHOLDER, seconds)
    write_results(output / "grounding.json", outcomes, seconds)
    outcome = outcomes[LAPE]
    examples = {
        "pictures": choose_examples(outcome.pictures, _NUM_EXAMPLES),
        "clips": choose_examples(outcome.clips, _NUM_EXAMPLES),
    }
    write_pictures(output / "pictures", examples)
    print()
    for cases in examples.values():
        print(case_lines(cases))
    print()
    for mode, of_mode in outcomes.items():
        print(score_lines(mode, of_mode.pictures, of_mode.clips))
    print(time_lines(seconds))
    print(f"in {output}: data/, checkpoint_{LAPE}/, grounding.json, pictures/")
    print("ask yourself:")
    case = outcome.pictures[0]
    print(
        f"  python -m llava.serve.cli --model_path {checkpoint_of(settings, LAPE)} --image {case.file} "
        f'--prompt "{case.question}" --draw answer.png'
    )
    return outcome


def train_and_ask(settings: GroundingSettings, data: GroundingData, mode: str, seconds: dict[str, float]) -> Outcome:
    """Train a model with a kind of coordinates, load it afresh as any user would, and ask it."""
    from llava.serve.generate import Captioner

    with phase(f"training with --grounding {mode}", seconds):
        train_to_answer(settings, data, mode)
    with phase(f"asking the model of --grounding {mode}", seconds):
        captioner = Captioner.from_checkpoint(str(checkpoint_of(settings, mode)))
        return Outcome(
            answer_questions(captioner, data.held_out_pictures), answer_questions(captioner, data.held_out_clips)
        )


def train_to_answer(settings: GroundingSettings, data: GroundingData, mode: str) -> None:
    """One training on pictures and clips together."""
    from llava.train.train import main as train

    steps = [] if settings.max_steps is None else ["--max_steps", str(settings.max_steps)]
    train(
        [
            *("--config", "demo_grounding.yaml"),
            *("--grounding", mode),
            *("--model_name_or_path", str(settings.output_dir / "base_model")),
            *("--vision_tower", str(TOWER_FOLDER)),
            *("--data_path", *map(str, data.train)),
            *("--output_dir", str(checkpoint_of(settings, mode))),
            *("--overwrite_output_dir", "true"),  # A second demonstration takes the first one's place.
            *("--seed", str(settings.seed)),
            *steps,
        ]
    )


def checkpoint_of(settings: GroundingSettings, mode: str) -> Path:
    """Where the model with a kind of coordinates is stored."""
    return settings.output_dir / f"checkpoint_{mode}"


def questions_of(data_files: Sequence[Path]) -> list[str]:
    """Every question of data files."""
    records = read_records([str(path) for path in data_files])
    return [turn.text for record in records for turn in record.turns if turn.role == "user"]


def write_results(path: Path, outcomes: dict[str, Outcome], seconds: dict[str, float]) -> None:
    """Write scores, times and every case as JSON."""
    content = {
        "scores": {
            mode: {"pictures": summarise(outcome.pictures), "clips": summarise(outcome.clips)}
            for mode, outcome in outcomes.items()
        },
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "cases": {
            mode: [case.to_json() for case in (*outcome.pictures, *outcome.clips)] for mode, outcome in outcomes.items()
        },
    }
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
