"""`python -m llava.demo.grounding`: a small GPT-2 learns to say where in a picture and when in a clip.

Reads as the demo's table of contents.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.command import CommandParser, run_command
from llava.demo import common
from llava.demo.common import QUICK_STEPS, TOWER_FOLDER, phase
from llava.io import write_json

if TYPE_CHECKING:
    from llava.demo.grounding.dataset import GroundingData
    from llava.demo.grounding.evaluation import Case

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Turns behind one another, an end of text behind each answer: of a conversation only the answers are learned."""

# Brackets with a space before them, as they stand in answers, are tokens of their own.
_BRACKETS = "[ ] { }"
_QUICK_AMOUNT = 6
_NUM_EXAMPLES = 6
_AMOUNTS = {
    "train_pictures": (14000, "pictures to train on"),
    "train_clips": (6500, "clips to train on"),
    "held_out_pictures": (256, "pictures to ask about at the end"),
    "held_out_clips": (256, "clips to ask about at the end"),
}


def build_parser() -> CommandParser:
    parser = common.build_parser(
        "python -m llava.demo.grounding",
        "Writes pictures of coloured shapes and clips of shapes that move, rest and move on, trains a tiny "
        "GPT-2 to answer where a shape is and when it rests, and asks it about shapes in colours that it has never "
        "seen together.",
        "demo_grounding_output",
        _AMOUNTS,
    )
    parser.add_argument(
        "--compare_placeholder",
        action="store_true",
        help="train a second model on the same data with --grounding placeholder, to which coordinates are words",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status, 2 with one line on standard error for a user's mistake."""
    return run_command(lambda: run(build_parser().parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Write data, train, ask about held-out pictures and clips, and report."""
    common.check_arguments(args, {f"num_{name}": 1 for name in _AMOUNTS})
    if args.quick:
        vars(args).update({f"num_{name}": _QUICK_AMOUNT for name in _AMOUNTS})

    from llava.config import LAPE, PLACEHOLDER
    from llava.data.records import read_records
    from llava.demo.grounding.dataset import Amounts, write_dataset
    from llava.demo.grounding.evaluation import case_lines, score_lines, summarise, write_pictures

    output, seconds = args.output_dir, dict[str, float]()
    with phase("writing pictures and clips", seconds):
        data = write_dataset(
            output / "data",
            seed=args.seed,
            train=Amounts(args.num_train_pictures, args.num_train_clips),
            held_out=Amounts(args.num_held_out_pictures, args.num_held_out_clips),
        )
    with phase("tokenizer and model", seconds):
        # Through the library's own reader: the tokenizer learns the texts that training sees.
        records = read_records([str(path) for path in data.train])
        questions = [turn.text for record in records for turn in record.turns if turn.role == "user"]
        write_base_model(output / "base_model", questions, args.seed)
    # LAPE first: its checkpoint is the one that is shown.
    modes = [LAPE, *([PLACEHOLDER] if args.compare_placeholder else [])]
    cases = {mode: train_and_ask(args, data, mode, seconds) for mode in modes}
    write_json(
        output / "grounding.json",
        {
            "scores": {mode: {kind: summarise(of_kind) for kind, of_kind in of.items()} for mode, of in cases.items()},
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "cases": {
                mode: [case.to_json() for of_kind in of.values() for case in of_kind] for mode, of in cases.items()
            },
        },
    )
    examples = {
        kind: common.choose_examples(of_kind, _NUM_EXAMPLES, lambda case: case.question)
        for kind, of_kind in cases[LAPE].items()
    }
    write_pictures(output / "pictures", examples)
    print("", *map(case_lines, examples.values()), "", sep="\n")
    for mode, of_mode in cases.items():
        print(score_lines(mode, of_mode["pictures"], of_mode["clips"]))
    print(common.time_lines(seconds))
    print(f"in {output}: data/, checkpoint_{LAPE}/, grounding.json, pictures/")
    print("ask yourself:")
    case = cases[LAPE]["pictures"][0]
    print(
        f"  python -m llava.serve.cli --model_path {output / f'checkpoint_{LAPE}'} --image {case.file} "
        f'--prompt "{case.question}" --draw answer.png'
    )


def write_base_model(folder: Path, questions: Sequence[str], seed: int) -> None:
    """Write a GPT-2 with random weights, and a tokenizer trained on ``questions``."""
    common.write_base_model(
        folder,
        [*questions, _BRACKETS],
        seed=seed,
        context_length=512,
        num_layers=3,
        dropout=0.0,
        position_range=1.0,
        range_of_new=0.1,  # Wider than the usual 0.02: places in a picture must be told apart from the first step.
        chat_template=CHAT_TEMPLATE,
    )


def train_and_ask(
    args: argparse.Namespace, data: GroundingData, mode: str, seconds: dict[str, float]
) -> dict[str, list[Case]]:
    """Train a model with a kind of coordinates on pictures and clips together, load it afresh, and ask it."""
    from llava.demo.grounding.evaluation import answer_questions
    from llava.serve.generate import Captioner

    checkpoint = args.output_dir / f"checkpoint_{mode}"
    with phase(f"training with --grounding {mode}", seconds):
        common.train(
            "demo_grounding.yaml",
            seed=args.seed,
            max_steps=QUICK_STEPS if args.quick else None,
            grounding=mode,
            model_name_or_path=args.output_dir / "base_model",
            vision_tower=TOWER_FOLDER,
            data_path=data.train,
            output_dir=checkpoint,
        )
    with phase(f"asking the model of --grounding {mode}", seconds):
        captioner = Captioner.from_checkpoint(str(checkpoint))
        return {
            "pictures": answer_questions(captioner, data.held_out_pictures),
            "clips": answer_questions(captioner, data.held_out_clips),
        }


if __name__ == "__main__":
    sys.exit(main())
