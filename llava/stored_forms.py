"""The forms in which models, checkpoints and caches are stored, by version: what this release writes and reads.

A form gets a new version when a release before could not read what this one writes, or would read it as something
else. What has no version was written before there were any, in form 1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.constants import RELEASE
from llava.messages import shorten


@dataclass(frozen=True)
class StoredForm:
    """A form of something that is stored.

    Attributes:
        name: of what is stored so.
        entry: of the JSON object that holds the version.
        version: that is written, and the newest that is read.
        oldest: that is read.
        remedy: what can be done beside taking another release of this library.
    """

    name: str
    entry: str
    version: int
    oldest: int
    remedy: str

    @property
    def stamp(self) -> dict[str, int]:
        """The entry of what is written now."""
        return {self.entry: self.version}

    def read(self, path: Path) -> Any:
        """What a file of JSON holds; a ValueError where it is damaged, or in a form that this release does not read."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        self.check(content, str(path))
        return content

    def check(self, content: Any, where: str) -> None:
        """See that an object of JSON is in a form that this release reads.

        Args:
            content: the object; what is none is left to its reader.
            where: the file that holds it, or its words for an error.

        Raises:
            ValueError: it is not; names its version and this release.
        """
        found = content.get(self.entry, 1) if isinstance(content, dict) else self.version
        if type(found) is not int or found < 1:
            raise ValueError(
                f"{where}: its {self.entry} is {shorten(found)}, expected a whole number from 1 on; {self.remedy}"
            )
        if found > self.version:
            raise ValueError(
                f"{where}: a newer release of llava wrote this {self.name} (version {found} of its form; llava "
                f"{RELEASE} reads up to {self.version}): upgrade llava, or {self.remedy}"
            )
        if found < self.oldest:
            raise ValueError(
                f"{where}: an older release of llava wrote this {self.name} (version {found} of its form; llava "
                f"{RELEASE} reads {self.oldest} to {self.version}): take that release, or {self.remedy}"
            )


MODEL = StoredForm("model", "llava_model_version", 1, 1, "take another model")
"""The settings in ``config.json``, and the names and shapes of the weights beside it, adapters included."""

TRAINING_STATE = StoredForm("checkpoint", "form_version", 1, 1, "give another --resume_from_checkpoint")
"""What a checkpoint has beside its model: the place in the data, counters, words, and what the run is."""

FEATURE_CACHE = StoredForm("feature cache", "version", 1, 1, "give another --feature_cache")
"""``cache.json``, and the shards beside it."""
