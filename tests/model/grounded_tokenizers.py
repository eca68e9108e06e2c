"""Tokenizers of several kinds that know the tokens of coordinates, and texts that a model would write with these."""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava.config import GroundingConfig
from llava.grounding.syntax import LOCATIONS, bin_token
from llava.model.vocabulary import add_coordinate_tokens, load_tokenizer
from llava.types import Coordinates

WORDS = ["il gatto dorme sul divano", "una stella gialla", "il cane guarda la strada"]
KINDS = ("byte-level", "pieces", "bytes", "words")


def add_coordinates(tokenizer, num_temporal: int = 7, num_spatial: int = 5) -> GroundingConfig:
    """Give a tokenizer the tokens of coordinates, as a grounded model's has them."""
    return add_coordinate_tokens(tokenizer, GroundingConfig(num_temporal=num_temporal, num_spatial=num_spatial))


def build_tokenizer(kind: str, tokenizer_dir: Path):
    """A tokenizer without tokens of coordinates.

    ``byte-level`` is of GPT-2's kind; ``pieces`` of SentencePiece's, with letters alone for words and a space before
    whatever follows an added token; ``bytes`` the same without pieces for brackets; ``words`` knows one bracket, ``[``.
    """
    if kind == "byte-level":
        return load_tokenizer(str(tokenizer_dir))
    if kind == "words":
        vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "[", *" ".join(WORDS).split()])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        brackets = "[]{}" if kind == "pieces" else ""
        merges = [("▁", bracket) for bracket in brackets]
        pieces = [
            "<unk>", "<s>", "▁", *(f"<0x{i:02X}>" for i in range(256)), *sorted(set("".join(WORDS)) - {" "}), *brackets,
            *map("".join, merges),
        ]  # fmt: skip
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<s>", pad_token="<s>")


def write_bins(text: str, coordinates: Coordinates, grounding: GroundingConfig) -> str:
    """A text with the nearest bin in the place of each placeholder, as a model would write it."""
    waiting = {placeholder: iter(getattr(coordinates, name)) for placeholder, name in LOCATIONS.items()}

    def write(match: re.Match[str]) -> str:
        last = grounding.num_bins(match[1]) - 1
        return bin_token(match[1], min(max(round(next(waiting[match.group()]) * last), 0), last))

    return re.sub(r"<(TEMP|HEIGHT|WIDTH)-(?:INPUT|OUTPUT)>", write, text)
