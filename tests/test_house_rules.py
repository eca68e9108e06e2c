"""Sizes and habits that keep the library readable in an evening; CONTRIBUTING.md has the tree that these tests hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.test_import_rules import find_imports, read_sources

ROOT = Path(__file__).parents[1]
FILES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted((ROOT / "llava").rglob("*.py"))}
MOST_LINES_OF_FILE = 450
MOST_LINES_OF_FUNCTION = 60


def test_no_file_is_longer_than_a_subject():
    assert {name: n for name, text in FILES.items() if (n := len(text.splitlines())) > MOST_LINES_OF_FILE} == {}


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def length_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    own = docstring.end_lineno - docstring.lineno + 1 if docstring is not None else 0
    return function.end_lineno - function.lineno + 1 - own


def test_every_function_fits_a_screen():
    lengths = {
        f"{name}:{function.name}": length_without_docstring(function)
        for name, text in FILES.items()
        for function in functions_of(ast.parse(text))
    }
    assert len(lengths) > 1000, "the library's functions are not found"
    assert {name: length for name, length in lengths.items() if length > MOST_LINES_OF_FUNCTION} == {}


def find_circles(graph: dict[str, set[str]]) -> set[str]:
    """The modules in circles, and those between two circles: what is left when leaves and roots are taken away."""
    left = dict(graph)
    while True:
        imported = {target for targets in left.values() for target in targets}
        kept = {
            module: targets & set(left)
            for module, targets in left.items()
            if targets & set(left) and module in imported
        }
        if kept == left:
            return set(left)
        left = kept


def test_no_import_goes_in_a_circle():
    """What a module imports at its top, type checking included; an import within a function waits for its call."""
    known = {module.removesuffix(".__init__"): tree for module, tree in read_sources().items()}
    graph: dict[str, set[str]] = {module: set() for module in known}
    for module, tree in read_sources().items():
        for found in find_imports(tree, module):
            target = found.name if found.name in known else found.name.rpartition(".")[0]
            if found.at_top and target in known and target != module.removesuffix(".__init__"):
                graph[module.removesuffix(".__init__")].add(target)
    assert find_circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"b", "c"}
    assert find_circles(graph) == set()


def read_tree() -> dict[str, str]:
    """What each file of the tree in CONTRIBUTING.md is said to own, by its path; braces stand for several files."""
    block = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("```\nllava/\n")[1].split("```")[0]
    folders: list[str] = ["llava"]
    owned = {}
    for line in block.splitlines():
        depth, entry = (len(line) - len(line.lstrip())) // 2, line.strip()
        name, _, about = entry.partition("  ")
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
            continue
        for file in expand(name):
            owned["/".join([*folders, file])] = about.strip()
    return owned


def expand(name: str) -> list[str]:
    before, brace, rest = name.partition("{")
    return [before + part + rest.partition("}")[2] for part in rest.partition("}")[0].split(",")] if brace else [name]


def test_the_tree_of_contributing_is_what_is_there():
    tree = read_tree()
    owners = {"llava/model/__init__.py", "llava/eval/__init__.py"}
    there = {name for name in FILES if not name.endswith("/__init__.py")} | owners
    assert set(tree) == there
    assert all(tree.values()), "each file has a line that says what it owns"
