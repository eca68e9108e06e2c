"""Registry: exact names, no duplicates, a miss lists what there is."""

from __future__ import annotations

import pytest

from llava.registry import Registry


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
