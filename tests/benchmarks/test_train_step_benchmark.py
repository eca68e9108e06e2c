"""The benchmark of a training step runs, and its floor computes what the library computes."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import load_script
from torch import nn

from llava.data.collator import SupervisedCollator, model_inputs
from llava.data.module import make_supervised_data_module
from llava.model.loss import supervised_loss
from llava.train.arguments import DataArguments

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def train_step() -> ModuleType:
    return load_script("benchmarks/train_step.py")


def test_a_quick_run_reports_every_stage(train_step: ModuleType, tmp_path: Path, capsys) -> None:
    output = tmp_path / "result.json"
    flags = ["--full-logits", "--checkpointing", "--eager", "--kernels", "--before"]
    train_step.main(["--quick", "--repeats", "1", *flags, "--output", str(output)])
    report = json.loads(output.read_text())
    printed = capsys.readouterr().out
    for dtype in ("fp32", "bf16"):
        seconds = report[dtype]["seconds"]
        assert set(seconds) == {
            "library",
            "floor",
            "decode",
            "full_logits",
            "checkpointing",
            "eager",
            "kernels",
            "before",
        }
        for kind in set(seconds) - {"decode"}:
            assert seconds[kind]["total"] == pytest.approx(sum(seconds[kind][s] for s in train_step.STAGES), abs=1e-3)
        assert report[dtype]["over_floor"]["library"] > 0
        assert set(report[dtype]["gains"]) == {"language_model", "tower", "step"}
        assert f"{dtype}, CPU seconds a step" in printed


def test_the_floor_computes_the_librarys_loss_and_gradients(train_step: ModuleType, tmp_path: Path) -> None:
    sizes = train_step.QUICK
    tokenizer = train_step.build_tokenizer(sizes)
    torch.manual_seed(0)
    model = train_step.build_model(sizes, tokenizer)
    path = train_step.write_data(tmp_path, sizes)
    data = make_supervised_data_module(tokenizer, DataArguments(data_path=[str(path)]), model.vision, sizes.context)[
        "train_dataset"
    ]
    batch = model_inputs(SupervisedCollator(tokenizer.pad_token_id)([data[i] for i in range(sizes.batch)]))
    floor = train_step.Floor(model, batch, bf16=False)
    for module in (*model.modules(), *floor.decoder.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    model.train()
    loss = model(**batch).loss
    loss.backward()
    gradients = {
        name: p.grad for name, p in model.named_parameters() if "transformer.h." in name or "resampler" in name
    }
    model.zero_grad()
    found: dict[str, torch.Tensor] = {}
    keep = torch.optim.SGD(floor.parameters, lr=0.0)
    keep.register_step_pre_hook(lambda *_: found.update({n: p.grad for n, p in model.named_parameters()}))
    assert floor.step(train_step.Clock(), keep, max_grad_norm=1e9) == pytest.approx(loss.item(), rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_the_full_loss_equals_the_librarys(train_step: ModuleType) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 7, 8), nn.Linear(8, 11)
    labels = torch.randint(0, 11, (2, 7))
    labels[:, :3] = -100
    torch.testing.assert_close(train_step.full_loss(hidden, labels, head, 8), supervised_loss(hidden, labels, head, 8))
