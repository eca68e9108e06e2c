"""Parts by name: one way to add one, with settings of its own, and the import of files that do."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from typing import Any, Generic, TypeVar

PLUGIN_HINT = "one of your own is known once its file is imported, by --plugins (docs/extending.md)"
"""What an error says of the name of a part that is not there."""

T = TypeVar("T")
S = TypeVar("S", bound="PartSettings")


class Registry(Generic[T]):
    """Maps exact names to parts (classes or functions) of one kind.

    Args:
        kind: what the parts are, in words for error messages ("projector", "resampler").
        settings: where the settings of the parts are registered, if they have any; known without the parts.
    """

    def __init__(self, kind: str, settings: Registry[Any] | None = None) -> None:
        self.kind = kind
        self._settings = settings
        self._parts: dict[str, T] = {}

    def register(self, name: str, settings: type[PartSettings] | None = None) -> Callable[[T], T]:
        """Decorator that files a part under ``name``; a name taken already is a ValueError.

        ``settings`` are registered with it, of a part that has some (the library's own are in ``llava.token_layout``).
        """

        def decorate(part: T) -> T:
            if name in self._parts:
                raise ValueError(f"the {self.kind} {name!r} is registered twice")
            if settings is not None:
                assert self._settings is not None, f"a {self.kind} has no settings"
                # First the settings: where they are refused the part is not there either.
                self._settings.register(name)(settings)
            self._parts[name] = part
            return part

        return decorate

    def get(self, name: str) -> T:
        """The part filed under ``name``; a ValueError lists the known names."""
        if name not in self._parts:
            known = ", ".join(self.names()) or "none"
            raise ValueError(f"unknown {self.kind} {name!r}; known: {known}; {PLUGIN_HINT}")
        return self._parts[name]

    def names(self) -> list[str]:
        return sorted(self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


# Settings of a part.


@dataclass(frozen=True)
class PartSettings:
    """The settings of a part, as a frozen dataclass with JSON's kinds of values.

    A field that the whole model's settings have too is theirs; the others are the part's own, which a flag such as
    ``--mm_resampler_args`` gives as a JSON object, and which a checkpoint keeps.
    """


def build_settings(kind: type[S], shared: Mapping[str, object], own: Mapping[str, object], flag: str) -> S:
    """The settings of a part.

    Args:
        kind: the class of the settings.
        shared: settings of the whole model, by name.
        own: what was given for the part alone; a field that is not there keeps its default.
        flag: that gives ``own``, for errors.

    Raises:
        ValueError: ``own`` has a name that the part does not know, a value of another kind than its default, or
            lacks one that has no default.
    """
    # A subclass without the decorator inherits the fields of its parent, and would lose its own without a word.
    if "__dataclass_fields__" not in vars(kind):
        raise TypeError(f"{kind.__name__} holds settings; it needs the decorator @dataclass(frozen=True)")
    known = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(kind)
        if field.name not in shared
    }
    for name in own:
        if name not in known:
            hint = f"it has a flag of its own, --mm_{name}; " if name in shared else ""
            raise ValueError(f"{flag} has the unknown setting {name!r}; {hint}known: {', '.join(known) or 'none'}")
    values = dict[str, object]()
    for name, default in known.items():
        value = own.get(name, default)
        if value is MISSING:
            raise ValueError(f'{flag} lacks {name!r}, which has no default; give {{"{name}": ...}}')
        if default is not MISSING and not _is_json(default):
            raise TypeError(
                f"{kind.__name__} has {name} {default!r}, which JSON cannot hold; take a number, text or list"
            )
        value = _as_kind_of(default, value)
        if default is not MISSING and default is not None and type(value) is not type(default):
            raise ValueError(f"{flag} has {name} {reprlib.repr(value)}; expected a value such as {default!r}")
        values[name] = value
    of_model = {field.name: shared[field.name] for field in fields(kind) if field.name in shared}
    return kind(**of_model, **values)


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _as_kind_of(default: object, value: object) -> object:
    """A value as JSON has it as one of the kind of a default: 1 for 1.0, and lists for tuples."""
    if isinstance(default, float) and type(value) is int and abs(value) < 10**300:
        return float(value)
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(_as_kind_of((), item) for item in value)
    return value


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
            # Importing it runs its decorators, which is all that is needed.
            import_module(name)
        except SyntaxError as error:
            raise ValueError(f"--plugins {name}: {error.filename}, line {error.lineno}: {error.msg}") from error
        except ModuleNotFoundError as error:
            # A module that is there but imports one that is not is another mistake, and its own error names it.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ValueError(
                f"--plugins {name}: no such module; run in its folder, or put that folder on PYTHONPATH, and leave "
                "out the .py"
            ) from error
