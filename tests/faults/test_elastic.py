"""A run goes on with another number of processes: the same samples and words, losses and weights but for rounding."""

from __future__ import annotations

import json
import os
import random
import signal
from itertools import chain, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import ITALIAN, turns
from runs import ForkServer, losses, read_record
from safetensors.torch import load_file

from llava.data.samplers import GROUPED, STRATEGIES, DataOrder, RankBatchSampler
from llava.train import resuming
from llava.train.checkpoint import find_damage, list_checkpoints
from llava.train.elastic import Split, advise, say_other_split
from llava.train.train import cli, main

STEPS = 8
STEP_SIZE = 4
ROUNDING = 1e-5
"""How far weights may lie apart behind eight steps of 3e-3, and losses, as a share of them."""


class Leg(NamedTuple):
    """A start of a run: its ranks and how a step is split over them; the last start of a run is not killed."""

    ranks: int
    batch: int
    accumulation: int = 1


@pytest.fixture(scope="module")
def flags(gpt2_dir: Path, tower_dir: Path, media_dir: Path):
    """The command line of a run without dropout on texts and images, of which an epoch has three steps and a rest."""
    samples = [
        {"id": f"s{i:02}", "conversations": turns("<image>" if i % 3 == 1 else "", f"{i} {ITALIAN[i % 5]}")}
        | ({"image": "a.png"} if i % 3 == 1 else {})
        for i in range(14)
    ]
    data = media_dir / "elastic.json"
    data.write_text(json.dumps(samples))

    def line(output: Path, leg: Leg, **changes: object) -> list[str]:
        values = {
            "model_name_or_path": gpt2_dir, "vision_tower": tower_dir, "data_path": data, "output_dir": output,
            "max_steps": STEPS, "per_device_train_batch_size": leg.batch, "report_to": "none", "save_steps": 2,
            "gradient_accumulation_steps": leg.accumulation, "learning_rate": 3e-3, "logging_steps": 3,
            "adam_epsilon": 1e-4, "use_cpu": "true", "disable_tqdm": "true", "resume_from_checkpoint": "auto",
            "save_total_limit": 2, "milestones": "100,250", **changes,
        }  # fmt: skip
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    return line


@pytest.fixture(scope="module")
def whole(server: ForkServer, flags, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    assert server.run(flags(output, Leg(1, 2, 2)), output) == 0, said(output)[-3000:]
    return output


def said(folder: Path) -> str:
    return (folder / "said").read_text()


def sequence(folder: Path, ranks: int) -> dict[int, list[str]]:
    """The samples of each step that a start trained, in their order: micro-batch by micro-batch, and in it by rank."""
    steps: dict[int, list[list[list[str]]]] = {}
    for rank in range(ranks):
        own: dict[int, list[list[str]]] = {}
        for entry in read_record(folder, rank)[-1]:
            own.setdefault(entry["step"], []).append(entry["samples"])
        for step, batches in own.items():
            steps.setdefault(step, []).append(batches)
    return {
        step: [sample for together in zip_longest(*of_ranks, fillvalue=[]) for batch in together for sample in batch]
        for step, of_ranks in steps.items()
    }


def last_step(output: Path) -> int:
    return max((int(f.name.split("-")[1]) for f in list_checkpoints(output) if find_damage(f) is None), default=0)


def train(
    server: ForkServer, flags, whole: Path, folder: Path, legs: list[Leg], seed: int = 0, **changes: object
) -> Path:
    """A run in several starts, each but the last killed at random: in a step, or in the midst of a save.

    Returns:
        Its output folder.
    """
    output, trained, chance = folder / "out", dict[int, list[str]](), random.Random(seed)
    for number, leg in enumerate(legs):
        place, first, hooks = folder / f"leg-{number}", last_step(output), dict[str, object]()
        if number < len(legs) - 1:
            method, later = chance.choice([("training_step", 3), ("_get_grad_norm", 3), ("_save_rng_state", 4)])
            hooks = {"inside": {"method": method, "step": first + later, "number": signal.SIGKILL}}
        status = server.run_ranks(flags(output, leg, **changes), place, ranks=leg.ranks, **hooks)
        assert status == (-signal.SIGKILL if hooks else 0), said(place)[-3000:]
        own = sequence(place, leg.ranks)
        assert min(own) == first, "it goes on from the last checkpoint"
        trained |= own
    assert trained == sequence(whole, 1)
    return output


def assert_same(output: Path, whole: Path) -> None:
    """Words are the same, at milestones too, losses and weights within rounding."""
    for name in ("exposure.jsonl", "chck_100/exposure.json", "chck_250/exposure.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    expected = losses(whole)
    assert len(losses(output)) == len(expected) == STEPS
    for one, other in zip(losses(output), expected, strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], rel=ROUNDING)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * ROUNDING)
    weights, others = (load_file(folder / "model.safetensors") for folder in (output, whole))
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights | others) < ROUNDING


