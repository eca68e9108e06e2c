"""The table of flags is the parser's, and a start that trains nothing loads nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava.data.formats import BUILT_IN
from llava.data.samplers import BY_LENGTH, BY_MODALITY
from llava.parser import CommandParser
from llava.train import flag_table
from llava.train.command_line import GROUPS, TrainingParser, parse_arguments

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "numpy", "datasets", "deepspeed", "accelerate", "peft", "bitsandbytes", "av", "PIL")


@pytest.fixture(scope="module")
def parser() -> CommandParser:
    return TrainingParser(GROUPS)


def test_every_flag_of_the_parser_is_in_the_table_with_its_help(parser: CommandParser) -> None:
    """Of the installed transformers too: whichever release it is."""
    real = {action.dest: action for action in parser._actions if action.dest != "help"}
    table = flag_table.read_flags()
    assert list(table) == [name for name in real if not name.startswith("no_")]
    assert {name: flag.help for name, flag in table.items()} == {name: real[name].help or "" for name in table}
    assert set(flag_table.GROUPING) == {BY_LENGTH, BY_MODALITY}


def test_the_formats_named_in_the_help_are_those_that_come_with_the_library() -> None:
    program = "from llava.data.formats import FORMATS; print(*FORMATS)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert tuple(done.stdout.split()) == BUILT_IN


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
    assert flag_table.answer_at_once(words) is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("word", ["--leraning_rate", "--num_frame=3", "--nothing_like_it", "--no_tf32"])
def test_an_unknown_flag_gets_the_words_of_the_parser(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert flag_table.answer_at_once(["--model_name_or_path", "x", "--data_path", "y", word, "1"]) == 2
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
