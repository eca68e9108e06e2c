"""Something that answers at once, in place of a model; other processes can make it too."""

from __future__ import annotations

import os
import signal
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.config import GroundingConfig, VisionConfig
from llava.geometry import Box
from llava.grounding.syntax import bin_token, parse_boxes, parse_spans
from llava.serve.generate import Answer

GROUNDING = GroundingConfig()


def places_of(question: str) -> str:
    """A span and two boxes that depend on the question alone."""
    seed = zlib.crc32(question.encode())
    a, b = seed % 50, 50 + seed // 50 % 50
    box = "".join(bin_token(axis, n) for axis, n in (("WIDTH", a), ("HEIGHT", a), ("WIDTH", b), ("HEIGHT", b)))
    return f"{{{bin_token('TEMP', a)}{bin_token('TEMP', b)}}}[{box}][{box}]"


@dataclass(frozen=True)
class FakeSource:
    """Makes a ``FakeAnswerer``.

    Attributes:
        vision: what media are fitted to.
        log: a file that gets a line for each question.
        dies_at: the question (a part of it) at which the process ends without a word.
        fails_at: the question at which a ValueError is raised.
        text: the answer to everything, in place of places that depend on the question.
    """

    vision: VisionConfig | None
    log: Path
    dies_at: str | None = None
    fails_at: str | None = None
    text: str | None = None

    def __call__(self, device: str) -> FakeAnswerer:
        return FakeAnswerer(self)

    def changed(self, **changes: Any) -> FakeSource:
        return replace(self, **changes)


class FakeAnswerer:
    def __init__(self, source: FakeSource) -> None:
        self.source, self.vision = source, source.vision

    def answer(self, requests, batch_size: int = 16, *, sub_bin: bool = False, **options: Any) -> list[Answer]:
        source = self.source
        prompts = [request.prompt for request in requests]
        if source.fails_at and any(source.fails_at in prompt for prompt in prompts):
            raise ValueError("the prompt has 900 tokens, but the model's context is 512")
        if source.dies_at and any(source.dies_at in prompt for prompt in prompts):
            os.kill(os.getpid(), signal.SIGKILL)
        with source.log.open("a") as log:
            log.writelines(f"{prompt}\n" for prompt in prompts)
        # How many are answered together shows, as it would in the last digits of a model.
        return [self._answer(f"{len(prompts)} together: {source.text or places_of(p)}", sub_bin) for p in prompts]

    def _answer(self, text: str, sub_bin: bool) -> Answer:
        boxes = parse_boxes(text, GROUNDING)
        if sub_bin:
            boxes = [Box(*(min(number + 0.001, 1.0) for number in box)) for box in boxes]
        return Answer(text, boxes, parse_spans(text, GROUNDING))
