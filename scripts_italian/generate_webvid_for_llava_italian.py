"""WebVid rows with Italian captions -> data files for both phases of the Italian pipeline: ``llava prepare webvid``."""

from __future__ import annotations

import sys

from llava.data.webvid import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
