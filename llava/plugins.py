"""Modules of one's own, imported so that they register their backbones, towers, resamplers ..."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module


def import_plugins(names: Sequence[str] | None) -> None:
    """Import modules by name, see ``docs/extending.md``.

    Args:
        names: dotted names, as in ``import``; a file ``my_parts.py`` in the current folder is ``my_parts``.

    Raises:
        ValueError: there is no such module, or it is not Python. What goes wrong inside one is its own error.
    """
    for name in names or ():
        if not name or name.startswith("."):
            raise ValueError(f"--plugins {name!r}: expected the whole name of a module, such as my_parts")
        try:
            import_module(name)
        except SyntaxError as error:
            raise ValueError(f"--plugins {name}: {error.filename}, line {error.lineno}: {error.msg}") from error
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ValueError(
                f"--plugins {name}: no such module; run in its folder, or put that folder on PYTHONPATH, and leave "
                "out the .py"
            ) from error
