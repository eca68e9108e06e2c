"""`python -m llava.demo`: a small GPT-2 learns to describe videos in Italian."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.messages import run_command
from llava.parser import CommandParser, check_at_least, check_output_folder

_QUICK_TRAIN_CLIPS, _QUICK_HELD_OUT_CLIPS, _QUICK_STEPS = 64, 12, 2


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.demo",
        description="Writes clips of moving shapes, trains a tiny GPT-2 to describe them in Italian, and shows what "
        "it says about clips whose shape and colour it has never seen together.",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("demo_output"), metavar="DIR", help="default: demo_output"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order (default 0)")
    parser.add_argument(
        "--num_train_clips", type=int, default=24000, metavar="N", help="clips to train on, each once (default 24000)"
    )
    parser.add_argument(
        "--num_held_out_clips", type=int, default=256, metavar="N", help="clips to caption at the end (default 256)"
    )
    parser.add_argument("--vision_tower", type=Path, metavar="DIR", help="a tower other than the one that is shipped")
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds on a few clips, to see that everything runs; learns nothing"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status, 2 with one line on standard error for a user's mistake."""
    return run_command(lambda: run(build_parser().parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Run the demo as a command line says."""
    check_at_least(args, {"num_train_clips": 1, "num_held_out_clips": 2, "seed": 0})
    check_output_folder(str(args.output_dir), "--output_dir")

    from llava.demo.run import TOWER_FOLDER, DemoSettings, run_demo

    run_demo(
        DemoSettings(
            output_dir=args.output_dir,
            seed=args.seed,
            num_train_clips=_QUICK_TRAIN_CLIPS if args.quick else args.num_train_clips,
            num_held_out_clips=_QUICK_HELD_OUT_CLIPS if args.quick else args.num_held_out_clips,
            tower=args.vision_tower or TOWER_FOLDER,
            max_steps=_QUICK_STEPS if args.quick else None,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
