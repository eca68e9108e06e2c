"""Uploads: measured, named by their content, decoded within limits and deleted."""

from __future__ import annotations

import base64
import os
import time
from pathlib import Path

import pytest
from PIL import Image

from llava.data.media import load_media
from llava.serve.web.uploads import (
    FileStore,
    UploadError,
    UploadLimits,
    Uploads,
    UploadTooLargeError,
    clean_name,
    read_data_url,
)
from llava.types import Media
from tests.conftest import write_video


@pytest.fixture(scope="module")
def uploads():
    uploads = Uploads(UploadLimits(max_upload_mb=1, max_video_seconds=5, max_image_pixels=10_000, decode_timeout=60))
    yield uploads
    uploads.close()
    assert not uploads.folder.exists()


def test_what_is_loaded_is_what_training_loads(uploads: Uploads, media_dir: Path, tiny_vision) -> None:
    for name, kind in (("a.png", "image"), ("b.jpg", "image"), ("a.mp4", "video")):
        upload = uploads.write((media_dir / name).read_bytes(), f"C:\\pictures\\{name}")
        assert (upload.name, upload.kind) == (name, kind)
        found, expected = uploads.load(upload, tiny_vision), load_media(Media(kind, str(media_dir / name)), tiny_vision)
        assert found.frames.equal(expected.frames)
        assert (found.original_size, found.times) == (expected.original_size, expected.times)
        assert Path(upload.path).stat().st_uid == os.getuid()
        uploads.delete(upload)
        assert not Path(upload.path).exists()
    assert uploads.folder.stat().st_mode & 0o77 == 0


def test_disguised_files_are_named(uploads: Uploads, media_dir: Path) -> None:
    picture, clip = (media_dir / "a.png").read_bytes(), (media_dir / "a.mp4").read_bytes()
    with pytest.raises(UploadError, match=r"cat.png: its name says that it is an image, but its content is a video"):
        uploads.write(clip, "cat.png")
    with pytest.raises(UploadError, match=r"cat.mp4: its name says that it is a video, but its content is an image"):
        uploads.write(picture, "cat.mp4")
    for data in (b"#!/bin/sh\nrm -rf /\n", b"<html><script>alert(1)</script></html>", b"PK\3\4" + bytes(99), b"MZ"):
        with pytest.raises(UploadError, match=r"cat.mp4: its content is no video of a kind that is read"):
            uploads.write(data, "cat.mp4")
    with pytest.raises(UploadError, match=r"cat.png: the file is empty"):
        uploads.write(b"", "cat.png")
    # Another kind of picture, or no ending at all, misleads nobody.
    assert uploads.write(picture, "cat.jpg").kind == "image"
    assert uploads.write(clip, "cat").kind == "video"


def test_animations_are_clips(uploads: Uploads, tmp_path: Path, tiny_vision) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=200)
    frames[0].save(tmp_path / "b.gif")
    moving, still = (uploads.write((tmp_path / name).read_bytes(), name) for name in ("a.gif", "b.gif"))
    assert (moving.kind, still.kind) == ("video", "image")
    assert uploads.load(moving, tiny_vision).times == pytest.approx((0.0, 0.2, 0.4))


def test_broken_files_are_named_without_their_place(uploads: Uploads, media_dir: Path, tiny_vision) -> None:
    for name in ("a.mp4", "b.jpg"):
        data = (media_dir / name).read_bytes()
        with pytest.raises(UploadError) as caught:
            uploads.load(uploads.write(data[: len(data) // 2], name), tiny_vision)
        assert str(caught.value).startswith(f"{name}: ")
        assert str(uploads.folder) not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_limits(uploads: Uploads, tmp_path: Path, tiny_vision) -> None:
    with pytest.raises(UploadTooLargeError, match=r"a.png: the file has 1.0 MiB, but at most 1 are taken"):
        uploads.write(bytes(2**20 + 1), "a.png")
    Image.new("RGB", (101, 100)).save(tmp_path / "large.png")
    with pytest.raises(UploadError, match=r"large.png: .*101 x 100 pixels.*--max_image_pixels"):
        uploads.write((tmp_path / "large.png").read_bytes(), "large.png")
    long = uploads.write(write_video(tmp_path / "long.mp4", 48).read_bytes(), "long.mp4")  # 8 frames a second
    with pytest.raises(UploadTooLargeError, match=r"long.mp4: it lasts 6 seconds, but at most 5 are taken"):
        uploads.load(long, tiny_vision)


def test_uploads_of_a_request_are_deleted_whatever_happens(uploads: Uploads, media_dir: Path) -> None:
    before = set(uploads.folder.iterdir())

    def fail() -> None:
        with uploads.holding() as held:
            held.append(uploads.write((media_dir / "a.png").read_bytes(), "a.png"))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert set(uploads.folder.iterdir()) == before


def test_data_urls() -> None:
    text = base64.b64encode(b"abc").decode()
    assert read_data_url(f"data:image/jpeg;base64,{text}", 9) == (b"abc", "image.png")
    assert read_data_url(f"data:video/webm;codecs=vp9;base64,{text}", 9) == (b"abc", "video.mp4")
    assert read_data_url(f"data:;base64,{text}", 9) == (b"abc", "upload")
    with pytest.raises(UploadError, match="not base64"):
        read_data_url("data:image/png;base64,a$c=", 9)
    with pytest.raises(UploadError, match="must be data:"):
        read_data_url("data:image/png,abc", 9)
    with pytest.raises(UploadTooLargeError, match="raise --max_upload_mb"):
        read_data_url("data:image/png;base64," + "A" * 100, 9)


def test_names_are_harmless() -> None:
    assert clean_name("../../etc/passwd") == "passwd"
    assert clean_name('a<script>"\n.png') == "a_script_.png"
    assert clean_name("..") == clean_name("") == "upload"
    assert len(clean_name("a" * 500 + ".png")) == 80


def test_stored_files_come_and_go(uploads: Uploads, media_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(uploads, seconds=60)
    stored = store.add((media_dir / "a.png").read_bytes(), "a.png")
    assert store.get(stored.id) == stored
    copied = store.copy(stored)
    assert store.delete(stored.id)
    assert not store.delete(stored.id)
    assert not Path(stored.upload.path).exists()
    assert Path(copied.path).read_bytes() == (media_dir / "a.png").read_bytes()
    with pytest.raises(UploadError, match="deleted meanwhile"):
        store.copy(stored)
    old = store.add((media_dir / "a.png").read_bytes(), "a.png")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert store.list() == []
    assert not Path(old.upload.path).exists()
