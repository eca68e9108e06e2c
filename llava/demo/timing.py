"""Phases of a demo: announced, and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a phase and note how long it took."""
    print(f"\n== {name} ==", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
