"""benchmarks/coco_narratives.py: rows of photographs with boxes, and the boxes that are found again in their traces."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from conftest import load_script

from llava.data.localized_narratives.__main__ import main
from llava.data.localized_narratives.boxes import BoxSettings, ground_utterances
from llava.data.localized_narratives.rows import parse_narrative, read_rows

ROOT = Path(__file__).parents[2]
OBJECTS = [
    {"category": "dog", "box": [0.05, 0.1, 0.45, 0.9]},
    {"category": "apple", "box": [0.7, 0.5, 0.95, 0.7]},
    {"category": "cup", "box": [0.5, 0.1, 0.51, 0.11]},
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("benchmarks/coco_narratives.py")


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def test_a_row(script: ModuleType) -> None:
    row = script.build_row({"image": "000000000009.jpg", "objects": OBJECTS}, most_objects=2, seed=0)
    assert row["caption"] == "In this image there is a dog on the left, and an apple on the right."
    assert row["image_id"] == "9"
    narrative = parse_narrative(row)
    assert narrative.findings == ()
    intro, *named = ground_utterances(narrative, BoxSettings())
    assert intro.box is None, "the pointer waits below the picture"
    for utterance, thing in zip(named, OBJECTS, strict=False):
        assert utterance.box is not None
        assert overlap(utterance.box, tuple(thing["box"])) > 0.6


def test_the_same_seed_gives_the_same_rows(script: ModuleType, tmp_path: Path) -> None:
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps([{"image": "1.jpg", "objects": OBJECTS}, {"image": "2.jpg", "objects": []}]))
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        script.main([str(boxes), str(tmp_path / name), "--seed", seed])
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c
    assert len(list(read_rows([str(tmp_path / "a")]))) == 1


def test_boxes_of_photographs_are_found_again(script: ModuleType, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "image" / "coco_boxes"
    if not folder.is_dir():
        pytest.skip(f"no photographs with boxes at {folder}")
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    script.main([str(folder / "boxes.json"), str(rows)])
    assert main([str(rows), "--images", str(folder), "--out", str(out), "--preview", "1"]) == 0
    samples = [json.loads(line) for line in (out / "localized_narratives_tim.jsonl").read_text().splitlines()]
    assert len(samples) == 79
    assert len(list((out / "preview").glob("*.png"))) == 1
    objects = {image["image"]: image["objects"] for image in json.loads((folder / "boxes.json").read_text())}
    overlaps = []
    for sample in samples:
        widths, heights = (sample["variables"][f"spatial_{name}_output_locations"] for name in ("width", "height"))
        boxes = zip(widths[::2], heights[::2], widths[1::2], heights[1::2], strict=True)
        overlaps += [max(overlap(box, tuple(thing["box"])) for thing in objects[sample["image"]]) for box in boxes]
    assert len(overlaps) > 250
    assert sum(overlaps) / len(overlaps) > 0.65
