"""Trains the tiny vision tower that the demo freezes: `python -m llava.demo.pretrain_tower`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.command import CommandParser, check_at_least, check_output_folder, run_command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a ValueError for flags that are wrong."""
    parser = CommandParser(
        prog="python -m llava.demo.pretrain_tower", description="Train the tiny vision tower that the demo freezes."
    )
    parser.add_argument(
        "--output_dir", metavar="DIR", type=Path, required=True, help="where it is saved; llava/demo/tower is shipped"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the frames (default 0)")
    parser.add_argument("--num_steps", metavar="N", type=int, default=2200, help="optimizer steps (default 2200)")
    parser.add_argument("--batch_size", metavar="N", type=int, default=64, help="frames in a step (default 64)")
    parser.add_argument("--learning_rate", metavar="X", type=float, default=3e-3, help="its peak (default 0.003)")
    args = parser.parse_args(argv)
    check_at_least(args, {"seed": 0, "num_steps": 1, "batch_size": 1, "learning_rate": 0})
    check_output_folder(str(args.output_dir), "--output_dir")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train, report and save; the exit status is 0, or 2 for a mistake in the flags."""
    return run_command(lambda: train_tower(parse_arguments(argv)))


def train_tower(args: argparse.Namespace) -> None:
    """Train, report and save."""
    from llava.demo.patch_labeller import NEW_TO_TOWER, TOWER_PAIRS, measure_accuracy, save_labeller, train_labeller

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    how = {name: value for name, value in vars(args).items() if name != "output_dir"}
    labeller = train_labeller(**how)
    size = save_labeller(labeller, args.output_dir)
    print(f"saved {args.output_dir}: {size / 1000:.0f} kB of weights")
    print("foreground patches of fresh frames labelled right:")
    for name, pairs in (("training pairs", TOWER_PAIRS), ("pairs new to the tower", NEW_TO_TOWER)):
        accuracy = measure_accuracy(labeller, args.seed, 1000, pairs)
        print(
            f"  {name}: shape {accuracy.shape:.1%}, colour {accuracy.colour:.1%}, "
            f"both {accuracy.both:.1%}; centre off by {accuracy.centre_error:.2f} px"
        )


if __name__ == "__main__":
    sys.exit(main())
