"""--deepspeed takes the names of the configurations that come with the library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.train.engines import SHIPPED, find_deepspeed_config


@pytest.mark.parametrize("name", SHIPPED)
def test_a_name_stands_for_a_file_of_that_stage(name: str) -> None:
    settings = json.loads(Path(find_deepspeed_config(name)).read_text())
    assert settings["zero_optimization"]["stage"] == int(name.removeprefix("zero")[0])


def test_a_file_or_settings_stay_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text("{}")
    for given in (str(file), {"zero_optimization": {}}, '{"zero_optimization": {}}'):
        assert find_deepspeed_config(given) == given


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"--deepspeed 'zero4' is no file; .* zero1, zero2, zero3, zero3_offload"):
        find_deepspeed_config("zero4")
