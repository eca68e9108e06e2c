"""Tensor names of the LLaVA family and of transformers' own class, and what each is called here: tables of patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class Rule(NamedTuple):
    """A pattern that part of a name matches, and what stands there instead, ``{decoder}`` and ``{head}`` filled in."""

    pattern: str
    replacement: str


FAMILY_NAMES = (
    # LLaVA-ST's packer has three blocks of one class, whose queries, keys and values torch keeps in one tensor.
    Rule(r"\bvision_resampler\.token_packer_slow\.devide_attention\.", "vision_resampler.slow."),
    Rule(r"\bvision_resampler\.token_packer_fast\.devide_attention\.", "vision_resampler.fast."),
    Rule(r"\bvision_resampler\.token_packer\.devide_attention\.", "vision_resampler.main."),
    Rule(r"(\bvision_resampler\.\w+)\.attn\.out_proj\.", r"\1.o_proj."),
    # Its tables of coordinates: embeddings of inputs, linear layers of outputs.
    Rule(r"\btemporal_(input|output)_embeddings\.weight$", r"coordinates.temporal_\1"),
    Rule(r"\bspatial_(height|width)_(input|output)_embeddings\.weight$", r"coordinates.\1_\2"),
)
"""LLaVA, LLaVA-NeXT, LLaVA-ST and forks of these: what is called otherwise there."""

PROJECTOR_LAYERS = {"linear_1": "0", "linear_2": "2"}
"""The projector's layers in ``LlavaForConditionalGeneration``, and their places in ``mlp2x_gelu``."""

NATIVE_NAMES = (
    *(
        Rule(rf"^(model\.)?multi_modal_projector\.{theirs}\.", f"{{decoder}}.mm_projector.{place}.")
        for theirs, place in PROJECTOR_LAYERS.items()
    ),
    Rule(r"^language_model\.lm_head\.", "{head}."),
    Rule(r"^lm_head\.", "{head}."),
    # The language model was a whole one until transformers 4.52, and is a decoder since.
    Rule(r"^language_model\.(model|transformer|gpt_neox)\.", "{decoder}."),
    Rule(r"^model\.language_model\.", "{decoder}."),
)
"""transformers' ``LlavaForConditionalGeneration``, and the names that it had before."""

_TOWER = re.compile(r"(?:^|.*\.)vision_tower\.(?:vision_tower\.)?(.+)")
_JOINED = re.compile(r"(\bvision_resampler\.\w+)\.attn\.in_proj_(weight|bias)$")
_COMPUTED = (
    (re.compile(r"_reparam_mat$"), "the spread over neighbouring bins, which is computed"),
    (re.compile(r"\brotary_emb\.(inv_freq|cos_cached|sin_cached)$"), "rotary frequencies, which are computed"),
    (re.compile(r"\b(attn|attention)\.(bias|masked_bias)$"), "a causal mask, which is computed"),
    (re.compile(r"\bposition_ids$"), "positions, which are computed"),
    (re.compile(r"\bfaster_token$"), "the faster stream of LLaVA-NeXT-Video, which is not offered"),
    (re.compile(r"\bblack_projected_feature$"), "a cached feature of the black picture"),
)
"""Buffers that older code stored, and parts that have no place here."""


class Part(NamedTuple):
    """Where a tensor comes from: the stored one of this name, or one of its three equal parts."""

    stored: str
    third: int | None = None

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        tensor = tensors[self.stored]
        return tensor if self.third is None else tensor.chunk(3)[self.third]

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        whole = shapes[self.stored]
        return whole if self.third is None else (whole[0] // 3, *whole[1:])


@dataclass
class TranslatedNames:
    """Stored tensors under today's names.

    Attributes:
        parts: by today's name, of everything but the tower.
        tower: by the name within the vision model's own class, the stored name.
        left_out: by the stored name, why it is.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    tower: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def translate_names(
    stored: Iterable[str], rules: Iterable[Rule], decoder: str, head: str, own: set[str]
) -> TranslatedNames:
    """Bring the names of a checkpoint's tensors to those of a model here.

    Args:
        stored: the names.
        rules: tried in order, all that match.
        decoder, head: what the model calls its decoder and its head.
        own: the names of the model's tensors; a stored one that is among them is never taken for a computed buffer.
    """
    filled = [(re.compile(rule.pattern), rule.replacement.format(decoder=decoder, head=head)) for rule in rules]
    translated = TranslatedNames()
    for name in stored:
        if match := _TOWER.fullmatch(name):
            translated.tower[match.group(1)] = name
            continue
        new = name
        for pattern, replacement in filled:
            new = pattern.sub(replacement, new)
        if new not in own and (why := next((why for pattern, why in _COMPUTED if pattern.search(name)), None)):
            translated.left_out[name] = why
        elif joined := _JOINED.search(new):
            start = new[: joined.start()] + joined.group(1)
            for third, letter in enumerate("qkv"):
                translated.parts[f"{start}.{letter}_proj.{joined.group(2)}"] = Part(name, third)
        else:
            translated.parts[new] = Part(name)
    return translated
