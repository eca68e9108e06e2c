"""The files of images, found by their ids."""

from __future__ import annotations

import stat
import string
from dataclasses import dataclass
from pathlib import Path

from llava.data.localized_narratives.rows import Narrative, RowError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG")
COCO_DIGITS = 12
_FIELDS = ("image_id", "dataset_id")


@dataclass(frozen=True)
class ImageFinder:
    """Finds the images of narratives in a folder.

    Attributes:
        folder: that of the images.
        patterns: names below the folder, such as ``train2017/{image_id:0>12}.jpg``, in the order in which they
            are looked for; without any, the image id as COCO writes it, and then as it is, with a common suffix.
    """

    folder: str
    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not Path(self.folder).is_dir():
            problem = "not a folder" if Path(self.folder).exists() else "no such folder"
            raise ValueError(f"--images {self.folder}: {problem}")
        for pattern in self.patterns:
            _check_pattern(pattern)

    def find(self, narrative: Narrative) -> str:
        """The name, below the folder, of a narrative's image.

        Raises:
            RowError: there is none, it has no bytes, or its name would lead out of the folder.
        """
        names = self.names_of(narrative)
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise RowError("the name of the image leads out of --images", name)
            if (size := _find_size(Path(self.folder, name))) is not None:
                if not size:
                    raise RowError("the image is an empty file", name)
                return name
        raise RowError("no image of that name", names[0])

    def names_of(self, narrative: Narrative) -> list[str]:
        """The names that a narrative's image may have, the likeliest first."""
        image_id = narrative.image_id
        if self.patterns:
            return [pattern.format(image_id=image_id, dataset_id=narrative.dataset_id) for pattern in self.patterns]
        stems = dict.fromkeys([image_id.zfill(COCO_DIGITS), image_id] if image_id.isdecimal() else [image_id])
        return [stem + suffix for stem in stems for suffix in SUFFIXES]


def _find_size(path: Path) -> int | None:
    """Bytes of a file; None where there is none, or the name can be none of a file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _check_pattern(pattern: str) -> None:
    expected = "write it as '{image_id:0>12}.jpg' or '{dataset_id}/{image_id}.jpg'"
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
        if "image_id" not in fields or not fields <= set(_FIELDS):
            raise ValueError(f"it names {', '.join(sorted(fields)) or 'no field'}")
        pattern.format(image_id="1", dataset_id="d")
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"--image_name {pattern}: {error}; {expected}") from error
