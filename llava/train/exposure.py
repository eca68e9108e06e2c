"""``python -m llava.train.exposure OUTPUT_DIR``: count once more what a run has presented, and compare.

Nothing of what the run counted is used: the data files are read and tokenised again, and their samples put in the order
that the run's settings make. What comes out is held against each line of ``exposure.jsonl``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.command import CommandParser, check_at_least, run_command
from llava.io import num_cores, read_json_lines

_MOST_SHOWN = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Recount a run; the exit status is 0 where all is equal, 1 where it is not, 2 after an error."""
    return run_command(lambda: recount(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a ValueError for flags that are wrong."""
    parser = CommandParser(
        prog="python -m llava.train.exposure",
        description="Count again, from data and order, what a run has presented, and compare it with exposure.jsonl.",
        epilog="Exit status: 0 where every line is equal, 1 where one differs, 2 where it cannot be counted.",
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="the run's folder")
    parser.add_argument("--data_path", nargs="+", metavar="DATA", help="where its data lie now, if they were moved")
    parser.add_argument("--image_folder", metavar="DIR", help="where its images lie now")
    parser.add_argument("--video_folder", metavar="DIR", help="where its videos lie now")
    parser.add_argument("--workers", metavar="N", type=int, default=num_cores(), help="processes (default: one a core)")
    args = parser.parse_args(argv)
    check_at_least(args, {"workers": 0})
    return args


def recount(args: argparse.Namespace) -> int:
    """Recount the run of a command line, and print what was found.

    Returns:
        0 where all is equal, 1 where it is not.

    Raises:
        ValueError: there is no such run, or its data are others by now.
    """
    from llava.train.exposure_log import EXPOSURE_FILE
    from llava.train.identity import RunIdentity
    from llava.train.recount import build_run_order, compare, find_saved, open_data

    folder = Path(args.output_dir)
    lines = read_json_lines(folder / EXPOSURE_FILE)
    if not lines:
        raise ValueError(f"{folder / EXPOSURE_FILE}: {'is empty' if folder.is_dir() else 'no such file'}")
    saved = find_saved(folder)
    run = RunIdentity.read(saved)
    assert run is not None
    dataset = open_data(saved, run, args)
    order = build_run_order(dataset, run)
    differences = compare(lines, dataset, order, args.workers)
    for difference in differences[:_MOST_SHOWN]:
        print(difference)
    last = lines[-1]
    words = f"{last['words']:,} words up to step {last['step']}"
    if differences:
        more = f", {len(differences) - _MOST_SHOWN} more" if len(differences) > _MOST_SHOWN else ""
        print(
            f"{folder / EXPOSURE_FILE}: {len(differences)} numbers differ{more}. A run that was gone on with as "
            "another (--resume_changed, --ignore_data_skip) is recounted as if it had not been"
        )
        return 1
    print(f"{folder / EXPOSURE_FILE}: {len(lines)} lines, {words}: every number equals the recount")
    return 0


if __name__ == "__main__":
    sys.exit(main())
