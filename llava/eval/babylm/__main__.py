"""The command line of ``python -m llava.eval.babylm``.

find_tasks              tasks.py          data -> tasks, and what is missing
read_items              tasks.py          rows -> items
score_items             model_scores.py   items -> scores, in a file that an interrupted run goes on with
summarize               results.py        scores -> the score of a task, groups, ties, intervals
write_official          official.py       the files of the official pipeline
write_tables            tables.py         all tasks of all models
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.command import CommandLineError, CommandParser, check_at_least, check_output_folder, run_command

if TYPE_CHECKING:
    from llava.eval.babylm.results import TaskResult
    from llava.eval.babylm.tables import ModelResults
    from llava.eval.babylm.tasks import Item, TaskData
    from llava.eval.blind import BlindCheck
    from llava.eval.choices import Choice, Scorer

DTYPES = ("float32", "bfloat16", "float16", "stored")


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.eval.babylm",
        description="Score models on the zero-shot tasks of BabyLM by the likelihood that they give to sentences.",
        epilog="The same command goes on where it was interrupted. docs/babylm.md has the tasks and their files.",
    )
    add = parser.add_argument
    add("--model_path", nargs="+", metavar="MODEL", help="folders or hub names: of this library or any causal model")
    add(
        "--revision",
        nargs="+",
        metavar="NAME",
        help="of the models, such as chck_10M: folders in theirs, or on the hub",
    )
    add("--data", nargs="+", metavar="PATH", help="folders that hold tasks, zips of them, or files of JSON lines")
    add("--tasks", nargs="+", metavar="NAME", help="only these (default: all that are found)")
    add("--pairs", nargs="+", metavar="FILE", help="pairs of one's own: .jsonl, .tsv or .csv, each file a task")
    add("--pair_columns", nargs="+", metavar="NAME", help="their columns of sentences, the right one first; or one")
    add("--prefix_column", metavar="NAME", help="their column of what stands before each sentence, which is not scored")
    add("--group_columns", nargs="+", metavar="NAME", help="their columns of groups; the first one's are averaged over")
    add("--label_column", metavar="NAME", help="which sentence is right: its number or column; of one: 1 or 0")
    add("--image_folder", metavar="DIR", help="pictures of winoground and vqa (default: images/ beside their items)")
    add("--out", default="results", metavar="DIR", help="where results go (default: results)")
    add("--fast", action="store_true", help="a part of each task, of the official fast sizes; the same in every run")
    add(
        "--seed", type=int, default=0, metavar="N", help="of that part, of intervals and of the blind check (default 0)"
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights while they score (default float32)")
    add("--batch_tokens", type=int, metavar="N", help="tokens read together (default: as suits the device)")
    add("--num_processes", type=int, default=1, metavar="N", help="on the CPU, or each with a GPU (default 1)")
    add("--no_blind_check", action="store_true", help="do not score items with other items' pictures as well")
    add("--overwrite", action="store_true", help="replace scores that were made with other settings")
    add("--compare", nargs=2, metavar=("A", "B"), help="two folders of results, such as out/NAME/main: paired tests")
    add("--check", metavar="DIR", help="hold a folder of results, such as out/NAME/main, against the official sizes")
    add("--plugins", nargs="+", metavar="MODULE", help="modules to import first (docs/extending.md)")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """The command line; a ValueError for flags that do not go together."""
    args = build_parser().parse_args(argv)
    check_at_least(args, {"seed": 0, "batch_tokens": 1, "num_processes": 1})
    if args.compare or args.check:
        if args.model_path or args.data or args.pairs:
            raise CommandLineError(
                "--compare and --check look at results that are there; leave out --model_path, --data"
            )
        return args
    if not args.model_path:
        raise CommandLineError("--model_path is missing; give it, or --compare or --check")
    if not args.data and not args.pairs and not args.tasks:
        raise CommandLineError("--data is missing; give it or --pairs, or a task that needs none: --tasks italian")
    columns = ("pair_columns", "prefix_column", "group_columns", "label_column")
    if not args.pairs and (given := [name for name in columns if getattr(args, name)]):
        raise CommandLineError(f"--{given[0]} is about --pairs, which is not given")
    if args.pair_columns and len(args.pair_columns) < 2 and not args.label_column:
        raise CommandLineError(
            f"--pair_columns is {args.pair_columns[0]}; give two or more, the right one first, or --label_column, "
            "which says of each sentence whether it is acceptable (1 or 0)"
        )
    check_output_folder(args.out, "--out")
    return args


def find_data(args: Namespace) -> list[TaskData]:
    """The tasks of ``--data`` and ``--pairs``; what is missing of those asked for is said."""
    from llava.eval.babylm.pairs import PairColumns, build_pair_tasks
    from llava.eval.babylm.tasks import find_tasks

    tasks: list[TaskData] = []
    if args.data or args.tasks:
        found = find_tasks(args.data or (), args.tasks, args.fast, args.image_folder)
        for line in found.missing:
            print(f"missing: {line}", file=sys.stderr, flush=True)
        if not found.tasks:
            where = " ".join(args.data) if args.data else "is missing"
            raise ValueError(f"--data {where}: no task is found; docs/babylm.md has folders and columns")
        tasks += found.tasks
    if args.pairs:
        candidates = tuple(args.pair_columns) if args.pair_columns else None
        columns = PairColumns(candidates, args.prefix_column, tuple(args.group_columns or ()), args.label_column)
        tasks += build_pair_tasks(args.pairs, columns)
    return tasks


def score_models(args: Namespace, load: Callable[[str, str | None], Scorer] | None = None) -> list[ModelResults]:
    """Score all models on all tasks that are found, and write everything down.

    Args:
        args: the command line.
        load: a model and its revision -> what scores with it; by default a ``LikelihoodScorer``.

    Raises:
        ValueError: a user's mistake, in one line.
    """
    from llava.eval.babylm.official import model_folder
    from llava.eval.babylm.tables import ModelResults, write_tables
    from llava.eval.babylm.tasks import describe_repeats, read_items

    # All are read before a model is: a broken line is an error at once.
    tasks = [(data, read_items(data, args.fast, args.seed)) for data in find_data(args)]
    for line in (line for data, items in tasks for line in describe_repeats(data.name, items)):
        print(f"warning: {line}", file=sys.stderr, flush=True)
    pairs = [(model, revision) for model in args.model_path for revision in args.revision or [None]]
    folders = [model_folder(Path(args.out), model, revision) for model, revision in pairs]
    # Only the last part of a path names its results, as in the official pipeline.
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise ValueError(f"--model_path: results of two models would go to {twice[0]}; give them different names")
    models = []
    for (model, revision), folder in zip(pairs, folders, strict=True):
        settings = {name: getattr(args, name) for name in ("fast", "seed", "dtype")}
        # A model that was trained on in the same folder is another one.
        settings["model_files"] = _hash_files(model, revision)
        results = ModelResults(model, revision or "main", settings=settings)
        scorer = _Loader(args, model, revision, load)
        for data, items in tasks:
            result, blind = score_task(args, data, items, scorer)
            results.results[data.name] = result
            if blind is not None:
                results.blind[data.name] = blind
                if blind.is_blind:
                    print(f"warning: {blind.describe(data.name)}", file=sys.stderr, flush=True)
        # Tasks of an earlier command stay in the tables, as their files stay in the folder.
        results.keep_others(folder / "scores.json")
        write_tables(folder, [results])
        models.append(results)
    return models


class _Loader:
    """A model that is loaded when it is first needed: where all is scored already, it never is."""

    def __init__(
        self, args: Namespace, model: str, revision: str | None, load: Callable[[str, str | None], Scorer] | None
    ) -> None:
        self.args, self.model, self.revision, self._load = args, model, revision, load
        self._scorer: Scorer | None = None

    def __call__(self) -> Scorer:
        if self._scorer is None:
            self._scorer = (self._load or self._load_model)(self.model, self.revision)
        return self._scorer

    def count_tokens(self, choices: Sequence[Choice]) -> list[int]:
        """Of each choice of a single candidate, how many tokens are scored."""
        from llava.eval.likelihood import count_tokens

        return [number for (number,) in count_tokens(self.model, self.revision, choices, "--model_path")]

    def _load_model(self, model: str, revision: str | None) -> Scorer:
        import torch

        from llava.eval.likelihood import LikelihoodScorer

        dtype = None if self.args.dtype == "stored" else getattr(torch, self.args.dtype)
        if self.args.num_processes > 1:
            from llava.eval.engine import choose_devices
            from llava.eval.parallel import ParallelScorer, ScorerSource

            devices = choose_devices(self.args.device, self.args.num_processes)
            source = ScorerSource(model, revision, dtype, self.args.batch_tokens)
            return ParallelScorer(source, devices, self.args.plugins or ())
        return LikelihoodScorer.from_folder(
            model, revision, device=self.args.device, dtype=dtype, batch_tokens=self.args.batch_tokens
        )


def score_task(
    args: Namespace, data: TaskData, items: Sequence[Item], loader: _Loader
) -> tuple[TaskResult, BlindCheck | None]:
    """Score a task with a model, write its official files, and see whether pictures matter."""
    from llava.eval.babylm.official import result_folder, write_official
    from llava.eval.babylm.results import check_pictures, summarize
    from llava.eval.blind import swap_media

    folder = result_folder(Path(args.out), loader.model, loader.revision, data, args.fast)
    choices = [item.choice for item in items]
    told = _score(args, folder, items, choices, loader, data.name, "own")
    result = summarize(data, items, told, args.seed)
    if items[0].acceptable is None:  # A single sentence is no choice that official files could have.
        write_official(folder, items, told, result)
    if args.no_blind_check or not data.task.needs_images:
        return result, None
    swapped = swap_media(choices, args.seed)
    if swapped is None:
        print(f"{data.name}: too few different pictures for the blind check", file=sys.stderr, flush=True)
        return result, None
    other = _score(args, folder, items, swapped, loader, f"{data.name}, other pictures", "other")
    return result, check_pictures(told, other, args.seed)


def _score(
    args: Namespace,
    folder: Path,
    items: Sequence[Item],
    choices: Sequence[Choice],
    loader: _Loader,
    label: str,
    shown: str,
) -> list[tuple[float, ...]]:
    from tqdm import tqdm

    from llava.eval.babylm.acceptability import SentenceScorer
    from llava.eval.babylm.model_scores import ITEM_SCORES, Settings, hash_items, score_items

    labels = [item.acceptable for item in items if item.acceptable is not None]
    settings = Settings(
        model=loader.model,
        model_files=_hash_files(loader.model, loader.revision),
        items=hash_items(choices, labels or [item.ratio for item in items if item.ratio is not None]),
        dtype=args.dtype,
        shown=shown,
    )
    name = ITEM_SCORES if shown == "own" else f"{shown}_{ITEM_SCORES}"
    # None: no bar where standard error is no terminal.
    with tqdm(total=len(items), desc=f"{Path(loader.model).name} {label}", unit=" items", disable=None) as bar:
        get_scorer = (lambda: SentenceScorer(loader(), loader.count_tokens)) if labels else loader
        return score_items(folder, settings, items, choices, get_scorer, bar.update, args.overwrite, name)


_MODEL_FILES = (".safetensors", ".bin", ".json", ".gguf", ".txt", ".model")
"""Ends of names of files with weights, settings and vocabularies."""
_OTHER_FOLDERS = {"config.json": "mm_vision_tower", "adapter_config.json": "base_model_name_or_path"}
"""Where a checkpoint names a folder that a part of its weights is read from: its tower, and the base of adapters."""


def _hash_files(model: str, revision: str | None) -> str:
    """A hash of the names, sizes and times of a model's files; of its name and revision where it is on the hub."""
    from llava.io import hash_json

    folder = Path(model, revision) if revision and Path(model, revision).is_dir() else Path(model)
    if not folder.is_dir():
        return hash_json([model, revision], 16)
    files = sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES)
    told: list[object] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    told += [_hash_files(other, None) for other in _other_folders(folder) if Path(other).is_dir()]
    return hash_json(told, 16)


