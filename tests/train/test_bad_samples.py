"""The log of bad samples: a line for each, once a run, and an end where too many are bad."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import ITALIAN, turns
from transformers import TrainerControl, TrainerState

from llava.data.records import read_records
from llava.io import read_json_lines
from llava.train.bad_samples import BadSampleLog
from llava.train.train import main
from llava.train.trainer import LlavaTrainer
from llava.types import BadSample

ROOT = Path(__file__).parents[2]


def bad(name: str, source: str = "x.json, sample 1") -> BadSample:
    return BadSample(name, source, f"{name}.mp4", "no such file")


def begin(path: Path, max_share: float = 0.5, step: int = 0) -> BadSampleLog:
    log = BadSampleLog(path, max_share)
    log.on_train_begin(None, TrainerState(global_step=step), TrainerControl())
    return log


def test_each_bad_sample_has_one_row(tmp_path: Path) -> None:
    path = tmp_path / "out" / "bad_samples.jsonl"
    log = begin(path)
    assert not path.exists()
    log.record(3, [bad("a"), bad("b")])
    log.record(3, [bad("b"), bad("b", "y.json, sample 7"), bad("a")])
    assert [(row["id"], row["source"]) for row in read_json_lines(path)] == [
        ("a", "x.json, sample 1"), ("b", "x.json, sample 1"), ("b", "y.json, sample 7"),
    ]  # fmt: skip
    assert read_json_lines(path)[0] == {
        "id": "a", "source": "x.json, sample 1", "file": "a.mp4", "reason": "no such file",
    }  # fmt: skip
    assert (len(log), log.num_seen, log.num_bad) == (3, 11, 5)


def test_samples_of_two_data_files_of_one_name_have_rows_of_their_own(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        samples = [{"id": 1, "video": f"{folder}.mp4", "conversations": turns("<video>", "x")}, "no sample"]
        (tmp_path / folder / "train.json").write_text(json.dumps(samples))
    paths = [str(tmp_path / folder / "train.json") for folder in "ab"]
    records = read_records(paths, on_bad_sample="skip")
    found = [BadSample.from_error(record, ValueError(record.fault or f"{record}: no such file")) for record in records]
    assert [str(sample) for sample in found] == [
        f"sample {identity!r} ({path}, sample {number}): {reason}"
        for path in paths
        for number, identity, reason in (
            (1, "1", "no such file"),
            (2, "", "expected an object, found str"),
        )
    ]
    log = begin(tmp_path / "bad.jsonl", max_share=1)
    log.record(0, found)
    log.record(0, found)
    rows = read_json_lines(log.path)
    assert [row["data_file"] for row in rows] == [paths[0], paths[0], paths[1], paths[1]]
    assert [row["source"] for row in rows] == [f"{path}, sample {n}" for path in paths for n in (1, 2)]
    resumed = begin(log.path, max_share=1, step=3)
    resumed.record(0, found)
    assert read_json_lines(log.path) == rows


def test_a_sample_of_the_evaluation_s_file_of_the_same_name_is_another(tmp_path: Path) -> None:
    log = begin(tmp_path / "bad.jsonl", max_share=1)
    for folder in ("train", "eval", "train"):
        log.record(0, [BadSample("1", "a.json, sample 1", "a.mp4", "no such file", f"/{folder}/a.json")])
    assert [row["data_file"] for row in read_json_lines(log.path)] == ["/train/a.json", "/eval/a.json"]


def test_any_name_can_be_written(tmp_path: Path) -> None:
    log = begin(tmp_path / "a.jsonl")
    names = ["città\n", "half \ud83d", "\udcff", "\u2028"]
    log.record(9, [bad(name) for name in names])
    assert [row["id"] for row in read_json_lines(log.path)] == names


def test_resumed_run_adds_and_a_fresh_one_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    begin(path).record(9, [bad("a"), bad("b")])
    with path.open("a") as file:
        file.write('{"id": "c", "sour')  # the run was killed here
    resumed = begin(path, step=5)
    resumed.record(9, [bad("a"), bad("c")])
    assert [row["id"] for row in read_json_lines(path)] == ["a", "b", "c"]
    assert len(resumed) == 3
    begin(path).record(9, [bad("d")])
    assert [row["id"] for row in read_json_lines(path)] == ["d"]
    begin(path)
    assert not path.exists()


def test_too_many_bad_samples_end_the_run(tmp_path: Path) -> None:
    log = begin(tmp_path / "a.jsonl", max_share=0.05)
    log.record(0, [bad(str(i)) for i in range(19)])
    with pytest.raises(
        ValueError, match=r"20 of the 20 samples seen are bad, more than --max_bad_share 0\.05; .*jsonl"
    ):
        log.record(0, [bad("x")])
    assert len(read_json_lines(log.path)) == 20


def test_a_few_early_bad_samples_are_no_proof(tmp_path: Path) -> None:
    log = begin(tmp_path / "a.jsonl", max_share=0.05)
    log.record(27, [bad("a"), bad("b"), bad("c")])
    log.record(30, [])
    log.on_epoch_end(None, TrainerState(), TrainerControl())
    log.record(0, [bad("d")])
    with pytest.raises(ValueError, match="4 of the 61 samples seen are bad"):
        log.on_epoch_end(None, TrainerState(), TrainerControl())


def test_the_smallest_data_is_judged_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    log = begin(tmp_path / "a.jsonl", max_share=0)
    log.record(3, [bad("a")])
    with pytest.raises(ValueError, match="1 of the 4 samples seen are bad, more than --max_bad_share 0"):
        log.on_epoch_end(None, TrainerState(), TrainerControl())


def test_an_epoch_that_is_broken_off_is_not_judged(tmp_path: Path) -> None:
    log = begin(tmp_path / "a.jsonl", max_share=0.05)
    log.record(3, [bad("a")])
    asked_to_stop = TrainerControl(should_training_stop=True)
    log.on_epoch_end(None, TrainerState(global_step=1, max_steps=9), asked_to_stop)
    with pytest.raises(ValueError, match="1 of the 4 samples seen are bad"):  # The run's own end is judged.
        log.on_epoch_end(None, TrainerState(global_step=9, max_steps=9), asked_to_stop)


RANKS = """
import sys
from pathlib import Path
from accelerate import PartialState
from transformers import TrainerState
from llava.data.records import read_records
from llava.train.bad_samples import BadSampleLog
from llava.types import BadSample

