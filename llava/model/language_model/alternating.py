"""Alternating attention: every other layer looks at one modality only.

Layers are counted from 0. Even layers and the last one are causal as usual. In the others a token
sees, of what a causal layer shows it,

- ``alternating``: the tokens of its own modality (text, or images and videos);
- ``alternating_cross``: the tokens of the other modality, and itself. Up to the first image or video
  there is no other modality, and there the layer stays causal: text alone is modelled as by the plain
  model, and what a token sees never depends on what comes after it.

transformers hands keyword arguments of a decoder down to its attention function, so one function
serves all backbones whose attention goes through ``AttentionInterface``. For the others
(``LlavaMetaModel.has_attention_interface``) both masks travel as one, and each layer takes its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, eager_mask, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava.compat import OwnAttention, choose_cache
from llava.model.backbones import VARIANTS, variant_type
from llava.model.llava_arch import CACHE, LlavaMetaForCausalLM
from llava.model.packing import PREFIX_OF_COPY, PackedMask, attend, current_layout, eager_attention, make_mask
from llava.model.visual import VISION_MODULES

if TYPE_CHECKING:  # What the mixins are mixed into; at run time each backbone brings its own.
    from llava.model.llava_arch import LlavaMetaForCausalLM as _LanguageModel
    from llava.model.llava_arch import LlavaMetaModel as _Decoder
else:
    _Decoder = _LanguageModel = object

_PREFIX = PREFIX_OF_COPY + "alternating_"


class AttentionLayer(Protocol):
    """What is needed of a layer's attention module in transformers."""

    layer_idx: int
    config: PretrainedConfig
    was_restricted: bool


def is_restricted(layer: int, num_layers: int) -> bool:
    """Whether a layer looks at one modality only."""
    return layer % 2 == 1 and layer != num_layers - 1


def forbidden_keys(
    variant: str, modality_ids: Tensor, num_queries: int, first_positions: Tensor | None = None
) -> Tensor:
    """Which keys a restricted layer hides, beside those that a causal one does.

    Args:
        variant: "alternating" or "alternating_cross".
        modality_ids: bool (batch, keys), true for images and videos; covers the cache too.
        num_queries: the last so many of the keys are the queries' own.
        first_positions: int64 (batch, keys), of rows with several samples: where each position's sample begins.

    Returns:
        bool (batch, 1, queries, keys), true where a key is hidden; never true for a query's own.
    """
    num_keys = modality_ids.shape[1]
    queries = modality_ids[:, num_keys - num_queries :]
    same = queries[:, :, None] == modality_ids[:, None, :]  # (batch, queries, keys)
    if variant == "alternating":
        return ~same[:, None]
    positions = torch.arange(num_keys, device=modality_ids.device)
    is_other = positions[num_keys - num_queries :, None] != positions  # (queries, keys): false for a query's own
    # Up to the first image or video there is nothing else to look at: nothing is hidden there.
    num_seen = modality_ids.cumsum(1)  # (batch, keys)
    if first_positions is not None:
        num_seen = num_seen - (num_seen - modality_ids.long()).gather(1, first_positions)
    has_seen = num_seen[:, num_keys - num_queries :] > 0  # (batch, queries)
    return (same & is_other & has_seen[:, :, None])[:, None]


class AlternatingAttention(OwnAttention):
    """What a decoder and its language model have in common: the attention functions they may run on."""

    attention_prefix = _PREFIX

    def check_attention(self, name: str | None) -> None:
        if name not in (None, "sdpa", "eager"):
            raise ValueError(
                f"--attn_implementation is {name!r}, which takes no mask of single tokens, and "
                "alternating attention is such a mask; use sdpa or eager"
            )


