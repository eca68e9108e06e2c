"""``python -m llava.train.exposure OUTPUT_DIR``: count once more what a run has presented, and compare.

Nothing of what the run counted is used: the data files are read and tokenised again, and their samples put in the order
that the run's settings make. What comes out is held against each line of ``exposure.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from llava.command import CommandParser, check_at_least, run_command
from llava.config import GroundingConfig, VisionConfig
from llava.data.files import find_entries
from llava.data.formats import build_format
from llava.data.media_files import MediaLimits
from llava.data.module import RunDataset, make_supervised_data_module
from llava.data.samplers import DataOrder
from llava.io import num_cores, read_json_lines
from llava.model.classes import build_config, choose_classes
from llava.model.pretrained import read_config
from llava.model.vocabulary import load_tokenizer
from llava.train.checkpoint import RUN_IDENTITY, list_checkpoints, list_milestones
from llava.train.data_order import describe_changes, fingerprint_of, order_samples
from llava.train.exposure_log import EXPOSURE_FILE, describe
from llava.train.identity import RunIdentity, hash_data
from llava.types import EXPOSURE_COUNTS, Exposure

_FEW = 2000
"""Samples that are read in this process, as workers would take longer to start."""
_MOST_SHOWN = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Recount a run; the exit status is 0 where all is equal, 1 where it is not, 2 after an error."""
    return run_command(lambda: recount(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a ValueError for flags that are wrong."""
    parser = CommandParser(
        prog="python -m llava.train.exposure",
        description=f"Count again, from data and order, what a run has presented, and compare it with {EXPOSURE_FILE}.",
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


# The run, as its folder tells it.


def find_saved(folder: Path) -> Path:
    """The final model, the newest checkpoint or a milestone of a run: what says how it was trained.

    Raises:
        ValueError: there is none yet.
    """
    # The newest first: an earlier one may be of other settings (--resume_changed).
    for place in (folder, *reversed(list_checkpoints(folder)), *list_milestones(folder)):
        if (place / RUN_IDENTITY).is_file() and (place / "config.json").is_file():
            return place
    raise ValueError(
        f"{folder}: neither the final model nor a checkpoint is there, which would tell how it was trained"
    )


def open_data(saved: Path, run: RunIdentity, args: argparse.Namespace) -> RunDataset:
    """The training data of a run, read anew.

    Raises:
        ValueError: they are not what it was trained on.
    """
    settings = {**run.fixed, **run.free}
    stored = run.fixed["data_content"]
    moved = {name: value for name in ("image_folder", "video_folder") if (value := getattr(args, name)) is not None}
    data_path = args.data_path or stored["source"]
    # By content: folders may have moved, and a file may have changed under its name.
    if hash_data(find_entries(data_path)) != stored["sha256"]:
        raise ValueError(f"--data_path {' '.join(data_path)}: not the content that the run in {args.output_dir} had")
    limits = {limit.name: settings.get(limit.name, limit.default) for limit in fields(MediaLimits)}
    data_args: Any = SimpleNamespace(**{
        **settings, **moved, "data_path": data_path, "eval_data_path": None, "media_limits": MediaLimits(**limits),
        "text_column": settings.get("text_column"),
    })  # fmt: skip
    config_dict = read_config(str(saved), "OUTPUT_DIR")
    config_class, _ = choose_classes(config_dict["model_type"], str(saved))
    config = build_config(config_class, config_dict, str(saved))
    tokenizer = load_tokenizer(str(saved), "OUTPUT_DIR")
    data = make_supervised_data_module(
        tokenizer,
        data_args,
        VisionConfig.from_model_config(config),
        settings["model_max_length"],
        build_format(settings["version"], tokenizer),
        run.length.get("data_seed", settings["seed"]),
        GroundingConfig.from_model_config(config),
    )
    assert data["train_dataset"] is not None
    return data["train_dataset"]


def build_run_order(dataset: RunDataset, run: RunIdentity) -> DataOrder:
    """The order in which a run had its data.

    Raises:
        ValueError: these data make another one; says in what.
    """
    made_from = run.length["order"]
    order = order_samples(
        dataset,
        made_from["step_size"],
        made_from["strategy"],
        made_from["seed"] or 0,
        made_from["drop_last"],
        made_from.get("pack_length", 0),
        made_from.get("max_tokens", 0),
    )
    if changes := describe_changes(made_from, fingerprint_of(order, dataset)):
        raise ValueError(f"the data make another order than the run's: {'; '.join(changes)}")
    return order


# Counting.


@dataclass
class _Measured(Dataset["tuple[int, Exposure | None]"]):
    """What chosen samples of a data set present, each with its index."""

    dataset: RunDataset
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Exposure | None]:
        index = int(self.indices[place])
        return index, self.dataset.measure(index)


def _first(items: list[Any]) -> Any:
    return items[0]


def measure(dataset: RunDataset, indices: NDArray[np.int64], num_workers: int) -> NDArray[np.int64]:
    """What each sample presents: int64 (samples, 1 + counts), its source first; zeros for bad and other samples."""
    from tqdm import tqdm

    measured = np.zeros((len(dataset), 1 + len(EXPOSURE_COUNTS)), np.int64)
    loader = DataLoader(
        _Measured(dataset, indices), collate_fn=_first, num_workers=num_workers if len(indices) > _FEW else 0
    )
    with tqdm(total=len(indices), desc="counting samples", disable=None if len(indices) > _FEW else True) as bar:
        for index, exposure in loader:
            bar.update()
            if exposure is not None:
                measured[index] = (exposure.source, *exposure.counts)
    return measured


def compare(lines: Sequence[dict[str, Any]], dataset: RunDataset, order: DataOrder, num_workers: int) -> list[str]:
    """In what the lines of a run differ from a recount: step, number, what is written and what was counted."""
    last = max(line["step"] for line in lines)
    epochs, rest = divmod(last, order.num_steps)
    # Less than an epoch: only what was trained on is read.
    reached = order.order(0)[: order.step_bounds(0)[rest]] if not epochs else np.arange(len(dataset))
    measured = measure(dataset, np.unique(reached).astype(np.int64), num_workers)
    total = np.zeros((len(dataset.sources), len(EXPOSURE_COUNTS)), np.int64)  # (sources, counts)
    differences: list[str] = []
    done = 0
    for line in sorted(lines, key=lambda line: line["step"]):
        for step in range(done, line["step"]):
            epoch, number = divmod(step, order.num_steps)
            # (samples of the step, 1 + counts)
            begin, end = order.step_bounds(epoch)[number : number + 2]
            samples = measured[order.order(epoch)[begin:end]]
            # Not +=, which adds once where a source stands there several times.
            np.add.at(total, samples[:, 0], samples[:, 1:])
        done = line["step"]
        counted = {"": describe(total.sum(0))}
        counted |= {name: describe(counts) for name, counts in zip(dataset.sources, total, strict=True)}
        written = {"": line} | line["sources"]
        for source in dict.fromkeys([*counted, *written]):
            for name in describe(total[0]):
                old, new = (found.get(source, {}).get(name, 0) for found in (written, counted))
                if old != new:
                    where = f" of {source}" if source else ""
                    differences.append(f"step {done}: {name}{where}: written {json.dumps(old)}, recounted {new}")
    return differences


if __name__ == "__main__":
    sys.exit(main())
