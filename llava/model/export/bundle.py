"""One module of Python out of several of this library's: what some classes need of its files, and nothing else.

An export carries the code of its model along. That code is not written a second time: it is cut out of the files it
lives in, definition by definition, beginning with a few classes and following every name that they use. A change of the
library is so a change of its exports. Files are read as text; none is imported.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = "llava"
_ROOT = Path(__file__).parents[2]
_WIDTH = 120


class Name(NamedTuple):
    """A definition at the top of a module of the library."""

    module: str
    name: str


class Edit(NamedTuple):
    """Bytes of a source, from one place to another (line from 1, column), and what takes their place."""

    start: tuple[int, int]
    end: tuple[int, int]
    text: str


@dataclass
class Definition:
    """A statement at the top of a module, or a part of one: its lines and the names that it defines and uses."""

    lines: tuple[int, int]
    names: tuple[str, ...]
    node: ast.stmt
    used: set[str] = field(default_factory=set)
    edits: list[Edit] = field(default_factory=list)


@dataclass
class Source:
    """A module of the library, taken apart.

    Attributes:
        name: dotted.
        lines: of its file, as bytes: the columns of Python's parser count these.
        definitions: in order; ``effects`` are statements that define nothing.
        inner: what it imports of the library, by the name that it has here.
        outer: what it imports of other packages, by the name that it has here: module ("" for ``import``) and name.
        needs: modules of the library that have to run before it.
    """

    name: str
    lines: list[bytes]
    definitions: list[Definition] = field(default_factory=list)
    effects: list[Definition] = field(default_factory=list)
    inner: dict[str, Name] = field(default_factory=dict)
    outer: dict[str, tuple[str, str]] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)

    def find(self, name: str) -> Definition | None:
        return next((one for one in self.definitions if name in one.names), None)


def bundle(
    roots: Sequence[Name],
    left_out: Mapping[Name, Collection[str]],
    decorators: Collection[str],
    effects: Collection[str],
) -> str:
    """The source of a module that has ``roots`` and all that they use.

    Args:
        roots: what the module is for.
        left_out: methods of a class that are not taken along, with what only they use.
        decorators: names of decorators that are not taken along.
        effects: modules whose statements that define nothing are taken along, if any definition of theirs is.

    Raises:
        AssertionError: two definitions would have one name where it is not clear which is meant.
    """
    _SOURCES.clear()  # The edits of one bundle are not those of another.
    taken: dict[str, list[Definition]] = {}
    names = dict[Name, None].fromkeys(roots)
    waiting = list(roots)
    while waiting:
        module, name = waiting.pop()
        source = read_source(module)
        definition = source.find(name)
        assert definition is not None, f"{module} defines no {name}"
        found = [definition, *(source.effects if module in effects else ())]
        for one in found:
            if one in taken.setdefault(module, []):
                continue
            taken[module].append(one)
            _cut(one, left_out.get(Name(module, name), ()), decorators)
            for used in sorted(one.used):
                target = resolve(module, used)
                if target is not None and target not in names:
                    names[target] = None
                    waiting.append(target)
    return _write(taken)


@cache
def _parse(module: str) -> tuple[ast.Module, bytes]:
    path = _ROOT.joinpath(*module.split(".")[1:])
    file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    content = file.read_bytes()
    return ast.parse(content), content


_SOURCES: dict[str, Source] = {}


def read_source(module: str) -> Source:
    """A module of the library, taken apart; the same object within one bundle."""
    if module not in _SOURCES:
        tree, content = _parse(module)
        source = _SOURCES[module] = Source(module, content.splitlines(keepends=True))
        _take_apart(source, tree.body)
    return _SOURCES[module]


def _take_apart(source: Source, body: Sequence[ast.stmt]) -> None:
    for statement in body:
        if isinstance(statement, ast.ImportFrom | ast.Import):
            _note_import(source, statement)
        elif isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            _take_apart(source, statement.orelse)  # What runs.
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            # The docstring of the assignment before it, or of the module.
            if source.definitions and isinstance(source.definitions[-1].node, ast.Assign | ast.AnnAssign):
                previous = source.definitions[-1]
                previous.lines = (previous.lines[0], statement.end_lineno or statement.lineno)
        else:
            names = _defined_names(statement)
            definition = Definition(_lines_of(source, statement), names, statement)
            (source.definitions if names else source.effects).append(definition)


def _note_import(source: Source, statement: ast.Import | ast.ImportFrom) -> None:
    module = getattr(statement, "module", None)
    for alias in statement.names:
        local = alias.asname or alias.name
        if isinstance(statement, ast.ImportFrom) and module and module.split(".")[0] == PACKAGE:
            source.inner[local] = Name(module, alias.name)
            source.needs.append(module)
        elif module != "__future__":
            renamed = f" as {alias.asname}" if alias.asname else ""
            source.outer[local.split(".")[0]] = (module or "", f"{alias.name}{renamed}")


def _defined_names(statement: ast.stmt) -> tuple[str, ...]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return (statement.name,)
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return tuple(node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
    return ()


def _lines_of(source: Source, statement: ast.stmt) -> tuple[int, int]:
    """First and last line of a statement, with its decorators and the comment right above it."""
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    first = min([statement.lineno, *(decorator.lineno for decorator in decorators)])
    while first > 1 and source.lines[first - 2].startswith(b"#"):
        first -= 1
    return first, statement.end_lineno or statement.lineno


def resolve(module: str, name: str) -> Name | None:
    """Where a name of a module is defined in the library; None for a local one, or one that is not the library's."""
    source = read_source(module)
    if source.find(name) is not None:
        return Name(module, name)
    target = source.inner.get(name)
    return None if target is None else resolve(*target)


