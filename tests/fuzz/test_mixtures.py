"""Mixtures, patterns and recipes: what a file asks for is what is taken; what cannot be meant is named."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from fuzzing import attempt, cases, names
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import damaged, json_values

from llava.command import CommandLineError
from llava.data.files import choose_rows, count_samples, expand_braces, find_entries
from llava.data.records import read_records
from llava.train.command_line import parse_values


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three data files of 5, 3 and 0 samples, and a folder with one."""
    folder = tmp_path_factory.mktemp("mixtures")
    (folder / "more").mkdir()
    for name, count in (("a", 5), ("b", 3), ("empty", 0), ("more/c", 2)):
        samples = [
            {"id": f"{name}{i}", "conversations": [{"from": "gpt", "value": f"{name} {i}"}]} for i in range(count)
        ]
        (folder / f"{name}.json").write_text(json.dumps(samples))
    return folder


amounts = st.one_of(
    st.integers(0, 7).map(str), st.integers(0, 101).map("{}%".format), st.decimals(0, 101, places=2).map("{}%".format),
    st.sampled_from(("", "-1", "1e2%", "%", "5%%", "٣", "½", "1_0", "99999999999999999999%", "0.0000000001%")),
)  # fmt: skip
samplings = st.one_of(
    st.just("all"),
    st.tuples(st.sampled_from(("first", "end", "random", "First", "some")), amounts).map(":".join),
    json_values,
)
paths = st.one_of(
    st.sampled_from(
        ["a.json", "b.json", "empty.json", "{a,b}.json", "more/*.json", "*.json", "more", "nothing.json", "~", "."]
    ),
    st.just(""),
    json_values,
)
entries = st.one_of(
    st.fixed_dictionaries(
        {"json_path": st.one_of(paths, st.lists(paths, max_size=3))},
        optional={
            "sampling_strategy": samplings,
            "source": json_values,
            "data_folder": st.one_of(st.just("x"), json_values),
        },
    ),
    json_values,
)
mixtures = st.one_of(
    st.fixed_dictionaries({"datasets": st.lists(entries, max_size=3)}),
    st.fixed_dictionaries(
        {"datasets": st.one_of(entries, st.lists(entries, max_size=2))}, optional={"more": json_values}
    ),
)


def dump(value: Any) -> bytes:
    text: str = yaml.safe_dump(value, allow_unicode=True, width=10**6)
    return text.encode("utf-8", "surrogatepass")


@cases(offline=500, in_ci=40)
@given(mixtures, st.data())
def test_a_mixture_takes_what_it_asks_for_or_is_refused_by_name(folder, mixture, data):
    path = folder / "mixture.yaml"
    path.write_bytes(dump(mixture))
    found = attempt(find_entries, [str(path)])
    if isinstance(found, ValueError):
        assert names(found, str(path))
    else:
        assert len(found) == len(mixture["datasets"])
        for entry, written in zip(found, mixture["datasets"], strict=True):
            assert all(Path(file).is_file() for file in entry.files)
            assert entry.sampling == written.get("sampling_strategy", "all")
        records = attempt(read_records, str(path), allow_duplicate_ids=True)
        if isinstance(records, ValueError):
            assert names(records, str(path))
        else:
            counts = {"a": 5, "b": 3, "empty": 0, "c": 2}
            available = [sum(counts[Path(file).stem] for file in entry.files) for entry in found]
            wanted = [count_samples(entry.sampling, n) for entry, n in zip(found, available, strict=True)]
            assert len(records) == sum(wanted)
    path.write_bytes(data.draw(damaged(dump(mixture))))
    found = attempt(find_entries, [str(path)])
    if isinstance(found, ValueError):
        assert names(found, str(path))


@cases(offline=400, in_ci=50)
@given(
    st.sampled_from(("first", "end", "random")),
    amounts,
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.integers(0, 9),
)
def test_as_many_samples_are_taken_as_asked_for_and_none_twice(way, amount, counts, seed):
    if not re.fullmatch(r"[0-9]+|[0-9]+(\.[0-9]+)?%", amount):
        return
    if amount.endswith("%") and Fraction(amount[:-1]) > 100:  # Refused where it is read.
        return
    sampling = f"{way}:{amount}"
    total = sum(counts)
    rows = attempt(choose_rows, sampling, counts, str(seed))
    wanted = math.ceil(total * Fraction(amount[:-1]) / 100) if amount.endswith("%") else int(amount)
    assert isinstance(rows, ValueError) == (wanted > total)
    if wanted > total:
        return
    assert sum(map(len, rows)) == wanted
    for chosen, count in zip(rows, counts, strict=True):
        taken = list(chosen)
        assert taken == sorted(set(taken))
        assert all(0 <= row < count for row in taken)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    places = [start + row for start, chosen in zip(starts, rows, strict=True) for row in chosen]
    if way != "random":
        assert places == list(range(wanted) if way == "first" else range(total - wanted, total))
    else:
        assert [list(chosen) for chosen in choose_rows(sampling, counts, str(seed))] == [
            list(chosen) for chosen in rows
        ]
        if wanted < total:  # Of one seed the larger choice holds the smaller.
            more = choose_rows(f"random:{wanted + 1}", counts, str(seed))
            assert all(set(few) <= set(many) for few, many in zip(rows, more, strict=True))


