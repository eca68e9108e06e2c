"""Flags of what makes a run faster or smaller, in groups that the groups of ``arguments.py`` are made of.

They are written as ``arguments.py`` says, and checked here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)  # Behind DataArguments.data_path, which has no default.
class FeatureCacheArguments:
    """Whether features of a frozen vision tower are read from files, and where these lie."""


@dataclass
class SpeedArguments:
    """How samples become batches, and what a step costs."""

    def check_speed(self) -> None:
        """A ValueError for flags that do not go together."""
