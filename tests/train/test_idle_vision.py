"""In one process: AdamW leaves vision modules alone that no micro-batch of the step used."""

from __future__ import annotations

import torch
from torch import nn

from llava.model.grad_sync import IdleVision


def groups(**modules: nn.Module) -> list[dict]:
    return [{"params": list(module.parameters()), "vision_module": None if name == "language_model" else name}
            for name, module in modules.items()]  # fmt: skip


def test_a_module_moves_as_a_whole_or_not_at_all() -> None:
    language_model, resampler = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(groups(language_model=language_model, vision_resampler=resampler), lr=0.1)
    idle = IdleVision(set(), torch.device("cpu"))
    optimizer.register_step_pre_hook(idle.before_optimizer_step)

    def step(*used: nn.Parameter) -> None:
        optimizer.zero_grad()
        idle.on_step_begin()
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
