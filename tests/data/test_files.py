"""What --data_path names: brace patterns, YAML mixtures, samples drawn from them, source folders."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import turns

from llava.data.files import choose_rows, count_samples, cut_rows, expand_braces
from llava.data.records import read_records


def write(path: Path, count: int = 3, **extra) -> Path:
    """A data file whose ids begin with its own name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = [{"id": f"{path.stem}{i}", "conversations": turns("", f"testo {i}"), **extra} for i in range(count)]
    text = "\n".join(map(json.dumps, samples)) if path.suffix == ".jsonl" else json.dumps(samples)
    path.write_text(text)
    return path


def mix(folder: Path, *entries: str, name: str = "mix.yaml") -> str:
    (folder / name).write_text("datasets:\n" + "".join(f"  - {entry}\n" for entry in entries))
    return str(folder / name)


def ids(paths, **options) -> list[str]:
    return [record.id for record in read_records(paths, **options)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.json", ["a.json"]),
        ("p{a,b}.json", ["pa.json", "pb.json"]),
        ("p{a}.json", ["pa.json"]),
        ("{x, y}/{1,2}.json", ["x/1.json", "x/2.json", "y/1.json", "y/2.json"]),
    ],
)
def test_braces(pattern, expected):
    assert expand_braces(pattern, "--data_path") == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("p{a,}.json", r"^--data_path .*: alternative 2 of \{a,\} is empty"),
        ("p{,b}.json", r"alternative 1 of \{,b\} is empty"),
        ("p{}.json", r"alternative 1 of \{\} is empty"),
        ("p{a,b.json", "braces that do not match"),
        ("pa}.json", "braces that do not match"),
        ("p{a,{b,c}}.json", "stand within braces"),
        ("p{a,c}.json", r"^--data_path .*p\{a,c\}\.json: .*pc\.json: no such file"),
        ("p{a,b}.txt", r"pa\.txt: no such file"),
    ],
)
def test_patterns_that_name_no_files(tmp_path, pattern, message):
    write(tmp_path / "pa.json")
    with pytest.raises(ValueError, match=message) as caught:
        read_records(f"{tmp_path}/{pattern}")
    assert str(tmp_path / pattern) in str(caught.value)


def test_braces_of_a_file_that_is_called_so(tmp_path):
    write(tmp_path / "p{a,b}.json", 1)
    assert ids(str(tmp_path / "p{a,b}.json")) == ["p{a,b}0"]


def test_patterns_and_files_are_joined_in_order(tmp_path):
    for name in ("pa.json", "pb.json", "c.jsonl"):
        write(tmp_path / name, 2)
    paths = [str(tmp_path / "c.jsonl"), str(tmp_path / "p{b,a}.json")]
    assert ids(paths) == ["c0", "c1", "pb0", "pb1", "pa0", "pa1"]


def test_a_mixture(tmp_path, monkeypatch):
    for name in ("a.json", "deep/b.jsonl", "pc.json", "pd.json"):
        write(tmp_path / "data" / name, 4)
    path = mix(
        tmp_path / "data",
        "{json_path: a.json}",
        "{json_path: deep/b.jsonl, sampling_strategy: 'first:1'}",
        "{json_path: 'p{c,d}.json', sampling_strategy: 'end:5'}",
        f"{{json_path: ['{tmp_path}/data/a.json', deep/b.jsonl], sampling_strategy: 'first:5'}}",
    )
    expected = ["a0", "a1", "a2", "a3", "b0", "pc3", "pd0", "pd1", "pd2", "pd3", "a0", "a1", "a2", "a3", "b0"]
    assert ids(path) == expected
    monkeypatch.chdir(tmp_path)
    assert ids(["data/mix.yaml", "data/a.json"]) == [*expected, "a0", "a1", "a2", "a3"]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", "0123456789"), ("first:3", "012"), ("end:3", "789"), ("first:25%", "012"), ("end:100%", "0123456789"),
        ("first:0.5%", "0"), ("end:10%", "9"), ("first:30%", "012"),
    ],
)  # fmt: skip
def test_sampling_strategies(tmp_path, strategy, expected):
    write(tmp_path / "a.json", 10)
    assert ids(mix(tmp_path, f"{{json_path: a.json, sampling_strategy: '{strategy}'}}")) == [f"a{n}" for n in expected]


def test_shares_are_rounded_up_exactly():
    # In floats 1000 * 16.1 / 100 is above 161, and 100 * (7 / 100) above 7.
    assert count_samples("first:16.1%", 1000) == 161
    assert count_samples("first:7%", 100) == 7
    assert count_samples("first:33.3%", 1000) == 333
    assert count_samples("first:33.31%", 1000) == 334