# What of a definition is taken along.


def _cut(definition: Definition, left_out: Collection[str], decorators: Collection[str]) -> None:
    """Note the names that a definition uses, and what is cut out of it: methods, decorators, imports of the library."""
    removed: set[int] = set()
    for statement in getattr(definition.node, "body", []):
        if isinstance(statement, ast.FunctionDef) and statement.name in left_out:
            removed.update(id(node) for node in ast.walk(statement))
            definition.edits.append(_remove_lines(statement))
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            removed.update(id(node) for node in ast.walk(statement))
            definition.edits.append(_remove_lines(statement))
    for decorator in getattr(definition.node, "decorator_list", []):
        if isinstance(decorator, ast.Name) and decorator.id in decorators:
            removed.add(id(decorator))
            definition.edits.append(Edit((decorator.lineno, 0), (decorator.lineno + 1, 0), ""))
    for node in ast.walk(definition.node):
        if id(node) in removed:
            continue
        if isinstance(node, ast.Name):
            definition.used.add(node.id)
        assert not (isinstance(node, ast.ImportFrom) and str(node.module).startswith(PACKAGE)), (
            f"{definition.names} imports {getattr(node, 'module', '')} where it is called; leave that method out"
        )


def _remove_lines(statement: ast.stmt) -> Edit:
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    first = min([statement.lineno, *(decorator.lineno for decorator in decorators)])
    return Edit((first, 0), ((statement.end_lineno or statement.lineno) + 1, 0), "")


# Writing the module.


def _write(taken: Mapping[str, list[Definition]]) -> str:
    order = _sort_modules(taken)
    new_names = _choose_names(taken, order)
    imports = {one for module in order for one in _outer_imports(read_source(module), taken[module])}
    pieces = ["from __future__ import annotations\n", _write_imports(imports)]
    written: set[str] = set()
    for module in order:
        source = read_source(module)
        renamed = _renamed_here(module, taken[module], new_names)
        for definition in sorted(taken[module], key=lambda one: one.lines):
            text = _text_of(source, definition, renamed)
            # Loggers and type variables are alike in all modules, and need to be there once.
            if not (isinstance(definition.node, ast.Assign) and text in written):
                written.add(text)
                pieces.append(text)
    return "\n\n".join(pieces)


def _sort_modules(taken: Collection[str]) -> list[str]:
    """Modules in an order in which each comes behind those that it imports."""
    order: dict[str, None] = {}
    entered: set[str] = set()

    def visit(module: str) -> None:
        if module not in entered:
            entered.add(module)
            for needed in read_source(module).needs:
                visit(needed)
            order[module] = None

    for module in sorted(taken):
        visit(module)
    return [module for module in order if module in taken]


