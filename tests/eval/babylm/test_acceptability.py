"""Sentences with a label of acceptability: what their scores come to, and what files of them can have wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from llava.eval.babylm.__main__ import main
from llava.eval.babylm.acceptability import RocArea, best_threshold, matthews, predict_held_out
from llava.eval.babylm.pairs import PairColumns, build_pair_tasks
from llava.eval.babylm.results import AREA, summarize
from llava.eval.babylm.tasks import read_items

ITACOLA = PairColumns(("sentence",), groups=("source",), label="acceptability")
FLAGS = ["--pair_columns", "sentence", "--label_column", "acceptability"]


def write_table(path: Path, labels: str, texts: list[str] | None = None) -> Path:
    """Sentences with these labels, in ItaCoLA's columns."""
    texts = texts or [f"Frase numero {n} {'lunga ' * (n % 3)}." for n in range(len(labels))]
    lines = [f"{n}\tsource{n % 2}\t{label}\t{text}" for n, (label, text) in enumerate(zip(labels, texts, strict=True))]
    path.write_text("\n".join(["unique_id\tsource\tacceptability\tsentence", *lines, ""]), encoding="utf-8")
    return path


def test_area_is_the_share_of_pairs_that_are_in_order() -> None:
    generator = np.random.default_rng(0)
    values, labels = generator.integers(0, 6, 40).astype(float), generator.random(40) < 0.6
    strata, weights = generator.integers(1, 4, 40).astype(float), generator.integers(0, 3, 40)
    for chosen in (np.zeros(40), strata):
        wins, pairs = 0.0, 0
        for i in np.repeat(np.arange(40), weights)[labels.repeat(weights)]:
            for j in np.repeat(np.arange(40), weights)[~labels.repeat(weights)]:
                if chosen[i] == chosen[j]:
                    pairs += 1
                    wins += (values[i] > values[j]) + (values[i] == values[j]) / 2
        assert RocArea(values, labels, chosen)(weights.astype(float)) == pytest.approx(wins / pairs, abs=1e-12)
    assert RocArea(values, labels, np.arange(40.0))() is None


def test_matthews_correlation_is_the_correlation() -> None:
    generator = np.random.default_rng(0)
    labels, predicted = generator.random(50) < 0.7, generator.random(50) < 0.4
    assert matthews(labels, predicted) == pytest.approx(np.corrcoef(labels, predicted)[0, 1])
    assert matthews(labels, np.ones(50, bool)) == 0.0
    values = generator.normal(size=50) + labels
    cuts = [matthews(labels, values > cut) for cut in np.append(values, -np.inf)]
    assert matthews(labels, values > best_threshold(values, labels)) == max(cuts)


