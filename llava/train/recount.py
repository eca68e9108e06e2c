"""A run's exposure from its data and its order alone: every sample read and tokenised again, every step counted."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from llava.config import GroundingConfig, VisionConfig
from llava.data.files import find_entries
from llava.data.formats import build_format
from llava.data.media_files import MediaLimits
from llava.data.module import RunDataset, make_supervised_data_module
from llava.data.samplers import DataOrder
from llava.model.classes import build_config, choose_classes
from llava.model.pretrained import read_config
from llava.model.vocabulary import load_tokenizer
from llava.train.checkpoint import RUN_IDENTITY, list_checkpoints, list_milestones
from llava.train.data_order import describe_changes, fingerprint_of, order_samples
from llava.train.exposure_log import describe
from llava.train.identity import RunIdentity, hash_data
from llava.types import EXPOSURE_COUNTS, Exposure

_FEW = 2000
"""Samples that are read in this process, as workers would take longer to start."""


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
