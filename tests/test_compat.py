"""Names that differ between releases of transformers and peft."""

from __future__ import annotations

import importlib.metadata
import inspect
import math
from contextlib import nullcontext

import pytest
import torch
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from llava.compat import cache_name, choose_cache, linear_by_onednn
from llava.train.trainer import LlavaTrainer


def test_a_cache_is_taken_by_either_name(load_tiny) -> None:
    loaded = load_tiny("llava_gpt2")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        whole = loaded.model(input_ids=ids).logits[:, -1]
        for name in ("cache", "past_key_values"):
            first = loaded.model(input_ids=ids[:, :3], use_cache=True)
            second = loaded.model(input_ids=ids[:, 3:], use_cache=True, **{name: getattr(first, cache_name())})
            assert getattr(second, cache_name()).get_seq_length() == 4, name
            torch.testing.assert_close(second.logits[:, -1], whole, atol=1e-5, rtol=1e-5)


def test_two_caches_are_refused() -> None:
    one, other = object(), object()
    assert choose_cache(one, None) is choose_cache(None, one) is choose_cache(one, one) is one
    assert choose_cache(None, None) is None
    with pytest.raises(ValueError, match="two names of one argument"):
        choose_cache(one, other)


def test_the_cache_is_handed_on_without_a_warning(load_tiny, recwarn, caplog) -> None:
    loaded = load_tiny("llava_gpt2")
    loaded.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    said = [str(warning.message) for warning in recwarn] + caplog.messages
    assert [text for text in said if "past_key_values" in text] == []
    assert cache_name() in loaded.model(torch.tensor([[5, 6, 7]]), use_cache=True)


def test_an_old_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft: pip install 'llava-babylm[lora]'")
    from llava.model.lora import check_peft

    check_peft()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0")
    with pytest.raises(ValueError, match=r"need peft 0\.21 or newer, and 0\.20\.0 is installed"):
        check_peft()


OVERRIDDEN = {
    "_get_grad_norm",
    "_init_training_state",
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_save_checkpoint",
}
"""Private methods of transformers' trainer that ours overrides: no more than these, and all of them still exist."""


def test_few_private_methods_of_transformers_are_overridden() -> None:
    theirs = {name for name in vars(Trainer) if name.startswith("_") and not name.startswith("__")}
    assert theirs & set(vars(LlavaTrainer)) == OVERRIDDEN


PUBLIC = {"get_batch_samples", "training_step", "compute_loss", "prediction_step", "log", "save_model", "train"}


@pytest.mark.parametrize("name", sorted(OVERRIDDEN | PUBLIC))
def test_what_is_overridden_takes_the_same_arguments(name: str) -> None:
    theirs, ours = (inspect.signature(getattr(owner, name)).parameters for owner in (Trainer, LlavaTrainer))
    takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in ours.values())
    assert takes_all or list(ours) == list(theirs)


@pytest.mark.parametrize(
    "name",
    ["_load_rng_state", "_maybe_log_save_evaluate", "_save_optimizer_and_scheduler",
     "_save_rng_state", "_save_scaler"],
)  # fmt: skip
def test_private_methods_that_are_called_exist(name: str) -> None:
    assert callable(getattr(Trainer, name))


@pytest.mark.parametrize("shape", [(5, 64), (3, 5, 64)])
def test_products_by_onednn_are_the_same_forward_and_backward(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    modules = (torch.nn.Linear(64, 48), torch.nn.Linear(64, 48, bias=False), Conv1D(48, 64))
    for module in modules:
        found = []
        for products in (nullcontext(), linear_by_onednn()):
            rows = torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_()
            module.zero_grad()
            with products:
                output = module(rows)
            (output.sin().sum()).backward()
            found.append([output, rows.grad, *(p.grad for p in module.parameters())])
        for plain, other in zip(*found, strict=True):
            torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)
        assert "LinearBackward" in type(output.grad_fn).__name__ or "View" in type(output.grad_fn).__name__
    with torch.no_grad(), linear_by_onednn():
        torch.testing.assert_close(modules[0](rows), modules[0](rows.double().float()))
        assert not modules[0](rows).requires_grad


def test_products_by_onednn_leave_other_types_alone() -> None:
    linear, rows = torch.nn.Linear(64, 48), torch.randn(3, 64)
    with linear_by_onednn(), linear_by_onednn():
        assert linear.bfloat16()(rows.bfloat16()).dtype == torch.bfloat16
        linear.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(rows).dtype == torch.bfloat16
        assert linear(rows[:0]).shape == (0, 48)
        assert linear(rows[0]).shape == (48,)
        assert linear.double()(rows.double()).dtype == torch.float64


@pytest.mark.parametrize("bias", [torch.ones(1), torch.arange(3.0)[:1].expand(48), torch.linspace(0, 1, 96)[::2]])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_products_by_onednn_read_any_bias(bias: torch.Tensor, is_transposed: bool) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(5, 64), torch.randn(48, 64, requires_grad=True)

    def multiply() -> torch.Tensor:
        if is_transposed:
            return torch.addmm(bias, rows, weight.t())
        return torch.nn.functional.linear(rows, weight, bias)

    expected = multiply()
    with linear_by_onednn():
        torch.testing.assert_close(multiply(), expected, rtol=1e-5, atol=1e-5)


def test_products_by_onednn_keep_no_rows_of_frozen_layers() -> None:
    weight, start = torch.ones(48, 64), torch.ones(5, 64, requires_grad=True)
    kept: list[torch.Size] = []
    with linear_by_onednn(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        rows = start.clone()
        output = torch.nn.functional.linear(rows, weight)
        rows.zero_()  # which plain PyTorch allows: no gradient needs them
        output.sum().backward()
    assert kept == [weight.shape]
    assert start.grad.eq(48).all()


@pytest.mark.parametrize("power", [1, 2])
def test_products_by_onednn_have_second_derivatives(power: int) -> None:
    found = []
    for products in (nullcontext(), linear_by_onednn()):
        torch.manual_seed(0)
        rows, weight = torch.randn(3, 2, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
        with products:
            (first,) = torch.autograd.grad(
                torch.nn.functional.linear(rows, weight).pow(power).sum(), rows, create_graph=True
            )
            first.pow(2).sum().backward()
        found.append(weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
