"""``python -m llava.train.replay OUTPUT_DIR/bad_step-N``: the step that stopped a run, once more and watched."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llava.command import CommandParser, run_command


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.train.replay",
        description="Run the batch that stopped a run once more, and print where its numbers go wrong.",
        epilog="Exit status: 0 where they go wrong here too, 1 where all are finite, 2 for a mistake.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="the folder bad_step-N that the stopped run has left"
    )
    parser.add_argument(
        "--rank", type=int, metavar="N", help="replay this rank's batch alone (default: all, one after the other)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--vision_tower", metavar="DIR", help="where the frozen vision tower lies, if it has moved")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Replay the batch of each rank.

    Returns:
        0 if a loss or a gradient is not finite here either, 1 if all are.

    Raises:
        ValueError: the folder is none that a stopped run has left.
    """
    options = build_parser().parse_args(argv)

    from llava.model.loading import choose_device
    from llava.train.nan_check import read_batch, read_run
    from llava.train.watched_step import bad_names, load_run_model, print_names, replay

    device = choose_device(options.device)
    settings = read_run(options.folder)
    # Files are read before the model, which takes longest: a rank that is missing is said at once.
    ranks = range(settings.world_size) if options.rank is None else [options.rank]
    batches = [read_batch(options.folder, rank) for rank in ranks]
    model = load_run_model(options.folder, settings, device, options.vision_tower)
    print_names("weights that are not finite", bad_names(model.named_parameters()))
    reproduced = [replay(model, batch, settings, device) for batch in batches]
    print("reproduced" if any(reproduced) else "all numbers are finite here: not reproduced")
    return 0 if any(reproduced) else 1


def cli() -> int:
    """``main`` for a shell: a mistake is one line and status 2."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
