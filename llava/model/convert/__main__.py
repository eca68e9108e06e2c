"""The command line of ``python -m llava.model.convert``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.command import CommandParser, run_command
from llava.registry import import_plugins

if TYPE_CHECKING:  # It takes seconds to load, which --help need not wait for.
    from llava.model.convert.report import ConversionReport

CONVERSION_FILE = "conversion.json"
"""The table of a conversion, with all names; the mark by which ``--overwrite`` knows its folder."""


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.model.convert",
        description="Say what a checkpoint of the LLaVA family or of transformers is made of, and write it in this "
        "library's layout. Its folder can also be loaded, trained on and exported as it is.",
    )
    parser.add_argument("checkpoint", metavar="FOLDER", help="checkpoint of another layout")
    parser.add_argument(
        "out", metavar="OUT", nargs="?", help="where the result goes; a folder that is empty or not there yet"
    )
    parser.add_argument("--dry_run", action="store_true", help="only say what would be done; nothing is written")
    parser.add_argument("--vision_tower", metavar="DIR", help="where the model's vision tower lies, if it has moved")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in OUT")
    parser.add_argument("--plugins", nargs="+", metavar="MODULE", help="modules to import first (docs/extending.md)")
    return parser


def convert_checkpoint(
    folder: str, out: str | None, dry_run: bool = False, vision_tower: str | None = None, overwrite: bool = False
) -> ConversionReport:
    """Convert a checkpoint; the arguments are those of the command line, and ``dry_run`` needs no ``out``.

    Raises:
        ValueError: a folder is not as it must be, or the checkpoint cannot be loaded.
    """
    from llava.io import write_json
    from llava.messages import list_names
    from llava.model.convert.foreign import ForeignCheckpoint
    from llava.model.export.folder import check_target, staged_folder
    from llava.model.loading import load_model
    from llava.model.pretrained import find_layout, locate_model, quiet_transformers, read_config

    path = locate_model(folder, "FOLDER")
    if out is not None:
        check_target(Path(out), path, overwrite, CONVERSION_FILE)
    elif not dry_run:
        raise ValueError("OUT is missing: the folder that the result is written to; only --dry_run needs none")
    config = read_config(path, "FOLDER")
    layout = find_layout(config, path, "FOLDER")
    if layout is None:
        raise ValueError(
            f"FOLDER {path!r} is a plain language model, or in this library's layout already: there is nothing to "
            "convert, load it as it is"
        )
    foreign = ForeignCheckpoint(path, config, layout, vision_tower, "FOLDER")
    foreign.describe()
    if foreign.report.missing:
        raise ValueError(
            f"FOLDER {path!r} lacks {list_names(foreign.report.missing)}, which would be random in OUT as if "
            "it had been trained; begin it anew in a training with --model_name_or_path, or take a folder that has it"
        )
    if dry_run or out is None:
        return foreign.report
    with staged_folder(Path(out)) as staged:
        loaded = load_model(path, vision_tower=vision_tower, dtype=foreign.dtype, flag="FOLDER")
        assert loaded.conversion is not None
        with quiet_transformers():
            loaded.model.save_pretrained(staged)
        loaded.tokenizer.save_pretrained(staged)
        files = sorted(path.name for path in staged.iterdir())
        write_json(staged / CONVERSION_FILE, {**loaded.conversion.to_dict(), "files": files})
    return loaded.conversion


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says; returns the exit status, 2 with one line for a user's mistake."""

    def run() -> None:
        args = build_parser().parse_args(argv)
        import_plugins(args.plugins)
        report = convert_checkpoint(args.checkpoint, args.out, args.dry_run, args.vision_tower, args.overwrite)
        print(f"{report}\n{'nothing was written: --dry_run' if args.dry_run else f'written: {args.out}'}")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
