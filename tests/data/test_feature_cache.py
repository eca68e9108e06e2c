"""A feature cache gives back what it was given for the same file and settings, and nothing for any other."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llava.config import VisionConfig
from llava.data.feature_cache import digests as digests_module
from llava.data.feature_cache import shards
from llava.data.feature_cache.cache import FeatureCache, FeatureCacheError
from llava.data.feature_cache.digests import Digests
from llava.data.feature_cache.keys import KeyMaker, TowerRun, frames_at_most
from llava.data.feature_cache.run import RunFeatures
from llava.data.feature_cache.shards import Kept, remove_unfinished
from llava.data.feature_cache.storage import Storage
from llava.data.media import load_media
from llava.data.media_files import DEFAULT_LIMITS, MediaError, MediaLimits
from llava.types import FeatureEntry, Media, VisualInput

VISION = VisionConfig("tower", {"model_type": "dinov2"}, hidden_size=8, image_size=56, patches_per_side=4)
TOWER = TowerRun("weights", "float32")


def features_of(number: int, frames: int = 2, side: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(frames, side**2, 8, generator=generator)


def entry_of(key: str) -> FeatureEntry:
    return FeatureEntry(key, "c0", "video", (48, 64), (0.0, 0.1 + 0.2), 1 / 3)


def fill(folder: Path, storage: Storage, numbers: range = range(3), name: str = "fill-0") -> FeatureCache:
    cache = FeatureCache(folder, storage)
    kept = [Kept.of(entry_of(f"key{i}"), features_of(i), storage) for i in numbers]
    cache.add(name, kept, {"c0": {"kind": "video"}})
    cache.look()
    return cache


# What is kept.


@pytest.mark.parametrize(
    ("storage", "most"),
    [(Storage("fp32"), 0.0), (Storage("bf16"), 0.004), (Storage("int8"), 0.008), (Storage("fp32", 2), 1.1)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back(tmp_path: Path, storage: Storage, most: float, dtype: torch.dtype) -> None:
    features = features_of(1, side=5).to(dtype)
    cache = FeatureCache(tmp_path, storage)
    cache.add("fill-0", [Kept.of(entry_of("key"), features, storage)], {"c0": {}})
    found = FeatureCache(tmp_path).read("key")
    assert found is not None
    entry, kept = found
    assert entry == entry_of("key")
    assert kept.dtype == dtype
    assert kept.shape == features.shape
    assert torch.equal(kept, storage.round(features)), "live features are those that come back"
    error = (kept.float() - features.float()).norm() / features.float().norm()
    assert error <= most
    assert (error == 0) == storage.is_exact(dtype)
    size = sum(tensor.nbytes for tensor in Kept.of(entry, features, storage).tensors.values())
    assert size == storage.num_bytes(2, 25, 8)


def test_pooling_keeps_a_flat_grid_and_where_things_are() -> None:
    storage = Storage("fp32", 2)
    assert torch.equal(storage.round(torch.ones(1, 25, 3)), torch.ones(1, 25, 3))
    grid = torch.zeros(1, 4, 4, 1)
    grid[:, :2, :2] = 1.0
    rounded = storage.round(grid.flatten(1, 2)).view(4, 4)
    assert rounded[0, 0] == 1.0
    assert rounded[3, 3] == 0.0


def test_others_open_a_shard(tmp_path: Path) -> None:
    fill(tmp_path, Storage("int8"))
    with safe_open(str(tmp_path / "fill-0.safetensors"), "pt") as file:
        assert file.get_tensor("key1").dtype == torch.int8
        assert file.get_tensor("key1.scale").shape == (2, 16, 1)


def test_the_same_entries_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fill(tmp_path / name, Storage("bf16"))
    one, other = ((tmp_path / name / "fill-0.safetensors").read_bytes() for name in ("a", "b"))
    assert one == other


# Damage.


@pytest.mark.parametrize("damage", ["header", "middle", "cut", "empty", "gone"])
@pytest.mark.parametrize("opened", [False, True], ids=["before it is opened", "behind its reader's back"])
def test_damage_is_told_and_never_read(tmp_path: Path, damage: str, opened: bool, caplog) -> None:
    cache = fill(tmp_path, Storage("fp32"))
    path = tmp_path / "fill-0.safetensors"
    content = bytearray(path.read_bytes())

    def spoil() -> None:
        if damage == "gone":
            path.unlink()
            return
        content[100 if damage == "header" else len(content) // 2] ^= 1
        path.write_bytes(content[: {"cut": -1, "empty": 0}.get(damage, len(content))])

    if opened and damage != "header":  # A header is read once.
        spoil()
    elif not opened:
        spoil()
        cache = FeatureCache(tmp_path)
    found = [cache.read(f"key{i}") for i in range(3)]
    good = [i for i, one in enumerate(found) if one is not None]
    assert all(torch.equal(found[i][1], features_of(i)) for i in good)
    if not (opened and damage == "header"):
        assert len(good) == (2 if damage == "middle" else 0)
        assert damage == "gone" or "fill-0.safetensors" in caplog.text
    if damage != "gone" and not opened:
        with pytest.raises(FeatureCacheError, match=r"fill-0\.safetensors"):
            [FeatureCache(tmp_path, strict=True).read(f"key{i}") for i in range(3)]


def test_another_copy_of_an_entry_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    fill(tmp_path, Storage("fp32"))
    cache = fill(tmp_path, Storage("fp32"), name="fill-1")
    path = tmp_path / "fill-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(cache.read("key2")[1], features_of(2))


def test_two_damaged_copies_of_an_entry_are_none(tmp_path: Path) -> None:
    for name in ("fill-0", "fill-1"):
        cache = fill(tmp_path, Storage("fp32"), name=name)
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert [cache.read(f"key{i}") is None for i in range(3)].count(True) == 1


def test_a_folder_that_is_removed_holds_nothing_and_is_made_again(tmp_path: Path) -> None:
    cache = fill(tmp_path / "cache", Storage("bf16"))
    shutil.rmtree(tmp_path / "cache")
    assert cache.read("key0") is None
    cache.add("fill-1", [Kept.of(entry_of("key0"), features_of(0), cache.storage)], {"c0": {}})
    assert FeatureCache(tmp_path / "cache").storage == Storage("bf16")
    assert cache.read("key0") is not None


def test_a_folder_that_cannot_be_had_is_named_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "cache" / "cache.json").mkdir(parents=True)
    for name in ("file", "cache"):
        with pytest.raises(ValueError, match=f"--feature_cache .*{name}: .*; give another folder"):
            FeatureCache(tmp_path / name, Storage("bf16"))


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = fill(tmp_path, Storage("fp32"))
    before = sorted(path.name for path in tmp_path.iterdir())

    def write_nothing(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llava.io.sync", write_nothing)
    with pytest.raises(OSError, match="No space left"):
        cache.add("fill-1", [Kept.of(entry_of("key9"), features_of(9), cache.storage)], {"c0": {}})
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert FeatureCache(tmp_path).read("key1") is not None


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    fill(tmp_path, Storage("fp32"))
    (tmp_path / "build-1.safetensors.0123.part").write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.json", "fill-0.safetensors"]


def test_a_writer_is_not_taken_for_a_killed_one_before_it_has_locked_its_file(tmp_path: Path, monkeypatch) -> None:
    lock = shards.lock_file
    for error in (FileNotFoundError, BlockingIOError):  # What the other does just before, or just now.
        calls = []

        def other_first(file, wait: bool, error=error, calls=calls) -> bool:
            calls.append(file)
            if len(calls) == 1:
                Path(file.name).unlink()
                if error is BlockingIOError and not wait:
                    raise error
            return lock(file, wait)

        monkeypatch.setattr(shards, "lock_file", other_first)
        assert fill(tmp_path / error.__name__, Storage("fp32")).read("key0") is not None


def test_a_read_only_folder_is_read(tmp_path: Path) -> None:
    fill(tmp_path, Storage("fp32"))
    tmp_path.chmod(0o500)
    try:
        assert FeatureCache(tmp_path).read("key0") is not None
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_keeps_one_form(tmp_path: Path) -> None:
    fill(tmp_path / "cache", Storage("bf16"))
    with pytest.raises(ValueError, match="keeps features as bf16, not as int8"):
        FeatureCache(tmp_path / "cache", Storage("int8"))
    with pytest.raises(ValueError, match="is no feature cache"):
        FeatureCache(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds (cache|thesis\.tex); give another"):
        FeatureCache(tmp_path, Storage("bf16"))


def test_two_writers_at_once_and_a_reader_beside(tmp_path: Path) -> None:
    reader = fill(tmp_path, Storage("fp32"))
    for name in ("fill-1", "fill-2"):
        fill(tmp_path, Storage("fp32"), range(2, 6), name)
    assert all(torch.equal(reader.read(f"key{i}")[1], features_of(i)) for i in range(6))
    assert reader.read("key7") is None


# What keys depend on.


def key(
    vision: VisionConfig = VISION, tower: TowerRun = TOWER, storage: str = "fp32", digest: str = "d", **media
) -> str:
    limits = media.pop("limits", DEFAULT_LIMITS)
    split = media.pop("split", None)
    return KeyMaker(tower, vision, Storage(storage), limits).key_of(
        Media(**{"kind": "video", "path": "a"} | media), split, digest
    )


def with_vision(**changes: object) -> dict[str, object]:
    return {"vision": replace(VISION, **changes)}


CHANGES = [
    {"digest": "e"},
    {"tower": TowerRun("other", "float32")},
    {"tower": TowerRun("weights", "bfloat16")},
    {"storage": "bf16"},
    {"split": (0, 4)},
    {"fps": 2.0},
    {"kind": "image"},
    {"limits": MediaLimits(max_video_frames=7)},
    with_vision(num_frames=5),
    with_vision(video_fps=2.0),
    with_vision(image_size=112, patches_per_side=8),
    with_vision(image_mean=(0.5, 0.5, 0.5)),
    with_vision(image_std=(0.5, 0.5, 0.5)),
    with_vision(image_resize_size=64),
    with_vision(image_aspect_ratio="pad"),
    with_vision(image_padding="black"),
    with_vision(vision_select_layer=1),
    with_vision(vision_final_norm=True),
    with_vision(vision_config={"model_type": "dinov2", "hidden_act": "relu"}),
]


def test_whatever_changes_makes_another_key() -> None:
    keys = [key(), *(key(**change) for change in CHANGES)]
    assert len(set(keys)) == len(keys)


def test_what_features_do_not_depend_on_does_not_count() -> None:
    same = [
        {"path": "/elsewhere/b"},
        with_vision(vision_tower="/elsewhere/tower"),
        with_vision(frames_upbound=9),  # of --video_fps, which is not set
        with_vision(add_time_instruction=True),
        with_vision(resampler_type="spatial_pool"),
        with_vision(vision_config={"model_type": "dinov2", "transformers_version": "9"}),
        {"limits": MediaLimits(max_image_bytes=7)},  # of images
    ]
    assert {key(**change) for change in same} == {key()}
    by_rate = with_vision(video_fps=2.0)
    assert key(**by_rate) == key(**with_vision(video_fps=2.0, num_frames=9))
    assert key(**by_rate) != key(**with_vision(video_fps=2.0, frames_upbound=9))
    assert key(kind="image") == key(kind="image", **with_vision(num_frames=5))


def test_views_of_anyres_are_keys_of_their_own() -> None:
    tiles = with_vision(image_aspect_ratio="anyres", image_grid_pinpoints="(1x2)")
    more = with_vision(image_aspect_ratio="anyres", image_grid_pinpoints="(1x2),(2x2)")
    assert len({key(kind="image", **one) for one in ({}, tiles, more)}) == 3
    assert key(**tiles) == key(), "clips are squares all the same"
    assert [frames_at_most(one["vision"], "image") for one in (tiles, more)] == [3, 5]


# Hashes of files.


def replaced(path: Path) -> None:
    """Another file of the same name, size and time."""
    times = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes()[:-1] + b"!")
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
    copy.replace(path)


def rewritten(path: Path) -> None:
    """The same file with another byte, and its time set back."""
    times = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"!")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", [replaced, rewritten])
def test_a_changed_byte_is_seen_though_size_and_time_stay(
    tmp_path: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests_module, "_SETTLED", -1.0)  # Everything is remembered at once.
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"0" * 1000)
    media = Media("video", str(clip))
    digests = Digests(tmp_path / "digests")
    before = digests.of_media(media)
    hashed: list[Path] = []
    real = digests_module.hash_file
    monkeypatch.setattr(digests_module, "hash_file", lambda path: hashed.append(path) or real(path))
    assert digests.of_media(media) == Digests(tmp_path / "digests").of_media(media) == before
    assert not hashed, "an unchanged file is not read again, in another process neither"
    change(clip)
    assert digests.of_media(media) != before
    assert Digests(tmp_path / "digests").of_media(media) != before


def test_a_file_that_has_just_changed_is_not_believed(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"0")
    digests = Digests(tmp_path / "digests")
    digests.of_file(str(clip))
    assert not digests._known
    assert not (tmp_path / "digests").exists()


def test_a_damaged_line_of_hashes_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests_module, "_SETTLED", -1.0)
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"0")
    digest = Digests(tmp_path / "digests").of_file(str(clip))
    (lines,) = (tmp_path / "digests").iterdir()
    lines.write_text(lines.read_text().replace(digest[:8], "00000000"))
    assert Digests(tmp_path / "digests").of_file(str(clip)) == digest


# A run.


def test_a_run_reads_what_it_kept_and_decodes_the_rest(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"0")
    cache = FeatureCache(tmp_path / "cache", Storage("fp32"))
    run = RunFeatures(cache, KeyMaker(TOWER, VISION, cache.storage, DEFAULT_LIMITS), torch.float32, fills=True)
    decoded: list[VisualInput] = []

    def decode() -> VisualInput:
        decoded.append(VisualInput("video", torch.zeros(2, 3, 56, 56, dtype=torch.uint8), (48, 64), (0.0, 0.5), 1.0))
        return decoded[-1]

    media = Media("video", str(clip))
    missed = run.load(media, None, decode)
    assert missed.entry is not None
    cache.add("fill-0", [Kept.of(missed.entry, features_of(1), cache.storage)], run.keys.contexts)
    moved = Media("video", str(shutil.copy(clip, tmp_path / "moved.mp4")))
    for found in (run.load(media, None, decode), run.load(moved, None, decode)):
        assert torch.equal(found.frames, features_of(1)[:, None])
        assert (found.original_size, found.times, found.duration) == ((48, 64), (0.0, 0.5), 1.0)
    assert len(decoded) == 1
    clip.write_bytes(b"1")
    assert run.load(media, None, decode).entry is not None
    assert len(decoded) == 2

    def change() -> VisualInput:
        clip.write_bytes(b"3")
        return decode()

    clip.write_bytes(b"2")
    assert run.load(media, None, change).entry is None, "what was decoded may be of other bytes than were hashed"


def test_what_cannot_be_used_live_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"0")
    frames = Media("video", str(tmp_path / "0.png"), frames=(str(tmp_path / "0.png"),))
    cache = FeatureCache(tmp_path / "cache", Storage("fp32"))
    run = RunFeatures(cache, KeyMaker(TOWER, VISION, cache.storage, DEFAULT_LIMITS), torch.float32)
    cache.add("fill-0", [Kept.of(entry_of(run.key_of(frames, None)), features_of(1), cache.storage)], {"c0": {}})
    assert load_media(frames, VISION, features=run).frames.shape == (2, 1, 16, 8)
    with pytest.raises(MediaError, match="frames without their rate"):
        load_media(frames, replace(VISION, add_time_instruction=True), features=run)
