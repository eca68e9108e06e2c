"""Where the trained vision parameters enter the graph of a step that several ranks take together.

A rank's batch may hold videos while another's is text alone, and yet the collectives of DDP and ZeRO
wait for a gradient of every parameter on every rank, ZeRO in the same order. So all trained vision
parameters pass one node of the graph, the gate, whatever is done with them behind it. Its backward
pass hands out all their gradients at once, in their own order, zeros where nothing was encoded. A rank
without media runs no vision module: nothing is computed that could overflow or take time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llava.model.visual import vision_module_of


class _Gate(torch.autograd.Function):
    """Hands parameters on as they are, with an empty (0, width) tensor that ties them to the loss of any batch."""

    @staticmethod
    def forward(ctx: Any, used: set[str], width: int, names: list[str], *parameters: Tensor) -> tuple[Tensor, ...]:
        # None says that nothing was encoded with a parameter; a gradient of zeros would not.
        ctx.set_materialize_grads(False)
        ctx.used, ctx.names, ctx.parameters = used, names, parameters
        return parameters[0].new_empty((0, width)), *(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        own = gradients[1:]
        for name, gradient in zip(ctx.names, own, strict=True):
            if gradient is not None:
                ctx.used.add(vision_module_of(name))
        pairs = zip(own, ctx.parameters, strict=True)
        complete = [torch.zeros_like(parameter) if gradient is None else gradient for gradient, parameter in pairs]
        return None, None, None, *complete


class _Encoder(nn.Module):
    """``encode_media`` of a decoder as a module, which can be called with other tensors for its parameters."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, *media: Any) -> list[Tensor]:
        return self.decoder.encode_media(*media)


def encode_through_gate(decoder: Any, media: tuple[Any, ...] | None) -> list[Tensor]:
    """Encode media on a training step of one rank among several.

    Call it before anything else of the step is computed: what enters a graph first leaves its backward
    pass last, so that the vision gradients follow those of the language model on every rank.

    Args:
        decoder: a ``LlavaMetaModel`` with vision modules. ``decoder.used_vision_modules`` gains, in the
            backward pass, the names of those that this rank's media passed.
        media: the arguments of ``encode_media``, or None for a batch of text alone.

    Returns:
        What ``encode_media`` gives and, last, an empty (0, width) tensor. It joins no token, yet ties
        every trained vision parameter into the graph.
    """
    width = decoder.get_input_embeddings().embedding_dim
    trained = {name: parameter for name, parameter in decoder.named_parameters() if _is_trained(name, parameter)}
    if not trained:
        encoded = [] if media is None else decoder.encode_media(*media)
        return [*encoded, torch.empty((0, width), device=decoder.device)]
    names = list(trained)
    anchor, *tensors = _Gate.apply(decoder.used_vision_modules, width, names, *trained.values())
    if media is None:
        return [anchor]
    gated = {f"decoder.{name}": tensor for name, tensor in zip(names, tensors, strict=True)}
    return [*functional_call(_Encoder(decoder), gated, media), anchor]


def _is_trained(name: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and vision_module_of(name) is not None
