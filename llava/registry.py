"""A table of named parts, matched by exact name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps exact names to parts (classes or functions) of one kind.

    Args:
        kind: what the parts are, in words for error messages ("projector", "resampler").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files a part under ``name``; a name taken already is a ValueError."""

        def decorate(part: T) -> T:
            if name in self._parts:
                raise ValueError(f"the {self.kind} {name!r} is registered twice")
            self._parts[name] = part
            return part

        return decorate

    def get(self, name: str) -> T:
        """The part filed under ``name``; a ValueError lists the known names."""
        if name not in self._parts:
            known = ", ".join(self.names()) or "none"
            raise ValueError(f"unknown {self.kind} {name!r}; known: {known}")
        return self._parts[name]

    def names(self) -> list[str]:
        return sorted(self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


# Modules of one's own, imported so that they register their backbones, towers, resamplers ...


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