def _choose_names(taken: Mapping[str, list[Definition]], order: Sequence[str]) -> dict[Name, str]:
    """The name of each definition in the bundle: its own or, for the second of a name, one with its module's before."""
    first: dict[str, tuple[Name, str]] = {}
    chosen: dict[Name, str] = {}
    for module in order:
        for definition in taken[module]:
            for name in definition.names:
                dump = ast.dump(definition.node)
                owner, same = first.setdefault(name, (Name(module, name), dump))
                alike = owner == Name(module, name) or (same == dump and isinstance(definition.node, ast.Assign))
                chosen[Name(module, name)] = name if alike else f"{module.rpartition('.')[2]}_{name}"
    assert len({*chosen.values()} - {*first}) == sum(name.name != new for name, new in chosen.items()), "names clash"
    return chosen


def _renamed_here(module: str, definitions: Sequence[Definition], new_names: Mapping[Name, str]) -> dict[str, str]:
    """Names of a module that are other ones in the bundle; an AssertionError where a local name could be meant."""
    renamed = {}
    for name in {used for one in definitions for used in (*one.used, *one.names)}:
        target = resolve(module, name)
        if target is not None and new_names.get(target, name) != name:
            renamed[name] = new_names[target]
    for definition in definitions:
        local = {node.arg for node in ast.walk(definition.node) if isinstance(node, ast.arg)} | {
            node.id
            for function in ast.walk(definition.node)
            if isinstance(function, ast.FunctionDef)
            for node in ast.walk(function)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        assert not local & set(renamed), f"{module} has local names that are renamed: {local & set(renamed)}"
    return renamed


def _outer_imports(source: Source, definitions: Sequence[Definition]) -> Iterator[tuple[str, str]]:
    for name in {used for one in definitions for used in one.used}:
        if name in source.outer:
            yield source.outer[name]


def _write_imports(imports: Collection[tuple[str, str]]) -> str:
    lines = [f"import {name}" for module, name in sorted(imports) if not module]
    for module in sorted({module for module, _ in imports if module}):
        names = sorted(name for of, name in imports if of == module)
        line = f"from {module} import {', '.join(names)}"
        if len(line) > _WIDTH:
            line = "\n    ".join([f"from {module} import (", *(f"{name}," for name in names)]) + "\n)"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _text_of(source: Source, definition: Definition, renamed: Mapping[str, str]) -> str:
    """The lines of a definition with its edits made and names changed."""
    edits = list(definition.edits)
    cut = [(edit.start, edit.end) for edit in edits]
    for node in ast.walk(definition.node):
        if isinstance(node, ast.Name) and node.id in renamed:
            start = (node.lineno, node.col_offset)
            if not any(first <= start < last for first, last in cut):
                edits.append(Edit(start, (node.lineno, node.col_offset + len(node.id)), renamed[node.id]))
    if (
        definition.names
        and definition.names[0] in renamed
        and isinstance(definition.node, ast.FunctionDef | ast.ClassDef)
    ):
        word = b"def " if isinstance(definition.node, ast.FunctionDef) else b"class "
        column = source.lines[definition.node.lineno - 1].index(word) + len(word)
        place = (definition.node.lineno, column)
        edits.append(Edit(place, (place[0], column + len(definition.names[0])), renamed[definition.names[0]]))
    first, last = definition.lines
    lines = {number: source.lines[number - 1] for number in range(first, last + 1)}
    for edit in sorted(edits, reverse=True):
        (line, column), (end_line, end_column) = edit.start, edit.end
        head, tail = lines[line][:column], lines.get(end_line, b"")[end_column:]
        for number in range(line, min(end_line, last) + 1):
            lines[number] = b""
        if end_line > last:
            lines[line] = head + edit.text.encode()
        elif end_line == line:
            lines[line] = head + edit.text.encode() + tail
        else:
            lines[line], lines[end_line] = head + edit.text.encode(), tail
    text = b"".join(lines.values()).decode().rstrip() + "\n"
    return textwrap.dedent(text) if definition.node.col_offset else text
