"""Command lines: what is accepted has the value that was given, and everything else is one line that names a flag."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
from functools import cache
from unittest import mock

import pytest
from fuzzing import attempt, cases, ends_in_time
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import any_texts, json_values

from llava.__main__ import main
from llava.command import CommandLineError, CommandParser, find_parser, read_json_object, read_number
from llava.commands import COMMANDS, load_start
from llava.train import command_line
from llava.train.command_line import answer_at_once, build_group, explain_unknown_flag, parse_values
from llava.train.flag_source import read_flags

OPTIONAL = ("output_dir", "model_name_or_path", "data_path")


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Warnings of flags that are given twice are no part of this."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module", autouse=True)
def one_parser():
    """Making the trainer's parser takes longer than all else."""
    made = cache(command_line.build_parser)
    with mock.patch.object(command_line, "build_parser", lambda optional=(): made(tuple(optional))):
        yield


_NUMBERS = "1e3 1_000 0x10 ٣ 1. .5 -1e-4 +7 nan -inf 1e400 ½ 1,5".split()  # noqa: SIM905
_WORDS = "true False yes off none None null steps no {} auto bf16".split()  # noqa: SIM905
numbers = st.one_of(
    st.integers(-3, 100).map(str),
    st.floats().map(str),
    st.integers().map(str),
    st.sampled_from([*_NUMBERS, " 4", "9" * 400]),
)
values = st.one_of(
    numbers,
    st.sampled_from([*_WORDS, "", '{"a": 1}']),
    any_texts.filter(lambda text: "\x00" not in text),
)
_LIKELY = {
    "int": st.integers(-1, 10**6).map(str),
    "float": st.floats(0, 10, allow_nan=False).map(str),
    "bool": st.sampled_from(("true", "False", "yes", "no", "1", "off")),
    "str": st.text("abc./ -", min_size=1, max_size=5),
}
_KINDS = {flag.name: flag.kind.removesuffix(" | None") for flag in read_flags().values()}
_NAMES = sorted(flag.name for flag in read_flags().values())
names_of_flags = st.one_of(
    st.sampled_from(_NAMES),
    st.sampled_from(_NAMES),
    st.sampled_from(("config", "lr", "no_cuda", "helpp", "learning-rate")),
    st.text("abc_-é=", max_size=6),
)


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """Words in any order: flags with a value, with several, with = or with none, and words that belong to none."""
    words: list[str] = []
    for _ in range(draw(st.integers(0, 5))):
        name = f"--{draw(names_of_flags)}"
        if draw(st.integers(0, 3)) == 0:
            name = name.replace("_", "-")
        way = draw(st.sampled_from(("one", "one", "one", "equals", "none", "two", "loose")))
        if way == "equals":
            words.append(f"{name}={draw(values)}")
        elif way == "loose":
            words.append(draw(values))
        else:
            likely = _LIKELY.get(_KINDS.get(name[2:].replace("-", "_"), ""), values)
            words += [
                name,
                *(draw(st.one_of(likely, likely, values)) for _ in range({"one": 1, "none": 0, "two": 2}[way])),
            ]
    return words


def says_one_line(error: ValueError) -> bool:
    said = str(error)
    return bool(said.strip()) and len(said) < 1500


@cases(offline=900, in_ci=60)
@example(["--learning_rate", "1e-4", "--learning-rate=2e-4"])
@example(["--config", "9" * 400])  # a name that is too long for a file
@given(lines())
def test_a_line_of_the_trainer_is_refused_in_one_line_or_means_what_it_says(words):
    if any(word in ("-h", "--help") for word in words):
        return
    with contextlib.redirect_stderr(io.StringIO()) as printed, ends_in_time():
        status = answer_at_once(words)
        unknown = explain_unknown_flag(words) if "--" not in words else None
    assert status in (None, 2)
    assert (status == 2) == (unknown is not None and "--" not in words)
    assert len(printed.getvalue().splitlines()) <= 1 or unknown is not None
    found = attempt(parse_values, words, OPTIONAL, tells_notes=False)
    if isinstance(found, ValueError):
        assert says_one_line(found)
        return
    assert unknown is None, unknown
    # The last of equal flags is the one that counts.
    given: dict[str, list[str]] = {}
    name = None
    for word in command_line.build_parser(OPTIONAL).rename(words):
        flag, equals, value = word.partition("=")
        if word.startswith("--") and (plain := flag[2:].replace("-", "_")) in found:
            name = plain
            given[name] = [value] if equals else []
        elif name is not None:
            given[name].append(word)
    for name, told in given.items():
        if name in ("config", "version", "plain_lm", "bits") or len(told) != 1:
            continue
        check_value(name, told[0], found[name])


