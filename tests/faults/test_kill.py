"""A run that is killed, or asked to stop, at any moment goes on as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from conftest import ITALIAN, turns
from runs import ForkServer, losses, read_record, trained_on
from safetensors.torch import load_file

from llava.train import exposure
from llava.train.checkpoint import CHECKSUMS, find_changes, find_damage, list_checkpoints
from llava.train.preemption import PREEMPTED

STEPS = 8
LAST = "chck_150"
MILESTONES = "20,60,100,150"
"""In steps 1, 3, 5 and 7 of two ranks, of which every second one is saved."""
NO_NAME = ("os.rename", LAST, 0)
"""When the last milestone is written, and is to be given its name."""


@pytest.fixture(scope="module")
def data(media_dir: Path) -> Path:
    """Texts and images, of which four steps make an epoch."""
    samples = [
        {"id": f"sample-{i}", "conversations": turns("<image>" if i % 2 else "", f"{i} {ITALIAN[i % 5]}")}
        | ({"image": "a.png"} if i % 2 else {})
        for i in range(7)
    ]
    path = media_dir / "kill.json"
    path.write_text(json.dumps(samples))
    return path


@pytest.fixture(scope="module")
def flags(backbone_dirs, tower_dir: Path, data: Path, dropout_dir: Path):
    """The command line of the run, which draws random numbers (dropout) and logs between its saves."""

    def line(output: Path, **changes: object) -> list[str]:
        values = {
            "model_name_or_path": dropout_dir, "vision_tower": tower_dir, "data_path": data, "output_dir": output,
            "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "logging_steps": 3,
            "report_to": "none", "save_steps": 2, "save_total_limit": 2, "use_cpu": "true", "disable_tqdm": "true",
            "resume_from_checkpoint": "auto", **changes,
        }  # fmt: skip
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    return line


@pytest.fixture(scope="module")
def dropout_dir(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny GPT-2 with dropout."""
    folder = tmp_path_factory.mktemp("dropout")
    for file in gpt2_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def whole(server: ForkServer, flags, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    assert server.run(flags(output), output) == 0, (output / "said").read_text()[-3000:]
    assert [len(start) for start in read_record(output)] == [STEPS]
    return output


def assert_same(output: Path, whole: Path) -> None:
    """Samples, losses and weights are those of the whole run."""
    assert trained_on(output) == trained_on(whole)
    assert losses(output) == losses(whole)
    one, other = (load_file(folder / "model.safetensors") for folder in (output, whole))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    assert not list(output.glob("tmp-*"))


def steps_of_start(output: Path, start: int) -> list[int]:
    """The steps that a start of a run executed, from 0; its last one may be cut off by a kill."""
    return [entry["step"] for entry in read_record(output)[start]]


def last_whole_step(output: Path) -> int:
    """The step of the last checkpoint that a killed run finished, with or without its name; 0 for none."""
    finished = [folder for folder in list_checkpoints(output) if find_damage(folder) is None]
    staged = [folder for folder in output.glob("tmp-checkpoint-*/checkpoint-*") if (folder / CHECKSUMS).is_file()]
    finished += [folder for folder in staged if find_damage(folder) is None]
    return max((int(folder.name.split("-")[1]) for folder in finished), default=0)


def said(output: Path) -> str:
    return (output / "said").read_text()


@pytest.mark.parametrize("share", [random.Random(seed).random() for seed in range(3)])
def test_killed_at_any_moment(server: ForkServer, flags, whole: Path, tmp_path: Path, share: float) -> None:
    moment = 1 + int(share * int((whole / "moments").read_text()))
    assert server.run(flags(tmp_path), tmp_path, moment=moment) == -signal.SIGKILL, said(tmp_path)[-2000:]
    first = last_whole_step(tmp_path)
    # Killed before its first step, it has none.
    assert first >= (steps_of_start(tmp_path, 0) or [0])[-1] - 2, "a save every two steps"
    assert server.run(flags(tmp_path), tmp_path) == 0, said(tmp_path)[-2000:]
    # From the last checkpoint, not from the beginning: that too would end as the whole run does.
    assert steps_of_start(tmp_path, 1) == list(range(first, STEPS))
    assert_same(tmp_path, whole)


@pytest.mark.parametrize(
    ("batches", "ranks"),
    [({"packing": "true", "model_max_length": 60}, 1), ({"max_tokens_per_batch": 60}, 2)],
    ids=["packs", "tokens on two ranks"],
)
@pytest.mark.parametrize("cache", [False, True], ids=["live", "filling a cache"])
def test_killed_with_other_batches(
    server: ForkServer, flags, tmp_path: Path, batches: dict[str, object], ranks: int, cache: bool
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    run = server.run if ranks == 1 else server.run_ranks
    batches = {**batches, "per_device_train_batch_size": 2 // ranks}
    assert run(flags(whole, **batches), whole) == 0, said(whole)[-2000:]
    if cache:
        batches |= {"feature_cache": tmp_path / "cache", "feature_cache_fill": "true"}
    moment = int(0.6 * int((whole / "moments").read_text()))
    assert run(flags(output, **batches), output, moment=moment) == -signal.SIGKILL, said(output)[-2000:]
    first = last_whole_step(output)
    assert run(flags(output, **batches), output) == 0, said(output)[-2000:]
    assert steps_of_start(output, 1) == list(range(first, STEPS))
    assert_same(output, whole)
    if ranks > 1:
        assert trained_on(output, rank=1) == trained_on(whole, rank=1)


@pytest.mark.parametrize(
    ("inside", "last"),
    [
        ({"method": "training_step", "step": 2, "number": signal.SIGTERM}, 3),
        ({"method": "get_batch_samples", "step": 2, "number": signal.SIGUSR1}, 3),
        # While step 4 is saved, twice: the save goes on, and the next step is the last.
        ({"method": "_save_rng_state", "step": 4, "number": signal.SIGTERM, "times": 2}, 5),
    ],
)
def test_asked_to_stop(server: ForkServer, flags, whole: Path, tmp_path: Path, inside: dict, last: int) -> None:
    assert server.run(flags(tmp_path), tmp_path, inside=inside) == PREEMPTED, said(tmp_path)[-2000:]
    assert f"stopped after step {last} of {STEPS}" in said(tmp_path)
    assert "Traceback" not in said(tmp_path)
    assert server.run(flags(tmp_path), tmp_path) == 0, said(tmp_path)[-2000:]
    assert [entry["step"] for entry in read_record(tmp_path)[1]] == list(range(last, STEPS))
    assert_same(tmp_path, whole)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
BEST = {"metric_for_best_model": "loss", "save_total_limit": 4}


@pytest.mark.parametrize(
    ("changes", "method", "step"),
    [
        # An evaluation that is not done tells neither the schedule nor the best checkpoint anything.
        (EVALUATED | BEST | {"lr_scheduler_type": "reduce_lr_on_plateau"}, "prediction_step", 4),
        (EVALUATED | BEST | {"save_strategy": "best"}, "prediction_step", 4),
        (EVALUATED | BEST | {"load_best_model_at_end": "true"}, "training_step", 3),
        # Step 4 ends an epoch, and its evaluation is due then only.
        (EVALUATED | {"eval_strategy": "epoch"}, "training_step", 3),
        # Step 3 does not, although it is the last of this start.
        (EVALUATED | {"eval_strategy": "epoch"}, "training_step", 2),
    ],
    ids=["plateau", "best", "left out", "epoch's end", "epoch's midst"],
)
def test_an_evaluation_that_is_stopped_is_made_up_for(
    server: ForkServer, flags, data: Path, tmp_path: Path, changes: dict, method: str, step: int
) -> None:
    evaluate = {"eval_data_path": data, **changes}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert server.run(flags(whole, **evaluate), whole) == 0, said(whole)[-2000:]
    inside = {"method": method, "step": step, "number": signal.SIGUSR1}
    assert server.run(flags(parted, **evaluate), parted, inside=inside) == PREEMPTED, said(parted)[-2000:]
    assert f"stopped after step {step + (method == 'training_step')}" in said(parted)
    assert server.run(flags(parted, **evaluate), parted) == 0, said(parted)[-2000:]
    assert_same(parted, whole)
    assert evaluations(parted) == evaluations(whole)
    assert len(evaluations(whole)) == (2 if changes["eval_strategy"] == "epoch" else STEPS / 2)


def evaluations(output: Path) -> list[tuple[int, float]]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]


def test_asked_to_stop_in_the_last_step(server: ForkServer, flags, whole: Path, tmp_path: Path) -> None:
    inside = {"method": "training_step", "step": STEPS - 1, "number": signal.SIGTERM}
    assert server.run(flags(tmp_path), tmp_path, inside=inside) == 0
    assert_same(tmp_path, whole)


def test_asked_to_stop_before_the_first_step(
    server: ForkServer, flags, data: Path, whole: Path, tmp_path: Path
) -> None:
    """In the evaluation at the start nothing is to be saved, and nothing is lost."""
    argv = flags(tmp_path, eval_data_path=data, eval_on_start="true", do_eval="false")
    inside = {"method": "prediction_step", "step": 0, "number": signal.SIGTERM}
    assert server.run(argv, tmp_path, inside=inside) == PREEMPTED, said(tmp_path)[-2000:]
    assert f"stopped after step 0 of {STEPS}" in said(tmp_path)
    assert not list_checkpoints(tmp_path)
    assert server.run(argv, tmp_path) == 0, said(tmp_path)[-2000:]
    assert_same(tmp_path, whole)


def test_a_finished_run_has_nothing_left(server: ForkServer, flags, tmp_path: Path) -> None:
    # Seven steps end within an epoch, where transformers alone would take another.
    argv = flags(tmp_path, max_steps=7, save_steps=7)
    assert server.run(argv, tmp_path) == 0
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert server.run(argv, tmp_path) == 0
    assert [len(start) for start in read_record(tmp_path)] == [7, 0]
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_a_model_only_run_can_still_be_stopped(server: ForkServer, flags, whole: Path, tmp_path: Path) -> None:
    inside = {"method": "training_step", "step": 4, "number": signal.SIGTERM}
    argv = flags(tmp_path, save_only_model="true")
    assert server.run(argv, tmp_path, inside=inside) == PREEMPTED
    assert not (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {f.name for f in (tmp_path / "checkpoint-5").iterdir()}
    assert server.run(argv, tmp_path) == 0
    assert steps_of_start(tmp_path, 1) == list(range(5, STEPS))
    assert_same(tmp_path, whole)


@pytest.fixture(scope="module")
def milestones(flags, tmp_path_factory: pytest.TempPathFactory):
    """The command line of a run on two ranks, with milestones behind its saves, of which each is scored."""
    pairs = tmp_path_factory.mktemp("pairs") / "blimp" / "number.jsonl"
    pairs.parent.mkdir()
    rows = [{"sentence_good": f"Il {i} dorme.", "sentence_bad": f"I {i} dorme.", "UID": "number", "field": "m"}
            for i in range(4)]  # fmt: skip
    pairs.write_text("\n".join(map(json.dumps, rows)))
    changes = {"per_device_train_batch_size": 1, "save_steps": 2, "milestones": MILESTONES, "score_data": pairs.parent}
    return lambda output: flags(output, **changes)


@pytest.fixture(scope="module")
def whole_on_two(server: ForkServer, milestones, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole-on-two")
    assert server.run_ranks(milestones(output), output) == 0, said(output)[-3000:]
    return output


@pytest.mark.parametrize(
    "kill",
    [
        {"place": NO_NAME},
        {"place": ("os.rename", LAST, 1)},
        {"share": random.Random(0).random()},
    ],
    ids=["no name", "named", "any moment"],
)
def test_milestones_of_two_ranks_that_are_killed(
    server: ForkServer, milestones, whole_on_two: Path, tmp_path: Path, capsys, kill: dict
) -> None:
    if "share" in kill:
        kill = {"moment": 1 + int(kill["share"] * int((whole_on_two / "moments").read_text()))}
    assert server.run_ranks(milestones(tmp_path), tmp_path, **kill) == -signal.SIGKILL, said(tmp_path)[-2000:]
    if "place" in kill:
        staged = tmp_path / f"tmp-{LAST}" / LAST
        assert [(tmp_path / LAST).exists(), staged.exists()] == [kill["place"] != NO_NAME, kill["place"] == NO_NAME]
    assert server.run_ranks(milestones(tmp_path), tmp_path) == 0, said(tmp_path)[-2000:]
    assert_same(tmp_path, whole_on_two)
    assert trained_on(tmp_path, rank=1) == trained_on(whole_on_two, rank=1)
    names = [f"chck_{number}" for number in MILESTONES.split(",")]
    assert sorted(path.name for path in tmp_path.glob("chck_*")) == sorted(names)
    for name in names:
        assert find_changes(tmp_path / name) is None
        for file in ("model.safetensors", "exposure.json", "config.json"):
            assert (tmp_path / name / file).read_bytes() == (whole_on_two / name / file).read_bytes()
    for name in ("exposure.jsonl", "scores.csv", "scores_by_group.csv"):
        assert (tmp_path / name).read_bytes() == (whole_on_two / name).read_bytes()
    assert exposure.main([str(tmp_path), "--workers", "0"]) == 0, capsys.readouterr().out
