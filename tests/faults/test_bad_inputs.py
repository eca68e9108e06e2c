"""Every bad input is an error that names it or a line of the bad-sample log, and nothing else is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_media import doubtful_media, media_faults, unusual_media
from conftest import turns, write_video
from torch.utils.data import DataLoader

from llava.data.dataset import SupervisedDataset
from llava.data.media import sample_video
from llava.data.records import read_records
from llava.io import read_json_lines
from llava.train.train import main
from llava.train.trainer import LlavaTrainer
from llava.types import BadSample, BadSampleError

LIMIT = 60.0


def fill(folder: Path, files: dict[str, bytes | Callable[[Path], object]]) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)


def sample_of(name: str) -> dict:
    kind = "image" if name.endswith((".png", ".jpg")) else "video"
    return {"id": name, kind: name, "conversations": turns(f"<{kind}>", "ciao")}


class Sweep:
    """A folder of good, unusual, doubtful and bad media.

    Attributes:
        good, bad: names of the files that decode and that do not; the doubtful are asked, each for itself.
        data: a data file with a sample for each, its id the file's name, good and bad by turns.
    """

    def __init__(self, folder: Path, media_dir: Path) -> None:
        self.folder = folder
        clip = write_video(folder / "whole.mp4", num_frames=24).read_bytes()
        one_frame = write_video(folder / "one_frame.mp4", num_frames=1).read_bytes()
        faults = media_faults(clip, (media_dir / "a.png").read_bytes())
        doubtful = doubtful_media(clip)
        fill(folder, faults | unusual_media(clip, one_frame) | doubtful)
        for name in ("a.mp4", "b.mp4", "a.png", "b.jpg"):
            (folder / name).write_bytes((media_dir / name).read_bytes())
        self.doubtful = {name: self._error_of(name) for name in doubtful}
        self.bad = [*faults, *(name for name, error in self.doubtful.items() if error)]
        self.good = ["whole.mp4", "one_frame.mp4", "turned.mp4", "behind.mp4", "a.mp4", "b.mp4", "a.png", "b.jpg"]
        self.good += [name for name, error in self.doubtful.items() if not error]
        names = [name for pair in zip(self.bad, self.good, strict=False) for name in pair]
        names += [name for name in [*self.bad, *self.good] if name not in names]
        self.data = folder / "data.json"
        self.data.write_text(json.dumps([sample_of(name) for name in names]))

    def _error_of(self, name: str) -> str:
        try:
            sample_video(str(self.folder / name), 3, timeout=LIMIT)
        except ValueError as error:
            return str(error)
        return ""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, media_dir) -> Sweep:
    return Sweep(tmp_path_factory.mktemp("sweep"), media_dir)


@pytest.fixture
def build(visual_tokenizer, tiny_vision):
    def dataset(data: Path, on_bad_sample: str) -> SupervisedDataset:
        records = read_records(str(data), on_bad_sample=on_bad_sample)
        return SupervisedDataset(
            records, visual_tokenizer, tiny_vision, 512, on_bad_sample=on_bad_sample, decode_timeout=LIMIT
        )

    return dataset


def test_there_are_enough_of_them(sweep) -> None:
    assert len(sweep.bad) + len(STRUCTURE) >= 40
    assert len(sweep.doubtful) == 21
    # Both happen, so that neither branch of the sweep is idle.
    assert 0 < sum(map(bool, sweep.doubtful.values())) < 21


def test_doubtful_files_decode_or_have_a_clear_error(sweep) -> None:
    for name, error in sweep.doubtful.items():
        assert not error or error.startswith(f"{sweep.folder / name}: ")
        assert "brought the decoder down" not in error
        assert "takes longer" not in error


def test_errors_name_sample_and_file(sweep, build) -> None:
    dataset = build(sweep.data, "error")
    for i, record in enumerate(dataset.records):
        if record.id in sweep.good:
            assert dataset[i].id == record.id
            continue
        with pytest.raises(BadSampleError) as caught:
            dataset[i]
        message = str(caught.value)
        assert message.startswith(f"sample {record.id!r} (data.json, sample {i + 1}): {sweep.folder / record.id}: ")
        assert "\n" not in message
        assert "brought the decoder down" not in message


def test_workers_skip_the_bad_and_keep_the_good(sweep, build) -> None:
    dataset = build(sweep.data, "skip")
    found = list(DataLoader(dataset, batch_size=None, num_workers=2, timeout=120))
    assert [sample.id for sample in found] == [record.id for record in dataset.records]
    bad = [sample for sample in found if isinstance(sample, BadSample)]
    assert sorted(sample.id for sample in bad) == sorted(sweep.bad)
    assert all(sample.file == str(sweep.folder / sample.id) and sample.reason for sample in bad)


def run(model: Path, tower: Path, data: Path, output: Path) -> list[str]:
    """Train one epoch with two workers and bad samples skipped; gives the ids that were trained on."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        step = LlavaTrainer.training_step

        def remember(self, model, inputs, *args):
            seen.extend(inputs["sample_ids"])
            return step(self, model, inputs, *args)

        patch.setattr(LlavaTrainer, "training_step", remember)
        flags = {
            "model_name_or_path": model, "vision_tower": tower, "data_path": data, "output_dir": output,
            "num_train_epochs": 1, "per_device_train_batch_size": 4, "num_frames": 3, "dataloader_num_workers": 2,
            "on_bad_sample": "skip", "max_bad_share": 1, "decode_timeout": LIMIT, "save_strategy": "no",
            "mm_resampler_type": "spatial_pool", "report_to": "none", "use_cpu": "true", "disable_tqdm": "true",
        }  # fmt: skip
        main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    return seen


