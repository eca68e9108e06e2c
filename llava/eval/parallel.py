"""Likelihood scores from several processes, each with a share of the choices and a model of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from llava.eval.choices import Choice, Scorer
from llava.eval.engine import run_shares
from llava.eval.likelihood import LikelihoodScorer
from llava.io import append_json_lines, num_cores, read_json_lines

_WRITTEN_TOGETHER = 1024
"""Choices of a share that are scored and written at once: enough to share beginnings."""


@dataclass(frozen=True)
class ScorerSource:
    """Loads a model in the process that scores with it; see ``LikelihoodScorer.from_folder``."""

    model_path: str
    revision: str | None = None
    dtype: torch.dtype | None = torch.float32
    batch_tokens: int | None = None

    def __call__(self, device: str) -> Scorer:
        return LikelihoodScorer.from_folder(
            self.model_path, self.revision, device=device, dtype=self.dtype, batch_tokens=self.batch_tokens
        )


@dataclass(frozen=True)
class ScoreShare:
    """What one process has to do: score choices on a device, and append their scores to a file, in order."""

    source: Callable[[str], Scorer]
    choices: Sequence[Choice]
    device: str
    path: Path
    plugins: Sequence[str] = ()
    num_threads: int = 0

    def answer(self, on_batch: Callable[[int], None]) -> None:
        scorer = self.source(self.device)
        with self.path.open("ab") as file:
            for start in range(0, len(self.choices), _WRITTEN_TOGETHER):
                scores = scorer.score(self.choices[start : start + _WRITTEN_TOGETHER], on_batch)
                append_json_lines(file, [{"scores": list(of_one)} for of_one in scores], durable=False)


class ParallelScorer:
    """Scores choices in several processes; answers as a ``Scorer``.

    Args:
        source: makes what scores in each, on a device; it is pickled on its way there.
        devices: of each process, see ``llava.eval.engine.choose_devices``.
        plugins: modules that each process imports first.
    """

    def __init__(self, source: Callable[[str], Scorer], devices: Sequence[str], plugins: Sequence[str] = ()) -> None:
        self._source, self._devices, self._plugins = source, devices, tuple(plugins)

    def score(
        self, choices: Sequence[Choice], on_scored: Callable[[int], None] | None = None
    ) -> list[tuple[float, ...]]:
        parts = cut_evenly(choices, len(self._devices))
        # Processes on one CPU would each start as many threads as it has cores.
        threads = max(num_cores() // len(parts), 1) if len(parts) > 1 else 0
        with tempfile.TemporaryDirectory() as folder:
            shares = [
                ScoreShare(self._source, part, device, Path(folder, f"{number}.jsonl"), self._plugins, threads)
                for number, (part, device) in enumerate(zip(parts, self._devices, strict=False))
            ]
            run_shares(shares, on_scored or (lambda _: None))
            # JSON keeps every digit of a float.
            return [tuple(line["scores"]) for share in shares for line in read_json_lines(share.path)]


def cut_evenly(choices: Sequence[Choice], num_parts: int) -> list[Sequence[Choice]]:
    """Consecutive parts, which share beginnings and media, with about as much text each; no part is empty."""
    ends = list(accumulate(sum(len(one.text) + 1 for one in choice.candidates) + 1 for choice in choices))
    parts: list[Sequence[Choice]] = []
    start = 0
    for number in range(1, num_parts + 1):
        # The last choice that ends within this share of the characters; whole numbers, so no rounding.
        stop = sum(end * num_parts <= ends[-1] * number for end in ends) if choices else 0
        if stop > start:
            parts.append(choices[start:stop])
            start = stop
    return parts
