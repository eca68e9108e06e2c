"""``llava init-slurm``, or ``python -m llava.train.slurm.init``: a script for ``sbatch`` as a file of one's own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llava.command import CommandLineError, CommandParser, check_output_folder, run_command
from llava.io import write_text

SCRIPT = Path(__file__).with_name("train.sbatch")


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.train.slurm.init",
        description="Write a script for sbatch that trains on one node or many, and is requeued (docs/slurm.md).",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="a file, or a folder to put it in (default: train.sbatch, here)"
    )
    parser.add_argument("--force", "--overwrite", action="store_true", help="replace what is there already")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the script; returns the exit status, 2 with one line on standard error for a mistake."""

    def run() -> None:
        args = build_parser().parse_args(argv)
        target = Path(args.output or ".")
        if target.is_dir() or not target.suffix:
            target /= SCRIPT.name
        if target.exists() and not args.force:
            raise CommandLineError(f"{target} exists already; give another --output, or --force to replace it")
        check_output_folder(str(target.parent), "--output")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, SCRIPT.read_text(encoding="utf-8"))
        print(f"{target}: written\nnext:\n  1. edit its top: nodes, GPUs, time, and CONFIG")
        print(f"  2. mkdir -p logs && sbatch {target}")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
