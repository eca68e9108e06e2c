"""The table of flags is the parser's, and a start that trains nothing loads nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser
from transformers import TrainingArguments as TransformersArguments

from llava.command import CommandParser
from llava.config import VisionConfig
from llava.data.samplers import BY_LENGTH, BY_MODALITY, RANDOM
from llava.token_layout import POOL_MODES
from llava.train import arguments, command_line
from llava.train.command_line import build_parser, parse_arguments, read_flags
from llava.train.family_flags import FAMILY, GROUPING, UNGROUPED
from llava.train.transformers_flags import AS_IN_TRANSFORMERS, FLAGS, TOPICS, WORKS

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "numpy", "datasets", "deepspeed", "accelerate", "peft", "bitsandbytes", "av", "PIL")


@pytest.fixture(scope="module")
def parser() -> CommandParser:
    return build_parser()


def test_every_flag_of_the_parser_is_in_the_table(parser: CommandParser) -> None:
    real = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
    assert list(read_flags()) == list(dict.fromkeys(real))
    assert set(GROUPING.values()) == {BY_LENGTH, BY_MODALITY}
    assert UNGROUPED == RANDOM
    assert FAMILY.isdisjoint(read_flags())


def test_flags_of_transformers_have_the_help_of_the_installed_release() -> None:
    real = {action.dest: action.help for action in HfArgumentParser(TransformersArguments)._actions}
    own = {name for name, flag in read_flags().items() if flag.topic not in TOPICS} | set(OVERRIDDEN)
    theirs = {name: flag.help for name, flag in read_flags().items() if name not in own}
    assert theirs == {name: real[name] or "" for name in theirs}
    assert len(theirs) > 90


def test_help_says_what_a_flag_of_transformers_does_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.answer_at_once(["--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "%%" not in printed
    assert "slower training" in printed
    for flag in read_flags().values():
        known = FLAGS.get(flag.name)
        if flag.of_transformers and known and known.effect != WORKS:
            assert command_line._describe(flag).startswith(("Refused: ", "No effect: ")), flag.name
            assert flag.help not in command_line._describe(flag)
        elif flag.of_transformers and known and known.note != AS_IN_TRANSFORMERS:
            assert command_line._describe(flag).endswith(f". Here: {known.note.replace('`', '')}."), flag.name
    assert "Refused: Liger's kernels are for transformers' own" in printed
    assert "Here: a folder, or auto for the last whole checkpoint." in printed
    own = set(arguments.TrainingArguments.__annotations__)
    assert {name for name, flag in read_flags().items() if flag.of_transformers}.isdisjoint(own)


OVERRIDDEN = (
    "train_sampling_strategy", "do_train", "do_eval", "logging_steps", "num_train_epochs",
    "include_num_input_tokens_seen", "report_to",
    "overwrite_output_dir", "resume_changed", "stop_on_bad_numbers", "dataloader_persistent_workers",
)  # fmt: skip


def test_every_flag_of_the_library_has_help_and_a_heading() -> None:
    own = set(vars(arguments.ModelArguments)["__annotations__"]) | set(arguments.DataArguments.__annotations__)
    own |= set(arguments.TrainingArguments.__annotations__)
    for name in own:
        flag = read_flags()[name]
        assert len(flag.help) > 20, name
        assert flag.help.endswith("."), name
        assert flag.topic, name


@pytest.mark.parametrize("name", sorted(arguments.CHOICES))
def test_help_names_every_choice(name: str) -> None:
    assert all(choice in read_flags()[name].help for choice in arguments.CHOICES[name])


def test_help_names_what_comes_with_the_library() -> None:
    assert all(part in read_flags()["mm_tunable_parts"].help for part in arguments.PARTS)
    assert all(mode in read_flags()["mm_spatial_pool_mode"].help for mode in POOL_MODES)


@pytest.mark.parametrize("name", [name for name, flag in read_flags().items() if "(default " in flag.help])
def test_a_default_told_in_the_help_is_the_real_one(name: str) -> None:
    """Of flags that are None until the model is known, that of a new model."""
    field = getattr(VisionConfig, name.removeprefix("mm_"), None)
    told = read_flags()[name].help.partition("(default ")[2].partition(")")[0]
    if isinstance(field, bool):
        assert told.startswith(str(field).lower())
    elif isinstance(field, int | float):
        assert float(told.split(";")[0]) == field


def test_the_formats_named_in_the_help_are_those_that_come_with_the_library(warm_python: str) -> None:
    program = "from llava.data.formats import FORMATS; print(*FORMATS)"
    done = subprocess.run(
        [warm_python, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    named = read_flags()["version"].help.partition("turns are learned: ")[2].partition(". ")[0]
    assert named.split(", ") == done.stdout.split()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--model_name_or_path", "x", "--learning_rate", "-1e-4"],
        ["--learning-rate=3", "--no_logging_nan_inf_filter", "--bf16"],
        ["--group_by_length", "true", "--lazy_preprocess", "--evaluation_strategy", "no", "--config", "r.yaml"],
    ],
)
def test_what_a_run_may_be_given_is_left_to_its_parser(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.answer_at_once(words) is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("word", ["--leraning_rate", "--num_frame=3", "--nothing_like_it", "--no_tf32"])
def test_an_unknown_flag_gets_the_words_of_the_parser(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.answer_at_once(["--model_name_or_path", "x", "--data_path", "y", word, "1"]) == 2
    said = capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown flag") as error:
        parse_arguments(["--model_name_or_path", "x", "--data_path", "y", word, "1"])
    assert said == f"error: {error.value}\n"


@pytest.mark.parametrize("words", [["--help"], ["--leraning_rate", "1"]])
def test_help_and_a_wrong_flag_load_nothing_heavy(words: list[str]) -> None:
    program = f"""
import runpy, sys
sys.argv = ["train", *{words!r}]
try:
    runpy.run_module("llava.train.train", run_name="__main__", alter_sys=True)
except SystemExit as end:
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    print("END", end.code, len(sys.modules), *loaded)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    _, code, modules, *loaded = done.stdout.splitlines()[-1].split()
    assert (int(code), loaded) == (0 if words == ["--help"] else 2, [])
    assert int(modules) < 300
    if words == ["--help"]:
        assert "--mm_perceiver_latents" in done.stdout
        assert "--gradient_accumulation_steps" in done.stdout
    else:
        assert "--learning_rate" in done.stderr


def test_a_date_in_a_recipe_is_its_text(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mm_resampler_args: {since: 2020-01-01, 1: 2}\n")
    values = command_line.parse_values(["--config", str(recipe)], optional=("model_name_or_path", "data_path"))
    assert values["mm_resampler_args"] == '{"since": "2020-01-01", "1": 2}'
