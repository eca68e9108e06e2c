"""What an inspection finds: how bad it is, the word that names its kind, and one sentence that says what to change."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

ERROR, WARNING, NOTE = "error", "warning", "note"

CODES = {
    "refused": "the trainer would stop before its first step",
    "visual_supervised": "visual tokens have labels: placeholders are learned as text",
    "nothing_supervised": "samples have no label at all",
    "end_not_learned": "no label is an end of text: answers would never end",
    "media_behind_text": "all that is learned stands before the image or clip, and so cannot depend on it",
    "context_too_small": "much of the text is cut off and never trained on",
    "media_unread": "the data have media, or a key that may name some, which nothing reads",
    "bad_samples": "samples that cannot be used",
    "tokenizer": "the tokenizer is another model's",
    "tower_statistics": "pixels are not normalised as the vision tower expects",
    "frozen_random": "a part that the checkpoint lacks is random, and frozen",
    "no_gradient": "parameters that are to train get no gradient",
    "stream_disconnected": "the loss does not depend on a stream of visual tokens",
    "step_failed": "a training step ends with an error",
    "bad_numbers": "the loss or a gradient is NaN or infinite",
    "disk": "checkpoints do not fit on the disk",
    "memory": "the run does not fit into the memory of the device",
    "trainer": "what the trainer warns of",
    "inspection": "what could not be looked at, or was looked at otherwise than it would be trained",
}
"""The kinds of findings, which ``--accept`` takes; ``docs/inspect.md`` says what to do about each."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        level: ``ERROR`` where it would ruin a run, ``WARNING`` where it may be meant, ``NOTE`` to know.
        code: of ``CODES``.
        text: what was found and where, what was expected, and which flag or file to change.
    """

    level: str
    code: str
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.code}: {self.text}"


@dataclass
class Findings:
    """All findings of an inspection, the worst first.

    Attributes:
        accepted: kinds that do not count as errors, of ``--accept``.
    """

    accepted: Collection[str] = ()
    found: list[Finding] = field(default_factory=list)

    def add(self, level: str, code: str, text: str) -> None:
        """Note something; an error of an accepted kind is a warning."""
        assert code in CODES, code
        level = WARNING if level == ERROR and code in self.accepted else level
        finding = Finding(level, code, " ".join(text.split()))
        if finding not in self.found:
            self.found.append(finding)

    def error(self, code: str, text: str) -> None:
        self.add(ERROR, code, text)

    def warn(self, code: str, text: str) -> None:
        self.add(WARNING, code, text)

    def note(self, code: str, text: str) -> None:
        self.add(NOTE, code, text)

    def __iter__(self) -> Iterator[Finding]:
        return iter(sorted(self.found, key=lambda finding: (ERROR, WARNING, NOTE).index(finding.level)))

    @property
    def num_errors(self) -> int:
        return sum(finding.level == ERROR for finding in self.found)

    def conclude(self) -> str:
        """The last line of the text: what it comes to."""
        if self.num_errors:
            number = "1 finding" if self.num_errors == 1 else f"{self.num_errors} findings"
            return f"{number} that would ruin this run (see docs/inspect.md)"
        warnings = sum(finding.level == WARNING for finding in self.found)
        return "nothing that would ruin this run" + (f"; {warnings} to look at" if warnings else "")
