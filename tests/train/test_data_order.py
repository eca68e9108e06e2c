"""Which samples a run trains on: all of them once an epoch, and after a resume those it would have come to."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.data.dataset import SupervisedDataset
from llava.data.samplers import DataOrder, RankBatchSampler
from llava.train import exposure
from llava.train.throughput import RATES
from llava.train.train import main
from llava.train.trainer import LlavaTrainer

ROOT = Path(__file__).parents[2]
TEXT = "Il gatto dorme sul divano e il cane guarda la strada."


EVERYTHING = [f"s{i:02}" for i in range(11)]


def ids(batches: list[list[str]]) -> list[str]:
    """All of them, sorted."""
    return sorted(name for batch in batches for name in batch)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Eleven texts of 1 to 11 words."""
    return write_texts(tmp_path / "texts.json", 11)


def write_texts(path: Path, number: int) -> Path:
    texts = [" ".join(TEXT.split()[: i + 1]) for i in range(number)]
    samples = [{"id": f"s{i:02}", "conversations": [{"from": "gpt", "value": text}]} for i, text in enumerate(texts)]
    path.write_text(json.dumps(samples))
    return path


def flags(model: Path, data: Path, output: Path, **changes) -> list[str]:
    values = {
        "model_name_or_path": model, "data_path": data, "output_dir": output, "per_device_train_batch_size": 2,
        "max_steps": 10, "learning_rate": 3e-3, "logging_steps": 1, "report_to": "none", "save_strategy": "steps",
        "save_steps": 3, "use_cpu": "true", "disable_tqdm": "true", **changes,
    }  # fmt: skip
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ids of every micro-batch that is trained on."""
    seen: list[list[str]] = []
    step = LlavaTrainer.training_step

    def record(self, model, inputs, *args, **kwargs):
        seen.append(inputs["sample_ids"])
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LlavaTrainer, "training_step", record)
    return seen


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the samples that the data set was asked for."""
    asked: list[str] = []
    get = SupervisedDataset.__getitem__

    def record(self, index):
        asked.append(self.records[index].id)
        return get(self, index)

    monkeypatch.setattr(SupervisedDataset, "__getitem__", record)
    return asked


Log = list[dict[str, float]]


