"""--deepspeed takes the names of the configurations that come with the library."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava.train.command_line import parse_arguments
from llava.train.engines import SHIPPED, check_deepspeed_config, check_engine, find_deepspeed_config


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


@pytest.mark.parametrize("section", ["optimizer", "scheduler", "tensor_parallel"])
def test_sections_that_replace_our_optimizer_are_refused(section: str, tmp_path: Path) -> None:
    settings = {"zero_optimization": {"stage": 2}, section: {"type": "AdamW", "params": {"lr": 1}}}
    file = tmp_path / "own.json"
    file.write_text(json.dumps(settings))
    for given in (str(file), settings, json.dumps(settings)):
        with pytest.raises(ValueError, match=rf"has a section '{section}': .*; remove the section"):
            check_deepspeed_config(given)
    words = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o", "--use_cpu"]
    with pytest.raises(ValueError, match=rf"--deepspeed .*own\.json has a section '{section}'"):
        parse_arguments([*words, "--deepspeed", str(file)])


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_leave_the_optimizer_to_us(name: str) -> None:
    check_deepspeed_config(find_deepspeed_config(name))


def test_a_file_that_is_no_configuration_is_named(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    for text, message in (("{", "is not JSON"), ("[]", "expected a JSON object, found list")):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"--deepspeed .*own\.json.* {message}"):
            check_deepspeed_config(str(file))


def test_what_accelerate_launch_asks_for_is_refused_too() -> None:
    check_engine(SimpleNamespace())
    with pytest.raises(ValueError, match="asks for FSDP, which is not available"):
        check_engine(SimpleNamespace(fsdp_plugin=object()))
    plugin = SimpleNamespace(deepspeed_config={"optimizer": {}})
    with pytest.raises(ValueError, match="has a section 'optimizer'"):
        check_engine(SimpleNamespace(deepspeed_plugin=plugin))
