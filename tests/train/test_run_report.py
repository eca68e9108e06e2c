"""report.html: all of a run on one page, whatever became of it, and nothing secret on it."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava.io import write_beside
from llava.train import run_report, run_starts
from llava.train.run_starts import describe_code, hide_secrets, is_secret, read_starts
from llava.train.train import build_trainer, main, train
from tests.test_html import Reader
from tests.train.test_training import flags, write_json

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def words(gpt2_dir: Path, tower_dir: Path, media_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """A function that gives the command line of a run on a clip, an image and texts, with some flags changed."""
    told = [("<video>", {"video": "a.mp4"}), ("<image>", {"image": "a.png"}), ("", {})]
    data = write_json(media_dir / "reported.json", [
        {"id": f"s{i} {HOSTILE}\x1b", **media, "conversations": [
            {"from": "human", "value": shown}, {"from": "gpt", "value": f"Una persona {HOSTILE} muove le mani."}]}
        for i, (shown, media) in enumerate(told)
    ])  # fmt: skip
    folder = tmp_path_factory.mktemp("runs")
    values = {
        "max_steps": 14, "save_strategy": "steps", "save_steps": 6, "eval_data_path": data, "eval_strategy": "steps",
        "eval_steps": 7, "sample_every": 7, "num_samples": 3, "sample_max_new_tokens": 4, "logging_steps": 2,
        "mm_projector_lr": 1e-2, "hub_token": "hf_abcdefgh1234",
    }  # fmt: skip
    return lambda name, **more: flags(gpt2_dir, tower_dir, data, folder / name, **values | more)


@pytest.fixture(scope="module")
def run(words) -> Path:
    """The folder of a run that came to its end."""
    trainer = main(words("run"))
    return Path(trainer.args.output_dir)


def read(folder: Path) -> str:
    return (folder / "report.html").read_text("utf-8")


def points(text: str, title: str) -> int:
    """How many dots the first chart of that title has."""
    return text.partition(f"<h3>{title}</h3>")[2].partition("</svg>")[0].count("<circle")


def test_the_page_has_all_of_a_run(run: Path) -> None:
    text = read(run)
    reader = Reader(text)
    assert "Finished: all 14 steps are trained, and the model is saved." in reader.text
    # Steps 1 to 10, 12 and 14; the evaluations at 7 and 14.
    assert points(text, "Loss") == 12 + 2
    assert points(text, "Exact matches") == 2
    assert points(text, "Evaluation, by what samples show") == 3 * 2
    # A rate of its own for the projector, one for the others.
    assert "mm_mlp_adapter" in text.partition("<h3>Learning rate</h3>")[2].partition("<h3>")[0]
    norms = text.partition("<h3>Gradient norm, before clipping (logarithmic)</h3>")[2].partition("</section>")[0]
    assert re.findall(r"class=\"key\"[^>]*>(\w+):", norms) == [
        "all", "mm_language_model", "mm_mlp_adapter", "mm_vision_resampler",
    ]  # fmt: skip
    for title in ("Samples a second", "Tokens a second", "Memory, GiB (since the start of the process)"):
        assert points(text, title) >= 12, title
    assert points(text, "Words trained on") >= 12
    for row in map(json.loads, (run / "samples" / "samples.jsonl").read_text().splitlines()):
        assert row["step"] in (0, 7, 14)
        assert row["id"].replace("\x1b", "\\x1b") in reader.text
    assert [name for name, _ in reader.elements].count("img") == 3 + 1  # of the clip, and of the image
    assert "learning_rate" in reader.text
    assert 10_000 < len(text) < 400_000


def test_what_comes_from_data_stays_text_and_nothing_comes_from_elsewhere(run: Path) -> None:
    reader = Reader(read(run))
    assert "script" not in {name for name, _ in reader.elements}
    assert HOSTILE in reader.text
    sources = [value for _, pairs in reader.elements for key, value in pairs.items() if key in ("src", "href")]
    assert all(str(value).startswith(("#s", "data:image/")) for value in sources)


def test_nothing_secret_is_written(run: Path) -> None:
    for name in ("report.html", "run_starts.jsonl"):
        assert "hf_abcdefgh1234" not in (run / name).read_text(), name
    assert "--hub_token &#x27;(hidden)&#x27;" in read(run) or "--hub_token '(hidden)'" in read(run)
    assert not [name for name in run_starts.VARIABLES if is_secret(name)]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("--hub_token abc --max_steps 3", "--hub_token (hidden) --max_steps 3"),
        ("--hub-token=abc x", "--hub-token=(hidden) (hidden)"),
        ("--api_key a b --max_tokens_per_batch 4096", "--api_key (hidden) (hidden) --max_tokens_per_batch 4096"),
        ("--ignore_keys a --data_path s3://me:pw@host/x", "--ignore_keys a --data_path s3://(hidden)@host/x"),
        ("python -m x hf_abcdefgh1234", "python -m x (hidden)"),
        (
            "--data_path https://h/x?a=1&X-Amz-Signature=abc&b=2",
            "--data_path https://h/x?a=1&X-Amz-Signature=(hidden)&b=2",
        ),
        ("--run_name=https://h/x?token=abc", "--run_name=https://h/x?token=(hidden)"),
    ],
)
def test_secrets_of_a_command_line_are_hidden(given: str, shown: str) -> None:
    assert " ".join(hide_secrets(given.split())) == shown


def test_variables_are_told_from_a_list_alone(words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_API_KEY", "verysecret")
    monkeypatch.setenv("HF_TOKEN", "verysecret")
    monkeypatch.setenv("ANOTHER", "verysecret")
    monkeypatch.setattr(run_starts, "VARIABLES", (*run_starts.VARIABLES, "WANDB_API_KEY", "HF_TOKEN"))
    start = run_starts.describe_start(None, ())
    assert start["environment"]["OMP_NUM_THREADS"] == "1"
    assert "verysecret" not in json.dumps(start)


def test_a_resumed_run_shows_all_of_its_curves(words, run: Path, tmp_path: Path) -> None:
    output = shutil.copytree(run, tmp_path / "out")
    shutil.rmtree(output / "checkpoint-14")
    for name in ("run_identity.json", "model.safetensors", "report.html"):
        (output / name).unlink()
    argv = words("run", resume_from_checkpoint="auto", seed=42)
    argv[argv.index("--output_dir") + 1] = str(output)
    main(argv)
    text = read(output)
    assert points(text, "Loss") == points(read(run), "Loss")
    assert [start["step"] for start in read_starts(output)] == [0, 12]
    assert "from the first step" in text
    assert "from step 12" in text
    # A table of the learning rates of a run that is gone on with, and one of the answers of all of its steps.
    assert text.count("<h3>s0 ") == 1
    answers = text.partition("<h3>s0 ")[2].partition("<h3>")[0]
    assert re.findall(r'<td class="number">(\d+)</td>', answers) == ["14", "7", "0"]


def test_a_run_that_is_interrupted_or_fails_says_so(words, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_with(error: BaseException, name: str) -> Path:
        trainer = build_trainer(words(name, save_strategy="no", eval_strategy="no", sample_every=None, num_samples=None,
                                      sample_max_new_tokens=None))  # fmt: skip
        step = trainer.training_step

        def training_step(*args, **kwargs):
            if trainer.state.global_step == 3:
                raise error
            return step(*args, **kwargs)

        monkeypatch.setattr(trainer, "training_step", training_step)
        with pytest.raises(type(error)):
            train(trainer)
        return Path(trainer.args.output_dir)

    text = read(stop_with(KeyboardInterrupt(), "interrupted"))
    assert "Interrupted (control-C) behind step 3." in text
    assert points(text, "Loss") == 3
    assert "Ended with an error behind step 3: it &lt;broke&gt;" in read(stop_with(ValueError("it <broke>"), "broken"))


def test_a_signal_leaves_a_report(words) -> None:
    trainer = build_trainer(words("stopped", sample_every=None, num_samples=None, sample_max_new_tokens=None))
    step = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer.state.global_step == 3:
            trainer.stop_request._received = 15
        return step(*args, **kwargs)

    trainer.training_step = training_step
    with pytest.raises(run_report.Preempted):
        train(trainer)
    assert "Stopped by a signal after step 4 of 14, with a checkpoint." in read(Path(trainer.args.output_dir))


def test_a_full_disk_is_one_warning(words, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(path: Path, **kwargs):
        if path.name == "report.html":
            raise OSError(28, "No space left on device", str(path))
        return write_beside(path, **kwargs)

    monkeypatch.setattr(run_report, "write_beside", full)
    with caplog.at_level(logging.WARNING):
        trainer = main(words("full", save_steps=1, max_steps=2))
    assert trainer.state.global_step == 2
    assert len([r for r in caplog.records if "report.html could not be written, the run goes on" in r.message]) == 1
    assert sorted(path.name for path in Path(trainer.args.output_dir).glob("report*")) == []


def test_the_state_of_the_code_is_that_of_its_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*command: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *command], check=True, capture_output=True)

    package = tmp_path / "site" / "llava"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(run_starts.llava, "__file__", str(package / "__init__.py"))
    assert describe_code.__wrapped__() == ""  # No checkout at all.
    git("init", "-q", "-b", "work")
    (tmp_path / "own.txt").write_text("x")
    git("add", "own.txt")
    git("commit", "-qm", "m")
    assert describe_code.__wrapped__() == ""  # Somebody else's, which llava is only installed in.
    git("add", ".")
    git("commit", "-qm", "m")
    commit = subprocess.run(
        ["git", "-C", str(tmp_path), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert describe_code.__wrapped__() == f"commit {commit} of branch work, unchanged"
    (tmp_path / "own.txt").write_text("y")
    assert describe_code.__wrapped__() == f"commit {commit} of branch work, with changes in own.txt"
    monkeypatch.setenv("PATH", os.devnull)
    assert describe_code.__wrapped__() == ""  # Without git nothing is known.


@pytest.mark.parametrize("name", ["report.html", "run_starts.jsonl"])
def test_a_file_of_somebodys_own_stays(name: str, tmp_path: Path, monkeypatch, caplog) -> None:
    (tmp_path / name).write_text("mine\n")
    monkeypatch.setattr(run_report, "build_page", lambda *_: "a page")
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=tmp_path), state=SimpleNamespace(global_step=0))
    report = run_report.RunReport(trainer, run_starts.describe_start(None, ()))
    report.on_train_begin(None, trainer.state, None)
    report.write(run_report.GOOD, "")
    assert (tmp_path / name).read_text() == "mine\n"
    assert name in caplog.text
    # Its own, or none, is written.
    (tmp_path / name).unlink()
    for _ in range(2):
        report.on_train_begin(None, trainer.state, None)
        report.write(run_report.GOOD, "")
        assert (tmp_path / "report.html").read_text() == "a page"
        assert len(read_starts(tmp_path)) == 1
