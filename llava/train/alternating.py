"""``python -m llava.train.alternating``, or ``train_alternating.py``: a model with alternating attention, trained.

Or a look at what a training would start from. Thin over ``llava.train.train``, whose flags it takes too. Without
``--model_name_or_path`` the model has the configuration of ``--backbone_model``, with the attention of ``--variant``.
Exit statuses: 0 done, 2 a mistake on the command line or in a file, 3 a checkpoint with another kind of attention than
``--variant``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llava.command import CommandParser
from llava.train import preemption

MISMATCH = 3
MANIFEST = "weights_manifest.json"
VARIANTS = ("base", "alternating", "alternating_cross")
"""Kinds of attention, as ``llava.model.VARIANTS`` has them."""


def build_parser() -> CommandParser:
    parser = CommandParser(
        description="Train a model with alternating attention. All flags of llava.train.train are taken as well; "
        "python -m llava.train.train --help lists them.",
        epilog="Exit status: 0 done, 2 wrong flag or file, 3 --variant is not the checkpoint's.",
    )
    parser.add_argument(
        "--variant",
        choices=["auto", *VARIANTS],
        default="auto",
        help="kind of attention that the checkpoint's config.model_type must have (default auto: any)",
    )
    parser.add_argument(
        "--force", action="store_true", help="train with --variant although the checkpoint has another kind"
    )
    parser.add_argument(
        "--init_from_backbone",
        action="store_true",
        help="copy the parameters of --backbone_model whose names and shapes match; projector and resampler never",
    )
    parser.add_argument(
        "--backbone_model", metavar="PATH", help="folder or hub name of the model that --init_from_backbone copies"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the model type and exit")
    parser.add_argument(
        "--inspect_data",
        action="store_true",
        help="print the number of samples and the first one, as it stands, and exit",
    )
    parser.add_argument(
        "--inspect_weights",
        action="store_true",
        help=f"print what --init_from_backbone copies, write every tensor to {MANIFEST} in --output_dir, and exit",
    )
    parser.add_argument(
        "--throughput_log_steps",
        type=int,
        metavar="N",
        help="say samples and tokens a second, the wait for data and memory every N steps",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit status.

    Raises:
        ValueError: a mistake on the command line or in a file.
    """
    parser = build_parser()
    own, words = parser.parse_known_args(argv)
    parser.warn_of_repeats(list(sys.argv[1:] if argv is None else argv))

    from llava.model import split_type
    from llava.model.pretrained import read_config
    from llava.train.command_line import parse_values
    from llava.train.throughput import ThroughputLines
    from llava.train.train import build_trainer, train

    inspecting = own.dry_run or own.inspect_data or own.inspect_weights
    # With a backbone the model's own folder may be missing. A run tells what became of older flags, when it reads them.
    optional = [
        *(["data_path", "output_dir"] if inspecting else []),
        *(["model_name_or_path"] if own.backbone_model else []),
    ]
    values = parse_values(words, optional=optional, also=parser.flags, tells_notes=inspecting)
    variant = None if own.variant == "auto" else own.variant
    is_new = own.backbone_model is not None and values["model_name_or_path"] is None
    if is_new:
        values["model_name_or_path"] = own.backbone_model
        words += ["--model_name_or_path", own.backbone_model]
    check_flags(own, values)

    model_type = read_config(values["model_name_or_path"])["model_type"]
    if is_new:
        model_type = describe_new(own.backbone_model, variant)
    if own.dry_run:
        print(model_type)
    found = split_type(model_type)[1]
    if variant not in (None, found) and not own.force:
        print(
            f"error: --variant is {variant}, but {values['model_name_or_path']} has the model type {model_type!r} "
            f"({found}); give --variant {found}, or --force to use {variant} all the same",
            file=sys.stderr,
        )
        return MISMATCH
    loading = {"variant": variant, "weights_from": own.backbone_model}
    if own.inspect_data:
        inspect_data(values["data_path"])
    if own.inspect_weights:
        inspect_weights(values, loading)
    if not inspecting:
        trainer = build_trainer(words, **loading)
        if own.throughput_log_steps is not None:
            trainer.add_callback(ThroughputLines(trainer.throughput, own.throughput_log_steps))
        train(trainer)
    return 0


