"""``python -m llava.model.random_weights``: a language model's folder -> the same model with fresh, seeded weights.

A folder that holds nothing but a ``config.json`` will do when ``--tokenizer`` names a tokenizer.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.command import CommandParser, check_output_folder, run_command

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def build_parser() -> CommandParser:
    parser = CommandParser(
        description="Write a copy of a language model with the same configuration and tokenizer, but random weights.",
    )
    parser.add_argument(
        "--model_path",
        required=True,
        metavar="DIR",
        help="folder of a decoder-only model; of its files only config.json and the tokenizer are read",
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder to write to; must be new or empty")
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="take the tokenizer, and the ids of its special tokens, from this folder; and, where config.json has no "
        "vocab_size, the number of its tokens",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the model; returns the exit status, 2 with one line on standard error for a user's mistake."""

    def run() -> None:
        args = build_parser().parse_args(argv)
        num_parameters = create(args.model_path, args.output_dir, args.seed, args.tokenizer)
        print(f"{args.output_dir}: {num_parameters:,} random parameters, seed {args.seed}")

    return run_command(run)


def create(model_path: str, output_dir: str, seed: int, tokenizer_path: str | None = None) -> int:
    """Write a model with random weights to ``output_dir``, a new or empty folder; returns the number of parameters.

    Args:
        model_path: folder with a ``config.json`` and, without ``tokenizer_path``, a tokenizer.
        seed: the same seed gives the same weights.
        tokenizer_path: folder of another tokenizer than the model's.

    Raises:
        ValueError: a folder is not as it should be, or the tokenizer has more tokens than the model.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    from llava.config import VisionConfig
    from llava.io import apply_umask
    from llava.model.pretrained import forget_implementations, locate_model, quiet_transformers
    from llava.model.vocabulary import check_vocabulary, load_tokenizer

    # All is checked before the folder is made: an error leaves nothing behind.
    model_path = locate_model(model_path, "--model_path")
    if not Path(model_path, "config.json").is_file():
        raise ValueError(f"--model_path {model_path}: expected a folder with a config.json")
    target = Path(output_dir)
    check_output_folder(output_dir, "--output_dir", empty=True)
    try:
        config = forget_implementations(AutoConfig.from_pretrained(model_path, trust_remote_code=False))
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"--model_path {model_path}: its config.json cannot be read: {error}") from error
    if VisionConfig.from_model_config(config) is not None:
        raise ValueError(
            f"--model_path {model_path}: is a checkpoint with vision ({config.model_type}); give the language model "
            "that it was trained from"
        )
    try:
        tokenizer = load_tokenizer(tokenizer_path or model_path, "--tokenizer" if tokenizer_path else "--model_path")
    except ValueError as error:
        remedy = "" if tokenizer_path else "; or name a folder that has one with --tokenizer"
        raise ValueError(f"{error}{remedy}") from error
    vocab_size = find_vocabulary_size(config, model_path, len(tokenizer) if tokenizer_path else None)
    # A tokenizer of one's own brings its own special tokens, which replace those of the configuration below.
    special_ids = None if tokenizer_path else config.to_dict()
    unused = None
    if tokenizer_path:  # Named on purpose: it cannot be another model's by mistake.
        unused = f'"vocab_size": {len(tokenizer)} in {model_path}/config.json makes the model smaller by the rest'
    check_vocabulary(tokenizer, vocab_size, tokenizer_path or model_path, special_ids=special_ids, unused=unused)
    if tokenizer_path is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))

    # Seeded right before the model is built: nothing else may draw in between.
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"--model_path {model_path}: {config.model_type!r} is no decoder-only model") from error
    with quiet_transformers():
        model.save_pretrained(output_dir)
    apply_umask(output_dir)
    tokenizer.save_pretrained(output_dir)
    # With another tokenizer its ids would stand for other tokens.
    generation = Path(model_path, "generation_config.json")
    if generation.is_file() and tokenizer_path is None:
        shutil.copyfile(generation, target / generation.name)
    return model.num_parameters()


def find_vocabulary_size(config: PretrainedConfig, model_path: str, num_tokens: int | None) -> int:
    """The vocabulary that a configuration says; one that says none becomes as large as the tokenizer it is given.

    Args:
        config: its ``vocab_size`` is set where ``config.json`` has none, as that of ``llava/recipes/start_gpt2``.
        model_path: the folder of that file.
        num_tokens: of the tokenizer; None where it is the folder's own.

    Raises:
        ValueError: it is no language model's.
    """
    vocab_size = getattr(config, "vocab_size", None)
    if vocab_size is None:
        raise ValueError(f"--model_path {model_path}: {config.model_type!r} is no language model, it has no vocabulary")
    written = json.loads(Path(model_path, "config.json").read_text(encoding="utf-8"))
    if num_tokens is not None and "vocab_size" not in written:
        config.vocab_size = vocab_size = num_tokens
    return vocab_size


if __name__ == "__main__":
    sys.exit(main())