rank = PartialState(cpu=True).process_index
log = BadSampleLog(Path(sys.argv[1]), 0.25)
log.on_train_begin(None, TrainerState(is_world_process_zero=rank == 0), None)
mine = [BadSample(f"rank {rank}", "", "", "bad"), BadSample("both", "", "", "bad")]
log.record(30, mine if rank == 1 else [])
log.record(30, mine)
assert (len(log), log.num_seen, log.num_bad) == (3, 126, 6), vars(log)
try:
    log.record(0, [BadSample(str(i), "", "", "bad") for i in range(99)] if rank == 0 else [])
except ValueError as error:
    print(error)
"""


def test_ranks_share_one_log_and_end_together(tmp_path: Path, warm_python: str) -> None:
    path = tmp_path / "a.jsonl"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [warm_python, "-c", RANKS, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], ended
    assert ended[0][0] == ended[1][0]
    assert ended[0][0].startswith("105 of the 225 samples seen are bad")
    names = [row["id"] for row in read_json_lines(path)]
    assert sorted(names) == sorted(["rank 0", "rank 1", "both", *map(str, range(99))])


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """The ids of the samples that the model was trained on, in order."""
    ids: list[str] = []
    original = LlavaTrainer.training_step

    def step(self, model, inputs, *args):
        ids.extend(inputs["sample_ids"])
        return original(self, model, inputs, *args)

    monkeypatch.setattr(LlavaTrainer, "training_step", step)
    return ids


def command(gpt2_dir: Path, tower_dir: Path, data: Path, output: Path, **changes) -> list[str]:
    values = {
        "model_name_or_path": gpt2_dir, "vision_tower": tower_dir, "data_path": data, "output_dir": output,
        "num_train_epochs": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "epoch",
        "report_to": "none", "use_cpu": "true", "disable_tqdm": "true", "on_bad_sample": "skip", **changes,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def partly_bad(media_dir: Path, tmp_path: Path) -> Path:
    """Six good samples and two with files that are missing or no video."""
    (tmp_path / "text.mp4").write_text("questo non è un video")
    samples = [{"id": f"text-{i}", "conversations": turns("", ITALIAN[i])} for i in range(4)]
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(media_dir / name, tmp_path)
    for name in ("a.mp4", "b.mp4", "none.mp4", "text.mp4"):
        samples.append({"id": name, "video": name, "conversations": turns("<video>", ITALIAN[0])})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(samples))
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_run_trains_on_exactly_the_good_samples(
    gpt2_dir, tower_dir, partly_bad: Path, tmp_path: Path, seen: list[str], workers: int
) -> None:
    output = tmp_path / "out"
    trainer = main(command(gpt2_dir, tower_dir, partly_bad, output, dataloader_num_workers=workers, max_bad_share=0.25))
    good = sorted(["text-0", "text-1", "text-2", "text-3", "a.mp4", "b.mp4"])
    assert sorted(seen[:6]) == sorted(seen[6:]) == good
    rows = read_json_lines(output / "bad_samples.jsonl")
    assert sorted(row["id"] for row in rows) == ["none.mp4", "text.mp4"]
    assert all(Path(row["file"]).name == row["id"] for row in rows)
    assert trainer.state.log_history[-1]["skipped_samples"] == 2
    main(command(gpt2_dir, tower_dir, partly_bad, output, num_train_epochs=3, resume_from_checkpoint="auto",
                 max_bad_share=0.25))  # fmt: skip
    assert len(seen) == 18
    assert read_json_lines(output / "bad_samples.jsonl") == rows


def test_evaluation_is_about_the_good_samples(gpt2_dir, tower_dir, partly_bad: Path, tmp_path: Path) -> None:
    samples = json.loads(partly_bad.read_text())
    good = tmp_path / "good.json"
    good.write_text(json.dumps(samples[:4]))
    bad_among = tmp_path / "bad_among.json"
    bad_among.write_text(json.dumps([samples[-1], *samples[:2], samples[-2], *samples[2:4]]))
    losses = [
        main(command(gpt2_dir, tower_dir, good, tmp_path / data.stem, max_steps=1, eval_data_path=data,
                     per_device_eval_batch_size=1)).evaluate()["eval_loss"]
        for data in (good, bad_among)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] > 1
    rows = read_json_lines(tmp_path / "bad_among" / "bad_samples.jsonl")
    assert sorted(row["id"] for row in rows) == ["none.mp4", "text.mp4"]


def test_run_ends_when_too_many_are_bad(gpt2_dir, tower_dir, partly_bad: Path, tmp_path: Path) -> None:
    argv = command(gpt2_dir, tower_dir, partly_bad, tmp_path / "out", max_bad_share=0.2)
    with pytest.raises(ValueError, match=r"2 of the 8 samples seen are bad, more than --max_bad_share 0\.2"):
        main(argv)


def test_shell_sees_one_line_of_a_worker_s_error(
    gpt2_dir, tower_dir, partly_bad: Path, tmp_path: Path, warm_python: str
) -> None:
    argv = command(gpt2_dir, tower_dir, partly_bad, tmp_path / "out", on_bad_sample="error", dataloader_num_workers=2)
    ended = subprocess.run(
        [warm_python, "-m", "llava.train.train", *argv], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: sample '")
    assert ".mp4: " in last


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [("on_bad_sample", "ignore", "--on_bad_sample is 'ignore'; known: error, skip"),
     ("max_bad_share", 5, r"--max_bad_share is 5\.0; it is a share")],
)  # fmt: skip
def test_wrong_values(gpt2_dir, tower_dir, partly_bad: Path, tmp_path: Path, flag, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        main(command(gpt2_dir, tower_dir, partly_bad, tmp_path / "out", **{flag: value}))
