"""The command line of ``python -m llava.data.localized_narratives``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from llava.command import CommandParser, check_at_least, check_output_folder, run_command
from llava.data.localized_narratives.boxes import BoxSettings
from llava.data.localized_narratives.prepare import ImageFinder, Settings, prepare
from llava.data.localized_narratives.preview import PreviewChoice, write_previews


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.data.localized_narratives",
        description="Turn rows of Localized Narratives into NAME_t.jsonl (captions alone), NAME_ti.jsonl (the same "
        "with their images) and NAME_tim.jsonl (the same with a box behind every utterance). What could not be used "
        "is listed in left_out.jsonl. The same rows and images give the same bytes.",
        epilog="Exit status: 0 where files were written, 2 for a wrong command line or rows that cannot be used.",
    )
    parser.add_argument("rows", nargs="+", metavar="ROWS", help="JSONL files of rows, plain or compressed (.gz)")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of the images; paths start here")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to; made if it is not there")
    parser.add_argument(
        "--name", default="localized_narratives", help="what the names of the files begin with (default: %(default)s)"
    )
    parser.add_argument(
        "--image_name",
        action="append",
        default=[],
        metavar="PATTERN",
        help="name of an image below --images, such as '{dataset_id}/{image_id:0>12}.jpg'; several are tried in order "
        "(default: the id with 12 digits, then the id as it is, with a common suffix)",
    )
    parser.add_argument(
        "--keep_without_image",
        action="store_true",
        help="rows whose image is missing stay in all three files, as text (default: they are left out)",
    )
    parser.add_argument(
        "--words_per_box",
        type=int,
        default=1,
        metavar="N",
        help="join utterances until N words are together or punctuation ends a phrase (default 1: none are joined)",
    )
    # A flag for each field, with the field's default and help.
    for setting in fields(BoxSettings):
        assert setting.default is not None
        parser.add_argument(
            f"--{setting.name}",
            type=type(setting.default),
            default=setting.default,
            metavar="N",
            help=f"{setting.metadata['help']} (default: %(default)s)",
        )
    parser.add_argument(
        "--preview", type=int, default=0, metavar="N", help="draw N samples as PNGs into the folder preview of --out"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; returns the exit status, 2 with one line on standard error for a user's mistake."""
    return run_command(lambda: write_files(build_parser().parse_args(argv)))


def write_files(args: argparse.Namespace) -> None:
    """Write what a command line asks for, and print a summary."""
    out = Path(args.out)
    check_at_least(args, {"preview": 0})
    check_rows(args.rows)
    # All is checked before the folder is made.
    boxes = BoxSettings(**{setting.name: getattr(args, setting.name) for setting in fields(BoxSettings)})
    settings = Settings(boxes, args.words_per_box, args.keep_without_image)
    choice = PreviewChoice(args.preview)
    finder = ImageFinder(args.images, tuple(args.image_name))
    if Path(args.name).name != args.name:
        raise ValueError(f"--name is {args.name!r}; it must be the beginning of a file's name")
    check_output_folder(args.out, "--out")
    summary = prepare(args.rows, finder, out, args.name, settings, choice)
    print(summary)
    if choice.samples:
        written, failed = write_previews(choice.samples, Path(args.images), out / "preview")
        print(f"{len(written)} pictures in {out / 'preview'}", *(f"not drawn: {e}" for e in failed), sep="\n")


def check_rows(paths: Sequence[str]) -> None:
    """A ValueError if a file of rows is not there, or is given twice."""
    for number, path in enumerate(map(Path, paths)):
        if not path.is_file():
            raise ValueError(f"ROWS {path}: {'not a file' if path.exists() else 'no such file'}")
        # Under two names too: its rows would all be repeated.
        if any(path.samefile(other) for other in paths[:number]):
            raise ValueError(f"ROWS {path}: given twice")


if __name__ == "__main__":
    sys.exit(main())
