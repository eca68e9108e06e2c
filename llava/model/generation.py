"""``generate`` for prompts with images, videos and coordinates, the same for every backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from llava.compat import cache_name
from llava.config import GroundingConfig, VisionConfig
from llava.constants import AXES, Axis
from llava.grounding.syntax import BOX_AXES, SPAN_AXES
from llava.model.coordinates import CoordinateTokens, Variables, embed_tokens
from llava.types import MediaKind

if TYPE_CHECKING:  # What the mixin is mixed into; at run time each backbone brings its own.
    from typing import Self

    from transformers import PreTrainedModel as _LanguageModel
else:
    _LanguageModel = object


_CACHE = cache_name()


class MultimodalGeneration(_LanguageModel):
    """The part of ``LlavaMetaForCausalLM`` that generates."""

    if TYPE_CHECKING:  # What LlavaMetaForCausalLM has.
        find_coordinates: Callable[..., CoordinateTokens | None]
        embed_multimodal: Callable[..., Tensor | None]

        def get_model(self) -> Any: ...

        def to(self, *args: object, **kwargs: object) -> Self: ...  # type: ignore[override] # Lost by a decorator.

        @property
        def vision(self) -> VisionConfig | None: ...

        @property
        def grounding(self) -> GroundingConfig | None: ...

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: list[Tensor] | Tensor | None = None,
        modalities: list[MediaKind] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        pixel_values: list[Tensor] | Tensor | None = None,
        variables: Variables | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate`` for prompts with images, videos and coordinates.

        The media are encoded once, whatever the number of beams and with or without the cache.
        Visual tokens and placeholders of coordinates are never produced; bins may be.

        Args:
            inputs: int64 (batch, length) prompt, left-padded where lengths differ; also ``input_ids``.
            images, modalities, image_sizes, pixel_values, variables: as for ``forward``.
            **kwargs: as for transformers' ``generate``; ``inputs_embeds`` have media and coordinates in them already.

        Returns:
            int64 (batch, length + new tokens), or what ``return_dict_in_generate`` asks for; with
            ``inputs_embeds`` alone the new tokens, as in transformers.

        Raises:
            ValueError: media, coordinates and other arguments do not go together.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        images = pixel_values if images is None else images
        if images is not None or any(variables or ()):
            self._check_media_go_with(kwargs)
        tokens = None if input_ids is None else self.find_coordinates(input_ids, variables)
        vision, grounding = self.vision, self.grounding
        if vision is not None and vision.token_ids:
            visual = vision.visual_token_ids
            if images is None and input_ids is not None and torch.isin(input_ids, input_ids.new_tensor(visual)).any():
                raise ValueError("the prompt has places for images or videos, but no images were given")
            # Never produced: visual positions need media, placeholders need coordinates that a prompt gives.
            placeholders = [] if grounding is None else grounding.filled_token_ids
            settings = kwargs.get("generation_config") or self.generation_config
            suppressed = kwargs.get("suppress_tokens") or settings.suppress_tokens or []
            kwargs["suppress_tokens"] = [*suppressed, *visual, *placeholders]
        if kwargs.get("inputs_embeds") is None and (images is not None or tokens is not None):
            tables = self.get_model().coordinate_embeddings()
            kwargs["prompt_embeds"] = self.embed_multimodal(input_ids, images, modalities, image_sizes, tables, tokens)
        # Bins are scored like words, but ``vocab_size`` counts the embeddings, which they lie behind; beam search of
        # some releases of transformers (5.17) takes the number of scores from there.
        num_embeddings = self.config.vocab_size
        if grounding is not None and grounding.has_tables:
            self.config.vocab_size = _size(grounding)
        try:
            return super().generate(input_ids, **kwargs)  # type: ignore[misc]
        finally:
            self.config.vocab_size = num_embeddings

    def _check_media_go_with(self, options: dict[str, Any]) -> None:
        """A ValueError where ``generate`` is given media or coordinates and what cannot take them."""
        if options.get("inputs_embeds") is not None:
            raise ValueError(
                "pass either inputs_embeds, which images and coordinates are in already, or input_ids with them"
            )
        configured = options.get("generation_config") or getattr(self, "generation_config", None)
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if options.get(name, getattr(configured, name, None)) is not None:
                raise ValueError(
                    f"{name} guesses from the ids of a prompt, and those of images, videos and coordinates are only "
                    f"places for them; leave {name} out for a prompt that has any"
                )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        prompt_embeds: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> dict[str, Any]:
        """As in transformers, with ``prompt_embeds`` (batch, prompt, width) in place of the prompt's ids.

        A step whose input still holds the prompt (the first one, or every one without the cache)
        gets the prompt's embeddings followed by those of the tokens generated since.
        """
        # transformers takes inputs_embeds only for classes whose signature has them.
        model_inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if kwargs.get(_CACHE) is not None and model_inputs.get(_CACHE) is None:
            # Phi-3 begins anew where its rotary factors change; 5.17 drops the cache, and the tokens in it too.
            anew = {**kwargs, _CACHE: None, "next_sequence_length": None}
            model_inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
                input_ids, inputs_embeds=inputs_embeds, **anew
            )
        step_ids = model_inputs.get("input_ids")
        # With a cache, steps behind the first hold the newest token alone, and need no prompt.
        if prompt_embeds is not None and step_ids is not None and step_ids.shape[1] == input_ids.shape[1]:
            # (batch, prompt, width) and (batch, new, width): bins that were generated have no ids in the embeddings.
            generated = self._embed_generated(input_ids[:, prompt_embeds.shape[1] :])
            model_inputs["inputs_embeds"] = torch.cat([prompt_embeds, generated.to(prompt_embeds.dtype)], dim=1)
            model_inputs["input_ids"] = None
        return model_inputs

    def _embed_generated(self, input_ids: Tensor) -> Tensor:
        """Embeddings of generated tokens, bins of coordinates among them."""
        tables, tokens = self.get_model().coordinate_embeddings(), self.find_coordinates(input_ids, None)
        embed = self.get_input_embeddings()
        return embed(input_ids) if tables is None or tokens is None else embed_tokens(input_ids, embed, tables, tokens)


# Generation that keeps to the syntax of boxes and spans of time, which ``llava.grounding.syntax`` describes.

_LOCATED = (("[", *BOX_AXES, "]"), ("{", *SPAN_AXES, "}"))
"""What a box and a span of time are made of, in order."""
_LONGEST = len(_LOCATED[0]) - 1
"""How many tokens back the beginning of a box lies at most."""
_KINDS = {kind: number for number, kind in enumerate(("[", "{", *AXES), start=1)}
"""Numbers of the kinds of tokens that count: those that open a box or a span, and those of an axis."""
_OTHER, _ANY = 0, -1
_BRACKETS = frozenset("[]{}")
_BYTES = {f"<0x{ord(bracket):02X}>" for bracket in _BRACKETS}
"""How SentencePiece names a bracket that is no piece of its own."""


class CoordinateSyntax(LogitsProcessor):
    """Lets a bin be generated only within a box or a span of time, and there nothing but bins of the axis that is due.

    Behind a token whose text ends with ``[`` come bins of width, height, width, height and a token whose text
    begins with ``]``; behind one that ends with ``{`` come two bins of time and one that begins with ``}``. Where the
    vocabulary has no closing bracket, any token but a bin may close.

    It goes by the last five tokens of a text and nothing else: texts may be beams that change places, prompts may be
    padded on the left, and one may end inside a box.

    Args:
        tokenizer: of the model; its special tokens are no brackets, whatever their names.
        grounding: of the model, with tables of bins.
        device: of the model.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, grounding: GroundingConfig, device: torch.device | str = "cpu"
    ) -> None:
        brackets = _find_brackets(tokenizer, grounding)
        # Each way in which a box or a span can have begun, and what comes next: 5 + 3 endings of a text.
        begun = [(parts[:n], parts[n]) for parts in _LOCATED for n in range(1, len(parts))]
        endings = [[_ANY] * (_LONGEST - len(parts)) + [_KINDS[part] for part in parts] for parts, _ in begun]
        forbidden = [_is_bin(grounding), *(~_may_be(part, brackets, grounding) for _, part in begun)]
        self._kinds = _kinds_of_tokens(brackets, grounding).to(device)
        self._endings = torch.tensor(endings, device=device)
        # A row for each state, so that a step of generation is one lookup: (1 + endings, vocabulary).
        self._forbidden = torch.stack(forbidden).to(device)
        self._lengths = [0, *(len(parts) for parts, _ in begun)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """The scores (texts, vocabulary) of the next token, minus infinity for what the syntax forbids.

        Args:
            input_ids: int64 (texts, length), the prompts and what was generated since.
            scores: logits, or their logarithms of probability.
        """
        if scores.shape[1] != self._forbidden.shape[1]:
            raise ValueError(
                f"the model scores {scores.shape[1]} tokens, but its grounding counts {self._forbidden.shape[1]}; "
                "load model and tokenizer from one checkpoint"
            )
        return scores.masked_fill(self._forbidden[self._states(input_ids)], float("-inf"))

    def count_open(self, ids: Sequence[int]) -> int:
        """How many tokens at the end of ``ids`` belong to a box or a span that is not closed yet."""
        texts = torch.tensor(ids, dtype=torch.long, device=self._kinds.device).unsqueeze(0)
        return self._lengths[int(self._states(texts))]

    def _states(self, input_ids: Tensor) -> Tensor:
        """For each text the number of the ending that it has, from 1 on, or 0 if it is in no box and no span."""
        recent = self._kinds[input_ids[:, -_LONGEST:]]  # (texts, at most 5)
        recent = F.pad(recent, (_LONGEST - recent.shape[1], 0), value=_OTHER)  # (texts, 5)
        fits = (recent.unsqueeze(1) == self._endings) | (self._endings == _ANY)  # (texts, endings, 5)
        # At most one fits: an opening bracket is the first part of an ending, and of no other part's kind.
        numbers = torch.arange(1, len(self._endings) + 1, device=fits.device)
        return (fits.all(-1) * numbers).sum(-1)


def _find_brackets(tokenizer: PreTrainedTokenizerBase, grounding: GroundingConfig) -> dict[int, str]:
    """By id, the text of each token that has a bracket in it; white space around the text is left out."""
    special = set(tokenizer.all_special_ids)
    texts = {
        i: tokenizer.convert_tokens_to_string([token]).strip()
        for token, i in tokenizer.get_vocab().items()
        if i not in special and i < _size(grounding) and (token in _BYTES or not _BRACKETS.isdisjoint(token))
    }
    return {i: text for i, text in texts.items() if text}


def _size(grounding: GroundingConfig) -> int:
    assert grounding.first_bin is not None
    return grounding.first_bin + grounding.total_bins


def _is_bin(grounding: GroundingConfig) -> Tensor:
    """Whether each token is a bin, (vocabulary,)."""
    assert grounding.first_bin is not None
    return torch.arange(_size(grounding)) >= grounding.first_bin


def _kinds_of_tokens(brackets: dict[int, str], grounding: GroundingConfig) -> Tensor:
    """The kind of each token as one that others follow, (vocabulary,)."""
    # One table over the whole vocabulary: in a step of generation it is a single lookup on the device.
    kinds = torch.full((_size(grounding),), _OTHER)
    for i, text in brackets.items():
        kinds[i] = _KINDS.get(text[-1], _OTHER)
    for axis in AXES:
        kinds[_bins_of(axis, grounding)] = _KINDS[axis]
    # Coordinates that a prompt gives by placeholders stand where bins do.
    for placeholder, i in grounding.token_ids.items():
        kinds[i] = next(_KINDS[axis] for axis in AXES if axis in placeholder)
    return kinds


def _may_be(part: str, brackets: dict[int, str], grounding: GroundingConfig) -> Tensor:
    """Whether each token may stand for a part of a box or a span: an axis or a closing bracket; (vocabulary,)."""
    may = torch.zeros(_size(grounding), dtype=torch.bool)  # (vocabulary,)
    for axis in AXES:
        if axis == part:
            may[_bins_of(axis, grounding)] = True
            return may
    may[[i for i, text in brackets.items() if text[0] == part]] = True
    return may if may.any() else ~_is_bin(grounding)


def _bins_of(axis: Axis, grounding: GroundingConfig) -> slice:
    first = grounding.first_bin_of(axis)
    return slice(first, first + grounding.num_bins(axis))