_GROUPS = st.lists(st.text("ab.%{}x ", max_size=3), max_size=4)


@cases(offline=300, in_ci=50)
@given(st.lists(st.one_of(st.text("ab/.{}%s!", max_size=3), _GROUPS), max_size=5))
@example(["{}", ["a", "b"]])
@example([[f"part-{i:03}" for i in range(60)], ".json"])  # longer than the name of a file may be
def test_braces_stand_for_every_choice(pieces):
    pattern = "".join(piece if isinstance(piece, str) else f"{{{','.join(piece)}}}" for piece in pieces)
    found = attempt(expand_braces, pattern, "--data_path x")
    is_plain = all(
        "{" not in word and "}" not in word
        for piece in pieces
        for word in ([piece] if isinstance(piece, str) else piece)
    )
    if isinstance(found, ValueError):
        assert names(found, "--data_path x")
        assert not is_plain or any(
            isinstance(piece, list) and any(not word.strip() for word in piece or [""]) for piece in pieces
        )
        return
    if is_plain:
        choices = [[piece] if isinstance(piece, str) else [word.strip() for word in piece] for piece in pieces]
        assert found == ["".join(choice) for choice in product(*choices)]


# Recipes.

_FLAGS: dict[str, st.SearchStrategy[Any]] = {
    "learning_rate": st.floats(1e-9, 1.0), "num_train_epochs": st.floats(0.5, 9), "max_steps": st.integers(-1, 10**6),
    "seed": st.integers(0, 2**31), "mm_hidden_size": st.integers(1, 10), "model_max_length": st.integers(1, 10**6),
    "num_frames": st.integers(1, 99), "video_fps": st.floats(0, 60),
    "output_dir": st.text("abc /_-.é", min_size=1, max_size=8).filter(lambda text: text[0] != "-"),
    "version": st.sampled_from(("plain", "v1", "chat")), "gradient_checkpointing": st.booleans(),
    "packing": st.booleans(),
    "data_path": st.lists(st.text("ab{},./é", min_size=1, max_size=5), min_size=1, max_size=3),
    "mm_resampler_type": st.sampled_from(("perceiver", "none")), "run_name": st.text("abc ", max_size=5),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_parser():
    """Making the trainer's parser takes longer than all else."""
    from llava.train import command_line

    made = cache(command_line.build_parser)
    with mock.patch.object(command_line, "build_parser", lambda optional=(): made(tuple(optional))):
        yield


@cases(offline=250, in_ci=12)
@given(st.dictionaries(st.sampled_from(sorted(_FLAGS)), st.none(), max_size=8), st.data())
def test_a_recipe_and_a_command_line_say_the_same(tmp_path_factory, chosen, data):
    values = {name: data.draw(_FLAGS[name]) for name in chosen}
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(dump(values))
    required = ["output_dir", "model_name_or_path", "data_path"]
    words = []
    for name, value in values.items():
        listed = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in listed)]
    of_recipe = attempt(parse_values, ["--config", str(path)], required, tells_notes=False)
    of_words = attempt(parse_values, words, required, tells_notes=False)
    if isinstance(of_recipe, ValueError):
        assert isinstance(of_words, ValueError)
        return
    assert of_words == of_recipe | {"config": None}
    for name, value in values.items():
        if name in of_recipe and name != "version":
            assert of_recipe[name] == value


@cases(offline=350, in_ci=20)
@given(
    st.one_of(
        json_values,
        st.dictionaries(st.one_of(st.sampled_from(sorted(_FLAGS)), st.text(max_size=6)), json_values, max_size=4),
    ),
    st.data(),
)
def test_any_yaml_is_a_recipe_or_an_error_that_names_it(tmp_path_factory, content, data):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    text = dump(content)
    path.write_bytes(data.draw(damaged(text)) if data.draw(st.booleans()) else text)
    found = attempt(
        parse_values, ["--config", str(path)], ["output_dir", "model_name_or_path", "data_path"], tells_notes=False
    )
    if isinstance(found, ValueError):
        assert isinstance(found, CommandLineError) or names(found, str(path), "--")


def test_a_value_of_a_recipe_is_never_a_flag(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(dump({"data_path": ["a.json", "--seed", "3"]}))
    with pytest.raises(ValueError, match=r"recipe\.yaml: 'data_path' has the value '--seed', which reads as a flag"):
        parse_values(["--config", str(path)], ["output_dir", "model_name_or_path"])