FOUR_TWO_ONE_TWO = [Leg(4, 1), Leg(2, 1, 2), Leg(1, 4), Leg(2, 2)]


@pytest.mark.parametrize(
    ("engine", "legs"),
    [
        ("ddp", FOUR_TWO_ONE_TWO),
        ("zero1", [Leg(2, 2), Leg(1, 2, 2)]),
        ("zero2", [Leg(1, 4), Leg(2, 1, 2)]),
        ("zero3", [Leg(4, 1), Leg(1, 4), Leg(2, 2)]),
    ],
    ids=["ddp", "zero1", "zero2", "zero3"],
)
def test_other_ranks_go_on(
    server: ForkServer, flags, whole: Path, tmp_path: Path, engine: str, legs: list[Leg]
) -> None:
    changes = {} if engine == "ddp" else {"deepspeed": engine}
    if changes:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    assert_same(train(server, flags, whole, tmp_path, legs, **changes), whole)
    warned = [line for line in said(tmp_path / "leg-1").splitlines() if "is not the same bit for bit" in line]
    assert len(warned) == 1
    assert f"with {describe(legs[1])} in place of {describe(legs[0])}: every step has the same samples" in warned[0]


def describe(leg: Leg) -> str:
    return str(Split(*leg))


@pytest.mark.skipif(
    "LLAVA_ELASTIC_RUNS" not in os.environ, reason="set LLAVA_ELASTIC_RUNS to a number of runs an engine"
)
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_many_runs(server: ForkServer, flags, whole: Path, tmp_path: Path, engine: str) -> None:
    """By hand: 4 -> 2 -> 1 -> 2 ranks with every engine, killed at other moments in each run."""
    changes = {} if engine == "ddp" else {"deepspeed": engine}
    for seed in range(int(os.environ["LLAVA_ELASTIC_RUNS"])):
        assert_same(train(server, flags, whole, tmp_path / str(seed), FOUR_TWO_ONE_TWO, seed, **changes), whole)


