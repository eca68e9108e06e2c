"""Annotation files of every layout, as samples; and what is wrong with an entry, named."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from llava.eval.annotations import MediaFolders, read_annotations
from llava.eval.tasks import TASKS, reference_tube
from llava.grounding.syntax import box_text, span_text
from llava.types import Coordinates

REFS = [
    {"ref_id": 3, "ann_id": 7, "image_id": 1, "file_name": "COCO_1_7.jpg", "split": "testA",
     "sentences": [{"sent": "the left cup", "sent_id": 1}, {"sent": "cup near the plate", "sent_id": 2}]},
    {"ref_id": 4, "ann_id": 8, "image_id": 1, "split": "val", "sentences": [{"sent": "the plate"}]},
]  # fmt: skip
INSTANCES = {
    "images": [{"id": 1, "file_name": "a.png", "width": 200, "height": 100}],
    "annotations": [{"id": 7, "bbox": [20, 10, 40, 20]}, {"id": 8, "bbox": [0, 0, 200, 100]}],
}


def write(path: Path, content) -> str:
    lines = content if isinstance(content, str) else json.dumps(content)
    if path.suffix == ".jsonl":
        lines = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(lines)
    return str(path)


def boxes_of(samples) -> list[list[float]]:
    return [[round(n, 4) for n in sample.reference.boxes[0]] for sample in samples]


def test_refs_and_instances(tmp_path: Path) -> None:
    files = [write(tmp_path / "refs.json", REFS), write(tmp_path / "instances.json", INSTANCES)]
    samples = read_annotations("expressions", files)
    assert [s.id for s in samples] == ["3-1", "3-2", "4-1"]
    assert [s.expression for s in samples] == ["the left cup", "cup near the plate", "the plate"]
    assert boxes_of(samples) == [[0.1, 0.1, 0.3, 0.3]] * 2 + [[0, 0, 1, 1]]
    assert samples[0].media[0].path == str(tmp_path / "a.png")  # The image's own file, not the one of its crop.
    only = read_annotations("expressions", files, split="val")
    assert [s.id for s in only] == ["4-1"]
    with pytest.raises(ValueError, match="whose split is 'testB'"):
        read_annotations("expressions", files, split="testB")


def test_images_with_the_words_of_one_box(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 5, "file_name": "a.png", "width": 200, "height": 100, "caption": "the cup"}],
        "annotations": [{"id": 5, "image_id": 5, "bbox": [20, 10, 40, 20]}],
    }
    (sample,) = read_annotations("expressions", [write(tmp_path / "captioned.json", content)])
    assert (sample.id, sample.expression, boxes_of([sample])) == ("5", "the cup", [[0.1, 0.1, 0.3, 0.3]])


ROW = {"image": "a.png", "width": 200, "height": 100}


@pytest.mark.parametrize(
    ("numbers", "options", "expected"),
    [
        # Shares of the picture: none is above 1.
        ([[0.1, 0.1, 0.3, 0.3], [0.5, 0, 1, 1]], {}, [0.1, 0.1, 0.3, 0.3]),
        # The second cannot be a size: it would leave the picture.
        ([[20, 10, 60, 30], [100, 50, 180, 90]], {}, [0.1, 0.1, 0.3, 0.3]),
        # The second cannot be a corner: it would lie left of the first.
        ([[20, 10, 40, 20], [100, 50, 20, 10]], {}, [0.1, 0.1, 0.3, 0.3]),
        ([[20, 10, 40, 20]], {"box_format": "xywh"}, [0.1, 0.1, 0.3, 0.3]),
        ([[20, 10, 40, 20]], {"box_format": "xyxy"}, [0.1, 0.1, 0.2, 0.2]),
    ],
)
def test_formats_of_boxes(tmp_path: Path, numbers, options, expected) -> None:
    rows = [ROW | {"sent": "the cup", "bbox": bbox} for bbox in numbers]
    samples = read_annotations("expressions", [write(tmp_path / "rows.jsonl", rows)], **options)
    assert boxes_of(samples)[0] == expected


def test_the_size_is_read_from_the_image(media_dir: Path, tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "sents": ["one", "two"], "bbox": [9, 6, 45, 30]}]
    folders = MediaFolders(images=str(media_dir))
    samples = read_annotations("expressions", [write(tmp_path / "rows.json", rows)], folders, "xyxy")
    assert boxes_of(samples) == [[0.1, 0.1, 0.5, 0.5]] * 2
    assert [s.id for s in samples] == ["1-1", "1-2"]
    # Where it is missing, the sample says so, and the others are read.
    (sample,) = read_annotations("expressions", [str(tmp_path / "rows.json")], MediaFolders(), "xyxy")[:1]
    assert sample.fault == f"{tmp_path}/a.png: no such file"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "a.png", "bbox": [0, 0, 1, 1]}], r'rows.jsonl, line 1: needs "expression" or .* found None'),
        ([ROW | {"sent": "x", "bbox": [0, 0, 1]}], r'line 1: needs "bbox" or "box", 4 numbers, found \[0, 0, 1\]'),
        ([ROW | {"sent": "x", "bbox": [0.5, 0, 0.2, 1]}], "line 1: its box .* is empty or lies outside"),
        ([ROW | {"sent": "x", "bbox": [9, 9, 20, 20]}], "say which with --box_format"),
        (
            [ROW | {"sent": "x", "bbox": b} for b in ([100, 50, 20, 10], [150, 50, 180, 90])],
            "line 1: its box .* line 2",
        ),
        ([ROW | {"sent": "x", "bbox": [0, 0, 1, 1], "image": "../a.png"}], "lies outside the folder"),
        ([ROW | {"sent": "x", "bbox": [0, 0, 9, 9], "width": -1}], '"width" must be a number above 0, found -1'),
        (["x"], "line 1: expected an object, found str"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, rows, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_annotations("expressions", [write(tmp_path / "rows.jsonl", rows)])


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data nowhere.json: no such file"):
        read_annotations("expressions", ["nowhere.json"])
    (tmp_path / "refs(unc).p").write_bytes(b"x")
    with pytest.raises(ValueError, match="a pickle runs whatever code it holds"):
        read_annotations("expressions", [str(tmp_path / "refs(unc).p")])
    instances = write(tmp_path / "instances.json", INSTANCES)
    with pytest.raises(ValueError, match=r"nothing that refers to them; give refs.json"):
        read_annotations("expressions", [instances])
    refs = write(tmp_path / "refs.json", [REFS[0] | {"ann_id": 99}])
    with pytest.raises(ValueError, match=r"refs.json, sample 1: instances.json has no annotation 99"):
        read_annotations("expressions", [refs, instances])
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"half.json: not JSON"):
        read_annotations("captions", [str(tmp_path / "half.json")])


LINES = "AB12C 2.5 5.0##a person opens a door.\n\nAB12C 5 12.0##a person sits##down.\n"


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("lengths.csv", "id,subject,length\nAB12C,x,10.0\n"),
        ("lengths.json", {"AB12C": 10}),
        ("more.json", {"AB12C": {"duration": 10.0}}),
    ],
)
def test_charades_lines(tmp_path: Path, name: str, lengths) -> None:
    files = [write(tmp_path / "charades_sta_test.txt", LINES), write(tmp_path / name, lengths)]
    samples = read_annotations("moments", files)
    assert [tuple(s.reference.span) for s in samples] == [(0.25, 0.5), (0.5, 1.0)]
    assert [s.expression for s in samples] == ["a person opens a door.", "a person sits##down."]
    assert samples[1].source == "charades_sta_test.txt, line 3"
    assert samples[0].media[0].path.endswith("AB12C.mp4")


def test_the_length_is_read_from_the_video(media_dir: Path, tmp_path: Path) -> None:
    lines = write(tmp_path / "lines.txt", "a 0.375 0.75##it moves\nb 0 1.5##it moves\nc 0 1##it moves\n")
    folders = MediaFolders(videos=str(media_dir))
    first, second, third = read_annotations("moments", [lines], folders)  # 12 frames, 8 a second.
    assert first.reference.span == pytest.approx((0.25, 0.5))
    assert second.reference.span == pytest.approx((0, 1))
    assert third.fault is not None
    assert "c.mp4: no such file" in third.fault


def test_rows_and_objects_of_moments(tmp_path: Path) -> None:
    rows = [
        {"video": "a.mp4", "caption": "x", "span": [0.2, 0.4]},
        {"image_id": 1, "video": "a.mp4", "query": "y", "timestamp": [2, 4], "duration": 10},
    ]
    samples = read_annotations("moments", [write(tmp_path / "rows.jsonl", rows)])
    assert [tuple(s.reference.span) for s in samples] == [(0.2, 0.4)] * 2
    videos = {"v_1": {"duration": 20, "timestamps": [[0, 5], [10, 20]], "sentences": ["one", "two"]}}
    samples = read_annotations("moments", [write(tmp_path / "videos.json", videos)])
    assert [tuple(s.reference.span) for s in samples] == [(0, 0.25), (0.5, 1)]
    assert [s.id for s in samples] == ["v_1-1", "v_1-2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("AB12C 2.5##a door", r"lines.txt, line 1: expected VIDEO START END##sentence"),
        ("AB12C 2 inf##a door", r"expected VIDEO START END##sentence"),
        ("AB12C 5 2##a door", "line 1: its span ends .* before it begins"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    lengths = write(tmp_path / "lengths.json", {"AB12C": 10})
    with pytest.raises(ValueError, match=message):
        read_annotations("moments", [write(tmp_path / "lines.txt", content), lengths])


def st_align(**changes) -> dict:
    entry = {
        "video_path": "a.mp4",
        "meta": {
            "split": [100, 200], "width": 200, "height": 100,
            "time_token": {"<s>": 120, "<e>": 160},
            "spatial_token": {"<bboxes>": {"120": [0, 0, 20, 10], "140": [20, 0, 20, 10], "160": [40, 0, 20, 10]}},
        },
        "conversations": [
            {"from": "human", "value": "<video>\nFrom <s> to <e>, where is the dog?"},
            {"from": "gpt", "value": "Ends in <e>, the dog runs. Object bounding box: <bboxes>"},
        ],
    }  # fmt: skip
    entry["meta"] |= changes
    return entry


def test_st_align(tmp_path: Path) -> None:
    (sample,) = read_annotations("tubes", [write(tmp_path / "svg.json", [st_align()])])
    assert sample.expression == "during {<TEMP-INPUT><TEMP-INPUT>}, where is the dog?"
    assert sample.coordinates == Coordinates(temporal_input_locations=(0.2, 0.6))
    assert sample.reference.captions == ("the dog runs.",)
    assert tuple(sample.reference.span) == (0.2, 0.6)
    assert [list(box) for box in sample.reference.boxes] == [[0, 0, 0.1, 0.1], [0.1, 0, 0.2, 0.1], [0.2, 0, 0.3, 0.1]]
    assert sample.split == (100, 200)


def test_uneven_boxes_of_st_align_are_spaced_evenly(tmp_path: Path) -> None:
    boxes = {"<bboxes>": {"120": [0, 0, 20, 10], "130": [20, 0, 20, 10], "160": [20, 0, 20, 10]}}
    (sample,) = read_annotations("tubes", [write(tmp_path / "svg.json", [st_align(spatial_token=boxes)])])
    tube = reference_tube(sample.reference)
    assert tube.box_at(0.25) == pytest.approx((0.05, 0, 0.15, 0.1), abs=1e-3)
    assert tube.box_at(0.45) == pytest.approx((0.1, 0, 0.2, 0.1), abs=1e-3)


def test_frames_of_st_align_are_shown_at_their_own_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "data"))
    from clips import encode

    # Ten frames a second apart, then ten of 30 a second: 9.3 seconds, of which frame 9 has seen 9.
    times = [i * 1000 for i in range(10)] + [9000 + 33 * (i + 1) for i in range(10)]
    encode(tmp_path / "a.mp4", numbers=range(20), times=times, time_base=Fraction(1, 1000))
    changes = {"split": [0, 19], "time_token": {"<s>": 3, "<e>": 9}, "spatial_token": {"<bboxes>": {"3": [0, 0, 9, 9]}}}
    (sample,) = read_annotations("tubes", [write(tmp_path / "svg.json", [st_align(**changes)])])
    assert sample.reference.span == pytest.approx((3 / 9.33, 9 / 9.33), abs=1e-3)
    assert sample.coordinates.temporal_input_locations == pytest.approx((3 / 9.33, 9 / 9.33), abs=1e-3)


def test_rows_of_tubes(tmp_path: Path) -> None:
    row = {"id": 9, "video": "a.mp4", "caption": "the dog runs", "span": [0.2, 0.6], "boxes": [[0, 0, 0.5, 0.5]]}
    asked = row | {"question": "Where is it?"}
    first, second = read_annotations("tubes", [write(tmp_path / "rows.jsonl", [row, asked])])
    assert (first.expression, first.question) == ("the dog runs", None)
    assert (second.expression, second.question) == ("Where is it?", "Where is it?")
    assert second.reference.captions == ("the dog runs",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (st_align(split=[5, 5]), r'rows.jsonl, line 1, meta: "split" must be \[first, last\] frame'),
        (st_align(width=None), 'needs "width" and "height"'),
        (st_align(time_token={"<s>": 1}), '"meta.time_token" needs <e>'),
        (st_align(spatial_token={}), '"meta.spatial_token" needs <bboxes>'),
        (st_align(spatial_token={"<bboxes>": {"x": [0, 0, 1, 1]}}), "the number of its frame, found 'x'"),
        ({"video": "a.mp4", "caption": "x", "span": [0, 1]}, 'line 1: needs "boxes"'),
        ({"video": "a.mp4", "caption": "x", "span": [0, 1], "boxes": [[0, 0, 1]]}, "4 numbers"),
    ],
)
def test_wrong_tubes_are_named(tmp_path: Path, row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_annotations("tubes", [write(tmp_path / "rows.jsonl", [row])])


def test_captions(tmp_path: Path) -> None:
    coco = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [{"image_id": i, "caption": c} for i, c in ((1, "a cup"), (2, "a dog"), (1, "one cup"))],
    }
    samples = read_annotations("captions", [write(tmp_path / "captions.json", coco)])
    assert [s.reference.captions for s in samples] == [("a cup", "one cup"), ("a dog",)]
    rows = [{"video": "a.mp4", "captions": ["x", "y"]}, {"image": "a.png", "caption": "z", "question": "What?"}]
    samples = read_annotations("captions", [write(tmp_path / "rows.jsonl", rows)])
    assert [s.media[0].kind for s in samples] == ["video", "image"]
    assert samples[1].expression == "What?"
    path = write(tmp_path / "captions.json", coco | {"annotations": coco["annotations"][:1]})
    with pytest.raises(ValueError, match="images 2: no annotation has its id 2"):
        read_annotations("captions", [path])


def conversation(human: str, answer: str, **variables) -> dict:
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    return {"id": "c", "video": "a.mp4", "conversations": turns, "variables": variables}


def test_conversations(tmp_path: Path) -> None:
    answer = f"It moves {span_text()}: {box_text()} and {box_text()}."
    sample = conversation(
        f"<video>\nWhat is at {box_text('INPUT')}?",
        answer,
        spatial_width_input_locations=[0.1, 0.2],
        spatial_height_input_locations=[0.3, 0.4],
        temporal_output_locations=[0.25, 0.75],
        spatial_width_output_locations=[0, 0.5, 0.5, 1],
        spatial_height_output_locations=[0.123, 0.5, 0.5, 1],
    )
    (read,) = read_annotations("tubes", [write(tmp_path / "data.json", [sample])])
    assert read.question == f"<video>\nWhat is at {box_text('INPUT')}?"
    assert read.expression == f"What is at {box_text('INPUT')}?"
    assert read.coordinates.spatial_width_input_locations == (0.1, 0.2)
    assert read.coordinates.temporal_output_locations == ()
    # To the last digit, not to the nearest bin.
    assert [list(box) for box in read.reference.boxes] == [[0, 0.123, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    assert tuple(read.reference.span) == (0.25, 0.75)
    assert read.reference.captions == ("It moves : and .",)


def test_conversations_give_the_time_in_the_question(tmp_path: Path) -> None:
    sample = conversation(
        f"<video> Where is it during {span_text('INPUT')}?",
        box_text(),
        temporal_input_locations=[0.25, 0.75],
        spatial_width_output_locations=[0, 0.5],
        spatial_height_output_locations=[0, 0.5],
    )
    (read,) = read_annotations("tubes", [write(tmp_path / "data.jsonl", [sample])])
    assert tuple(read.reference.span) == (0.25, 0.75)
    TASKS.get("svg").check_reference(read)
    with pytest.raises(ValueError, match=r"sample 'c' \(data.jsonl, line 1\): its reference needs caption"):
        TASKS.get("caption").check_reference(read)


def test_media_are_shown_where_the_question_shows_them(tmp_path: Path) -> None:
    sample = conversation("In <video> and <image>, and in <video>?", "x") | {
        "image": "b.png",
        "video": ["a.mp4", "c.mp4"],
    }
    (read,) = read_annotations("captions", [write(tmp_path / "data.json", [sample])])
    assert [Path(file.path).name for file in read.media] == ["a.mp4", "b.png", "c.mp4"]
    assert read.question == "In <video> and <image>, and in <video>?"


def test_conversations_ask_one_question(tmp_path: Path) -> None:
    sample = conversation("<video>", "x")
    sample["conversations"] *= 2
    sample["video"] = ["a.mp4", "a.mp4"]
    with pytest.raises(ValueError, match="has turns of user, assistant, user, assistant"):
        read_annotations("captions", [write(tmp_path / "data.json", [sample])])
