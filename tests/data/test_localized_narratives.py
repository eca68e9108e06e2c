"""``python -m llava.data.localized_narratives``: golden files, what is left out, errors, pictures."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.config import GroundingConfig
from llava.data.localized_narratives.__main__ import main
from llava.data.records import read_records
from llava.grounding.syntax import LOCATIONS, box_text, find_placeholders, parse_boxes
from tests.model.grounded_tokenizers import write_bins

GOLDEN = Path(__file__).parent / "golden"
ROWS = GOLDEN / "narratives_rows.jsonl"
IMAGES = ("000000000009.jpg", "1000092795.jpg", "000000000025.jpg", "ADE_train_00000001.png")
KINDS = ("t", "ti", "tim")
NO_POINTS = "traces is not a list of lists of points with x, y and t"
TOO_FEW_POINTS = "utterances without enough points of the trace in the image"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name in IMAGES:
        Image.new("RGB", (64, 48), (120, 140, 90)).save(folder / name)
    return folder


def words(rows: Path | list[Path], images: Path, out: Path, *more: str) -> list[str]:
    return [*map(str, rows if isinstance(rows, list) else [rows]), "--images", str(images), "--out", str(out), *more]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_row(**changes: Any) -> dict[str, Any]:
    """A row with one utterance, whose 21 points lie on a line from (0.2, 0.3) to (0.6, 0.7)."""
    trace = [{"x": 0.2 + 0.02 * i, "y": 0.3 + 0.02 * i, "t": 0.05 * i} for i in range(21)]
    row = {
        "dataset_id": "mscoco_train2017", "image_id": "9", "annotator_id": 7, "caption": "A brown dog.",
        "timed_caption": [{"utterance": "A brown dog.", "start_time": 0.0, "end_time": 1.0}], "traces": [trace],
    }  # fmt: skip
    return row | changes


def prepare_one(row: Any, images: Path, tmp_path: Path, *more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The grounded sample of a row, and what was found wrong with it."""
    out = tmp_path / "out"
    assert main(words(write_rows(tmp_path / "rows.jsonl", row), images, out, *more)) == 0
    return read(out / "localized_narratives_tim.jsonl")[0], read(out / "left_out.jsonl")


def test_golden_files(images: Path, tmp_path: Path, capsys) -> None:
    assert main(words(ROWS, images, tmp_path)) == 0
    for kind in KINDS:
        written = (tmp_path / f"localized_narratives_{kind}.jsonl").read_bytes()
        assert written.decode() == (GOLDEN / f"narratives_{kind}.jsonl").read_text(encoding="utf-8")
    assert (tmp_path / "left_out.jsonl").read_text() == (GOLDEN / "narratives_left_out.jsonl").read_text()
    printed = capsys.readouterr().out
    assert printed.startswith("9 rows: 5 samples, 5 with an image; 5 boxes for 11 utterances\nrows left out:\n")
    assert "       2  no trace\n" in printed
    assert not list(tmp_path.glob("*.part"))