@pytest.mark.parametrize("units", [{}, {"pack_length": 40}, {"max_tokens": 40}], ids=["samples", "packs", "tokens"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_of_samples_is_the_same_for_every_split(strategy: str, units: dict[str, int]) -> None:
    """Undone what deals a micro-batch to ranks, by turns or by neighbours, the sequence itself is the same."""
    lengths = np.random.default_rng(0).integers(1, 30, 101) * np.where(np.arange(101) % 3, 1, -1)
    order = DataOrder(101, 12, strategy, 3, lengths, **units)
    by_turns = strategy in GROUPED and not units

    def read(ranks: int, batch: int, accumulation: int) -> list[list[int]]:
        batches = [list(RankBatchSampler(order, batch, accumulation, ranks, rank)) for rank in range(ranks)]
        steps: list[list[int]] = [[] for _ in range(order.num_steps)]
        for number, dealt in enumerate(zip(*batches, strict=True)):
            turns_of = chain.from_iterable(zip_longest(*dealt)) if by_turns else chain.from_iterable(dealt)
            steps[number // accumulation] += [index for index in turns_of if index is not None]
        return steps

    whole = read(1, 12, 1)
    assert sorted(chain.from_iterable(whole)) == list(range(101))
    for split in ((4, 1, 3), (3, 2, 2), (2, 3, 2), (2, 6, 1), (12, 1, 1)):
        assert read(*split) == whole


@pytest.mark.parametrize(
    ("before", "now", "by_tokens", "advice"),
    [
        (12, (3, 2), False, "3 ranks fit with --per_device_train_batch_size 2 --gradient_accumulation_steps 2"),
        (12, (4, 2), False, "4 ranks fit with --per_device_train_batch_size 1 --gradient_accumulation_steps 3"),
        (4, (1, 8), False, "1 rank fits with --per_device_train_batch_size 4 --gradient_accumulation_steps 1"),
        (8, (3, 2), False, "no batch fits 3 ranks, of which 8 is no multiple: start 2 or 4"),
        (4, (5, 1), False, "no batch fits 5 ranks, of which 4 is no multiple: start 4"),
        (8, (2, 99), True, "2 ranks fit with --gradient_accumulation_steps 4"),
    ],
)
def test_values_that_fit(before: int, now: tuple[int, int], by_tokens: bool, advice: str) -> None:
    assert advise(before, *now, by_tokens) == advice


def test_another_size_of_a_step_is_refused_with_values_that_fit(flags, whole: Path, capfd) -> None:
    argv = flags(whole, Leg(1, 3), resume_from_checkpoint=whole / "checkpoint-8")
    assert cli(lambda: main(argv)) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "samples of a step was 4, is 3" in error
    assert "1 rank fits with --per_device_train_batch_size 2 --gradient_accumulation_steps 2" in error


@pytest.mark.parametrize(
    ("changes", "router", "line"),
    [
        ({"world_size": 4, "gradient_accumulation_steps": 1}, 0, None),
        ({}, 0, "2 ranks x batch 1 x accumulation 2 in place of 4 ranks x batch 1 x accumulation 1: every step has"),
        ({}, 0.1, "; the experts' balance is taken over other micro-batches"),
        ({"average_tokens_across_devices": False}, 0, "; --average_tokens_across_devices false weighs tokens by ranks"),
        ({"optim": "stable_adamw", "deepspeed": "zero2"}, 0, "; --optim stable_adamw limits a step by a norm over"),
        ({"resume_changed": True}, 0, "in place of 4 ranks x batch 1 x accumulation 1: what is not the same"),
        ({"max_tokens_per_batch": 9, "world_size": 4, "gradient_accumulation_steps": 1,
          "per_device_train_batch_size": 7}, 0, None),
    ],
    ids=["as before", "ranks", "experts", "by ranks", "by share", "another run", "by tokens"],
)  # fmt: skip
def test_what_another_split_changes_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict, router: float, line: str | None
) -> None:
    before = {"world_size": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    (tmp_path / "run_identity.json").write_text(json.dumps({"fixed": {}, "free": before, "length": {}}))
    now = {"world_size": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    others = {
        "optim": "adamw_torch",
        "deepspeed": None,
        "max_tokens_per_batch": None,
        "resume_changed": False,
        "ignore_data_skip": False,
    }
    args: Any = SimpleNamespace(**{**now, **others, "average_tokens_across_devices": True, **changes})
    say_other_split(tmp_path, args, {"router_aux_loss_coef": router})
    assert [line in record.getMessage() for record in caplog.records] == ([] if line is None else [True])


@pytest.mark.parametrize(("saved", "ranks", "expected"), [(4, 4, [1, 2, 3, 10]), (4, 2, [4, 4]), (1, 2, [1, 1])])
def test_losses_that_no_line_of_the_log_has_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: int, ranks: int, expected: list[float]
) -> None:
    """The next line is a mean over ranks, and so is what each rank goes on from where there were others."""
    for rank, loss in enumerate([1, 2, 3, 10][:saved]):
        (tmp_path / f"loss_since_log_{rank}.json").write_text(json.dumps({"sum": loss, "last_logged_step": 5}))
        (tmp_path / f"rng_state_{rank}.pth").touch()
    taken: list[tuple] = []
    monkeypatch.setattr(resuming, "restore_loop", lambda *words: taken.append(words))
    for rank in range(ranks):
        args = SimpleNamespace(process_index=rank, world_size=ranks, seed=1)
        state = SimpleNamespace(global_step=6, stateful_callbacks={})
        resuming.ResumeCallback(SimpleNamespace(), str(tmp_path)).on_train_begin(args, state, None)  # type: ignore[arg-type]
    mean = sum([1, 2, 3, 10][:saved]) / saved
    assert [meter for *_, meter, _ in taken] == [(own, 5, -mean) for own in expected]
    drawn = []
    for *_, seed in taken:
        assert (seed is None) == (saved == ranks)
        if seed is not None:
            seed()
            drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == len(drawn), "each rank draws other numbers"
