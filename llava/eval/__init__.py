"""Scoring a trained model."""

from __future__ import annotations

import platform
from importlib.metadata import version

import llava


def list_versions() -> dict[str, str]:
    """Of what numbers may change with; each table of scores has them."""
    others = {name: version(name) for name in ("torch", "transformers")}
    return {"llava": llava.__version__, "python": platform.python_version(), **others}