def test_the_three_files_share_ids_and_captions() -> None:
    text, image, grounded = (read(GOLDEN / f"narratives_{kind}.jsonl") for kind in KINDS)
    for a, b, c in zip(text, image, grounded, strict=True):
        assert a["id"] == b["id"] == c["id"]
        caption = a["conversations"][1]["value"]
        assert caption == b["conversations"][1]["value"]
        assert caption == c["conversations"][1]["value"].replace(f" {box_text()}", "")
        assert "image" not in a
        assert b["image"] == c["image"]
        assert [turns["conversations"][0]["value"] for turns in (a, b, c)] == ["", "<image>", "<image>"]
        placeholders = find_placeholders(c["conversations"][1]["value"])
        assert {name: len(numbers) for name, numbers in c["variables"].items()} == {
            location: placeholders.count(placeholder) for placeholder, location in LOCATIONS.items()
        }
    assert len({sample["id"] for sample in text}) == len(text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_reads_the_files(kind: str, images: Path) -> None:
    records = read_records(str(GOLDEN / f"narratives_{kind}.jsonl"), str(images))
    assert [bool(record.media) for record in records] == [kind != "t"] * 5
    assert all(Path(media.path).is_file() for record in records for media in record.media)
    assert [bool(record.coordinates) for record in records] == [kind == "tim" and i in (0, 1, 3) for i in range(5)]


def test_what_a_model_reads_and_writes_of_a_grounded_caption(images: Path) -> None:
    record = read_records(str(GOLDEN / "narratives_tim.jsonl"), str(images))[0]
    grounding = GroundingConfig(num_spatial=101)
    text = write_bins(record.turns[1].text, record.coordinates, grounding)
    assert text.startswith(
        "In this image there is a brown dog, [<WIDTH-022><HEIGHT-032><WIDTH-058><HEIGHT-068>] and on "
    )
    # The ball's edges, 0.895 and 0.945, lie between two bins.
    assert parse_boxes(text, grounding)[1] == pytest.approx((0.0, 0.895, 0.05, 0.945), abs=0.006)


def test_several_and_compressed_files_give_the_same_samples(images: Path, tmp_path: Path) -> None:
    lines = ROWS.read_bytes().splitlines(keepends=True)
    first, second = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"
    first.write_bytes(gzip.compress(b"".join(lines[:3])))
    second.write_bytes(b"".join(lines[3:]))
    assert main(words([first, second], images, tmp_path, "--name", "n")) == 0
    for kind in KINDS:
        assert (tmp_path / f"n_{kind}.jsonl").read_bytes() == (GOLDEN / f"narratives_{kind}.jsonl").read_bytes()
    places = [row["row"] for row in read(tmp_path / "left_out.jsonl")]
    assert (places[0], places[-1]) == ("a.jsonl.gz, line 1", "b.jsonl, line 7")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_id": "10"}, "no image of that name"),
        ({"image_id": "../9"}, "the name of the image leads out of --images"),
        ({"image_id": "9" * 300}, "no image of that name"),
        ({"image_id": "9\0"}, "no image of that name"),
        ({"image_id": None}, "no image_id"),
        ({"image_id": 1.5}, "image_id is neither a string nor a whole number"),
        ({"dataset_id": "\ud83d"}, "dataset_id has half a character"),
        ({"caption": None}, "no caption"),
        ({"caption": "A \ud83d dog."}, "the caption has half a character"),
        ({"caption": "A <vid_start> dog."}, "the caption has a name kept for images, videos or coordinates"),
        ({"caption": "A <WIDTH-OUTPUT> dog."}, "the caption has a name kept for images, videos or coordinates"),
        ({"caption": "A <TEMP-007> dog."}, "the caption has a name kept for images, videos or coordinates"),
    ],
)
def test_a_row_that_can_be_no_sample_is_listed(
    changes: dict[str, Any], reason: str, images: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_row(**changes), make_row(annotator_id=8))
    assert main(words(rows, images, tmp_path)) == 0
    assert [sample["id"] for sample in read(tmp_path / "localized_narratives_t.jsonl")] == ["mscoco_train2017_9_8"]
    (found,) = read(tmp_path / "left_out.jsonl")
    assert (found["row"], found["kept"], found["reason"]) == ("rows.jsonl, line 1", False, reason)
    assert found["annotator_id"] == 7


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"traces": None}, "no trace"),
        ({"traces": [[]]}, "no trace"),
        ({"traces": [{"x": 1}]}, NO_POINTS),
        ({"traces": [[{"x": 0.5, "y": 0, "t": float("nan")}]]}, NO_POINTS),
        ({"traces": [[{"x": 10**400, "y": 0, "t": 0}]]}, NO_POINTS),
        ({"traces": [[{"x": 1.01, "y": 0.5, "t": 0.5}]]}, TOO_FEW_POINTS),
        ({"traces": [[{"x": 0.5, "y": 0.5, "t": 1.3}]]}, TOO_FEW_POINTS),
        ({"timed_caption": None}, "no timed_caption"),
        ({"timed_caption": ["A brown dog."]}, "timed_caption is not a list of utterances"),
        (
            {"timed_caption": [{"utterance": "A brown dog.", "start_time": 1.0, "end_time": 0.5}]},
            "utterances without a start_time and an end_time behind it",
        ),
        (
            {"timed_caption": [{"utterance": "Many people here.", "start_time": 0.0, "end_time": 0.5},
                               {"utterance": "a brown dog"}]},
            "utterances that were not found in the caption",
        ),
    ],
)  # fmt: skip
def test_a_row_without_boxes_stays_and_is_listed(
    changes: dict[str, Any], reason: str, images: Path, tmp_path: Path
) -> None:
    sample, found = prepare_one(make_row(**changes), images, tmp_path)
    assert sample["conversations"][1]["value"] == "A brown dog."
    assert sample["image"] == "000000000009.jpg"
    assert not any(sample["variables"].values())
    assert (found[0]["kept"], found[0]["reason"]) == (True, reason)


