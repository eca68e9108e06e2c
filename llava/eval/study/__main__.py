"""``python -m llava.eval.study``: variants of a recipe x seeds, trained, scored, and in one table."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import llava
from llava.command import INTERRUPTED, CommandLineError, CommandParser, run_command
from llava.eval.study.plan import Cell, Study, read_study
from llava.io import hash_json, write_json

_PATHS = ("data_path", "eval_data_path", "vision_tower", "image_folder", "video_folder")
"""Flags of training that name what must be there, unless a step makes it."""
CHECKED = "prepared/checked.json"
_CHECK_FLAGS = """
import json, sys
from llava.train.command_line import parse_arguments
for name, words in json.load(sys.stdin):
    try:
        parse_arguments(words)
    except ValueError as error:
        print(f"variant {name}: {error}")
"""


def build_parser() -> CommandParser:
    parser = CommandParser(
        description="Train variants of a recipe with several seeds, score them, and compare them with a baseline."
    )
    parser.add_argument("study", metavar="STUDY", help="YAML file that describes the study (docs/study.md)")
    parser.add_argument("--output_dir", metavar="DIR", help="folder of everything (default: the file's output_dir)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=TEXT", help="other texts than those under 'values' of the file"
    )
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these variants")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="only these seeds")
    parser.add_argument("--cell", nargs="+", type=int, metavar="N", help="only these cells, by their number in --list")
    parser.add_argument(
        "--over", action="store_true", help="with --table: no training runs any more, what has no end was killed"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list the cells and how far they are, and do nothing")
    what.add_argument("--dry_run", action="store_true", help="check everything, print all commands, and run nothing")
    what.add_argument("--prepare", action="store_true", help="run the steps before the first training only")
    what.add_argument("--table", action="store_true", help="make the tables of what is done, and train nothing")
    what.add_argument(
        "--sbatch",
        action="store_true",
        help="write the scripts of a Slurm array, a task for each cell, and of the table behind it, in --output_dir",
    )
    what.add_argument("--submit", action="store_true", help="write them and hand them to sbatch")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Go through a study; returns the exit status: 0, 2 after an error, 85 if stopped, 130 after ^C."""
    from llava.eval.study.cells import STOPPED, Stopped

    def run() -> int:
        args = build_parser().parse_args(argv)
        if args.over and not args.table:
            raise CommandLineError("--over says something of --table; give both")
        study = read_study(Path(args.study), args.output_dir, args.set)
        try:
            return go_through(study, choose_cells(study, args), args)
        except Stopped:
            print("stopped; the same command goes on", file=sys.stderr)
            return STOPPED

    status = run_command(run)
    if status == INTERRUPTED:
        print("the same command goes on where it stopped", file=sys.stderr)
    return status


def choose_cells(study: Study, args: argparse.Namespace) -> list[Cell]:
    """The cells that the flags ask for."""
    for flag, given, known in (
        ("--variants", args.variants, list(study.variants)),
        ("--seeds", args.seeds, list(study.seeds)),
        ("--cell", args.cell, range(len(study.cells))),
    ):
        for value in given or ():
            if value not in known:
                told = f"0 to {len(study.cells) - 1}" if flag == "--cell" else ", ".join(map(str, known))
                raise CommandLineError(f"{flag} is {value}; {args.study} has {told}")
    return [
        cell
        for cell in study.cells
        if (args.variants is None or cell.variant in args.variants)
        and (args.seeds is None or cell.seed in args.seeds)
        and (args.cell is None or cell.number in args.cell)
    ]


def go_through(study: Study, cells: Sequence[Cell], args: argparse.Namespace) -> int:
    """What one call of the command does."""
    from llava.eval.study import cells as trainings
    from llava.eval.study import progress, slurm
    from llava.eval.study.prepare import prepare
    from llava.eval.study.scoring import check_scoring

    if args.list:
        print(progress.format_list(study, cells))
        return 0
    if args.table:
        return print_tables(study, args.over)
    if args.sbatch or args.submit:
        slurm.write_scripts(study, cells, args.output_dir is not None, args.set, args.submit)
        return 0
    checked = check_plan(study, cells)
    if args.dry_run:
        print_commands(study, cells)
        return 0
    record = study.output_dir / CHECKED
    # Only now: --dry_run leaves nothing behind.
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, checked)
    lock_and_prepare(study, [] if args.prepare else cells, prepare)
    if args.prepare:
        return 0
    for cell in cells:  # All before the first training: hours may lie between the first and the last.
        trainings.check_unchanged(study, cell)
    check_scoring(study, cells)
    for place, cell in enumerate(cells, 1):
        run_cell(study, cell, f"[{place}/{len(cells)}] {cell.name}")
    print_tables(study)  # Whatever has become of other cells: these are done.
    return 0


def lock_and_prepare(study: Study, cells: Sequence[Cell], prepare: Callable[[Study], None]) -> None:
    """Steps and random weights, by one process at a time."""
    from llava.eval.study.cells import state
    from llava.eval.study.prepare import create_model, locked

    with locked(study):
        prepare(study)
        for cell in cells:
            if state(study, cell) != "trained":
                create_model(study, cell)


