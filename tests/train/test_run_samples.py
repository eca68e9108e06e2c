"""What a model says of a few samples while it trains: the run stays the same, and the file is whole after a resume."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.serve.generate import Captioner
from llava.train.command_line import parse_arguments
from llava.train.run_report import RUN_REPORT
from llava.train.run_starts import RUN_STARTS
from llava.train.samples import SampleCallback, choose_samples, spread
from llava.train.train import build_trainer, train
from tests.model.test_coordinates import SAMPLES as GROUNDED
from tests.train.test_scoring import assert_same_run
from tests.train.test_training import ROOT, flags, write_json

RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2,
       "learning_rate": 1e-2, "do_eval": "false"}  # fmt: skip
SAMPLED = {"sample_every": 2, "num_samples": 5, "sample_max_new_tokens": 6}


@pytest.fixture(scope="module")
def words(dropout_dir: Path, tower_dir: Path, media_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """A function that gives the command line of a run on clips, images and texts, with some flags changed."""
    turns = [
        [{"from": "human", "value": shown}, {"from": "gpt", "value": f"Una persona muove le mani numero {number}."}]
        for number, shown in enumerate(("<video>", "<video>", "<image>", "", "<video> <image>"))
    ]
    media = [{"video": "a.mp4"}, {"video": "b.mp4"}, {"image": "a.png"}, {}, {"video": "a.mp4", "image": "b.jpg"}]
    data = write_json(media_dir / "watched.json", [
        {"id": f"s{number} <b>", **files, "conversations": said}
        for number, (files, said) in enumerate(zip(media, turns, strict=True))
    ])  # fmt: skip
    folder = tmp_path_factory.mktemp("runs")
    return lambda name, **more: flags(
        dropout_dir, tower_dir, more.pop("data_path", data), folder / name, **RUN | {"eval_data_path": data} | more
    )


@pytest.fixture(scope="module")
def sampled(words) -> Path:
    """The folder of a run whose model was asked."""
    trainer = build_trainer(words("sampled", **SAMPLED))
    train(trainer)
    return Path(trainer.args.output_dir)


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples" / "samples.jsonl").read_text().splitlines()]


def test_weights_and_random_states_are_those_of_a_run_that_is_not_asked(words, sampled: Path) -> None:
    train(plain := build_trainer(words("plain")))
    assert_same_run(sampled, Path(plain.args.output_dir))
    assert not (Path(plain.args.output_dir) / "samples").exists()


def test_the_file_has_every_sample_at_every_step_with_its_frames(sampled: Path) -> None:
    rows = read(sampled)
    ids = ["s0 <b>", "s2 <b>", "s3 <b>", "s1 <b>", "s4 <b>"]  # A clip, an image, a text, and clips again.
    assert [(row["step"], row["id"]) for row in rows] == [(step, name) for step in (0, 2, 4, 6) for name in ids]
    first = {row["id"]: row for row in rows[:5]}
    assert first["s0 <b>"]["reference"] == "Una persona muove le mani numero 0."
    assert first["s0 <b>"]["question"] == ""
    assert [Path(path).name for path in first["s4 <b>"]["media"]] == ["a.mp4", "b.jpg"]
    # Of a text the model is given the beginning.
    assert (first["s3 <b>"]["question"], first["s3 <b>"]["reference"]) == ("Una persona muove", "le mani numero 3.")
    assert [row["words"] for row in rows[::5]] == sorted({row["words"] for row in rows})
    pictures = sorted(path.relative_to(sampled / "samples").as_posix() for path in sampled.rglob("*.jpg"))
    assert pictures[:4] == [f"step-000000/{n:02d}_s{i}_b_.jpg" for n, i in ((1, 0), (2, 2), (4, 1), (5, 4))]
    assert len(pictures) == 16
    assert Image.open(sampled / "samples" / pictures[0]).width > 500


def test_what_is_written_is_what_the_saved_model_says(words, sampled: Path) -> None:
    captioner = Captioner.from_checkpoint(str(sampled), device="cpu")
    watched = choose_samples(build_trainer(words("other")).eval_dataset, 5, "--eval_data_path")
    said = [str(captioner.answer([one.request], 1, max_new_tokens=6)[0]) for one in watched]
    assert said == [row["answer"] for row in read(sampled)[-5:]]
    assert len({row["answer"] for row in read(sampled)}) > 1


def test_a_resumed_run_goes_on_with_the_file(words, sampled: Path, tmp_path: Path) -> None:
    output = shutil.copytree(sampled, tmp_path / "out")
    for name in ("checkpoint-6", "samples/step-000004"):
        shutil.rmtree(output / name)
    for name in ("run_identity.json", "model.safetensors"):
        (output / name).unlink()
    # Killed in the midst of a line, behind one of a step that comes again; that of step 4 was not yet written.
    kept = [row for row in read(sampled) if row["step"] in (0, 2, 6)]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    (output / "samples" / "samples.jsonl").write_text(text + '{"step": 6, "wor')
    argv = words("sampled", **SAMPLED, resume_from_checkpoint="auto")
    argv[argv.index("--output_dir") + 1] = str(output)
    train(build_trainer(argv))
    assert read(output) == read(sampled)
    assert sorted(path.name for path in (output / "samples").iterdir()) == [
        "samples.jsonl", "step-000000", "step-000002", "step-000004", "step-000006",
    ]  # fmt: skip


def test_drawn_tokens_are_the_same_every_time(words) -> None:
    said = []
    for name in ("drawn", "drawn-again"):
        drawn = {"num_samples": 2, "sample_temperature": 1.5, "max_steps": 1, "save_strategy": "no"}
        train(trainer := build_trainer(words(name, **SAMPLED | drawn, run_report="false")))
        assert not {path.name for path in Path(trainer.args.output_dir).iterdir()} & {RUN_REPORT, RUN_STARTS}
        said.append(read(Path(trainer.args.output_dir)))
    assert said[0] == said[1]
    assert len(said[0]) == 4


def test_boxes_and_spans_are_drawn_and_written(words, media_dir: Path) -> None:
    data = write_json(media_dir / "watched-grounded.json", GROUNDED)
    train(trainer := build_trainer(words("grounded", **SAMPLED | {"max_steps": 1, "save_strategy": "no"}, stage=2,
                                         sample_data_path=data, eval_data_path=None, data_path=data)))  # fmt: skip
    output = Path(trainer.args.output_dir)
    rows = {row["id"]: row for row in read(output)}
    # A text with a place has no picture to point into.
    assert set(rows) == {"image", "video", "ungrounded", "text"}
    assert (rows["image"]["question"], rows["image"]["reference"]) == ("una stella", "gialla")
    picture = np.asarray(Image.open(next(output.glob("samples/step-000001/*_image.jpg")))).astype(int)
    green = (picture[..., 1] - picture[..., [0, 2]].max(-1)) > 60
    # The reference's box of the left tenth to the right tenth, in a picture that begins at 20 pixels and is 920 wide.
    columns = np.flatnonzero(green.sum(0) > 200)
    assert (columns[0], columns[-1]) == pytest.approx((20 + 92, 20 + 828), abs=8)
    # What a trained model says of places: drawn in red, told in fractions.
    watched = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SampleCallback)).watched[1]
    row = {**rows[watched.sample.id], "boxes": [[0.4, 0.4, 0.6, 0.6]]}
    red = np.asarray(watched.draw(row)).astype(int)
    assert ((red[..., 0] - red[..., 1]) > 100).any()


def test_kinds_come_in_turn_and_are_spread_over_the_data(words) -> None:
    dataset = build_trainer(words("spread")).eval_dataset
    assert spread(dataset) == [0, 2, 3, 1, 4]


def test_a_disk_that_is_full_costs_a_sample_and_not_the_run(words, monkeypatch, caplog) -> None:
    from llava.train.samples import SampleLog

    write = SampleLog.add

    def add(self, watched, rows) -> None:
        if rows[0]["step"] == 2:
            raise OSError(28, "No space left on device", "samples.jsonl")
        write(self, watched, rows)

    monkeypatch.setattr(SampleLog, "add", add)
    with caplog.at_level(logging.WARNING):
        train(trainer := build_trainer(words("full", **SAMPLED)))
    assert "could not be asked at step 2, training goes on: samples.jsonl: No space left on device" in caplog.text
    assert {row["step"] for row in read(Path(trainer.args.output_dir))} == {0, 4, 6}


def test_what_data_are_asked_about_is_said(words, capsys, media_dir: Path, tmp_path: Path) -> None:
    argv = words("said", **SAMPLED | {"num_samples": 1})
    build_trainer(argv)
    assert "asked every 2 steps what is in 1 samples of --eval_data_path: 's0 <b>'" in capsys.readouterr().out
    at = argv.index("--eval_data_path")
    build_trainer([*argv[:at], *argv[at + 2 :]])
    assert "samples of --data_path, which it trains on (there is no --eval_data_path)" in capsys.readouterr().out
    own = write_json(tmp_path / "own.json", [{"id": "mine", "conversations": [{"from": "gpt", "value": "uno due"}]}])
    build_trainer([*argv, "--sample_data_path", str(own)])
    assert "samples of --sample_data_path: 'mine'" in capsys.readouterr().out
    write_json(own, [{"id": "mine", "conversations": [{"from": "gpt", "value": "uno"}]}])
    with pytest.raises(
        ValueError, match=r"^--sample_every: no sample of --sample_data_path can be asked; .*'mine'.*few"
    ):
        build_trainer([*argv, "--sample_data_path", str(own)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample_every": 0}, "--sample_every is 0; it must be at least 1"),
        ({"num_samples": 0}, "--num_samples is 0; it must be at least 1"),
        ({"sample_data_path": "x.json"}, "--sample_data_path is given without --sample_every"),
        ({"sample_every": 5, "sample_temperature": -1}, "--sample_temperature is -1.0; it is 0 or more"),
        ({"sample_every": 5, "do_train": "false"}, "--sample_every is for a model that trains"),
    ],
)
def test_flags_that_cannot_be_meant(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(flags(Path("m"), None, Path("d.json"), Path("o"), **given))


def test_two_ranks(words, warm_python: str) -> None:
    argv = words(
        "ranks",
        **SAMPLED | {"num_samples": 2},
    )
    command = [warm_python, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m",
               "llava.train.train", *argv]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON_EXEC": warm_python}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    output = Path(argv[argv.index("--output_dir") + 1])
    assert "<td>ranks</td><td>2</td>" in (output / "report.html").read_text()  # One page, of the first rank.
    assert len((output / "run_starts.jsonl").read_text().splitlines()) == 1
    rows = read(output)
    assert [(row["step"], row["id"]) for row in rows] == [(n, i) for n in (0, 2, 4, 6) for i in ("s0 <b>", "s2 <b>")]
