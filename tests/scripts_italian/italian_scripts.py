"""The scripts are files, not a package: tests import them from where they lie."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load_script(name: str) -> ModuleType:
    """Import a script of ``scripts_italian`` by its name, once."""
    key = f"scripts_italian_{name}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, ROOT / "scripts_italian" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    # dataclasses look their module up by name.
    module = sys.modules[key] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
