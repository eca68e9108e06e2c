"""What only mixtures of experts have: the load balancing loss, and experts stored one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from llava.model.loading import load_model
from llava.train.parts import balance_experts

MIXTURES = ["llava_mixtral", "llava_qwen_moe"]


def text_batch(rows: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 300, (rows, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    mask[0, 7:] = 0
    labels[0, 7:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", MIXTURES)
def test_loss_equals_the_plain_class(name: str, backbone_dirs) -> None:
    ours = load_model(str(backbone_dirs[name])).model.eval()
    plain = AutoModelForCausalLM.from_pretrained(backbone_dirs[name]).eval()
    for balanced in (False, True):
        mine = ours(**text_batch(), output_router_logits=balanced)
        theirs = plain(**text_batch(), output_router_logits=balanced)
        torch.testing.assert_close(mine.loss, theirs.loss)
    torch.testing.assert_close(mine.aux_loss, theirs.aux_loss)
    assert [logits.shape for logits in mine.router_logits] == [logits.shape for logits in theirs.router_logits]


@pytest.mark.parametrize("name", MIXTURES)
def test_configuration_switches_it_on(name: str, backbone_dirs) -> None:
    model = load_model(str(backbone_dirs[name])).model.eval()
    without = model(**text_batch()).loss
    model.config.output_router_logits = True
    output = model(**text_batch())
    torch.testing.assert_close(output.loss, without + model.config.router_aux_loss_coef * output.aux_loss)


@pytest.mark.parametrize("name", MIXTURES)
def test_micro_batches_do_not_multiply_it(name: str, backbone_dirs) -> None:
    model = load_model(str(backbone_dirs[name])).model.eval()
    batch = text_batch()
    total = int((batch["labels"][:, 1:] != -100).sum())
    losses, balances, shares = [], [], []
    for row in range(len(batch["input_ids"])):
        part = {key: value[row : row + 1] for key, value in batch.items()}
        output = model(**part, num_items_in_batch=total, output_router_logits=True)
        losses.append(output.loss)
        balances.append(output.aux_loss)
        shares.append((part["labels"][:, 1:] != -100).sum() / total)
    entropy = model(**batch, output_router_logits=False).loss
    balance = sum(share * value for share, value in zip(shares, balances, strict=True))
    torch.testing.assert_close(sum(losses), entropy + model.config.router_aux_loss_coef * balance)


@pytest.mark.parametrize(
    ("name", "stored"), [("llava_mixtral", ".experts.3.w1."), ("llava_qwen_moe", ".experts.3.up_")]
)
def test_experts_are_stored_one_by_one_as_transformers_does(name: str, stored: str, load_tiny, tmp_path: Path) -> None:
    load_tiny(name).model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert any(stored in key for key in weights.keys())  # noqa: SIM118


@pytest.mark.parametrize(("weight", "used", "on"), [(None, 0.02, True), (0.5, 0.5, True), (0.0, 0.0, False)])
def test_training_switches_it_on(weight: float | None, used: float, on: bool, backbone_dirs) -> None:
    model = load_model(str(backbone_dirs["llava_mixtral"])).model
    balance_experts(model, weight)
    assert (model.config.router_aux_loss_coef, model.config.output_router_logits) == (used, on)


def test_a_weight_for_experts_that_are_not_there(gpt2_dir: Path) -> None:
    model = load_model(str(gpt2_dir)).model
    balance_experts(model, None)
    with pytest.raises(ValueError, match=r"--router_aux_loss_coef is 0\.1, but llava_gpt2 has no experts"):
        balance_experts(model, 0.1)
