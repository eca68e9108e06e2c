"""What runs of ``test_storage.py`` call before they begin."""

from __future__ import annotations

from llava import storage


def shorten_pauses(seconds: float = 0.01) -> None:
    """Let reads that failed be tried again at once."""
    storage.PAUSES = (seconds,) * 4
