"""Italian text -> a byte-level BPE tokenizer of 30,000 tokens: ``python -m llava.data.train_tokenizer``."""

from __future__ import annotations

import sys

from llava.data.train_tokenizer import main, train

__all__ = ["main", "train"]

if __name__ == "__main__":
    sys.exit(main())
