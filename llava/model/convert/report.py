"""What is said of a conversion: its table, and its settings with what means something else now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llava.messages import list_names

_MOST_NAMED = 2
_COLUMN = 16


@dataclass
class Settings:
    """Today's visual settings of a checkpoint, as fields of ``VisionConfig``, and what is said of them.

    Attributes:
        fields: the settings.
        used: entries of ``config.json`` that they were made of, or that have no meaning any more.
        changed: what means something else here than in the code that wrote the checkpoint.
        assumed: what its files do not say.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)


@dataclass
class ConversionReport:
    """What became of a checkpoint's tensors and settings.

    Attributes:
        source: its folder or hub name.
        found: what it is, by part.
        copied: names of tensors that are the same here.
        renamed: stored names, and those that they have, or that their parts have, today.
        missing: names of parameters here that it does not have; they are random.
        left_out: stored names, and why nothing takes them.
        changed: what means something else here than in the code that wrote it.
        assumed: settings that its files do not say.
    """

    source: str
    found: dict[str, str]
    copied: list[str] = field(default_factory=list)
    renamed: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"translated from another layout: {self.source}"]
        lines += [f"  {part:<{_COLUMN}}{what}" for part, what in self.found.items()]
        left = [f"{name} ({why})" for name, why in self.left_out.items()]
        for status, names in (
            ("copied", self.copied),
            ("renamed", [f"{old} -> {new[0]}{' and others' * (len(new) > 1)}" for old, new in self.renamed.items()]),
            ("missing", self.missing),
            ("left out", left),
        ):
            lines.append(f"  {status:<{_COLUMN}}{_count(names)}")
        for status, notes in (("changed meaning", self.changed), ("assumed", self.assumed)):
            lines += [f"  {status:<{_COLUMN}}{note}" for note in notes or ["nothing"]]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return asdict(self)


def _count(names: Sequence[str]) -> str:
    named = f": {list_names(names, _MOST_NAMED)}" if names else ""
    return f"{len(names):>4} tensors{named}"