def test_lines_that_are_no_rows_are_listed(images: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'\xff\n{"a": \n[]\n\n' + json.dumps(make_row()).encode() + b"\n")
    assert main(words(rows, images, tmp_path)) == 0
    found = read(tmp_path / "left_out.jsonl")
    assert [(row["row"], row["reason"]) for row in found] == [
        ("rows.jsonl, line 1", "the line is not JSON"),
        ("rows.jsonl, line 2", "the line is not JSON"),
        ("rows.jsonl, line 3", "the line is no object"),
    ]


def test_rows_without_an_image_stay_as_text_on_request(images: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_row(image_id="10"), make_row())
    assert main(words(rows, images, tmp_path, "--keep_without_image")) == 0
    text, image, grounded = (read(tmp_path / f"localized_narratives_{kind}.jsonl") for kind in KINDS)
    assert text[0] == image[0] == grounded[0]
    assert "image" not in text[0]
    assert "image" in image[1]
    (found,) = read(tmp_path / "left_out.jsonl")
    assert (found["kept"], found["details"]) == (True, ["000000000010.jpg"])


def test_annotators_of_one_image_and_their_repeats_have_ids_of_their_own(images: Path, tmp_path: Path) -> None:
    rows = [make_row(annotator_id=1), make_row(annotator_id=2), make_row(annotator_id=1), make_row(annotator_id=1)]
    assert main(words(write_rows(tmp_path / "rows.jsonl", *rows), images, tmp_path)) == 0
    ids = [sample["id"] for sample in read(tmp_path / "localized_narratives_tim.jsonl")]
    assert ids == [f"mscoco_train2017_9_{end}" for end in ("1", "2", "1_2", "1_3")]


def test_names_of_images(images: Path, tmp_path: Path) -> None:
    for path in ("9.png", "000000000009.jpg", "train/x.jpg", "mscoco_train2017/9.webp"):
        (tmp_path / "i" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "i" / path).write_bytes(b"some")
    cases: list[tuple[dict[str, Any], list[str], str]] = [
        ({}, [], "000000000009.jpg"),
        ({}, ["--image_name", "no{image_id}.png", "--image_name", "{image_id}.png"], "9.png"),
        ({}, ["--image_name", "{dataset_id}/{image_id}.webp"], "mscoco_train2017/9.webp"),
        ({"image_id": "x"}, ["--image_name", "train/{image_id}.jpg"], "train/x.jpg"),
    ]
    for changes, flags, expected in cases:
        assert prepare_one(make_row(**changes), tmp_path / "i", tmp_path, *flags)[0]["image"] == expected
    (tmp_path / "i" / "000000000009.jpg").unlink()
    assert prepare_one(make_row(), tmp_path / "i", tmp_path)[0]["image"] == "9.png"


def test_an_empty_image_is_listed(tmp_path: Path, capsys) -> None:
    (tmp_path / "000000000009.jpg").touch()
    assert main(words(write_rows(tmp_path / "rows.jsonl", make_row()), tmp_path, tmp_path / "out")) == 2
    assert "most often: the image is an empty file" in capsys.readouterr().err


