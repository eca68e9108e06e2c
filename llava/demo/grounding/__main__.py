"""`python -m llava.demo.grounding`: a small GPT-2 learns to say where in a picture and when in a clip."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.messages import run_command
from llava.parser import CommandParser, check_at_least, check_output_folder

_QUICK_AMOUNT, _QUICK_STEPS = 6, 2


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.demo.grounding",
        description="Writes pictures of coloured shapes and clips of shapes that move, rest and move on, trains a tiny "
        "GPT-2 to answer where a shape is and when it rests, and asks it about shapes in colours that it has never "
        "seen together.",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("demo_grounding_output"),
        metavar="DIR",
        help="default: demo_grounding_output",
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order (default 0)")
    for name, default, what in (
        ("train_pictures", 14000, "pictures to train on"),
        ("train_clips", 6500, "clips to train on"),
        ("held_out_pictures", 256, "pictures to ask about at the end"),
        ("held_out_clips", 256, "clips to ask about at the end"),
    ):
        parser.add_argument(f"--num_{name}", type=int, default=default, metavar="N", help=f"{what} (default {default})")
    parser.add_argument(
        "--compare_placeholder",
        action="store_true",
        help="train a second model on the same data with --grounding placeholder, to which coordinates are words",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few seconds on a few samples, to see that everything runs; learns nothing",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status, 2 with one line on standard error for a user's mistake."""
    return run_command(lambda: run(build_parser().parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Run the demo as a command line says."""
    amounts = {name: value for name, value in vars(args).items() if name.startswith("num_")}
    check_at_least(args, {**dict.fromkeys(amounts, 1), "seed": 0})
    check_output_folder(str(args.output_dir), "--output_dir")
    if args.quick:
        amounts = dict.fromkeys(amounts, _QUICK_AMOUNT)

    from llava.demo.grounding.dataset import Amounts
    from llava.demo.grounding.run import GroundingSettings, run_grounding_demo

    run_grounding_demo(
        GroundingSettings(
            output_dir=args.output_dir,
            seed=args.seed,
            train=Amounts(amounts["num_train_pictures"], amounts["num_train_clips"]),
            held_out=Amounts(amounts["num_held_out_pictures"], amounts["num_held_out_clips"]),
            compare_placeholder=args.compare_placeholder,
            max_steps=_QUICK_STEPS if args.quick else None,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