def _other_folders(folder: Path) -> Iterator[str]:
    for name, key in _OTHER_FOLDERS.items():
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # Not there; one that is broken is an error where the model is read.
            continue
        if isinstance(content, dict) and isinstance(other := content.get(key), str) and Path(other) != folder:
            yield other


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit status: 0, 1 where ``--check`` finds a fault, 2 for a user's mistake."""

    def run() -> int:
        args = parse_arguments(argv)
        if args.check:
            from llava.eval.babylm.official import check_results

            lines = check_results(Path(args.check), args.fast, args.tasks)
            rest = "GLUE, reading and AoA, which the collation wants too, are not looked at"
            print("\n".join(lines or [f"{args.check}: complete, as the official collation counts; {rest}"]))
            return 1 if lines else 0
        if args.compare:
            from llava.eval.babylm.compare import HEAD, compare_folders, describe_uncompared

            first, second = map(Path, args.compare)
            rows = [one.describe() for one in compare_folders(first, second, args.seed)]
            print("\n".join([f"A: {first}\nB: {second}\n", HEAD, *rows]))
            for line in describe_uncompared(first, second):
                print(line, file=sys.stderr)
            return 0
        from llava.eval.babylm.official import model_folder
        from llava.eval.babylm.tables import describe_markdown, describe_score, write_tables
        from llava.registry import import_plugins

        import_plugins(args.plugins)
        models = score_models(args)
        print(write_tables(Path(args.out), models) if len(models) > 1 else describe_markdown(models))
        # Last, as the tables of groups are long.
        for model in models:
            told = ", ".join(f"{name} {describe_score(model, name)}" for name in model.results)
            print(f"{model_folder(Path(args.out), model.model, model.revision) / 'scores.md'}: {told}", file=sys.stderr)
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