def test_flags_of_boxes(images: Path, tmp_path: Path) -> None:
    def box(*flags: str) -> tuple[float, ...]:
        variables = prepare_one(make_row(), images, tmp_path, *flags)[0]["variables"]
        widths, heights = (variables[f"spatial_{name}_output_locations"] for name in ("width", "height"))
        return (*widths[:1], *heights[:1], *widths[1:], *heights[1:])

    assert box() == (0.22, 0.32, 0.58, 0.68)
    assert box("--quantile", "0") == (0.2, 0.3, 0.6, 0.7)
    assert box("--quantile", "0.01", "--decimals", "2") == (0.2, 0.3, 0.6, 0.7)
    assert box("--min_size", "0.5") == (0.15, 0.25, 0.65, 0.75)
    assert box("--min_points", "22") == ()
    timed = [{"utterance": "A brown dog.", "start_time": 0.5, "end_time": 0.5}]
    narrow = prepare_one(make_row(timed_caption=timed), images, tmp_path, "--padding", "0.12", "--quantile", "0")[0]
    # Five points from 0.4 s to 0.6 s.
    assert narrow["variables"]["spatial_width_output_locations"] == [0.36, 0.44]


def test_utterances_are_joined_on_request(images: Path, tmp_path: Path) -> None:
    said = ("a", "brown", "dog,", "a", "cat")
    timed = [{"utterance": text, "start_time": 0.2 * i, "end_time": 0.2 * i + 0.2} for i, text in enumerate(said)]
    row = make_row(caption="A brown dog, a cat.", timed_caption=timed)
    sample = prepare_one(row, images, tmp_path, "--words_per_box", "4")[0]
    assert sample["conversations"][1]["value"] == f"A brown dog, {box_text()} a cat {box_text()}."


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quantile", "0.5"], "--quantile is 0.5; it must be 0 to 0.4"),
        (["--padding", "nan"], "--padding is 'nan'; expected a finite number"),
        (["--decimals", "1"], "--min_size is 0.05; it must be 0.1 to 1"),
        (["--words_per_box", "0"], "--words_per_box is 0; it must be at least 1"),
        (["--preview", "-1"], "--preview is -1; it must be at least 0"),
        (["--name", "a/b"], "--name is 'a/b'; it must be the beginning of a file's name"),
        (["--image_name", "{x}.jpg"], "--image_name {x}.jpg: it names x; write it as "),
        (["--image_name", "{image_id.real}"], "--image_name {image_id.real}: it names image_id.real; "),
        (["--image_name", "{image_id"], "--image_name {image_id: expected '}' before end of string; "),
        (["--image_name", "{image_id:d}"], "--image_name {image_id:d}: Unknown format code 'd'"),
        (["--images", "nowhere"], "--images nowhere: no such folder"),
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], message: str, images: Path, tmp_path: Path, capsys) -> None:
    assert main(words(ROWS, images, tmp_path / "out", *flags)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert not (tmp_path / "out").exists()


def test_wrong_files_are_one_line(images: Path, tmp_path: Path, capsys) -> None:
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(ROWS.read_bytes())[:-40])
    no_gzip = tmp_path / "no.jsonl.gz"
    no_gzip.write_text("{}\n")
    a_list = tmp_path / "list.json"
    a_list.write_text(json.dumps([make_row()], indent=1))
    out = tmp_path / "out"
    for rows, message in (
        ([tmp_path / "none.jsonl"], f"ROWS {tmp_path / 'none.jsonl'}: no such file"),
        ([tmp_path], f"ROWS {tmp_path}: not a file"),
        ([ROWS, ROWS], f"ROWS {ROWS}: given twice"),
        ([torn], f"{torn}: not a whole gzip file: "),
        ([no_gzip], f"{no_gzip}: not a whole gzip file: "),
        ([a_list], "no sample is left of the "),
    ):
        assert main(words(rows, images, out)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}")
        assert error.count("\n") == 1
    assert [path.name for path in out.iterdir()] == ["left_out.jsonl"], "no data file is left half written"


