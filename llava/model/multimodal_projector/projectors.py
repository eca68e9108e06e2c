"""The projectors."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from llava.registry import Registry

PROJECTORS: Registry[Callable[[int, int], nn.Module]] = Registry("projector")

_MLP_NAME = re.compile(r"mlp([1-9]\d*)x_gelu")


@PROJECTORS.register("linear")
def build_linear(input_size: int, output_size: int) -> nn.Module:
    return nn.Linear(input_size, output_size)


def parse_mlp(name: str) -> int | None:
    """The number of linear layers in a name like ``mlp2x_gelu``, or None for another name."""
    match = _MLP_NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def build_mlp(input_size: int, output_size: int, depth: int) -> nn.Module:
    """``depth`` linear layers with GELU between them; the first one changes the width."""
    layers: list[nn.Module] = [nn.Linear(input_size, output_size)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(output_size, output_size)]
    return nn.Sequential(*layers)