class AlternatingModel(AlternatingAttention, _Decoder):
    """Mixin for a decoder; put it first.

    ``forward`` takes one more argument, ``modality_ids`` (see ``forbidden_keys``); what it was given for
    the tokens in a cache, the cache keeps. Without it there is no image and no video, and every layer
    is causal.
    """

    variant: ClassVar[str]
    _is_tried = False

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        if not self.has_attention_interface:
            # Such a decoder hands its layers a mask and nothing else: it is given two in one, see _join_masks.
            take_mask = partial(_take_mask, num_layers=config.num_hidden_layers)
            for name, module in self.named_modules():
                if hasattr(module, "layer_idx") and not name.startswith(VISION_MODULES):
                    module.register_forward_pre_hook(take_mask, with_kwargs=True)
        elif not self.layers_hand_down:
            for name, module in self.named_modules():
                if hasattr(module, "layer_idx") and not name.startswith(VISION_MODULES):
                    layer = self.get_submodule(name.rpartition(".")[0])
                    layer.register_forward_pre_hook(partial(_keep_forbidden, module), with_kwargs=True)
                    module.register_forward_pre_hook(_hand_down, with_kwargs=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        modality_ids: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        cache = choose_cache(cache, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        num_queries = inputs_embeds.shape[1]
        modality_ids = _complete(modality_ids, cache, num_queries)  # (batch, past + queries)
        if modality_ids is not None:
            layout = current_layout()
            if not self.has_attention_interface:
                first = None if layout is None else layout.first_positions
                forbidden = forbidden_keys(self.variant, modality_ids, num_queries, first)  # (batch, 1, queries, keys)
                attention_mask = _join_masks(self.config, inputs_embeds, attention_mask, cache, forbidden)
            elif layout is None:
                kwargs["forbidden"] = forbidden_keys(self.variant, modality_ids, num_queries)
            else:  # By sample, as attention runs: (samples, 1, longest, longest) for each group.
                groups = layout.split(modality_ids)
                kwargs["forbidden"] = [forbidden_keys(self.variant, ids, ids.shape[1]) for ids in groups]
        outputs = super().forward(
            attention_mask=attention_mask, inputs_embeds=inputs_embeds, **{CACHE: cache}, **kwargs
        )
        if "forbidden" in kwargs and not self._is_tried:
            self._check_restricted()
        if (filled := getattr(outputs, CACHE)) is not None:
            # The next step's tokens have to know which of those before them were visual.
            filled.modality_ids = modality_ids
        return outputs

    def _check_restricted(self) -> None:
        """A ValueError if no layer was given what it must not see; a plug-in would be causal, and nothing say so."""
        count = self.config.num_hidden_layers
        restricted = any(is_restricted(layer, count) for layer in range(count))
        if restricted and not any(getattr(module, "was_restricted", False) for module in self.modules()):
            raise ValueError(
                f"the layers of {type(self).__name__} keep keyword arguments to themselves, and alternating "
                "attention is handed to them so; say layers_hand_down = False in its decoder (docs/extending.md)"
            )
        self._is_tried = True


class AlternatingForCausalLM(AlternatingAttention, _LanguageModel):
    """Mixin for a language model with head whose decoder is an ``AlternatingModel``; put it first."""

    def decoder_inputs(self, input_ids: Tensor | None) -> dict[str, Tensor]:
        assert self.vision is not None
        assert input_ids is not None
        visual = torch.tensor(self.vision.visual_token_ids, device=input_ids.device)
        return {"modality_ids": torch.isin(input_ids, visual)}

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        prompt_embeds: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if inputs_embeds is not None:
            raise ValueError(
                "inputs_embeds do not tell which positions are visual, which alternating attention has to know; pass "
                "input_ids, with images where there are any"
            )
        prepared = super().prepare_inputs_for_generation(input_ids, prompt_embeds=prompt_embeds, **kwargs)
        # Of all tokens so far, in the order in which a beam search may have put the texts since.
        return prepared if prompt_embeds is None else {**prepared, **self.decoder_inputs(input_ids)}


def make_variant(backbone: type[LlavaMetaForCausalLM], variant: str) -> type[Any]:
    """The language model with head of a family with alternating attention; it names its configuration and its decoder.

    Args:
        backbone: language model with head and causal attention.
        variant: "alternating" or "alternating_cross".
    """
    prefix = backbone.__name__.removesuffix("ForCausalLM") + VARIANTS[variant]

    def derive(name: str, *bases: type, **attributes: object) -> Any:
        doc = f"``{bases[-1].__name__}`` with the attention of ``llava.model.language_model.alternating``."
        return type(prefix + name, bases, {"__module__": "llava.model", "__doc__": doc, **attributes})

    model_type = variant_type(backbone.config_class.model_type, variant)
    config_class = derive("Config", backbone.config_class, model_type=model_type)
    decoder = derive("Model", AlternatingModel, backbone.decoder_class, config_class=config_class, variant=variant)
    return derive("ForCausalLM", AlternatingForCausalLM, backbone, config_class=config_class, decoder_class=decoder)


def _complete(modality_ids: Tensor | None, cache: Cache | None, num_queries: int) -> Tensor | None:
    """``modality_ids`` over the cache and the input; by default the cache's, and text behind them."""
    past = 0 if cache is None else cache.get_seq_length()
    known = getattr(cache, "modality_ids", None) if past else None
    if modality_ids is None and known is not None:
        return torch.nn.functional.pad(known, (0, num_queries))
    if modality_ids is not None and modality_ids.shape[1] == num_queries and known is not None:
        return torch.cat([known, modality_ids], dim=1)
    if modality_ids is not None and modality_ids.shape[1] != past + num_queries:
        raise ValueError(
            f"modality_ids cover {modality_ids.shape[1]} tokens, but {past} are in the cache and {num_queries} come "
            "now; give one for each"
        )
    return modality_ids


def _attend(
    attention_function: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedMask | None,
    forbidden: Tensor | list[Tensor] | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """An attention function for ``AttentionInterface``: ``attention_function`` under the layer's own mask."""
    layer = cast(AttentionLayer, module)
    if forbidden is not None and is_restricted(layer.layer_idx, layer.config.num_hidden_layers):
        if isinstance(attention_mask, PackedMask):
            pairs = zip(attention_mask.groups, forbidden, strict=True)
            groups = [_restrict(mask, hidden, hidden.shape[-1]) for mask, hidden in pairs]
            attention_mask = PackedMask(attention_mask.layout, groups)
        else:
            assert isinstance(forbidden, Tensor)
            attention_mask = _restrict(attention_mask, forbidden, key.shape[2])
        layer.was_restricted = True
    return attend(attention_function, module, query, key, value, attention_mask, **kwargs)


def _restrict(attention_mask: Tensor | None, forbidden: Tensor, num_keys: int) -> Tensor:
    """Hide keys in a mask of transformers: bool (true is seen), added to scores, or None (causal)."""
    num_queries = forbidden.shape[2]
    # A cache with a sliding window holds the last keys only, one of fixed size has room behind them.
    forbidden = forbidden[..., -num_keys:]  # (batch, 1, queries, keys)
    forbidden = torch.nn.functional.pad(forbidden, (0, num_keys - forbidden.shape[-1]))
    if attention_mask is None:
        seen = ~forbidden
        return seen.tril() if num_queries > 1 else seen
    if attention_mask.dtype == torch.bool:
        return attention_mask & ~forbidden
    return attention_mask.masked_fill(forbidden, torch.finfo(attention_mask.dtype).min)


def _join_masks(
    config: PretrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    forbidden: Tensor,
) -> Tensor:
    """Both masks as one bool (batch, 2, queries, keys), true where a key is hidden: causal, and restricted."""
    given: dict[str, Any] = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, CACHE: cache}
    added = cast(Tensor, create_causal_mask(config=config, **given))  # 0 where seen, else the lowest number
    causal = added.to(torch.bool)  # (batch, 1, queries, keys)
    return torch.cat([causal, causal | forbidden], dim=1)


def _take_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], num_layers: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hook before a layer's attention: of two packed masks, the one for this layer."""
    mask = kwargs["attention_mask"]
    if mask is not None and mask.shape[1] == 2:
        row = int(is_restricted(cast(AttentionLayer, module).layer_idx, num_layers))
        kwargs["attention_mask"] = mask[:, row : row + 1]
    return args, kwargs


def _keep_forbidden(attention: nn.Module, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hook before a layer, also when gradient checkpointing runs it again: what its attention is to have of it."""
    vars(attention)["forbidden"] = kwargs.get("forbidden")


def _hand_down(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hook before a layer's attention: what the layer has kept to itself."""
    return args, {**kwargs, "forbidden": vars(attention)["forbidden"]}


AttentionInterface.register(_PREFIX + "sdpa", partial(_attend, sdpa_attention_forward))
AttentionInterface.register(_PREFIX + "eager", partial(_attend, eager_attention))
AttentionMaskInterface.register(_PREFIX + "sdpa", partial(make_mask, sdpa_mask))
AttentionMaskInterface.register(_PREFIX + "eager", partial(make_mask, eager_mask))
