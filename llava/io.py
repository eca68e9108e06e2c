"""Reading files that people write."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.messages import shorten, shorten_text

if TYPE_CHECKING:
    import yaml


def read_yaml(path: Path, name: str) -> Any:
    """What a YAML file holds.

    Args:
        path: of the file.
        name: what an error calls it.

    Raises:
        ValueError: it cannot be read, is no YAML, or has a key twice in one place: names both lines.
    """
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        """YAML's own loader takes the last of equal keys and says nothing."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            check_keys(node, name)
            return super().construct_mapping(node, deep)

    try:
        text = path.read_bytes().decode("utf-8-sig")
        loader = UniqueKeyLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except DuplicateKeyError:
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{name}: not YAML that can be read: brackets within brackets") from error
    except (yaml.YAMLError, ValueError) as error:  # A number of 5,000 digits, or the 31st of April.
        raise ValueError(f"{name}: not YAML: {shorten_text(str(error), 300)}") from error


class DuplicateKeyError(ValueError):
    """A key that a YAML file has twice in one place."""


def check_keys(node: yaml.MappingNode, name: str) -> None:
    """A ``DuplicateKeyError`` for a key that a mapping has twice; a merge (<<) may be overridden."""
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key.value, str):
            continue
        if (key.tag, key.value) in lines:
            raise DuplicateKeyError(
                f"{name}: the key {shorten(key.value)} is there twice, in lines {lines[key.tag, key.value]} and "
                f"{line}; leave one out"
            )
        lines[key.tag, key.value] = line
