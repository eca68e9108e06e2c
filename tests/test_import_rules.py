"""Who may import whom, and what must wait until it is needed (see ARCHITECTURE, "Who may import whom")."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOUNDATION = {
    "constants",
    "registry",
    "types",
    "token_layout",
    "geometry",
    "config",
    "grounding",
    "compat",
    "compat_deepspeed",
    "messages",
    "progress",
    "command",
    "command_help",
    "commands",
    "io",
    "storage",
    "stored_forms",
    "draw",
    "chart",
    "html",
}
MAY_IMPORT = {
    "constants": set(),
    "compat": {"compat_deepspeed"},
    "compat_deepspeed": set(),
    "registry": set(),
    "types": set(),
    "geometry": set(),
    "token_layout": {"constants", "geometry", "registry", "types"},
    "setting_ranges": {"messages"},
    "config": {"constants", "geometry", "registry", "setting_ranges", "token_layout", "types"},
    "grounding": {"constants", "types", "config", "geometry", "grounding"},
    "messages": set(),
    "progress": set(),
    "commands": set(),
    "command_help": {"commands"},
    "command": {"messages", "commands", "command_help"},
    "completion": {"commands", "command"},
    "__main__": {"commands", "command"},
    "storage": {"types"},
    "stored_forms": {"constants", "messages"},
    "io": {"messages", "storage"},
    "draw": {"geometry"},
    "chart": {"draw", "html"},
    "html": set(),
    "data": {*FOUNDATION, "data"},
    "model": {*FOUNDATION, "model"},
    "train": {*FOUNDATION, "data", "model", "train", "eval", "recipes", "compat_llava"},
    "eval": {*FOUNDATION, "data", "model", "serve", "eval"},
    "inspect": {*FOUNDATION, "data", "model", "train", "inspect"},
    "serve": {*FOUNDATION, "data", "model", "serve"},
    "demo": {*FOUNDATION, "data", "model", "train", "serve", "eval", "inspect", "demo"},
    "recipes": FOUNDATION,
    "compat_llava": {*FOUNDATION, "data", "model", "train"},
}
OPTIONAL = {
    "deepspeed", "peft", "bitsandbytes", "gradio", "timm", "flash_attn", "decord", "fastapi", "starlette", "uvicorn",
}  # fmt: skip
HEAVY = ("torch", "transformers", "numpy", "av", "decord", "datasets", "PIL", "yaml")
READS_ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv"}


class Import(NamedTuple):
    name: str
    line: int
    at_top: bool


@cache
def read_sources() -> dict[str, ast.Module]:
    """The library's modules by dotted name; read by the tests, and not by every process that collects them."""
    files = sorted((ROOT / "llava").rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_bytes()) for file in files}


