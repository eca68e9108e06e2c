"""--deepspeed takes the names of the configurations that come with the library."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava.train import engines
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


def test_the_log_goes_to_tensorboard_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"tensorboard"}
    monkeypatch.setattr(engines, "_check_trackers", lambda names: None)
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: name if name in installed else None)
    words = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o", "--use_cpu"]
    assert parse_arguments(words)[2].report_to == ["tensorboard"]
    assert parse_arguments([*words, "--report_to", "none"])[2].report_to == []
    assert parse_arguments([*words, "--report_to", "wandb", "trackio"])[2].report_to == ["wandb", "trackio"]
    installed.clear()
    assert parse_arguments(words)[2].report_to == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_missing_is_one_line_before_the_model(name: str) -> None:
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    # There is no model of that name to read: what is said first is the tracker.
    words = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o", "--use_cpu"]
    with pytest.raises(ValueError, match=rf"^--report_to {name}: .* pip install 'llava-babylm\[{name}\]'") as caught:
        parse_arguments([*words, "--report_to", name])
    assert "\n" not in str(caught.value)


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
    with pytest.raises(ValueError, match="accelerate's environment asks for FSDP; give --fsdp true instead"):
        check_engine(SimpleNamespace(fsdp_plugin=object()))
    with pytest.raises(ValueError, match=r"--fsdp: accelerate .* would train without it here"):
        check_engine(SimpleNamespace(fsdp_plugin=None, is_fsdp2=False), fsdp=True)
    check_engine(SimpleNamespace(fsdp_plugin=object(), is_fsdp2=True), fsdp=True)
    plugin = SimpleNamespace(deepspeed_config={"optimizer": {}})
    with pytest.raises(ValueError, match="has a section 'optimizer'"):
        check_engine(SimpleNamespace(deepspeed_plugin=plugin))