def test_random_samples_depend_on_the_seed_alone(tmp_path):
    write(tmp_path / "a.json", 60)
    write(tmp_path / "b.json", 60)
    path = mix(tmp_path, "{json_path: a.json, sampling_strategy: 'random:20'}")
    drawn = ids(path, seed=1)
    assert len(set(drawn)) == 20
    assert drawn == sorted(drawn, key=lambda name: int(name[1:]))
    assert ids(path, seed=1) == ids(path, seed=1, cache_dir=str(tmp_path / "cache")) == drawn != ids(path, seed=2)
    more = mix(
        tmp_path, "{json_path: b.json, sampling_strategy: 'random:20'}",
        "{json_path: a.json, sampling_strategy: 'random:50%'}", "{json_path: a.json, sampling_strategy: 'random:20'}",
    )  # fmt: skip
    found = ids(more, seed=1)
    assert [name[1:] for name in found[:20]] != [name[1:] for name in drawn]
    assert set(drawn) < set(found[20:50])
    assert found[50:] != drawn


def test_random_samples_are_the_same_in_every_release():
    (rows,) = choose_rows("random:5", [100], "42 a.json 0")
    assert rows.tolist() == [26, 71, 82, 90, 99]
    assert choose_rows("random:100%", [7], "x")[0].tolist() == list(range(7))


def test_random_samples_are_spread_evenly():
    counts = np.zeros(20)
    for seed in range(2000):
        counts[choose_rows("random:5", [20], str(seed))[0]] += 1
    assert counts.min() > 400
    assert counts.max() < 600


@pytest.mark.parametrize("rows", [range(3, 8), np.array([3, 4, 6, 7])], ids=["range", "array"])
def test_rows_over_several_files(rows):
    parts = [[int(row) for row in cut_rows(rows, *bounds)] for bounds in ((0, 4), (4, 4), (4, 6), (6, 20))]
    starts = (0, 4, 4, 6)
    assert parts[1] == []
    assert [row + start for part, start in zip(parts, starts, strict=True) for row in part] == list(rows)


def test_both_flags_take_mixtures(tmp_path, visual_tokenizer):
    from llava.data.module import make_supervised_data_module
    from llava.train.arguments import DataArguments

    write(tmp_path / "a.json", 10)
    path = mix(tmp_path, "{json_path: a.json, sampling_strategy: 'random:4'}")
    arguments = DataArguments(data_path=[path], eval_data_path=[path, str(tmp_path / "a.json")])
    module = make_supervised_data_module(visual_tokenizer, arguments, None, 64, seed=7)
    assert [r.id for r in module["train_dataset"].records] == ids(path, seed=7)
    assert len(module["eval_dataset"]) == 14
    with pytest.raises(ValueError, match=r"^--eval_data_path .*none\.json: no such file"):
        make_supervised_data_module(
            visual_tokenizer, DataArguments(data_path=[path], eval_data_path=[str(tmp_path / "none.json")]), None, 64
        )


MISTAKES = {
    "no file": (["{json_path: none.json}"], r"mix\.yaml, entry 1: json_path none\.json: no such file"),
    "second entry": (["{json_path: a.json}", "{json_path: 'x{1,2}.json'}"], r"entry 2: json_path x\{1,2\}\.json: "),
    "no path": (["{source: x}"], "entry 1: json_path must be a path or a list of paths, found None"),
    "number for a path": (["{json_path: 3}"], "json_path must be a path or a list of paths, found 3"),
    "empty list": (["{json_path: []}"], "json_path must be"),
    "empty path": (["{json_path: ''}"], "json_path must be"),
    "mixture in a mixture": (["{json_path: mix.yaml}"], "unknown kind of file '.yaml'"),
    "folder": (["{json_path: .}"], "is a folder without a corpus in it"),
    "text for an entry": (["a.json"], "entry 1: expected json_path and its settings, found 'a.json'"),
    "unknown key": (
        ["{json_path: a.json, sampling_stratgy: all}"],
        "'sampling_stratgy'; did you mean sampling_strategy?",
    ),
    "strange key": (["{json_path: a.json, 7: all}"], "unknown key 7; known: json_path, sampling_strategy, source"),
    "unknown strategy": (["{json_path: a.json, sampling_strategy: 'some:3'}"], "entry 1: sampling_strategy must be"),
    "nothing": (["{json_path: a.json, sampling_strategy: 'first:0'}"], "must be .* found 'first:0'"),
    "no share": (["{json_path: a.json, sampling_strategy: 'random:0%'}"], "must be .* found 'random:0%'"),
    "too large a share": (["{json_path: a.json, sampling_strategy: 'end:101%'}"], "must be .* found 'end:101%'"),
    "negative": (["{json_path: a.json, sampling_strategy: 'end:-1'}"], "must be .* found 'end:-1'"),
    "half a sample": (["{json_path: a.json, sampling_strategy: 'end:1.5'}"], "must be .* found 'end:1.5'"),
    "number": (["{json_path: a.json, sampling_strategy: 3}"], "must be .* found 3"),
    "more than there is": (
        ["{json_path: a.json}", "{json_path: a.json, sampling_strategy: 'random:4'}"],
        r"mix\.yaml, entry 2: sampling_strategy random:4 asks for more than the 3 samples there are",
    ),
    "list for a source": (["{json_path: a.json, source: [x]}"], r"source must be the name of a folder, found \['x'\]"),
    "number for a folder": (
        ["{json_path: a.json, data_folder: 5}"],
        "data_folder must be the name of a folder, found 5",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_a_mixture_name_file_entry_and_key(tmp_path, case):
    entries, message = MISTAKES[case]
    write(tmp_path / "a.json")
    with pytest.raises(ValueError, match=message) as caught:
        read_records(mix(tmp_path, *entries))
    assert "mix.yaml, entry" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected datasets, a list of entries"),
        ("- a\n", "expected datasets, a list of entries"),
        ("datasets: []\n", "expected datasets, a list of entries"),
        ("datasets: {json_path: a.json}\n", "expected datasets, a list of entries"),
        ("datasets: [{json_path: a.json}]\nseed: 3\n", "unknown key 'seed'; known: datasets"),
        ("datasets: [\n", "not YAML"),
        ("datasets: !!python/object/apply:os.system ['true']\n", "not YAML"),
    ],
)
def test_a_file_that_is_no_mixture(tmp_path, content, message):
    write(tmp_path / "a.json")
    (tmp_path / "mix.yml").write_text(content)
    with pytest.raises(ValueError, match=rf"mix\.yml: {message}") as caught:
        read_records(str(tmp_path / "mix.yml"))
    assert "\n" not in str(caught.value)