def test_no_threshold_is_chosen_on_the_sentences_it_is_used_for() -> None:
    generator = np.random.default_rng(0)
    values, labels = generator.normal(size=300), generator.random(300) < 0.5
    # Noise: the best threshold on all of it finds something, and one from other folds nothing.
    assert matthews(labels, values > best_threshold(values, labels)) > 0.08
    predicted = predict_held_out(values, labels, [str(n) for n in range(300)], seed=0)
    assert abs(matthews(labels, predicted)) < 0.08
    # Every sentence twice: where the two were in different folds, one would have given the other's label away.
    texts, twice = [str(n // 2) for n in range(600)], values.repeat(2)
    before = predict_held_out(twice, labels.repeat(2), texts, seed=0)
    for own in range(0, 300, 3):
        other = labels.copy()
        other[own] = ~other[own]
        again = predict_held_out(twice, other.repeat(2), texts, seed=0)
        assert (again[2 * own : 2 * own + 2] == before[2 * own : 2 * own + 2]).all()


def test_measures_tell_length_from_acceptability(tmp_path: Path) -> None:
    """A model that knows nothing but length: its sum looks good where what is wrong is longer."""
    data = build_pair_tasks([str(write_table(tmp_path / "itacola.tsv", "10" * 30))], ITACOLA)[0]
    items = read_items(data)
    assert [items[0].acceptable, items[1].acceptable, items[0].fields] == [True, False, {"source": "source0"}]
    lengths = [5.0 + (n // 2) % 3 + 3 * (not item.acceptable) for n, item in enumerate(items)]
    result = summarize(data, items, [(-2 * length, length) for length in lengths])
    told = {row.name: row.score for row in result.rows}
    assert (result.metric, result.official, result.ties, result.chance) == (AREA, 50.0, 60, 50.0)
    assert told["area, sum"] == told["area, the shorter sentence"] == 100.0
    assert "area, sentences of one length" not in told  # There are none to compare.
    assert (told["Matthews correlation, mean of a token"], told["Matthews correlation, sum"]) == (0.0, 100.0)
    # The last digits of a sum differ from batch to batch: the same sentence is not above itself.
    noisy = [(-2 * length - 1e-6 * (n % 2), length) for n, length in enumerate(lengths)]
    assert summarize(data, items, noisy).official == 50.0
    # All of source0 are acceptable, so that there is nothing to tell apart.
    assert not [row for row in result.rows if row.kind == "source"]
    knows = [(-length - 9 * (not item.acceptable), length) for length, item in zip(lengths, items, strict=True)]
    seen = summarize(data, items, knows)
    assert (seen.official, seen.low, seen.high) == (100.0, 100.0, 100.0)


def test_command_scores_sentences_and_compares_models(gpt2_dir, llama_dir, tmp_path: Path, capsys) -> None:
    table = write_table(tmp_path / "itacola.tsv", "1101001101" * 2)
    out = tmp_path / "out"
    command = ["--pairs", str(table), *FLAGS, "--out", str(out), "--model_path"]
    assert main([*command, str(gpt2_dir), str(llama_dir)]) == 0
    said = capsys.readouterr()
    assert "area, mean of a token" in said.out
    assert f"{out / gpt2_dir.stem / 'main' / 'scores.md'}: itacola " in said.err
    folders = [out / path.stem / "main" for path in (gpt2_dir, llama_dir)]
    files = [folder / "zero_shot" / "causal" / "pairs" / "itacola" for folder in folders]
    assert sorted(path.name for path in files[0].iterdir()) == ["item_scores.jsonl"]
    rows = [json.loads(line) for line in (files[0] / "item_scores.jsonl").read_text().splitlines()][1:]
    assert [row["acceptable"] for row in rows[:3]] == [True, True, False]
    means = np.array([row["scores"][0] / row["scores"][1] for row in rows])
    area = 100 * RocArea(means, np.array([row["acceptable"] for row in rows]))()
    with (folders[0] / "scores.csv").open(newline="") as file:
        told = list(csv.DictReader(file))
    assert float(told[0]["score"]) == pytest.approx(area, abs=1e-3)
    assert [(row["kind"], row["metric"]) for row in told[:2]] == [("all", AREA), ("measure", AREA)]
    assert [row["metric"] for row in told if "Matthews" in row["group"]] == ["Matthews correlation, x 100"] * 2
    assert float(told[1]["low"]) <= float(told[1]["score"]) <= float(told[1]["high"])
    assert main(["--compare", *map(str, folders)]) == 0
    assert f"| pairs/itacola | {area:.2f} |" in capsys.readouterr().out
    # Other labels of the same sentences are other data.
    write_table(table, "0101001101" * 2)
    assert main([*command, str(gpt2_dir)]) == 2
    assert "was made with another items" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "columns", "said"),
    [
        ("102", ITACOLA, r"t.tsv, line 4: 'acceptability' is '2'; expected 1 \(acceptable\) or 0"),
        ("1x", ITACOLA, r"t.tsv, line 3: 'acceptability' is 'x'"),
        ("111", ITACOLA, r"t.tsv, line 4: all 3 sentences up to here have the label 1; expected some with 0"),
        ("10", PairColumns(("sentence",), label="label"), r"t.tsv, line 2: has no 'label', but 'unique_id', "),
        ("10", PairColumns(("text",), label="acceptability"), r"t.tsv, line 2: has no 'text', but 'unique_id', "),
    ],
)
def test_faults_are_named(tmp_path: Path, labels: str, columns: PairColumns, said: str) -> None:
    table = write_table(tmp_path / "t.tsv", labels)
    with pytest.raises(ValueError, match=said):
        read_items(build_pair_tasks([str(table)], columns)[0])


def test_a_single_column_needs_labels(tmp_path: Path, capsys) -> None:
    table = write_table(tmp_path / "t.tsv", "10")
    assert main(["--model_path", "m", "--pairs", str(table), "--pair_columns", "sentence"]) == 2
    assert "give two or more, the right one first, or --label_column" in capsys.readouterr().err