def test_out_that_cannot_be_made_is_one_line(images: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    assert main(words(ROWS, images, tmp_path / "file" / "out")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_rows_do_not_stay_in_memory(images: Path, tmp_path: Path) -> None:
    def peak(num_rows: int) -> int:
        rows = write_rows(tmp_path / f"{num_rows}.jsonl", *(make_row(annotator_id=i) for i in range(num_rows)))
        tracemalloc.start()
        try:
            assert main(words(rows, images, tmp_path, "--preview", "0")) == 0
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)
    few, many = peak(50), peak(450)
    # A row of 21 points takes more than 5 kB in memory, an id some 150 bytes.
    assert many - few < 400 * 1000


def test_pictures(images: Path, tmp_path: Path, capsys) -> None:
    for out in ("a", "b"):
        assert main(words(ROWS, images, tmp_path / out, "--preview", "2")) == 0
    assert capsys.readouterr().out.endswith(f"2 pictures in {tmp_path / 'b' / 'preview'}\n")
    drawn = sorted((tmp_path / "a" / "preview").iterdir())
    assert len(drawn) == 2
    for path in drawn:
        assert path.read_bytes() == (tmp_path / "b" / "preview" / path.name).read_bytes()


def test_a_picture_shows_the_box(images: Path, tmp_path: Path) -> None:
    prepare_one(make_row(), images, tmp_path, "--preview", "1")
    with Image.open(tmp_path / "out" / "preview" / "mscoco_train2017_9_7.png") as picture:
        # The photograph is 720 x 540 from (24, 24) on; the box 0.22, 0.32, 0.58, 0.68 of it is red, hue 0.
        red, green, blue = picture.getpixel((24 + int(0.4 * 720), 24 + int(0.32 * 540) + 1))
        assert (red > 200, green < 60, blue < 60) == (True, True, True)
        red, green, blue = picture.getpixel((24 + int(0.9 * 720), 24 + int(0.32 * 540) + 1))
        assert abs(red - 120) + abs(green - 140) + abs(blue - 90) < 12


def test_an_id_that_can_be_no_file_has_a_picture(images: Path, tmp_path: Path) -> None:
    prepare_one(make_row(dataset_id="../a b/" + "c" * 300), images, tmp_path, "--preview", "1")
    assert [path.name[:10] for path in (tmp_path / "out" / "preview").iterdir()] == [".._a_b_ccc"]


def test_an_image_that_is_none_has_no_picture(images: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "000000000009.jpg").write_text("no image")
    rows = write_rows(tmp_path / "rows.jsonl", make_row())
    assert main(words(rows, tmp_path, tmp_path / "out", "--preview", "1")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2] == f"0 pictures in {tmp_path / 'out' / 'preview'}"
    assert printed[-1].startswith(f"not drawn: {tmp_path / '000000000009.jpg'}: ")


def test_the_example_of_the_documents(images: Path, tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "localized_narratives.md").read_text(encoding="utf-8")
    row, written = re.findall(r"```jsonl\n(.*?)```", document, re.S)
    rows = tmp_path / "coco_train.jsonl"
    rows.write_text(" ".join(row.split("\n")) + "\n")
    assert main(words(rows, images, tmp_path)) == 0
    for kind, line in zip(KINDS, written.splitlines(), strict=True):
        assert read(tmp_path / f"localized_narratives_{kind}.jsonl") == [json.loads(line)]
    (found,) = re.findall(r"```text\n(\{.*?)```", document, re.S)
    assert read(tmp_path / "left_out.jsonl") == [json.loads(found)]


def test_the_command_runs(images: Path, tmp_path: Path, warm_python: str) -> None:
    command = [warm_python, "-m", "llava.data.localized_narratives", *words(ROWS, images, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("9 rows: 5 samples")
    assert not done.stderr, "no progress bar where nobody watches"
