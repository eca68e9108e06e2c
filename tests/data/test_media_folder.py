"""Paths in data files stay in the folder of media, by their spelling and through links."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava.data.check import main as check
from llava.data.dataset import SupervisedDataset
from llava.data.media import check_links
from llava.data.media_files import MediaError, find_media
from llava.data.records import parse_record, read_records
from llava.types import Media

TURNS = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "una stella"}]


@pytest.fixture
def folders(tmp_path: Path, media_dir: Path) -> Path:
    """A folder of media with a data file, and a picture beside the folder."""
    shutil.copy(media_dir / "a.png", tmp_path / "secret.png")
    (tmp_path / "media").mkdir()
    shutil.copy(media_dir / "a.png", tmp_path / "media" / "a.png")
    return tmp_path


def write(folders: Path, path: str, **more) -> str:
    file = folders / "media" / "data.json"
    file.write_text(json.dumps([{"id": "x", "image": path, "conversations": TURNS, **more}]))
    return str(file)


@pytest.mark.parametrize("path", ["a.png", "./a.png", "sub/../a.png", "../media/a.png", "{root}/media/a.png"])
def test_paths_inside(folders: Path, path: str) -> None:
    (media,) = read_records(write(folders, path.format(root=folders)))[0].media
    assert media == Media("image", f"{folders}/media/a.png", len(f"{folders}/media"))
    check_links(media)


@pytest.mark.parametrize(
    "path", ["../secret.png", "a/../../secret.png", "{root}/secret.png", "/etc/passwd", "{root}/media2/a.png", "."]
)
def test_paths_outside(folders: Path, path: str) -> None:
    path = path.format(root=folders)
    with pytest.raises(ValueError, match=r"^sample 'x' \(data\.json, sample 1\): its image ") as caught:
        read_records(write(folders, path))
    assert f"{path!r} lies outside the folder {folders}/media; give the folder that has it with --image_folder" in str(
        caught.value
    )
    (media,) = read_records(write(folders, path), allow_outside_paths=True)[0].media
    assert media.root == 0
    check_links(media)


def test_another_folder_allows_other_paths(folders: Path) -> None:
    (media,) = read_records(write(folders, f"{folders}/secret.png"), image_folder=str(folders))[0].media
    assert media.path == f"{folders}/secret.png"
    # Of the root every path is inside, and so is the whole of it.
    assert find_media("/etc/passwd", "image", "/", False, "x") == Media("image", "/etc/passwd", 1)
    check_links(Media("image", "/etc/passwd", 1))


def test_a_source_is_no_way_out(folders: Path) -> None:
    with pytest.raises(ValueError, match="lies outside the folder"):
        read_records(write(folders, "secret.png", source=".."))
    with pytest.raises(ValueError, match="lies outside the folder"):
        parse_record({"id": 1, "video": "v.mp4", "conversations": [{"from": "gpt", "value": "<video>"}]}, "x",
                     "/i", "/v", "../w")  # fmt: skip


def test_links_that_lead_out(folders: Path, visual_tokenizer, tiny_vision) -> None:
    (folders / "media" / "link.png").symlink_to(folders / "secret.png")
    path = write(folders, "link.png")
    message = rf"link\.png: is a link to {folders}/secret\.png, which lies outside the folder {folders}/media"
    with pytest.raises(ValueError, match=rf"sample 'x' \(data\.json, sample 1\): .*{message}"):
        SupervisedDataset(read_records(path), visual_tokenizer, tiny_vision, 512)[0]
    assert check([path, "--workers", "0"]) == 1
    allowed = read_records(path, allow_outside_paths=True)
    assert SupervisedDataset(allowed, visual_tokenizer, tiny_vision, 512)[0].media
    assert check([path, "--workers", "0", "--allow_outside_paths"]) == 0


def test_a_folder_may_be_a_link_and_hold_links_to_itself(folders: Path) -> None:
    (folders / "elsewhere").symlink_to(folders / "media")
    (folders / "media" / "link.png").symlink_to("a.png")
    (media,) = read_records(write(folders, "link.png"), image_folder=str(folders / "elsewhere"))[0].media
    assert media.path == f"{folders}/elsewhere/link.png"
    check_links(media)


def test_a_missing_file_is_missing_not_outside(folders: Path, visual_tokenizer, tiny_vision) -> None:
    records = read_records(write(folders, "gone.png"))
    with pytest.raises(ValueError, match=r"gone\.png: no such file"):
        SupervisedDataset(records, visual_tokenizer, tiny_vision, 512)[0]
    (folders / "media" / "gone.png").symlink_to("/nowhere")
    with pytest.raises(MediaError, match="is a link to /nowhere"):
        check_links(records[0].media[0])


def test_indexes_do_not_remember_what_was_allowed(folders: Path, tmp_path: Path) -> None:
    path, cache = write(folders, "../secret.png"), str(tmp_path / "cache")
    assert len(read_records(path, cache_dir=cache, allow_outside_paths=True)) == 1
    with pytest.raises(ValueError, match="lies outside the folder"):
        read_records(path, cache_dir=cache)