def test_run_leaves_one_row_for_each(sweep, gpt2_dir, tower_dir, tmp_path) -> None:
    seen = run(gpt2_dir, tower_dir, sweep.data, tmp_path / "out")
    assert sorted(seen) == sorted(sweep.good)
    assert sorted(row["id"] for row in read_json_lines(tmp_path / "out" / "bad_samples.jsonl")) == sorted(sweep.bad)


def line(text: object = "ciao", role: str = "gpt", **fields: object) -> bytes:
    """A sample of one turn; a field that is None is left out."""
    sample = {"id": "a", "conversations": [{"from": role, "value": text}], **fields}
    return json.dumps({name: value for name, value in sample.items() if value is not None}).encode()


STRUCTURE: dict[str, tuple[bytes, str]] = {
    "not_json": (b'{"id": "a", ', "not JSON"),
    "trailing_comma": (b'{"id": "a", "conversations": [],}', "not JSON"),
    "a_list": (b"[1, 2]", "expected an object"),
    "a_number": (b"17", "expected an object"),
    "brackets": (b"[" * 100_000, "brackets within brackets"),
    "latin_1": (line().replace(b"ciao", "è".encode("latin-1")), "not UTF-8"),
    "empty_id": (line(id=""), 'needs an "id"'),
    "id_is_a_list": (line(id=[1]), 'needs an "id"'),
    "same_id": (line(id="good-0"), "same id"),
    "no_conversations": (line(conversations=None), 'needs "conversations"'),
    "conversations_are_text": (line(conversations="ciao"), 'needs "conversations"'),
    "turn_is_text": (line(conversations=["ciao"]), "turn 1: expected an object"),
    "value_is_a_number": (line(3), "must be a string"),
    "unknown_role": (line(role="bot"), "unknown role 'bot'"),
    "image_is_a_number": (line(image=3), "must be a path"),
    "no_placeholder": (line(video="a.mp4"), "0 <video>"),
    "no_media": (line("<video> ciao"), "0 video files"),
    "two_for_one": (line("<image><image>", image="a.png"), "2 <image>"),
    "reserved": (line("<vid_start>"), "<vid_start>"),
    "half_a_character": (line("\ud83d"), "half a character"),
    "split_is_backwards": (line(meta={"split": [9, 2]}), "meta.split"),
    "variables": (line(variables=[1]), '"variables"'),
}
"""Lines that are no sample, and what is said of them."""


def write_lines(path: Path, bad: list[bytes]) -> Path:
    """A data file of good lines, with bad ones behind each of the first."""
    lines = []
    for i in range(len(bad) + 1):
        lines += [line(id=f"good-{i}"), *bad[i : i + 1]]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize("name", STRUCTURE)
def test_errors_of_a_line_name_the_line(tmp_path, name) -> None:
    line, message = STRUCTURE[name]
    data = write_lines(tmp_path / "data.jsonl", [line])
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2") as caught:
        read_records(str(data))
    assert message in str(caught.value)
    if b'"id": "a"' in line and name not in ("not_json", "trailing_comma", "latin_1"):
        assert "sample 'a'" in str(caught.value)


def test_run_skips_bad_lines(gpt2_dir, tower_dir, tmp_path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [line for line, _ in STRUCTURE.values()])
    seen = run(gpt2_dir, tower_dir, data, tmp_path / "out")
    assert sorted(seen) == sorted(f"good-{i}" for i in range(len(STRUCTURE) + 1))
    rows = read_json_lines(tmp_path / "out" / "bad_samples.jsonl")
    assert [row["source"].removeprefix("data.jsonl, line ") for row in sorted_by_line(rows)] == [
        str(2 * i + 2) for i in range(len(STRUCTURE))
    ]
    for row, (_, message) in zip(sorted_by_line(rows), STRUCTURE.values(), strict=True):
        assert message in row["reason"]
        assert row["file"] == ""


def sorted_by_line(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return sorted(rows, key=lambda row: int(row["source"].rpartition(" ")[2]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", b"", "the file is empty"),
        ("data.json", b'{"id": "a"}', "expected a list of samples"),
        ("data.json", b'[{"id": "a"', "not JSON"),
        ("data.json", '[{"id": "è"}]'.encode("utf-16"), "not UTF-8"),
        ("data.csv", b"id,value\n", "unknown kind of file"),
        ("data.jsonl", b"\n\n", "no samples"),
    ],
)
@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
def test_files_that_are_no_data_are_errors_always(tmp_path, name, content, message, on_bad_sample) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_records(str(tmp_path / name), on_bad_sample=on_bad_sample)
