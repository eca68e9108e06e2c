"""A language model's folder -> the same model with fresh, seeded weights: ``python -m llava.model.random_weights``."""

from __future__ import annotations

import sys

from llava.model.random_weights import create, main

__all__ = ["create", "main"]

if __name__ == "__main__":
    sys.exit(main())