def check_flags(own: argparse.Namespace, values: dict[str, Any]) -> None:
    """A ValueError for flags that need each other, and for paths that are not there."""
    from llava.data.files import find_entries
    from llava.data.media_files import check_media_folders
    from llava.model.pretrained import read_config

    if (own.init_from_backbone or own.inspect_weights) and not own.backbone_model:
        raise ValueError("--init_from_backbone and --inspect_weights need --backbone_model PATH")
    if own.backbone_model and not (own.init_from_backbone or own.inspect_weights):
        raise ValueError("--backbone_model says where from; add --init_from_backbone to copy its parameters")
    if own.inspect_data and not values["data_path"]:
        raise ValueError("--inspect_data needs --data_path FILE")
    if own.force and own.variant == "auto":
        raise ValueError("--force needs a --variant to force: " + ", ".join(VARIANTS))
    if own.throughput_log_steps is not None and own.throughput_log_steps < 1:
        raise ValueError(f"--throughput_log_steps is {own.throughput_log_steps}; it must be at least 1")
    if own.backbone_model:
        read_config(own.backbone_model, "--backbone_model")
    for flag in ("data_path", "eval_data_path"):
        find_entries(values[flag] or [], f"--{flag}")
    check_media_folders(values["image_folder"], values["video_folder"])


def describe_new(backbone: str, variant: str | None) -> str:
    """The type of the model that has a backbone's configuration, with the attention of ``variant``.

    Raises:
        ValueError: the backbone sees: its vision modules would be loaded with it, and are never to be copied.
    """
    from llava.model.loading import choose_classes
    from llava.model.pretrained import read_config

    config = read_config(backbone, "--backbone_model")
    if config.get("mm_vision_config") or config.get("mm_vision_tower"):
        raise ValueError(
            f"--backbone_model {backbone!r} has vision modules, which --init_from_backbone never copies; say with "
            "--model_name_or_path which model gets its language model"
        )
    return choose_classes(config["model_type"], backbone, variant)[0].model_type


def inspect_data(paths: Sequence[str]) -> None:
    """Print how many samples there are, and the first as its file has it; no image and no video is opened."""
    from llava.data.files import count_samples, find_entries
    from llava.data.raw_samples import read_samples

    count, first = 0, None
    for entry in find_entries(paths):
        of_entry = 0
        for path in entry.files:
            for sample, where in read_samples(path):
                of_entry, first = of_entry + 1, first or (sample, where)
        count += count_samples(entry.sampling, of_entry)
    print(f"{count} samples")
    if first is not None:
        print(f"first ({first[1]}):\n{json.dumps(first[0], ensure_ascii=False, indent=2, default=vars)}")


def inspect_weights(values: dict[str, Any], loading: dict[str, str | None]) -> None:
    """Print and write what the backbone gives to the model."""
    from llava.train.arguments import DataArguments, ModelArguments
    from llava.train.command_line import build_group
    from llava.train.train import load_from_arguments

    arguments = build_group(ModelArguments, values), build_group(DataArguments, values)
    variant, weights_from = loading["variant"], loading["weights_from"]
    report = load_from_arguments(*arguments, None, variant, weights_from).transfer
    assert report is not None
    print(report)
    folder = Path(values["output_dir"] or ".")
    folder.mkdir(parents=True, exist_ok=True)
    report.write(folder / MANIFEST)
    print(f"every tensor: {folder / MANIFEST}")


def start(argv: Sequence[str]) -> int:
    """``main`` for a shell: signals are heard from the first, and a mistake is one line; returns the exit status."""
    preemption.listen()
    if any(word in ("-h", "--help") for word in argv):
        build_parser().print_help()  # At once: nothing large is imported for it.
        return 0

    from llava.train.train import cli

    return cli(partial(main, argv))


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
