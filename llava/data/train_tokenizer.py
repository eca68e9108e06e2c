"""``python -m llava.data.train_tokenizer``: text -> a byte-level BPE tokenizer, a folder for ``AutoTokenizer``."""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from llava.command import CommandParser, check_output_folder, run_command
from llava.data.placeholders import remove_placeholders
from llava.data.raw_samples import TEXT_SUFFIXES
from llava.io import is_file
from llava.types import Record

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257
"""Every byte and the end of text."""


def build_parser() -> CommandParser:
    parser = CommandParser(description="Train a byte-level BPE tokenizer of GPT-2's kind on text files.")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="text, a paragraph a line (.txt, .txt.gz), or data files of this library (.json, .jsonl)",
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder to write to; must be new or empty")
    parser.add_argument("--vocab_size", type=int, default=30_000, metavar="N", help="most tokens (default 30000)")
    parser.add_argument(
        "--min_frequency", type=int, default=2, metavar="N", help="a pair must occur so often to be merged (default 2)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tokenizer; returns the exit status, 2 with one line on standard error for a user's mistake."""

    def run() -> None:
        args = build_parser().parse_args(argv)
        size = train(args.data, args.output_dir, args.vocab_size, args.min_frequency)
        print(f"{args.output_dir}: {size:,} tokens")
        if size < args.vocab_size:
            print(
                f"note: the text has pairs for {size:,} tokens only, fewer than --vocab_size {args.vocab_size:,}; "
                "add text or lower --min_frequency to get more",
                file=sys.stderr,
            )

    return run_command(run)


def train(paths: Sequence[str], output_dir: str, vocab_size: int, min_frequency: int) -> int:
    """Train on the files and write the tokenizer to ``output_dir``.

    Returns:
        The number of tokens, the end of text included; its id is 0.

    Raises:
        ValueError: a file cannot be read, there is no text, or ``output_dir`` holds something already.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST:
        raise ValueError(f"--vocab_size is {vocab_size}; every byte and {END_OF_TEXT} need at least {SMALLEST}")
    if min_frequency < 1:
        raise ValueError(f"--min_frequency is {min_frequency}; it must be at least 1")
    check_output_folder(output_dir, "--output_dir", empty=True)
    for path in paths:
        if not is_file(path):
            raise ValueError(f"--data {path}: no such file")
    # Stops at the first text.
    if not any(True for path in paths for _ in read_texts(path)):
        raise ValueError(f"--data {' '.join(paths)}: no text in it")

    bpe = Tokenizer(models.BPE())
    # As GPT-2's: a text begins without a space.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        # All 256 bytes, so that nothing is ever unknown.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator((text for path in paths for text in read_texts(path)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    tokenizer.save_pretrained(output_dir)
    return len(tokenizer)


def read_texts(path: str) -> Iterator[str]:
    """The texts of a file: its lines, or the turns of its samples without their placeholders."""
    if Path(path).suffix in (".json", ".jsonl"):
        from llava.data.raw_samples import read_samples
        from llava.data.records import parse_record
        from llava.data.spellings import MEDIA_KEYS
        from llava.grounding.syntax import strip_coordinates

        # Media are not opened, wherever they are said to lie.
        for sample, source in read_samples(path):
            record = parse_record(sample, source, "", "", outside=MEDIA_KEYS)
            # Samples as a model learns them, without what stands for pixels.
            text = text_without_media(record)
            if text := strip_coordinates(text) if record.coordinates else text:
                yield text
        return
    if not path.removesuffix(".gz").endswith(TEXT_SUFFIXES):
        raise ValueError(f"--data {path}: unknown kind of file; known: .txt, .txt.gz, .train, .json, .jsonl")
    try:
        with open_text(path) as lines:
            yield from filter(None, map(str.strip, lines))
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {path}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    # What gzip raises for a file that was cut off or is none.
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"--data {path}: cannot be read to its end: {error}") from error


def text_without_media(record: Record) -> str:
    """The text of a record as ``plain_lm`` joins it, placeholders left out."""
    return " ".join(text for turn in record.turns if (text := remove_placeholders(turn.text).strip()))


def open_text(path: str) -> IO[str]:
    """Open a text file, gzipped if its name says so."""
    if path.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    return Path(path).open(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