def test_a_mixture_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"--eval_data_path .*none\.yaml: no such file"):
        read_records(str(tmp_path / "none.yaml"), flag="--eval_data_path")


SEEN = {"video": "c.mp4", "conversations": turns("<video>", "un gatto")}


def media_of(paths, **options) -> list[str]:
    return [record.media[0].path for record in read_records(paths, **options)]


def test_media_start_from_the_data_folder_then_the_flag_then_the_data_file(tmp_path):
    write(tmp_path / "sub" / "a.json", 1, **SEEN)
    plain, own = mix(tmp_path, "{json_path: sub/a.json}"), mix(
        tmp_path, "{json_path: sub/a.json, data_folder: clips/old}", name="own.yaml"
    )  # fmt: skip
    assert media_of(plain) == [f"{tmp_path}/sub/c.mp4"]
    assert media_of(plain, video_folder=f"{tmp_path}/all") == [f"{tmp_path}/all/c.mp4"]
    assert media_of(own) == media_of(own, video_folder=f"{tmp_path}/all") == [f"{tmp_path}/clips/old/c.mp4"]


def test_a_source_is_a_folder_below_the_media_folder(tmp_path):
    write(tmp_path / "a.json", 1, **SEEN, source="webvid")
    write(tmp_path / "b.json", 1, **SEEN)
    assert media_of(str(tmp_path / "a.json"), video_folder="/v") == ["/v/webvid/c.mp4"]
    files = "json_path: ['a.json', 'b.json'], data_folder: /v"
    assert media_of(mix(tmp_path, f"{{{files}}}")) == ["/v/webvid/c.mp4", "/v/c.mp4"]
    assert media_of(mix(tmp_path, f"{{{files}, source: didemo}}")) == ["/v/didemo/c.mp4"] * 2
    assert media_of(mix(tmp_path, f"{{{files}, source: ''}}")) == ["/v/c.mp4"] * 2
    write(tmp_path / "c.json", 1, **SEEN | {"video": "/abs/c.mp4"}, source="webvid")
    assert media_of(str(tmp_path / "c.json"), video_folder="/abs") == ["/abs/c.mp4"]


def test_a_mixture_trains_from_the_command_line(tmp_path, gpt2_dir):
    from llava.train.train import main

    for name in ("pa.json", "pb.json"):
        write(tmp_path / name, 6)
    path = mix(tmp_path, "{json_path: 'p{a,b}.json', sampling_strategy: 'random:50%'}")
    argv = ["--model_name_or_path", gpt2_dir, "--data_path", path, "--output_dir", tmp_path / "out", "--use_cpu"]
    trainer = main([str(word) for word in [*argv, "--max_steps", "1", "--data_seed", "5", "--report_to", "none"]])
    assert [record.id for record in trainer.train_dataset.records] == ids(path, seed=5)


def test_the_inspection_of_data_knows_mixtures(tmp_path, gpt2_dir, warm_python):
    for name in ("pa.json", "pb.json"):
        write(tmp_path / name, 6)
    path = mix(tmp_path, "{json_path: 'p{b,a}.json', sampling_strategy: 'random:50%'}")
    script = Path(__file__).parents[2] / "train_alternating.py"
    words = ["--inspect_data", "--model_name_or_path", gpt2_dir, "--data_path", path, "--output_dir", tmp_path / "out"]
    done = subprocess.run([warm_python, script, *map(str, words)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("6 samples\nfirst (pb.json, sample 1)")
