"""The command line of ``python -m llava.model.export``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llava.command import CommandParser, run_command
from llava.registry import import_plugins

if TYPE_CHECKING:
    import torch

KINDS = ("text", "multimodal", "llava_hf")
DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.model.export",
        description="Write a checkpoint as a folder that loads with transformers alone, and compare the two.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint, with or without adapters")
    parser.add_argument("out", metavar="OUT", help="where the export goes; a folder that is empty or not there yet")
    parser.add_argument(
        "--as", dest="kind", required=True, choices=KINDS,
        help="text: the plain language model. multimodal: model, processor and tokenizer, with code of their own "
        "(trust_remote_code). llava_hf: transformers' own LlavaForConditionalGeneration, where the parts allow it",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="of the exported weights (default: as they are stored)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in OUT")
    parser.add_argument("--model_base", metavar="DIR", help="where the adapters' base model lies, if it has moved")
    parser.add_argument("--vision_tower", metavar="DIR", help="where the model's vision tower lies, if it has moved")
    parser.add_argument("--plugins", nargs="+", metavar="MODULE", help="modules to import first (docs/extending.md)")
    return parser


def export_checkpoint(
    checkpoint: str,
    out: str,
    kind: str,
    dtype: str | None = None,
    overwrite: bool = False,
    model_base: str | None = None,
    vision_tower: str | None = None,
) -> list[str]:
    """Export a checkpoint; the arguments are those of the command line.

    Returns:
        What was done, a line each.

    Raises:
        ValueError: a folder is not as it must be, the checkpoint cannot be exported so, or the export differs from it.
    """
    # Here: they take seconds to load, which --help need not wait for.
    import torch
    import transformers

    from llava import __version__
    from llava.io import write_json
    from llava.model.export.folder import EXPORT_FILE, check_target, staged_folder
    from llava.model.model_card import describe_export, write_card

    check_target(Path(out), checkpoint, overwrite)
    weights = None if dtype is None else getattr(torch, dtype)
    write = {"text": _write_text, "multimodal": _write_multimodal, "llava_hf": _write_llava_hf}[kind]
    with staged_folder(Path(out)) as folder:
        lines, differences = write(folder, _Source(checkpoint, weights, model_base, vision_tower))
        found = " and ".join(
            f"{difference:.3g} on a{'n' * (name[0] == 'i')} {name}" for name, difference in differences.items()
        )
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights_type = written.get("dtype") or written.get("torch_dtype")
        lines.append(
            f"checked: its logits differ from the checkpoint's, with weights in {weights_type}, by at most {found}"
        )
        write_card(folder, describe_export(Path(out).absolute().name, kind, Path(checkpoint), lines))
        write_json(
            folder / EXPORT_FILE,
            {
                "checkpoint": checkpoint, "as": kind, "llava": __version__, "transformers": transformers.__version__,
                "done": lines, "largest_difference": differences,
                "files": sorted(path.name for path in folder.iterdir()),
            },
        )  # fmt: skip
    return lines


class _Source(NamedTuple):
    """What is exported, as ``read_source`` and ``read_model`` take it."""

    checkpoint: str
    dtype: torch.dtype | None
    model_base: str | None
    vision_tower: str | None


def _write_text(folder: Path, source: _Source) -> tuple[list[str], dict[str, float]]:
    """Write and check an export; what was done, and the largest differences of logits."""
    from llava.model.export.text import check_text, export_text, read_source

    read = read_source(*source)
    lines = export_text(read, folder)
    difference, lost = check_text(read, folder)
    if lost > 0:
        lines.append(f"the removed tokens had at most {lost:.2g} of the probability there")
    return lines, {"text": difference}


def _write_multimodal(folder: Path, source: _Source) -> tuple[list[str], dict[str, float]]:
    from llava.model.export.multimodal import check_multimodal, export_multimodal, read_model

    loaded = read_model(*source)
    lines = export_multimodal(loaded, folder)
    return lines, check_multimodal(loaded, folder)


def _write_llava_hf(folder: Path, source: _Source) -> tuple[list[str], dict[str, float]]:
    from llava.model.export.llava_hf import check_llava_hf, export_llava_hf
    from llava.model.export.multimodal import read_model

    loaded = read_model(*source)
    lines = export_llava_hf(loaded, folder)
    return lines, check_llava_hf(loaded, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Export as the command line says; returns the exit status, 2 with one line for a user's mistake."""

    def run() -> None:
        args = build_parser().parse_args(argv)
        import_plugins(args.plugins)
        lines = export_checkpoint(
            args.checkpoint, args.out, args.kind, args.dtype, args.overwrite, args.model_base, args.vision_tower
        )
        print("\n".join([*lines, f"written: {args.out}"]))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
