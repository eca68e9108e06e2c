"""Gradient synchronisation: ranks whose batches hold different modalities stay in step.

A rank's batch may hold videos while another's is text alone, and yet the collectives of DDP and ZeRO wait for a
gradient of every parameter on every rank, ZeRO in the same order. So on each rank all trained vision parameters pass
one node of the graph, whatever is done with them behind it. Its backward pass hands out all their gradients at once,
in their own order, zeros where nothing was encoded. A rank without media runs no vision module: nothing is computed
that could overflow or take time.

So it is on one process where nothing but vision modules trains: a batch of text alone has a backward pass too.

A gradient of zero is not none, though: ``UnusedVisionModules`` keeps the optimizer from moving what no rank used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed
from torch import Tensor, nn
from torch.func import functional_call
from transformers import TrainerCallback

from llava.model.coordinates import CoordinateEmbeddings
from llava.model.visual import VISION_MODULES, vision_module_of
from llava.types import MediaKind

MediaArguments = tuple[
    list[Tensor] | Tensor, list[MediaKind] | None, list[tuple[int, int]] | None, CoordinateEmbeddings | None
]
"""Arguments of ``encode_media``: images, modalities, image sizes and the tables of coordinates."""


class SeeingDecoder(Protocol):
    """What is needed of a decoder with vision modules, which is a ``LlavaMetaModel``."""

    used_vision_modules: set[str]

    @property
    def device(self) -> torch.device: ...

    def get_input_embeddings(self) -> nn.Embedding: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def encode_media(
        self,
        images: list[Tensor] | Tensor,
        modalities: list[MediaKind] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        tables: CoordinateEmbeddings | None = None,
    ) -> list[Tensor]: ...


class _Context(Protocol):
    """What autograd keeps between the two passes of ``_AllTrained``."""

    used: set[str]
    names: list[str]
    parameters: tuple[Tensor, ...]

    def set_materialize_grads(self, value: bool) -> None: ...


class _AllTrained(torch.autograd.Function):
    """Hands parameters on as they are, with an empty (0, width) tensor that ties them to the loss of any batch."""

    @staticmethod
    def forward(ctx: _Context, used: set[str], width: int, names: list[str], *parameters: Tensor) -> tuple[Tensor, ...]:
        # None says that nothing was encoded with a parameter; a gradient of zeros would not.
        ctx.set_materialize_grads(False)
        ctx.used, ctx.names, ctx.parameters = used, names, parameters
        return parameters[0].new_empty((0, width)), *(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        own = gradients[1:]  # The first is the anchor's, which holds nothing.
        for name, gradient in zip(ctx.names, own, strict=True):
            module = vision_module_of(name)
            if gradient is not None and module is not None:
                ctx.used.add(module)
        pairs = zip(own, ctx.parameters, strict=True)
        complete = [torch.zeros_like(parameter) if gradient is None else gradient for gradient, parameter in pairs]
        return None, None, None, *complete


class _Encoder(nn.Module):
    """``encode_media`` of a decoder as a module, which can be called with other tensors for its parameters."""

    def __init__(self, decoder: SeeingDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, *media: object) -> list[Tensor]:
        return self.decoder.encode_media(*media)  # type: ignore[arg-type] # functional_call hands MediaArguments on.


def encode_in_step(decoder: SeeingDecoder, media: MediaArguments | None) -> list[Tensor]:
    """Encode the media of one rank among several, so that the gradients of all ranks stay in step.

    Call it before anything else of the step is computed: what enters a graph first leaves its backward
    pass last, so that the vision gradients follow those of the language model on every rank.

    Args:
        decoder: a ``LlavaMetaModel``; the backward pass enters the modules that media passed into its
            ``used_vision_modules``.
        media: the arguments of ``encode_media``, or None for a batch of text alone.

    Returns:
        What ``encode_media`` gives and, last, an empty (0, width) tensor that ties all trained vision parameters in.
    """
    # Frozen modules stay out: no collective waits for a gradient of theirs.
    width = decoder.get_input_embeddings().embedding_dim
    trained = {name: parameter for name, parameter in decoder.named_parameters() if _is_trained(name, parameter)}
    if not trained:
        encoded = [] if media is None else decoder.encode_media(*media)
        return [*encoded, torch.empty((0, width), device=decoder.device)]
    names = list(trained)
    # One node for all parameters: their gradients come out in one order on every rank, whatever its batch shows.
    anchor, *tensors = _AllTrained.apply(decoder.used_vision_modules, width, names, *trained.values())
    if media is None:
        return [anchor]
    # The modules compute with these stand-ins, so that every gradient passes the node above.
    joined = {f"decoder.{name}": tensor for name, tensor in zip(names, tensors, strict=True)}
    return [*functional_call(_Encoder(decoder), joined, media), anchor]


def trains_vision_alone(decoder: SeeingDecoder) -> bool:
    """Whether vision modules train and nothing else does: a batch of text alone would then have no gradient at all."""
    # True at the first parameter, as a rule: the language model's embeddings.
    return not any(p.requires_grad and vision_module_of(name) is None for name, p in decoder.named_parameters())


def _is_trained(name: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and vision_module_of(name) is not None


class UnusedVisionModules(TrainerCallback):
    """Takes vision modules that no rank had media for out of an optimizer's step.

    AdamW decays weights and moments for a gradient of zero all the same, and counts a step. A module moves as a whole
    if any of its parameters was used by any micro-batch of any rank, and else not at all; so it is with every engine.

    Args:
        used: the model's ``used_vision_modules``, which the backward passes of the step fill.
        in_step: whether they do so on one process too (``trains_vision_alone``); among several ranks they always do.
        device: where the ranks' small collective runs, one for each step of the optimizer.
    """

    def __init__(self, used: set[str], in_step: bool, device: torch.device) -> None:
        self.used = used
        self.in_step = in_step
        self.device = device
        self._moving: set[str] | None = None

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.used.clear()
        self._moving = None

    def before_optimizer_step(self, optimizer: torch.optim.Optimizer, *args: object) -> None:
        """Hook for ``Optimizer.register_step_pre_hook``; groups say in ``vision_module`` what they hold.

        ZeRO steps group by group, with flat shares of the parameters in the groups.
        """
        if self._moving is None:  # Once a step: ZeRO comes here for each group, and ranks must agree as often.
            alone = self.used if self.in_step else _modules_with_gradients(optimizer)
            self._moving = self._agree() if is_distributed() else set(alone)
        # No gradient at all is the one way to tell AdamW to leave a parameter alone, its step count and decay included.
        for group in optimizer.param_groups:
            module = group["vision_module"]
            for parameter in group["params"] if module is not None else ():
                if module not in self._moving:
                    parameter.grad = None
                elif parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _agree(self) -> set[str]:
        """The modules that were used on any rank."""
        # A rank's own backward pass knows its own media alone; the maximum is whether any rank had some.
        flags = torch.tensor([module in self.used for module in VISION_MODULES], dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return {module for module, flag in zip(VISION_MODULES, flags.tolist(), strict=True) if flag}


def is_distributed() -> bool:
    """Whether this process is one of a group; the group may have no other member."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _modules_with_gradients(optimizer: torch.optim.Optimizer) -> set[str]:
    def has_gradient(parameters: list[Tensor]) -> bool:
        return any(parameter.grad is not None for parameter in parameters)

    return {group["vision_module"] for group in optimizer.param_groups if has_gradient(group["params"])}
