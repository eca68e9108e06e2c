"""On ranks, trained vision parameters share one node of the graph: the same gradients, or zeros without media."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llava.model import llava_arch
from llava.model.grad_sync import UnusedVisionModules, encode_in_step
from llava.model.multimodal_projector.projectors import PROJECTORS
from llava.model.multimodal_resampler.base import RESAMPLERS

PROJECTOR_NAMES = [*PROJECTORS.names(), "mlp2x_gelu", "mlp1x_res1x_gelu"]
SMALL = {"perceiver_latents": 4, "perceiver_depth": 1, "qformer_depth": 1}

every_resampler = pytest.mark.parametrize("resampler", [None, *RESAMPLERS.names()])
every_projector = pytest.mark.parametrize("projector", PROJECTOR_NAMES)


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets models take this process for one rank among several."""
    return lambda: monkeypatch.setattr(llava_arch, "is_distributed", lambda: True)


def text_batch(loaded: Any) -> dict[str, Tensor]:
    ids = loaded.tokenizer("Il gatto dorme sul divano.", return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "labels": ids}


def video_batch(loaded: Any) -> dict[str, Any]:
    text = "".join(span.text for span in loaded.vision.layout.spans("video", 3)) + "ciao"
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    labels = torch.where(torch.isin(ids, torch.tensor(loaded.vision.visual_token_ids)), -100, ids)
    frames = torch.randint(0, 255, (3, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": labels, "images": [frames], "modalities": ["video"]}


def step(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients of one training step."""
    model.train().zero_grad()
    torch.manual_seed(0)  # masked_drop draws.
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@every_resampler
@every_projector
def test_text_gives_zeros_whatever_the_vision_modules_hold(
    load_tiny, as_rank, projector: str, resampler: str | None
) -> None:
    loaded = load_tiny(projector_type=projector, resampler_type=resampler, **SMALL)
    decoder = loaded.model.get_model()
    vision = [module for module in (decoder.mm_projector, decoder.vision_resampler) if module is not None]
    for module in vision:
        module.register_forward_hook(lambda *_: pytest.fail("a vision module ran for a batch of text"))
        for parameter in module.parameters():
            parameter.data.fill_(float("inf"))
    loss, expected = step(loaded.model, text_batch(loaded))
    as_rank()
    rank_loss, gradients = step(loaded.model, text_batch(loaded))
    assert torch.equal(loss, rank_loss)
    of_vision = {id(parameter) for module in vision for parameter in module.parameters()}
    for name, parameter in loaded.model.named_parameters():
        if id(parameter) in of_vision:
            assert expected[name] is None
            assert torch.equal(gradients[name], torch.zeros_like(parameter)), name
        elif parameter.requires_grad:
            assert torch.equal(gradients[name], expected[name]), name
    assert decoder.used_vision_modules == set()


@every_resampler
def test_a_video_gives_the_gradients_of_one_process(load_tiny, as_rank, resampler: str | None) -> None:
    loaded = load_tiny(resampler_type=resampler, **SMALL)
    loss, expected = step(loaded.model, video_batch(loaded))
    as_rank()
    rank_loss, gradients = step(loaded.model, video_batch(loaded))
    assert torch.equal(loss, rank_loss)
    assert all(torch.equal(gradients[name], grad) for name, grad in expected.items() if grad is not None)
    has_weights = resampler in ("fast_slow_resampler", "perceiver", "qformer")
    trained = {"mm_projector", "vision_resampler"} if has_weights else {"mm_projector"}
    assert loaded.model.get_model().used_vision_modules == trained


def test_vision_gradients_follow_the_language_models_in_one_order(load_tiny, as_rank) -> None:
    loaded = load_tiny(resample_images=True)
    as_rank()
    arrived: list[str] = []
    for name, parameter in loaded.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    orders = []
    for batch in (text_batch(loaded), video_batch(loaded)):
        step(loaded.model, batch)
        orders.append(list(arrived))
        arrived.clear()
    assert orders[0] == orders[1]
    vision = [name for name in orders[0] if "mm_projector" in name or "vision_resampler" in name]
    assert orders[0][-len(vision) :] == vision


def test_frozen_vision_modules_are_not_tied_in(load_tiny) -> None:
    decoder = load_tiny().model.get_model()
    decoder.requires_grad_(False)
    (anchor,) = encode_in_step(decoder, None)
    assert anchor.shape == (0, 32)
    assert not anchor.requires_grad
    features, _ = encode_in_step(decoder, ([torch.zeros(3, 3, 56, 56)],))
    assert features.shape == (39, 32)


def optimizer_groups(**modules: nn.Module) -> list[dict]:
    return [{"params": list(module.parameters()), "vision_module": None if name == "language_model" else name}
            for name, module in modules.items()]  # fmt: skip


def test_where_vision_alone_trains_a_gradient_of_zero_moves_nothing() -> None:
    resampler, used = nn.Linear(2, 2), set[str]()
    optimizer = torch.optim.AdamW(optimizer_groups(vision_resampler=resampler), lr=0.1)
    unused = UnusedVisionModules(used, True, torch.device("cpu"))
    optimizer.register_step_pre_hook(unused.before_optimizer_step)
    for module, moves in ((None, False), ("vision_resampler", True)):
        unused.on_step_begin()
        used |= {module} if module else set()
        before = resampler.weight.detach().clone()
        resampler.weight.grad = torch.zeros_like(resampler.weight)
        optimizer.step()
        assert (not torch.equal(resampler.weight, before)) is moves  # by weight decay


def test_a_module_moves_as_a_whole_or_not_at_all() -> None:
    """In one process: AdamW leaves vision modules alone that no micro-batch of the step used."""
    language_model, resampler = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(optimizer_groups(language_model=language_model, vision_resampler=resampler), lr=0.1)
    unused = UnusedVisionModules(set(), False, torch.device("cpu"))
    optimizer.register_step_pre_hook(unused.before_optimizer_step)

    def step(*used: nn.Parameter) -> None:
        optimizer.zero_grad()
        unused.on_step_begin()
        sum(parameter.sum() for parameter in (language_model.weight, *used)).backward()
        optimizer.step()

    step(resampler.weight)
    assert optimizer.state[resampler.bias]["step"] == 1
    assert language_model.bias not in optimizer.state
    before = [tensor.clone() for p in resampler.parameters() for tensor in (p, *optimizer.state[p].values())]
    step()
    after = [tensor for p in resampler.parameters() for tensor in (p, *optimizer.state[p].values())]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert optimizer.state[language_model.weight]["step"] == 2
    step(resampler.bias)
    assert optimizer.state[resampler.weight]["step"] == 2
