"""Registry: exact names, no duplicates, a miss lists what there is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llava.registry import PartSettings, Registry, build_settings


@pytest.fixture
def projectors() -> Registry[str]:
    registry: Registry[str] = Registry("projector")
    assert registry.register("linear")("first") == "first"
    registry.register("identity")("second")
    return registry


def test_parts_are_found_by_name(projectors):
    assert projectors.get("linear") == "first"
    assert "linear" in projectors
    assert projectors.names() == list(projectors) == ["identity", "linear"]


def test_names_match_exactly(projectors):
    for name in ("Linear", "linear ", "lin", "linear_2", ""):
        assert name not in projectors
        with pytest.raises(ValueError, match=f"unknown projector '{name}'; known: identity, linear"):
            projectors.get(name)


def test_a_name_is_taken_once(projectors):
    with pytest.raises(ValueError, match="the projector 'linear' is registered twice"):
        projectors.register("linear")("other")
    assert projectors.get("linear") == "first"


def test_empty_registry():
    with pytest.raises(ValueError, match="known: none"):
        Registry("tower").get("dinov2")


@dataclass(frozen=True)
class Settings(PartSettings):
    scale: float = 0.5
    sizes: tuple[Any, ...] = (1, 2)


def test_settings_of_a_part_are_of_the_kinds_of_their_defaults() -> None:
    assert build_settings(Settings, {}, {"scale": 2}, "--x") == Settings(2.0)
    assert type(build_settings(Settings, {}, {"scale": 2}, "--x").scale) is float
    # JSON has no tuples: neither a flag's nor a checkpoint's.
    assert build_settings(Settings, {}, json.loads('{"sizes": [3, [4, 5]]}'), "--x").sizes == (3, (4, 5))


@pytest.mark.parametrize("own", [{"scale": True}, {"scale": 10**400}, {"scale": "1"}, {"sizes": 3}, {"sizes": None}])
def test_a_setting_of_another_kind(own: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"--x has {next(iter(own))} .*; expected a value such as"):
        build_settings(Settings, {}, own, "--x")


def test_a_default_that_no_checkpoint_could_keep() -> None:
    @dataclass(frozen=True)
    class WithFolder(PartSettings):
        folder: Path = Path("here")

    with pytest.raises(TypeError, match=r"WithFolder has folder .*'here'.*, which JSON cannot hold"):
        build_settings(WithFolder, {}, {}, "--x")
