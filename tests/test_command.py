"""Command lines: what they become, and the one line that each mistake is."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

import pytest

from llava.command import CommandLineError, CommandParser, check_output_folder, read_json_object
from llava.io import read_yaml


@pytest.fixture
def parser() -> CommandParser:
    parser = CommandParser(prog="x", may_be_empty=("text",))
    parser.add_argument("--rate", type=float)
    parser.add_argument("--count", type=int, choices=(1, 2))
    parser.add_argument("--truth", type=bool)
    parser.add_argument("--files", nargs="+", required=True)
    parser.add_argument("--text")
    parser.add_argument("--switch", action="store_true")
    parser.add_argument("--each", action="append")
    return parser


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rate abc", "--rate is 'abc'; expected a number"),
        ("--rate nan", "--rate is 'nan'; expected a finite number"),
        ("--rate -inf", "--rate is '-inf'; expected a finite number"),
        ("--rate 1e999", "expected a finite number"),
        ("--rate", "--rate needs a value behind it"),
        ("--count 1.0", "--count is '1.0'; expected a whole number"),
        ("--count 3", "--count is 3; known: 1, 2"),
        (f"--count {10**30}", "at most 18 digits"),
        ("--truth 2", "--truth is '2'; expected true or false"),
        ("--switch=yes", "--switch takes no value, but 'yes' was given"),
        ("--rat 3", "unknown flag --rat; did you mean --rate"),
        ("-x", "unknown flag -x"),
        ("stray --rate 1", "unexpected 'stray'"),
    ],
)
def test_mistakes(parser, words: str, message: str) -> None:
    given = words.split() if words == "stray --rate 1" else ["--files", "a", *words.split()]
    given = ["--files", "a", "--text", "t", "stray"] if words == "stray --rate 1" else given
    with pytest.raises(CommandLineError) as caught:
        parser.parse_args(given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named_behind_what_is_misspelled(parser) -> None:
    with pytest.raises(CommandLineError, match=r"^--files is missing; see --help$"):
        parser.parse_args([])
    with pytest.raises(CommandLineError, match="unknown flag --file; did you mean --files"):
        parser.parse_args(["--file", "a"])
    parser.add_argument("--data", required=True)
    with pytest.raises(CommandLineError, match=r"^--files and --data are missing; see --help$"):
        parser.parse_args([])
    parser.add_argument("--out", required=True)
    with pytest.raises(CommandLineError, match=r"^--files, --data and --out are missing; see --help$"):
        parser.parse_args([])


@pytest.mark.parametrize("word", ["true", "True", "YES", "on", "1", " true "])
def test_truth_is_spelled_in_many_ways(parser, word: str) -> None:
    assert parser.parse_args(["--files", "a", "--truth", word]).truth is True


def test_values(parser) -> None:
    args = parser.parse_args(["--files", "a", "b", "--rate", "-1e-4", "--text", "", "--count", "2", "--truth", "off"])
    assert (args.rate, args.files, args.text, args.count, args.truth) == (-1e-4, ["a", "b"], "", 2, False)
    with pytest.raises(CommandLineError, match="--files is empty"):
        parser.parse_args(["--files", ""])


def test_a_flag_that_is_given_twice_is_named(parser, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        parser.parse_args(["--files", "a", "--rate", "1", "--each", "1", "--each", "2", "--switch", "--switch"])
        parser.parse_args(["--files", "a", "b", "--rate=1", "--files", "a", "b", "--rate", "1"])  # it says the same
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        args = parser.parse_args(["--files", "a", "--files", "b", "--rate=1", "--rate", "2"])
    assert (args.files, args.rate) == (["b"], 2.0)
    assert "--rate is given more than once: only the last one counts" in caplog.text
    assert "--files is given more than once: only the last one counts; several values go behind one flag" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' is there twice, in lines 1 and 3"),
        ("x:\n  - {a: 1, a: 1}\n", "the key 'a' is there twice, in lines 2 and 2"),
        ("a: 2024-13-45\n", "not YAML"),
        (f"a: {'9' * 5000}\n", "not YAML"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.system [true]\n", "not YAML"),
    ],
)
def test_yaml_that_cannot_be_meant(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"^NAME: ") as caught:
        read_yaml(tmp_path / "a.yaml", "NAME")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_yaml_keys_may_repeat_in_other_places(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("b: &x {a: 1}\nc: {<<: *x, a: 2}\nd: {a: 1}\n1: x\n'1': y\n")
    assert read_yaml(tmp_path / "a.yaml", "a") == {"b": {"a": 1}, "c": {"a": 2}, "d": {"a": 1}, 1: "x", "1": "y"}


def test_output_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check_output_folder(str(tmp_path / "a" / "b"), "--out", empty=True)
    assert not (tmp_path / "a").exists()
    for path, message in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "b", "file is a file")):
        with pytest.raises(CommandLineError, match=message):
            check_output_folder(str(path), "--out")
    with pytest.raises(CommandLineError, match="not an empty folder"):
        check_output_folder(str(tmp_path), "--out", empty=True)


def test_a_json_object() -> None:
    assert read_json_object('{"a": [1, 2.5, null], "b": {"c": true}}', "--x") == {"a": [1, 2.5, None], "b": {"c": True}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[2]", "--x is '\\[2\\]', expected a JSON object such as"),
        ("a=2", "--x is 'a=2', expected a JSON object: Expecting value"),
        ('{"a": NaN}', "'NaN' is not a finite number"),
        ('{"a": [{"b": -Infinity}]}', "'-Infinity' is not a finite number"),
        ('{"a": 1e999}', "'1e999' is not a finite number"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ("[" * 100_000, r"\(100,000 characters\), expected a JSON object: "),
    ],
)
def test_what_is_no_json_object(text: str, message: str) -> None:
    with pytest.raises(CommandLineError, match=message):
        read_json_object(text, "--x")


COMMANDS = (
    "completion",
    "data.check",
    "data.feature_cache",
    "data.localized_narratives",
    "data.train_tokenizer",
    "data.webvid",
    "demo",
    "demo.grounding",
    "demo.pretrain_tower",
    "eval.babylm",
    "eval.run",
    "eval.study",
    "inspect",
    "inspect.commands",
    "inspect.flags",
    "inspect.pictures",
    "inspect.models",
    "model.convert",
    "model.export",
    "model.merge_lora",
    "model.random_weights",
    "recipes",
    "serve.cli",
    "serve.web",
    "train.alternating",
    "train.exposure",
    "train.launch",
    "train.model_card",
    "train.replay",
    "train.slurm",
    "train.slurm.init",
    "train.train",
)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_itself_and_its_mistakes_as_it_was_called(name: str, warm_python: str) -> None:
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root)}
    command = [warm_python, "-m", f"llava.{name}"]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, env=env)
    assert helped.returncode == 0, helped.stderr
    assert helped.stdout.startswith(f"usage: python -m llava.{name} ")
    failed = subprocess.run([*command, "--no_such_flag"], capture_output=True, text=True, env=env)
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr
    if name != "train.launch":  # whose parser is torchrun's
        assert "error: unknown flag --no_such_flag" in failed.stderr


def test_every_module_that_can_be_run_is_among_the_commands() -> None:
    package = Path(__file__).parents[1] / "llava"
    runnable = {path for path in package.rglob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    names = {".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__main__") for path in runnable}
    # Another name of a command calls itself by the one that the documents have.
    assert names - {"train.train_mem", "__main__"} == set(COMMANDS)
