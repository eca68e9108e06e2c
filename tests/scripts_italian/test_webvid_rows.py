"""generate_webvid_for_llava_italian.py: golden files, the list of what was left out, errors."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from conftest import load_script, write_video

from llava.data.records import read_records

COLUMNS = ("videoid", "contentUrl", "duration", "name_it")
ROWS = [
    ("11", "https://example.org/11.mp4", "PT00H00M05S", "Un gatto  dorme\nsul divano."),
    ("12", "https://example.org/12.mp4", "PT00H00M06S", "Perché la città è «vuota», di notte"),
    ("13", "https://example.org/13.mp4", "PT00H00M07S", "Una clip che non c'è"),
    ("14", "https://example.org/14.mp4", "PT00H00M08S", "Una clip vuota"),
    ("15", "https://example.org/15.mp4", "PT00H00M09S", "Una clip che non è una clip"),
    ("16", "https://example.org/16.mp4", "PT00H00M09S", "  "),
    ("11", "https://example.org/11.mp4", "PT00H00M05S", "Ancora il gatto"),
    ("17", "https://example.org/17.mp4", "PT00H00M05S", "Un segnaposto <video> nella didascalia"),
    ("18", "https://example.org/18.mp4", "PT00H00M05S", "Il mare di sera"),
]
ALL_TEXT = ("11", "12", "13", "14", "15", "18")
WITH_CLIP = ("11", "12", "18")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts_italian/generate_webvid_for_llava_italian.py")


@pytest.fixture(scope="module")
def video_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate(("11", "12", "18")):
        write_video(folder / f"{name}.mp4", num_frames=5, seed=seed)
    (folder / "14.mp4").touch()
    (folder / "15.mp4").write_text("questo non è un video")
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "rows.csv", COLUMNS, ROWS)


def write_csv(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def words(rows: Path, video_dir: Path, out: Path, *more: str) -> list[str]:
    return ["--rows", str(rows), "--video-dir", str(video_dir), "--out", str(out), *more]


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_golden_files(script: ModuleType, rows: Path, video_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert script.main(words(rows, video_dir, out, "--require-video", "--max-samples", "2")) == 0
    assert (out / "webvid_vi_it.json").read_text(encoding="utf-8") == (
        "[\n"
        ' {\n  "id": "11",\n  "video": "11.mp4",\n  "conversations": [\n'
        '   {\n    "from": "human",\n    "value": "<video>"\n   },\n'
        '   {\n    "from": "gpt",\n    "value": "Un gatto dorme sul divano."\n   }\n  ]\n },\n'
        ' {\n  "id": "12",\n  "video": "12.mp4",\n  "conversations": [\n'
        '   {\n    "from": "human",\n    "value": "<video>"\n   },\n'
        '   {\n    "from": "gpt",\n    "value": "Perché la città è «vuota», di notte"\n   }\n  ]\n }\n'
        "]\n"
    )
    assert read(out / "webvid_t_it.json")[0] == {
        "id": "11",
        "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "Un gatto dorme sul divano."}],
    }
    assert (out / "left_out.jsonl").read_text() == ""


@pytest.mark.parametrize(("flags", "ids"), [((), ALL_TEXT), (("--require-video",), WITH_CLIP)])
def test_both_files_share_ids_and_captions(
    script: ModuleType, rows: Path, video_dir: Path, tmp_path: Path, flags: tuple[str, ...], ids: tuple[str, ...]
) -> None:
    assert script.main(words(rows, video_dir, tmp_path, *flags)) == 0
    text, video = read(tmp_path / "webvid_t_it.json"), read(tmp_path / "webvid_vi_it.json")
    assert tuple(sample["id"] for sample in text) == tuple(sample["id"] for sample in video) == ids
    assert [s["conversations"][1] for s in text] == [s["conversations"][1] for s in video]
    assert not any("video" in sample for sample in text)
    assert tuple(sample["id"] for sample in video if "video" in sample) == WITH_CLIP
    for sample in video:
        assert sample["conversations"][0]["value"] == ("<video>" if "video" in sample else "")


def test_what_is_left_out_is_listed(
    script: ModuleType, rows: Path, video_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(words(rows, video_dir, tmp_path, "--require-video")) == 0
    listed = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    reasons = {row["id"] + row["file"]: row["reason"] for row in listed}
    assert reasons.pop("1515.mp4").startswith("cannot be decoded as a video")
    assert "<video>" in reasons.pop("1717.mp4")
    assert reasons == {
        "1313.mp4": "no such file",
        "1414.mp4": "the file is empty",
        "1616.mp4": "no caption",
        "1111.mp4": "an earlier row has the same id",
    }
    assert listed[0]["contentUrl"] == "https://example.org/13.mp4"
    printed = capsys.readouterr().out
    assert "3 samples of 9 rows" in printed
    assert "1 x no such file" in printed


def test_same_bytes_twice_and_from_both_formats(
    script: ModuleType, rows: Path, video_dir: Path, tmp_path: Path
) -> None:
    lines = [json.dumps(dict(zip(COLUMNS, row, strict=True)) | {"videoid": int(row[0])}) for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    outs = [tmp_path / name for name in ("first", "second", "third")]
    for source, out in zip((rows, rows, tmp_path / "rows.jsonl"), outs, strict=True):
        assert script.main(words(source, video_dir, out)) == 0
    for name in ("webvid_t_it.json", "webvid_vi_it.json", "left_out.jsonl"):
        assert len({(out / name).read_bytes() for out in outs}) == 1
    assert len(list(outs[0].iterdir())) == 3


def test_the_library_reads_what_was_written(script: ModuleType, rows: Path, video_dir: Path, tmp_path: Path) -> None:
    assert script.main(words(rows, video_dir, tmp_path)) == 0
    records = read_records(str(tmp_path / "webvid_vi_it.json"), video_folder=str(video_dir))
    assert [bool(record.media) for record in records] == [True, True, False, False, False, True]
    assert all(Path(media.path).is_file() for record in records for media in record.media)


def test_folders_of_webvid(script: ModuleType, video_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "clips" / "001").mkdir(parents=True)
    shutil.copy(video_dir / "11.mp4", tmp_path / "clips" / "001" / "21.mp4")
    rows = write_csv(tmp_path / "rows.csv", (*COLUMNS, "page_dir"), [("21", "", "", "Una barca", "001")])
    assert script.main(words(rows, tmp_path / "clips", tmp_path, "--require-video")) == 0
    assert read(tmp_path / "webvid_vi_it.json")[0]["video"] == "001/21.mp4"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", None, "no such file"),
        ("rows.txt", "", "unknown kind of file"),
        ("rows.csv", "", "lacks videoid, name_it"),
        ("rows.csv", "videoid,name_it\n", "has no rows"),
        ("rows.csv", "videoid,name\n1,x\n", "lacks name_it; found videoid, name"),
        ("rows.csv", "videoid,name_it\n1\n", "line 2: expected 2 fields"),
        ("rows.jsonl", '{"videoid": 1, "name_it": "x"}\n{"videoid": ', "line 2: not JSON"),
        ("rows.jsonl", '{"videoid": 1}\n', "line 1: lacks name_it"),
        ("rows.jsonl", "[1]\n", "line 1: expected an object"),
        ("rows.jsonl", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_mistake_is_one_line(
    script: ModuleType,
    video_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str | bytes | None,
    message: str,
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert script.main(words(path, video_dir, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_clip_at_all_is_an_error_where_clips_are_required(
    script: ModuleType, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(words(rows, tmp_path, tmp_path / "out", "--require-video")) == 2
    assert "no sample is left of the 9 rows" in capsys.readouterr().err
    assert script.main(words(rows, tmp_path / "nowhere", tmp_path / "out")) == 2
    assert "--video_folder" in capsys.readouterr().err
    assert script.main(words(rows, tmp_path, tmp_path / "out", "--max-samples", "0")) == 2


def test_captions_of_another_column(script: ModuleType, video_dir: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("videoid,name\n1,A man waves.\n")
    assert script.main(words(rows, video_dir, tmp_path)) == 2
    assert script.main(words(rows, video_dir, tmp_path, "--caption_column", "name", "--language", "en")) == 0
    (sample,) = json.loads((tmp_path / "webvid_t_en.json").read_text())
    assert sample["conversations"][1]["value"] == "A man waves."
    assert script.main(words(rows, video_dir, tmp_path, "--caption_column", "name", "--language", "a/b")) == 2
