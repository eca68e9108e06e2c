"""The command lines of `python -m llava.data.feature_cache`, which are read before anything large is imported."""

from __future__ import annotations

from llava.command import CommandParser

PROGRAM = "python -m llava.data.feature_cache"
FP32, BF16, INT8 = "fp32", "bf16", "int8"
STORAGES = (FP32, BF16, INT8)
POOLS = (1, 2)


def command_parser() -> CommandParser:
    """The commands; of ``build`` it has only the name."""
    parser = CommandParser(
        prog=PROGRAM,
        description="Features of a frozen vision tower in files, for --feature_cache of training, evaluation and "
        "captioning (docs/feature_cache.md).",
        epilog="Exit status: 0, 1 where verify finds damage, 2 for a mistake.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("build", help="compute them ahead of training: build --help")
    for name, text in (("info", "what is in a folder, and for which settings"), ("verify", "check every byte of it")):
        commands.add_parser(name, help=text, description=text).add_argument("feature_cache", metavar="DIR")
    return parser


def build_parser() -> CommandParser:
    """The flags of ``build`` beside those of training."""
    parser = CommandParser(
        prog=f"{PROGRAM} build",
        description="Compute the features of all images and clips that a training run will see, with the flags or the "
        "--config of that run and --feature_cache DIR. The same command goes on where it was stopped. Flags of steps, "
        "logs and saving have no effect; python -m llava.train.train --help lists them all.",
        epilog="torchrun's ranks and the tasks of a Slurm array share the work. Exit status: 0, 2 for a mistake.",
    )
    parser.add_argument(
        "--storage", choices=STORAGES, help="bits of a number: fp32, bf16, or int8 with a scale for each patch "
        "(default: as the tower computes, which is exact)",
    )  # fmt: skip
    parser.add_argument("--pool", type=int, default=1, choices=POOLS, help="2: keep means of 2 x 2 patches (default 1)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="on this machine (default 1)")
    parser.add_argument("--shard", metavar="I/N", help="part I of N, from 1 (default: by SLURM_ARRAY_TASK_ID, or all)")
    return parser
