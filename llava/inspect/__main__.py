"""``python -m llava.inspect``: what a run would train on, and what would ruin it, before it starts."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.command import CommandLineError, CommandParser, check_at_least, check_output_folder, run_command
from llava.inspect.findings import CODES, Findings
from llava.io import write_text
from llava.messages import shorten_text
from llava.train.command_line import explain_unknown_flag

PROGRAM = "python -m llava.inspect"
PAGE = "inspect.html"
_DEFAULT_BATCHES = 2


def build_parser() -> CommandParser:
    """The parser of the inspection's own flags; the others are the trainer's."""
    parser = CommandParser(
        prog=PROGRAM,
        usage="%(prog)s [--fast] [--html [FILE]] [--batches N] [--memory GIB] [--accept KIND ...] FLAGS OF THE TRAINER",
        description="Look at a training run before it starts: its data, batches, model, and what would ruin it. "
        "Nothing is trained, no GPU is needed, and nothing is written but the page.",
        epilog=f"All other flags are the trainer's, --config among them ({PROGRAM.replace('inspect', 'train.train')} "
        "--help). Kinds of findings: " + "; ".join(f"{code}: {text}" for code, text in CODES.items()) + ". "
        "Exit status: 0 where nothing would ruin the run, 1 where something would, 2 for a wrong command line. "
        "docs/inspect.md says what to do about each finding.",
    )
    parser.add_argument("--fast", action="store_true", help="open few media, and make no passes of a large model")
    parser.add_argument(
        "--html", nargs="?", const=PAGE, metavar="FILE",
        help=f"write a page for the browser, with batches and frames (default: {PAGE} in the current folder)",
    )  # fmt: skip
    parser.add_argument(
        "--batches", type=int, default=_DEFAULT_BATCHES, metavar="N",
        help=f"first batches of the run to look at (default: {_DEFAULT_BATCHES})",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="of the GPU that it is to run on: a step that needs more is found"
    )
    parser.add_argument(
        "--accept", nargs="+", default=[], metavar="KIND",
        help="kinds of findings that are meant to be so, and count as warnings",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Inspect a run; the exit status is 0, 1 where something would ruin it, or 2, as ``--help`` says."""
    return run_command(lambda: inspect(list(sys.argv[1:] if argv is None else argv)))


def inspect(words: list[str]) -> int:
    """Do what a command line asks for."""
    parser = build_parser()
    own, rest = parser.parse_known_args(words)
    if own.batches < 1:
        raise CommandLineError(f"--batches is {own.batches}; it must be at least 1")
    check_at_least(own, {"memory": 0})
    if unknown := [code for code in own.accept if code not in CODES]:
        raise CommandLineError(f"--accept names {', '.join(unknown)}; known: {', '.join(CODES)}")
    # A misspelled flag is answered before anything is imported that takes its time.
    if (wrong := explain_unknown_flag(rest, parser.flags)) is not None:
        raise CommandLineError(wrong)
    if own.html is not None:
        check_page(own.html)
    from llava.inspect.inspection import describe, inspect_run
    from llava.inspect.page import build_page
    from llava.inspect.run import read_arguments

    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    run = read_arguments(rest, parser.flags)
    findings = Findings(own.accept)
    seen = inspect_run(run, findings, own.fast, own.batches, own.memory)
    for section in describe(seen):
        print(section, end="\n\n")
    print(findings.conclude(), flush=True)
    if own.html is not None:
        Path(own.html).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(own.html), build_page(seen, shlex.join([*parser.prog.split(), *words])))
        print(f"written: {own.html}", flush=True)
    return 1 if findings.num_errors else 0


def check_page(file: str) -> None:
    """A CommandLineError for a page that could not be written, or would take the place of something else."""
    if Path(file).suffix.lower() not in (".html", ".htm") or Path(file).is_dir():
        raise CommandLineError(f"--html {shorten_text(file)}: expected the name of a file that ends with .html")
    check_output_folder(str(Path(file).parent), "--html")


if __name__ == "__main__":
    sys.exit(main())
