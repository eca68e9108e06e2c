"""``python -m llava.model.merge_lora``: from LoRA adapters and their base model to one complete checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.command import CommandParser, check_output_folder, run_command
from llava.registry import import_plugins


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.model.merge_lora",
        description="Write a checkpoint with LoRA adapters as a complete one, which needs no base model and no peft.",
    )
    parser.add_argument("--model_path", required=True, metavar="DIR", help="checkpoint with adapters")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="where the complete checkpoint goes")
    parser.add_argument("--model_base", metavar="DIR", help="where the adapters' base model lies, if it has moved")
    parser.add_argument("--vision_tower", metavar="DIR", help="where the model's vision tower lies, if it has moved")
    parser.add_argument("--plugins", nargs="+", metavar="MODULE", help="modules to import first (docs/extending.md)")
    return parser


def merge_checkpoint(
    model_path: str, output_dir: str, model_base: str | None = None, vision_tower: str | None = None
) -> None:
    """Merge the adapters of a checkpoint folder and write model and tokenizer to another folder.

    Raises:
        ValueError: a folder is not as it must be, or the model cannot be loaded.
    """
    # Here: they take seconds to load, which --help need not wait for.
    from llava.model.loading import load_model
    from llava.model.lora import is_adapter_folder, merge_adapters
    from llava.model.pretrained import locate_model

    model_path = locate_model(model_path, "--model_path")
    check_output_folder(output_dir, "--output_dir")
    if not is_adapter_folder(model_path):
        raise ValueError(f"--model_path {model_path!r} holds no adapters (no adapter_config.json); nothing to merge")
    # Its adapter_config.json would stay, and make the merged model one with adapters again.
    if is_adapter_folder(output_dir):
        raise ValueError(f"--output_dir {output_dir!r} holds adapters already; give another folder")
    loaded = load_model(model_path, model_base=model_base, vision_tower=vision_tower, flag="--model_path")
    merge_adapters(loaded.model)
    loaded.model.save_pretrained(output_dir)
    loaded.tokenizer.save_pretrained(output_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """Merge as the command line says; returns the exit status, 2 with one line for a user's mistake."""

    def run() -> None:
        args = build_parser().parse_args(argv)
        # The checkpoint may be of a family, or have a resampler, of the user's own.
        import_plugins(args.plugins)
        merge_checkpoint(args.model_path, args.output_dir, args.model_base, args.vision_tower)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