def find_imports(tree: ast.Module, module: str, skip_type_checking: bool = False) -> Iterator[Import]:
    """Every module that a module imports, absolute, at its top or in a function."""
    left: list[tuple[ast.AST, bool]] = [(tree, True)]
    while left:
        node, at_top = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            at_top = False
        below = list(ast.iter_child_nodes(node))
        if skip_type_checking and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            below = node.orelse
        left += [(child, at_top) for child in below if not isinstance(child, ast.expr)]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            prefix = ".".join(part for part in (base, node.module) if part)
            names = [f"{prefix}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(name, node.lineno, at_top)


def room_of(name: str) -> str | None:
    """The part of the library that a dotted name lies in; None for ``llava`` itself and for others' modules."""
    parts = name.split(".")
    return parts[1] if parts[0] == "llava" and len(parts) > 1 and parts[1] != "__init__" else None


def check_layers(module: str, tree: ast.Module) -> list[str]:
    """What a module imports from parts above its own.

    A command stands above all parts, wherever its name puts it: nothing imports its ``__main__``, which may take
    what it runs from anywhere, in the function that runs it.
    """
    room = room_of(module)
    wrong = []
    for found in find_imports(tree, module):
        target = room_of(found.name)
        if module.endswith(".__main__") and not found.at_top:
            continue
        if target in MAY_IMPORT and room is not None and target not in MAY_IMPORT[room]:
            wrong.append(f"{module}:{found.line} imports {found.name}")
    return wrong


def check_commands(module: str, tree: ast.Module) -> list[str]:
    names = [f"{found.name}." for found in find_imports(tree, module)]
    return [
        f"{module} imports a command, {name}" for name in names if name.startswith("llava.") and ".__main__." in name
    ]


def check_environment(module: str, tree: ast.Module) -> list[str]:
    wrong = []
    for node in ast.walk(tree):
        attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
        name = node.attr if attribute else node.name if isinstance(node, ast.alias) else ""
        if name in READS_ENVIRONMENT:
            wrong.append(f"{module}:{node.lineno} reads the environment ({name})")
    return wrong


def check_optional(module: str, tree: ast.Module) -> list[str]:
    return [
        f"{module}:{found.line} imports {found.name} when it is loaded"
        for found in find_imports(tree, module, skip_type_checking=True)
        if found.at_top and found.name.split(".")[0] in OPTIONAL
    ]


def test_every_room_is_in_the_plan():
    rooms = {room for module in read_sources() if (room := room_of(module)) is not None}
    assert rooms <= set(MAY_IMPORT), "say in MAY_IMPORT (and in ARCHITECTURE) what the new room may import"
    assert {"data", "model", "train"} <= rooms


def find_breaches(check: Callable[[str, ast.Module], list[str]]) -> list[str]:
    """What a check finds wrong in the whole library."""
    assert len(read_sources()) > 50, "the library's files are not found"
    return [breach for module, tree in read_sources().items() for breach in check(module, tree)]


def test_layers():
    assert find_breaches(check_layers) == []


def test_nothing_imports_a_command():
    assert find_breaches(check_commands) == []


def test_only_the_arguments_read_the_environment():
    breaches = find_breaches(check_environment)
    # The last two read nothing: one tells Gradio to report to nobody, for which there is no other way, the other hands
    # the environment on to the commands that it starts, with one folder more.
    readers = (
        "llava.train.arguments:",
        "llava.train.command_line:",
        "llava.serve.web.page:",
        "llava.eval.study.prepare:",
    )
    allowed = [b for b in breaches if b.startswith(readers)]
    assert allowed, "this test no longer sees what it looks for"
    assert [breach for breach in breaches if breach not in allowed] == []


def test_optional_packages_wait_until_they_are_needed():
    assert find_breaches(check_optional) == []


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (check_layers, "llava.data.media", "from llava.model.visual import encode"),
        (check_layers, "llava.data.media", "def f():\n    import llava.train.train"),
        (check_layers, "llava.model.visual", "from llava import data"),
        (check_layers, "llava.model.visual", "from ..data import media"),
        (check_layers, "llava.model.visual", "from .. import data"),
        (check_layers, "llava.token_layout", "from llava.config import VisionConfig"),
        (check_layers, "llava.train.train", "from llava.serve.generate import Captioner"),
        (check_layers, "llava.data.feature_cache.__main__", "from llava.train.build_features import build"),
        (check_commands, "llava.data.media", "from llava.data.feature_cache.__main__ import main"),
        (check_environment, "llava.data.media", "import os\nx = os.environ['A']"),
        (check_environment, "llava.data.media", "from os import getenv"),
        (check_optional, "llava.data.media", "import decord"),
        (check_optional, "llava.model.loading", "try:\n    from timm.models import vit\nexcept ImportError:\n    pass"),
    ],
)
def test_the_checks_see_a_breach(check, module, source):
    assert len(check(module, ast.parse(source))) == 1


def test_the_checks_let_pass_what_is_allowed():
    lazy = ast.parse(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import timm\ndef f():\n    import decord"
    )
    assert check_optional("llava.data.media", lazy) == []
    assert check_layers("llava.train.train", ast.parse("from llava.data.media import x\nimport llava.model")) == []
    assert check_layers("llava.data.x.__main__", ast.parse("def f():\n    import llava.train.train")) == []


def loaded_after(statement: str) -> set[str]:
    program = f"import sys\n{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["llava", *sorted(f"llava.{name}" for name in FOUNDATION)])
def test_import_takes_nothing_heavy(module):
    assert loaded_after(f"import {module}") == set()


def test_reading_records_takes_nothing_heavy_before_there_are_any():
    assert loaded_after("import llava.data.records, llava.data.placeholders, llava.data.formats.base") == set()


def test_data_takes_no_decoder_and_no_transformers():
    assert loaded_after("import llava.data.dataset") == {"torch", "numpy"}