def log_of(trainer: LlavaTrainer) -> Log:
    return [{k: v for k, v in e.items() if k not in RATES} for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_steps": 7, "save_steps": 2},
        {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 2, "max_steps": 9},
        {"group_by_modality_length": "true", "max_steps": -1, "num_train_epochs": 2},
        {"train_sampling_strategy": "sequential", "dataloader_drop_last": "true"},
        {"save_steps": 6},
        {"packing": "true", "model_max_length": 24, "dataloader_num_workers": 2, "max_steps": 7, "save_steps": 2},
        {"max_tokens_per_batch": 40, "gradient_accumulation_steps": 2, "max_steps": 6, "save_steps": 2},
        {"save_strategy": "epoch", "data_seed": 5, "max_steps": -1, "num_train_epochs": 2},
    ],
    ids=[
        "mid-epoch",
        "accumulation",
        "workers",
        "epochs",
        "drop-last",
        "epoch's-end",
        "packs",
        "tokens",
        "saved-by-epoch",
    ],
)
def test_resumed_run_sees_what_an_uninterrupted_one_sees(
    gpt2_dir, texts: Path, tmp_path: Path, trained, read, monkeypatch, changes: dict
) -> None:
    argv = flags(gpt2_dir, texts, tmp_path / "out", **changes)
    whole = main(argv)
    expected, losses = list(trained), log_of(whole)
    first = min(int(folder.name.split("-")[1]) for folder in (tmp_path / "out").glob("checkpoint-*"))
    start = first_micro_batch(first, whole)
    trained.clear()
    read.clear()
    dealt = count_dealt(monkeypatch)
    resumed = main([*argv, "--resume_from_checkpoint", str(tmp_path / "out" / f"checkpoint-{first}")])
    assert trained == expected[start:]
    assert log_of(resumed) == losses
    # Of the epoch that was left in the middle, the sampler looks nothing up that was trained.
    assert dealt[0] == start % len(whole.data.batches)
    if not changes.get("dataloader_num_workers"):
        assert read == [name for batch in trained for name in batch]
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def count_dealt(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers, in their epochs, of the micro-batches that samplers look up."""
    dealt: list[int] = []
    deal = RankBatchSampler._deal

    def record(self, order, number):
        dealt.append(number)
        return deal(self, order, number)

    monkeypatch.setattr(RankBatchSampler, "_deal", record)
    return dealt


def first_micro_batch(step: int, trainer: LlavaTrainer) -> int:
    """How many micro-batches were trained in so many steps."""
    batches, order = trainer.data.batches, trainer.data.batches.order
    epochs, steps = divmod(step, order.num_steps)
    return epochs * len(batches) + steps * batches.accumulation


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length", "group_by_modality_length"])
@pytest.mark.parametrize(("batch", "accumulation"), [(2, 3), (16, 1)])
def test_every_sample_is_trained_once_an_epoch(
    gpt2_dir, texts, tmp_path: Path, trained, strategy: str, batch: int, accumulation: int
) -> None:
    trainer = main(flags(gpt2_dir, texts, tmp_path / "out", max_steps=-1, num_train_epochs=2, save_strategy="no",
                         train_sampling_strategy=strategy, per_device_train_batch_size=batch,
                         gradient_accumulation_steps=accumulation))  # fmt: skip
    half = len(trained) // 2
    for epoch in (trained[:half], trained[half:]):
        assert ids(epoch) == EVERYTHING
    # The schedule ends where the data do.
    assert trainer.state.global_step == trainer.state.max_steps == 2 * -(-11 // (batch * accumulation))
    assert log_of(trainer)[-1]["epoch"] == 2.0


def test_epochs_have_orders_of_their_own_from_the_data_seed(gpt2_dir, texts, tmp_path: Path, trained) -> None:
    main(flags(gpt2_dir, texts, tmp_path / "out", max_steps=-1, num_train_epochs=2, save_strategy="no", data_seed=5))
    order = DataOrder(11, 2, seed=5)
    expected = [EVERYTHING[index] for epoch in (0, 1) for index in order.order(epoch)]
    assert [name for batch in trained for name in batch] == expected
    assert expected[:11] != expected[11:]


def test_a_checkpoint_says_where_it_stands(gpt2_dir, texts, tmp_path: Path) -> None:
    trainer = main(flags(gpt2_dir, texts, tmp_path / "out", dataloader_num_workers=2))
    states = {step: json.loads((tmp_path / f"out/checkpoint-{step}/data_state.json").read_text()) for step in (3, 6, 9)}
    # Six steps an epoch; workers have fetched ahead of what was trained.
    assert [(states[step]["epoch"], states[step]["step"]) for step in states] == [(0, 3), (1, 0), (1, 3)]
    assert states[3]["order"]["samples"] == 11
    assert states[3]["order"]["seed"] == 42
    assert trainer.data.state(trainer.state.global_step)["step"] == 4


@pytest.fixture
def checkpoint(gpt2_dir, texts, tmp_path: Path) -> Path:
    main(flags(gpt2_dir, texts, tmp_path / "out", max_steps=3))
    return tmp_path / "out" / "checkpoint-3"


def drop_a_sample(data: Path) -> None:
    data.write_text(json.dumps(json.loads(data.read_text())[:-1]))


def swap_two_samples(data: Path) -> None:
    samples = json.loads(data.read_text())
    data.write_text(json.dumps([samples[1], samples[0], *samples[2:]]))


@pytest.mark.parametrize(
    ("changes", "edit", "message"),
    [
        ({"per_device_train_batch_size": 4}, None, r"samples of a step was 2, is 4 \(--per_device_train_batch_size"),
        ({"seed": 7}, None, r"seed was 42, is 7 \(--data_seed or --seed\)"),
        ({"train_sampling_strategy": "sequential"}, None, "sampling strategy was random, is sequential"),
        ({}, drop_a_sample, r"number of samples was 11, is 10 \(--data_path\)"),
        ({}, swap_two_samples, r"the ids of the samples differ \(--data_path\)"),
    ],
)
def test_a_position_in_other_data_is_an_error(
    gpt2_dir, texts, tmp_path, checkpoint: Path, changes: dict, edit: Callable | None, message: str
) -> None:
    if edit:
        edit(texts)
    argv = flags(gpt2_dir, texts, tmp_path / "other", **changes, resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=f"stands at step 3 of epoch 0 of other data.*{message}.*--ignore_data_skip"):
        main(argv)


def test_other_data_can_be_gone_on_with(gpt2_dir, texts, tmp_path, checkpoint: Path, trained, caplog) -> None:
    swap_two_samples(texts)
    argv = flags(gpt2_dir, texts, tmp_path / "other", resume_from_checkpoint=checkpoint, ignore_data_skip="true",
                 train_sampling_strategy="sequential", max_steps=7)  # fmt: skip
    trained.clear()
    with caplog.at_level(logging.WARNING):
        trainer = main(argv)
    assert "trained on other data" in caplog.text
    assert trained[:2] == [["s01", "s00"], ["s02", "s03"]]
    assert trainer.data.position(trainer.state.global_step) == (0, 4)


def test_without_a_data_state_the_step_tells_the_position(
    gpt2_dir, texts, tmp_path, trained, checkpoint: Path, caplog
) -> None:
    whole = list(trained)
    for name in ("data_state.json", "checksums.json"):  # Neither is in checkpoints of an earlier version.
        (checkpoint / name).unlink()
    with caplog.at_level(logging.WARNING):
        main(flags(gpt2_dir, texts, tmp_path / "other", resume_from_checkpoint=checkpoint, max_steps=6,
                   resume_changed="true"))  # fmt: skip
    assert "nothing tells whether the data are still its own" in caplog.text
    assert trained[: len(whole)] == whole
    assert ids(trained) == EVERYTHING


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_that_is_resumed_twice_within_an_epoch(gpt2_dir, tmp_path: Path, trained, accumulation: int) -> None:
    """The position is counted from where the resumed run began, in steps, whatever the micro-batches of a step."""
    texts = write_texts(tmp_path / "texts.json", 10 * accumulation)
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, "save_steps": 1}
    changes |= {"max_steps": 14, "logging_steps": 14}
    main(flags(gpt2_dir, texts, tmp_path / "whole", **changes))
    whole, output = list(trained), tmp_path / "parted"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", output / "checkpoint-3")
    for begin, end in ((3, 5), (5, 14)):
        trained.clear()
        main(flags(gpt2_dir, texts, output, **changes, resume_from_checkpoint=output / f"checkpoint-{begin}"))
        assert trained == whole[begin * accumulation :]
        position = json.loads((output / f"checkpoint-{end}" / "data_state.json").read_text())
        assert (position["epoch"], position["step"]) == divmod(end, 10)
        for folder in output.glob("checkpoint-*"):
            if int(folder.name.split("-")[1]) > 5:
                shutil.rmtree(folder)


def test_workers_that_stay_change_no_number(gpt2_dir, texts, tmp_path: Path) -> None:
    """Without workers, with one that stays for the second epoch, and resumed at its first step: dropout draws alike."""
    model = tmp_path / "model"
    shutil.copytree(gpt2_dir, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.2}))
    changes = {"max_steps": 8, "save_steps": 6}
    alone, stays = (
        main(flags(model, texts, tmp_path / str(workers), **changes, dataloader_num_workers=workers))
        for workers in (0, 1)
    )
    assert stays.get_train_dataloader().persistent_workers
    shutil.copytree(tmp_path / "1" / "checkpoint-6", tmp_path / "2" / "checkpoint-6")
    argv = flags(model, texts, tmp_path / "2", **changes, dataloader_num_workers=1, resume_from_checkpoint="auto")
    assert log_of(alone) == log_of(stays) == log_of(main(argv))


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_loss_of_an_evaluation_is_one_over_tokens(gpt2_dir, texts, tmp_path, read, strategy: str) -> None:
    trainer = main(flags(gpt2_dir, texts, tmp_path / "out", max_steps=1, save_strategy="no", eval_data_path=texts,
                         train_sampling_strategy=strategy))  # fmt: skip
    losses = []
    for trainer.args.per_device_eval_batch_size in (1, 3, 4, 16):
        read.clear()
        losses.append(trainer.evaluate()["eval_loss"])
        assert sorted(read) == EVERYTHING
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


RECORDING = """
import json, sys
from pathlib import Path
from llava.train import train, trainer
from llava.train.trainer import LlavaTrainer

seen = {"train": [], "eval": []}
for name, kind in (("training_step", "train"), ("prediction_step", "eval")):
    def record(self, model, inputs, *args, kind=kind, before=getattr(LlavaTrainer, name), **kwargs):
        seen[kind].append(inputs["sample_ids"])
        return before(self, model, inputs, *args, **kwargs)
    setattr(LlavaTrainer, name, record)
trained = train.main(sys.argv[2:])
seen["losses"] = [entry["eval_loss"] for entry in trained.state.log_history if "eval_loss" in entry]
Path(f"{sys.argv[1]}-{trained.args.process_index}.json").write_text(json.dumps(seen))
"""
"""A run that leaves the ids that each rank trained and evaluated on in a file of the rank."""


def test_two_ranks_share_an_uneven_epoch(gpt2_dir, tmp_path: Path, trained, warm_python: str) -> None:
    """Of nine samples, one rank has none in an epoch's last step. One process then goes on from their checkpoint."""
    data = write_texts(tmp_path / "nine.json", 9)
    script = tmp_path / "record.py"
    script.write_text(RECORDING)
    common = {"max_steps": 5, "save_steps": 2, "eval_data_path": data, "eval_strategy": "steps", "eval_steps": 3}
    common |= {"milestones": "20,21,60"}
    argv = flags(gpt2_dir, data, tmp_path / "two", **common, per_device_eval_batch_size=2)
    command = [warm_python, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON_EXEC": warm_python}
    ended = subprocess.run([*command, str(tmp_path / "rank"), *argv], capture_output=True, text=True, timeout=300,
                           env=environment, check=False)  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]

    steps = [one + other for one, other in zip(ranks[0]["train"], ranks[1]["train"], strict=True)]
    assert ids(steps[:3]) == EVERYTHING[:9]
    assert sorted(len(rank["train"][2]) for rank in ranks) == [0, 1]
    assert ids(ranks[0]["eval"][:3] + ranks[1]["eval"][:3]) == EVERYTHING[:9]

    # The same samples in the same steps as one process with twice the batch, and the same losses.
    single = {**common, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3}
    alone = main(flags(gpt2_dir, data, tmp_path / "one", **single))
    assert [sorted(step) for step in trained] == [sorted(step) for step in steps]
    losses = [entry["eval_loss"] for entry in alone.state.log_history if "eval_loss" in entry]
    assert ranks[0]["losses"] == pytest.approx(losses, rel=1e-4)
    for place in (".", "chck_20", "chck_60"):
        one, two = (load_file(tmp_path / name / place / "model.safetensors") for name in ("one", "two"))
        assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    # Throughput is that of both ranks together: by step and by sample they have what one process has.
    last = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][-1] for name in ("one", "two")
    ]
    for name in ("samples", "tokens", "supervised_tokens"):
        one, two = (line[f"train_{name}_per_second"] / line["train_steps_per_second"] for line in last)
        assert one == pytest.approx(two, rel=2e-3)
    # What was presented is counted over the ranks; the order of the data gives the same once more.
    counted = [(tmp_path / name / "exposure.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert counted[0] == counted[1]
    assert exposure.main([str(tmp_path / "two")]) == 0

    trained.clear()
    main(flags(gpt2_dir, data, tmp_path / "on", **single, resume_from_checkpoint=tmp_path / "two" / "checkpoint-2"))
    assert [sorted(step) for step in trained] == [sorted(step) for step in steps[2:]]
    rest = (tmp_path / "on" / "exposure.jsonl").read_text().splitlines()
    assert rest == [line for line in counted[0] if json.loads(line)["step"] > 2]