def run_cell(study: Study, cell: Cell, title: str) -> None:
    """Train a cell and score it, as far as that is not done."""
    from llava.eval.study import cells as trainings
    from llava.eval.study.scoring import score_cell

    def show(text: str) -> None:
        watched = sys.stderr.isatty()
        print(f"\r\033[K{title}: {text}" if watched else f"{title}: {text}", end="" if watched else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    if trainings.state(study, cell) == "trained":
        show("trained before")
    else:
        show("training starts")
        trainings.train(study, cell, trainings.start_training, show)
    if study.score is not None:
        score_cell(study, cell, show)
    seconds = trainings.read_trained(study, cell)["seconds"]
    show(f"done, trained for {seconds:,.0f} s\n" if sys.stderr.isatty() else f"done, trained for {seconds:,.0f} s")


def check_plan(study: Study, cells: Sequence[Cell]) -> list[str]:
    """Files and flags of all cells before anything runs: a typo in the last variant shows at once.

    Returns:
        Marks of what has passed, also before.

    Raises:
        ValueError: a file is missing that no step makes, or a flag is wrong.
    """
    # What a step makes need not be there yet.
    made = [study.fill(step.makes) for step in study.prepare]
    # One of each variant: seeds differ in no path.
    for cell in {cell.variant: cell for cell in cells}.values():
        where = f"{study.path}: variant {cell.variant}"
        named = [(name, part) for name in _PATHS for part in _as_list(cell.flags.get(name))]
        if cell.model is not None:
            named.append(("model: config", cell.model.config))
            named += [("model: tokenizer", name) for name in _as_list(cell.model.tokenizer)]
        for name, text in named:
            check_there(study.fill(text), made, f"{where}: {name}", may_be_name=name == "vision_tower")
    for data in study.score.data if study.score else ():
        check_there(study.fill(data), made, f"{study.path}: score: data")
    return check_flags(study, cells)


def check_flags(study: Study, cells: Sequence[Cell]) -> list[str]:
    """A ValueError for a flag of a variant that training does not know or cannot take, as its own parser says."""
    from llava.eval.study.prepare import environment

    told = [(cell.variant, study.train_words(cell)) for cell in {cell.variant: cell for cell in cells}.values()]
    # To load that parser takes seconds: not again for each cell of a study that was checked as a whole.
    record = study.output_dir / CHECKED
    passed = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
    keys = [hash_json([llava.__version__, study.variants[name], study.values], 16) for name, _ in told]
    told = [entry for entry, key in zip(told, keys, strict=True) if key not in passed]
    if not told:
        return passed
    found = subprocess.run(  # This package lies below training, and does not import it.
        [sys.executable, "-c", _CHECK_FLAGS],
        input=json.dumps(told),
        capture_output=True,
        text=True,
        env=environment(study),
        check=False,
    )
    lines = found.stdout.strip().splitlines()
    # The parser itself has failed, as where a plug-in cannot be imported.
    if found.returncode and not lines:
        lines = found.stderr.strip().splitlines()[-1:]
    if lines:
        raise ValueError(f"{study.path}: {lines[0]}")
    return sorted({*passed, *keys})


def _as_list(value: object) -> list[str]:
    return [] if value is None else [str(part) for part in (value if isinstance(value, list) else [value])]


def check_there(path: str, made: Sequence[str], where: str, may_be_name: bool = False) -> None:
    """A ValueError for a path that is not there and that no step makes; patterns and names on the hub are left be."""
    if Path(path).exists() or any(sign in path for sign in "*{[") or (may_be_name and not path.startswith((".", "/"))):
        return
    if not any(Path(path) == Path(name) or Path(name) in Path(path).parents for name in made):
        raise ValueError(f"{where}: {path}: no such file or folder, and no step under 'prepare' makes it")


def print_commands(study: Study, cells: Sequence[Cell]) -> None:
    for step in study.prepare:
        print(shlex.join(study.fill(word) for word in step.words))
    for cell in cells:
        print(f"\n# {cell.number}: {cell.name}")
        if cell.model is not None:
            tokenizer = [] if cell.model.tokenizer is None else ["--tokenizer", study.fill(cell.model.tokenizer)]
            words = ["python", "-m", "llava.model.random_weights", "--model_path", study.fill(cell.model.config)]
            words += [*tokenizer, "--output_dir", str(study.model_folder(cell)), "--seed", str(cell.seed)]
            print(shlex.join(words))
        print(shlex.join(["python", *study.train_command(cell)[1:]]))


def print_tables(study: Study, over: bool = False) -> int:
    """Write and print the tables; the status is 1 where a cell has failed."""
    from llava.eval.study.progress import format_unfinished, has_failed
    from llava.eval.study.table import CURVE_CHART, MARKDOWN, write_tables

    unfinished, status = format_unfinished(study, over), int(any(has_failed(study, cell, over) for cell in study.cells))
    try:
        print(write_tables(study), end="")
    finally:  # Also where no cell is done, and there is no table.
        if unfinished:
            print(f"\n{unfinished}", flush=True)
    beside = "results.json and table.csv"
    if (study.output_dir / CURVE_CHART).is_file():
        beside = f"{CURVE_CHART}, {beside}"
    print(f"\n{study.output_dir / MARKDOWN}, with {beside} beside it", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
