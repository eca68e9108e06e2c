"""A table of named parts, matched by exact name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
