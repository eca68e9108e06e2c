#!/usr/bin/env python
"""Train a model with alternating attention, or look at what a training would start from: ``llava alternating``."""

from __future__ import annotations

import sys

from llava.train.alternating import build_parser, main, start

__all__ = ["build_parser", "main", "start"]

if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