def check_value(name: str, told: str, value: object) -> None:
    """A value is the number, the truth or the text that was typed."""
    if isinstance(value, bool):
        assert (
            told.strip().lower()
            in {True: ("true", "yes", "on", "t", "y", "1"), False: ("false", "no", "off", "f", "n", "0")}[value]
        )
    elif isinstance(value, int):
        assert int(told) == value
    elif isinstance(value, float):
        assert math.isfinite(value)
        assert float(told) == value
    elif isinstance(value, str):
        assert told == value or told.strip().lower() == value or hasattr(value, "value")
    elif isinstance(value, list):
        assert [str(item) for item in value] == [told]


@cases(offline=400, in_ci=30)
@given(st.sampled_from(("ModelArguments", "DataArguments")), st.data())
def test_the_values_of_a_group_are_checked_in_one_line(group, data):
    from llava.train import arguments

    kind = getattr(arguments, group)
    flags = [flag for flag in read_flags().values() if flag.name in kind.__dataclass_fields__]
    chosen = data.draw(st.lists(st.sampled_from(flags), max_size=4, unique_by=lambda flag: flag.name))
    words = [word for flag in chosen for word in (f"--{flag.name}", data.draw(values))]
    found = attempt(parse_values, words, OPTIONAL, tells_notes=False)
    if isinstance(found, ValueError):
        assert says_one_line(found)
        return
    built = attempt(build_group, kind, found | {"model_name_or_path": "m", "data_path": ["d.json"]})
    if isinstance(built, ValueError):
        assert says_one_line(built)
        assert "--" in str(built)


_PARSED = [one for one in COMMANDS if one.name not in ("train", "launch", "alternating")]


@cache
def parser_of(number: int) -> CommandParser:
    return find_parser(load_start(_PARSED[number]))


@cases(offline=600, in_ci=25)
@given(st.integers(0, len(_PARSED) - 1), st.data())
def test_every_command_refuses_in_one_line_or_reads_what_was_given(number, data):
    with contextlib.redirect_stdout(io.StringIO()):
        parser = parser_of(number)
    flags = [
        action for action in parser._actions if action.option_strings and not isinstance(action, argparse._HelpAction)
    ]
    words: list[str] = []
    told: dict[str, str] = {}
    for action in data.draw(st.lists(st.sampled_from(flags), max_size=4, unique=True)) if flags else ():
        flag = action.option_strings[0]
        if action.nargs == 0:
            words.append(flag)
        else:
            told[action.dest] = data.draw(values)
            words.append(f"{flag}={told[action.dest]}")
    loose = data.draw(st.lists(values, max_size=2))
    place = data.draw(st.integers(0, len(words)))
    words[place:place] = loose
    found = attempt(parser.parse_words, words)
    if isinstance(found, ValueError):
        assert says_one_line(found)
        assert isinstance(found, CommandLineError)
        return
    for dest, text in told.items():
        value = getattr(found, dest.removeprefix("flag_of_"))
        assert value is not None or not text.strip() or text in ("none", "None"), (dest, text)
        if isinstance(value, int | float | str):
            check_value(dest, text, value)
        elif isinstance(value, list):
            assert text in map(str, value)


@cases(offline=250, in_ci=20)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([*(word for one in COMMANDS for word in one.name.split()), "help", "-V", "--hel"]), values
        ),
        max_size=3,
    )
)
def test_words_that_are_no_command_are_named_in_one_line(words):
    """No command is started: what would be is noted."""
    started: list[str] = []
    with (
        mock.patch("llava.__main__.load_start", lambda command: lambda rest: started.append(command.name)),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as errors,
        ends_in_time(),
    ):
        status = main(words)
    assert status in (0, 2)
    if status == 2 and words and not started and "usage" not in errors.getvalue():
        assert errors.getvalue().startswith("error: unknown command ")
        assert len(errors.getvalue().splitlines()) == 1


@cases(offline=300, in_ci=40)
@given(values, st.sampled_from((int, float, bool)), json_values)
def test_numbers_and_objects_are_what_python_and_json_make_of_them(text, kind, value):
    import json

    number = attempt(read_number, kind, text, "--x")
    if not isinstance(number, ValueError):
        assert type(number) is kind
        assert kind is bool or (number == kind(text) and math.isfinite(number))
    written = json.dumps(value)
    read = attempt(read_json_object, written, "--x")
    if isinstance(read, ValueError):
        assert says_one_line(read)
    else:
        assert read == value
    found = attempt(read_json_object, text, "--x")
    assert isinstance(found, dict) or says_one_line(found)
