"""Data of the BabyLM tasks: found, read as the official pipeline reads them, and summed up."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from llava.eval.babylm.results import spearman, summarize
from llava.eval.babylm.tasks import TASKS, find_tasks, read_items
from llava.eval.choices import Candidate

ROWS: dict[str, tuple[str, dict[str, object]]] = {
    "blimp": (
        "blimp_filtered/wh_island.jsonl",
        {
            "sentence_good": "A b.", "sentence_bad": "A c.", "UID": "wh_island", "field": "syntax_semantics",
            "linguistics_term": "island_effects",
        },
    ),
    "supplement": ("supplement_filtered/hypernym.jsonl", {"sentence_good": "A b.", "sentence_bad": "A c."}),
    "ewok": (
        "ewok_filtered/agent.jsonl",
        {
            "Context1": "He runs.", "Context2": "He sits.", "Target1": "Fast.", "Target2": "Slow.", "Domain": "agent",
            "ContextType": "direct", "ContextDiff": "antonym", "TargetDiff": "concept swap",
        },
    ),
    "entity_tracking": (
        "entity_tracking/ambiref.jsonl",
        {"input_prefix": "Box 1 has", "options": [" the key.", " nothing.", " a cup."], "numops": 2},
    ),
    "comps": (
        "comps/comps_wugs_dist-in-between.jsonl",
        {"prefix_acceptable": "A wug", "prefix_unacceptable": "A dax", "property_phrase": "can fly."},
    ),
    "wug_adj": ("wug_adj_nominalization/wug.jsonl", {"sentences": "wugness\twugity", "ratio": "0.75"}),
    "wug_past": ("wug_past_tense/wug.jsonl", {"sentences": "splung\tsplinged", "ratio": 0.25}),
    "winoground": (
        "winoground_filtered/w.jsonl",
        {"caption_0": "A b", "caption_1": "B a", "image_idx": 7, "image_key": "image_1", "tag": "Object"},
    ),
    "vqa": (
        "vqa_filtered/v.jsonl",
        {"question": "What?", "target_ans": "cat", "distractors": ["dog", "cow", "pig"], "idx_in_hf_dataset": 3},
    ),
}  # fmt: skip
EXPECTED = {
    "blimp": ("wh_island", [("A b.", 0), ("A c.", 0)], ("A b.", "A c.")),
    "supplement": ("hypernym", [("A b.", 0), ("A c.", 0)], ("A b.", "A c.")),
    "ewok": ("agent", [("He runs. Fast.", 8), ("He runs. Slow.", 8)], (" Fast.", " Slow.")),
    "entity_tracking": (
        "ambiref_2_ops",
        [("Box 1 has the key.", 9), ("Box 1 has nothing.", 9), ("Box 1 has a cup.", 9)],
        (" the key.", " nothing.", " a cup."),
    ),
    "comps": (
        "wugs_dist_in_between",
        [("A wug can fly.", 6), ("A dax can fly.", 6)],
        ("A wug can fly.", "A dax can fly."),
    ),
    "wug_adj": ("wug_adj", [("wugness", 0), ("wugity", 0)], ("wugness", "wugity")),
    "wug_past": ("wug_past", [("splung", 0), ("splinged", 0)], ("splung", "splinged")),
    "winoground": ("winoground", [("A b", 0), ("B a", 0)], ("A b", "B a")),
    "vqa": (
        "vqa",
        [("What? cat", 5), ("What? dog", 5), ("What? cow", 5), ("What? pig", 5)],
        (" cat", " dog", " cow", " pig"),
    ),
}


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """A folder laid out as the official data are, with two rows a task."""
    root = tmp_path_factory.mktemp("evaluation_data")
    for path, row in ROWS.values():
        file = root / "full_eval" / path
        file.parent.mkdir(parents=True)
        line = json.dumps(row)
        file.write_text(f"{line}\n\n{line}\n", encoding="utf-8")
    for picture in ("winoground_filtered/images/ex_7_img_1.png", "vqa_filtered/images/3.jpg"):
        (root / "full_eval" / picture).parent.mkdir()
        (root / "full_eval" / picture).write_bytes(b"x")
    return root


@pytest.mark.parametrize("name", ROWS)
def test_each_task_is_read_as_the_official_pipeline_does(official: Path, name: str) -> None:
    found = find_tasks([str(official)], [name])
    assert found.missing == []
    first, second = read_items(found.tasks[0])
    uid, candidates, predictions = EXPECTED[name]
    assert first.choice.candidates == tuple(Candidate(*pair) for pair in candidates)
    assert first.predictions == predictions
    assert (first.uid, first.id, second.id, first.gold) == (uid, f"{uid}_0", f"{uid}_1", 0)
    assert second.choice.source.endswith(f"{Path(ROWS[name][0]).name}, line 3")
    assert bool(first.choice.media) == TASKS[name].needs_images
    assert found.tasks[0].folder == ROWS[name][0].split("/")[0]


def test_a_zip_is_read_without_being_unpacked(official: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in official.rglob("*.jsonl"):
            archive.write(file, file.relative_to(official))
    found = find_tasks([str(tmp_path / "all.zip")], ["ewok", "comps"])
    assert [data.name for data in found.tasks] == ["ewok", "comps"]
    for data in found.tasks:
        alone = read_items(find_tasks([str(official)], [data.name]).tasks[0])
        assert [item.choice.candidates for item in read_items(data)] == [item.choice.candidates for item in alone]


def test_full_and_fast_data_may_lie_beside_each_other(official: Path, tmp_path: Path) -> None:
    # As in the official download, where the wug tasks have the same folder in both.
    for part in ("full_eval", "fast_eval"):
        file = tmp_path / part / "wug_past_tense" / "wug.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(ROWS["wug_past"][1]))
    for fast, part in ((False, "full_eval"), (True, "fast_eval")):
        (data,) = find_tasks([str(tmp_path)], ["wug_past"], fast).tasks
        assert part in str(data.files[0])


def test_fast_data_alone_and_packed_files_are_said(official: Path, tmp_path: Path, caplog) -> None:
    folder = tmp_path / "blimp_fast"
    shutil.copytree(next(official.rglob("blimp_filtered")), folder)
    for name in ("b.jsonl.gz", "c.JSONL", "d.zip", "e.json"):
        (folder / name).write_bytes(b"")
    find_tasks([str(tmp_path)])
    packed, fast = caplog.messages
    assert packed.endswith(f"in .jsonl: {folder}/b.jsonl.gz, {folder}/c.JSONL, {folder}/d.zip")
    assert fast.startswith("blimp: only its official fast data are there")


def test_zips_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("blimp/a.jsonl", json.dumps(ROWS["blimp"][1]))
    content = whole.read_bytes()
    locked, broken = bytearray(content), bytearray(content)
    locked[6] |= 1  # The flags of the member, and of its entry in the directory.
    locked[content.index(b"PK\x01\x02") + 8] |= 1
    broken[content.index(b"A b.")] = ord("B")
    for name, changed, said in (("locked", locked, "password required"), ("broken", broken, "is damaged")):
        (tmp_path / f"{name}.zip").write_bytes(changed)
        with pytest.raises(ValueError, match=rf"{name}.zip:blimp/a.jsonl.* {said}"):
            read_items(find_tasks([str(tmp_path / f"{name}.zip")], ["blimp"]).tasks[0])
    (tmp_path / "cut.zip").write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut\.zip: is no whole zip, it is cut short or damaged; copy it again"):
        find_tasks([str(tmp_path / "cut.zip")])


def test_lines_without_an_end_are_not_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("llava.eval.babylm.sources._LONGEST_LINE", 100)
    write_blimp(tmp_path, {"a" * 100: 1})
    with pytest.raises(ValueError, match="line 1: has more than 100 characters"):
        read_items(find_tasks([str(tmp_path)], ["blimp"]).tasks[0])


def test_a_ratio_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "wug_past_tense").mkdir()
    (tmp_path / "wug_past_tense" / "w.jsonl").write_text('{"sentences": "a\\tb", "ratio": NaN}')
    with pytest.raises(ValueError, match="line 1: 'ratio' is nan; expected a number"):
        read_items(find_tasks([str(tmp_path)]).tasks[0])


def test_what_is_missing_is_said(official: Path, tmp_path: Path) -> None:
    (tmp_path / "blimp").mkdir()
    (tmp_path / "blimp" / "a.jsonl").write_text(json.dumps(ROWS["blimp"][1]))
    found = find_tasks([str(tmp_path)], ["blimp", "comps"])
    assert [data.name for data in found.tasks] == ["blimp"]
    assert len(found.missing) == 1
    assert found.missing[0].startswith("comps: ")
    with pytest.raises(ValueError, match="blimp is there twice"):
        find_tasks([str(tmp_path), str(official)], ["blimp"])
    with pytest.raises(ValueError, match="--tasks 'nothing': known are blimp"):
        find_tasks([str(tmp_path)], ["nothing"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no line"),
        ("[1]", "line 1: expected a JSON object"),
        ('{"sentence_good": "a"', "line 1: no JSON"),
        (r'{"sentence_good": "a \ud83d"}', "line 1: has half of a character"),
        ('\n{"sentence_good": "a", "UID": "x", "field": "y"}', "line 2: has no 'sentence_bad', but 'sentence_good'"),
        ('{"sentence_good": "a", "sentence_bad": 3, "UID": "x", "field": "y"}', "line 1: 'sentence_bad' is 3"),
    ],
)
def test_faulty_rows_are_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "blimp_filtered" / "a.jsonl"
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(ValueError, match=f"a.jsonl.*{said}"):
        read_items(find_tasks([str(tmp_path)], ["blimp"]).tasks[0])


def write_blimp(folder: Path, sizes: dict[str, int]) -> None:
    (folder / "blimp_filtered").mkdir()
    for uid, size in sizes.items():
        rows = [ROWS["blimp"][1] | {"UID": uid, "sentence_good": f"{uid} {n}."} for n in range(size)]
        (folder / "blimp_filtered" / f"{uid}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_the_fast_choice_is_the_same_whatever_stands_beside_it(tmp_path: Path) -> None:
    write_blimp(tmp_path, {"a": 5, "b": 230})
    data = find_tasks([str(tmp_path)], ["blimp"]).tasks[0]
    chosen = read_items(data, fast=True)
    assert [sum(item.uid == uid for item in chosen) for uid in "ab"] == [5, 200]
    assert chosen == read_items(data, fast=True)
    assert chosen != read_items(data, fast=True, seed=1)
    (tmp_path / "blimp_filtered" / "a.jsonl").unlink()
    alone = find_tasks([str(tmp_path)], ["blimp"]).tasks[0]
    assert read_items(alone, fast=True) == chosen[5:]


def test_scores_are_means_over_groups_and_ties_count_a_share(tmp_path: Path) -> None:
    write_blimp(tmp_path, {"a": 1, "b": 4})
    data = find_tasks([str(tmp_path)], ["blimp"]).tasks[0]
    items = read_items(data)
    result = summarize(data, items, [(0, -1), (0, -1), (-1, 0), (0, 0), (0, 0)])
    assert (result.official, result.adjusted, result.ties, result.num_items) == (87.5, 75.0, 2, 5)
    assert result.low is not None
    assert result.low < 87.5 <= result.high
    assert [(row.kind, row.name, row.score) for row in result.rows[:3]] == [
        ("UID", "a", 100.0), ("UID", "b", 75.0), ("field", "syntax/semantics", 80.0)
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in ROWS if "wug" not in name])
def test_a_model_that_knows_nothing_ties_everywhere(official: Path, name: str) -> None:
    data = find_tasks([str(official)], [name]).tasks[0]
    items = read_items(data)
    count = len(items[0].choice.candidates)
    result = summarize(data, items, [(0.0,) * count] * len(items))
    assert (result.ties, result.official, result.adjusted) == (2, 100.0, pytest.approx(100 / count))
    assert result.chance == pytest.approx(100 / count)


def test_ratios_are_correlated_by_rank(official: Path) -> None:
    data = find_tasks([str(official)], ["wug_adj"]).tasks[0]
    items = read_items(data)
    assert summarize(data, items, [(0, 0)] * 2).official is None
    assert spearman(np.array([1.0, 2.0, 3.0, 3.0]), np.array([10.0, 20.0, 40.0, 30.0])) == pytest.approx(0.9486833)
    assert spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])) is None


def test_a_fast_choice_of_no_item_is_told(official: Path) -> None:
    """Of entity tracking the official fast data have some groups alone."""
    (data,) = find_tasks([str(official)], ["entity_tracking"]).tasks
    with pytest.raises(
        ValueError, match="entity_tracking: the official fast data have no item of its groups ambiref_2"
    ):
        read_items(data, fast=True)
