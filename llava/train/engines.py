"""DeepSpeed's configurations that come with the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "deepspeed"

SHIPPED = tuple(sorted(file.stem for file in _FOLDER.glob("*.json")))
"""Names that ``--deepspeed`` takes in place of a file."""


def find_deepspeed_config(given: Any) -> Any:
    """What ``--deepspeed`` means: one of ``SHIPPED`` by its name, or else the file or the settings that it is.

    Raises:
        ValueError: it is none of these.
    """
    if given in SHIPPED:
        return str(_FOLDER / f"{given}.json")
    if isinstance(given, str) and not given.lstrip().startswith("{") and not Path(given).is_file():
        raise ValueError(f"--deepspeed {given!r} is no file; give one, or one of {', '.join(SHIPPED)}")
    return given
