"""Which weights the files of a tower hold, so that a run with all features at hand need not read them.

A record says what a tower's weights hash to whose files have a certain SHA-256; the hash of a file is taken, and
remembered, as that of a clip (``digests``). A file that has changed has no record, and its tower is read.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from llava.config import VisionConfig
from llava.data.cache import find_stranger
from llava.data.feature_cache.cache import TOWERS
from llava.data.feature_cache.digests import FOLDER, Digests
from llava.data.feature_cache.keys import describe_structure
from llava.io import hash_json, write_beside

logger = logging.getLogger(__name__)


class TowerRecords:
    """The records of a cache's folder, which need not exist yet."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self._digests = Digests(self.folder / FOLDER)

    def __call__(self, source: str, vision: VisionConfig) -> str | None:
        """The hash of a tower's weights at a folder or hub name; None where it has not been seen yet."""
        try:
            path = self._path(source, vision)
            if path is None or find_stranger(path, self.folder):
                return None
            told = json.loads(path.read_text(encoding="utf-8"))
            return str(told["weights"]) if told["check"] == _check(path, told["weights"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, vision: VisionConfig) -> None:
        """Remember the hash of the weights that were read, where the folder can be written to."""
        try:
            path = self._path(vision.vision_tower, vision)
            if path is None or path.exists():
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            told = {"weights": vision.vision_tower_hash, "source": vision.vision_tower}
            told["check"] = _check(path, vision.vision_tower_hash)
            with write_beside(path, shared=True) as beside:
                beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            logger.warning("%s: cannot be written (%s): the tower is read the next time too", self.folder, error)

    def _path(self, source: str, vision: VisionConfig) -> Path | None:
        """Where the record of a tower lies; None for one whose files cannot be found."""
        if (folder := _find_folder(source)) is None:
            return None
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        if not files:
            return None
        content = [self._digests.of_file(str(file)) for file in files]
        return self.folder / TOWERS / f"{hash_json([content, describe_structure(vision)], 16)}.json"


def _check(path: Path, weights: str | None) -> str:
    return hash_json([path.stem, weights], 16)


def _find_folder(source: str) -> Path | None:
    """The folder of a tower, or that of a hub name in the local cache."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from transformers.utils import cached_file

    found = cached_file(source, "config.json", local_files_only=True)
    return Path(found).parent if found else None
