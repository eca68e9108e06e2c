"""Rows of tokens with images and clips: each decoded and encoded once, whatever number of candidates it stands before.

What is scored is written as in the training samples of the checkpoint, media first: with ``plain_lm`` the spans of
visual tokens, a space and the candidate's text; with formats of conversations the media, and what stands before the
candidate's ``start``, in the user's turn, and the rest as the assistant's answer, of which the words are scored and not
the tokens that end it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llava.data.formats import PLAIN_LM, build_format
from llava.data.formats.base import encode_answer
from llava.data.media import load_media
from llava.data.media_files import MediaError
from llava.eval.token_rows import TextEncoder, TokenRow, name_choice
from llava.model.coordinates import embed_tokens
from llava.serve.generate import PromptWriter, Request
from llava.types import Media, Turn, VisualInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llava.eval.choices import Choice
    from llava.model.llava_arch import LlavaMetaForCausalLM

Features = Mapping[int, Tensor]
"""Features of images and videos by the keys that stand for them in rows, each (width,)."""

Call = Callable[..., Any]
"""Calls a function with the model, in the weights that are in force, and what it is given besides."""

_KEYS_EACH = 2**24
"""Keys that are set aside for one image or video: more than it ever has tokens."""

_KEPT = 64
"""Images and videos that stay decoded for choices to come."""

_DECODE_TIMEOUT = 60.0
"""Seconds that decoding one may take."""


class VisualEncoder:
    """Turns the candidates of choices with media into rows.

    Args:
        model: of this library, with vision.
        text: encodes its texts; says what fits its context.

    Raises:
        ValueError: the model cannot see.
    """

    def __init__(self, model: PreTrainedModel, text: TextEncoder) -> None:
        vision = getattr(model, "vision", None)
        if vision is None:
            raise ValueError(f"{text.model_name} reads text alone and cannot look at images and videos")
        text_format = build_format(getattr(model.config, "llava_format", PLAIN_LM), text.tokenizer)
        grounding = getattr(model, "grounding", None)
        self._writer = PromptWriter(text.tokenizer, text_format, vision, grounding)
        self._text, self._visual_ids = text, frozenset(vision.visual_token_ids)
        self._numbers: dict[Media, int] = {}
        self._loaded: OrderedDict[Media, VisualInput] = OrderedDict()

    def read(self, choices: Sequence[Choice], call: Call) -> tuple[list[list[TokenRow]], Features]:
        """The rows of each choice's candidates, and the features of their media.

        Args:
            choices: with media.
            call: calls a function with the model and what it is given besides.

        Raises:
            ValueError: a file cannot be read, or a candidate cannot be scored; names the choice.
        """
        media = self._load(choices)
        features = self._encode_media(media, call)
        rows = [self._encode(choice, media, features) for choice in choices]
        return rows, self._by_key(features)

    def read_features(self, choices: Sequence[Choice], call: Call) -> Features:
        """The features of their media alone, for choices that were read before."""
        return self._by_key(self._encode_media(self._load(choices), call))

    def _load(self, choices: Sequence[Choice]) -> dict[Media, VisualInput]:
        """The media of choices, each decoded once."""
        found: dict[Media, VisualInput] = {}
        assert self._writer.vision is not None
        for choice in choices:
            for media in choice.media:
                if media not in self._loaded:
                    try:
                        self._loaded[media] = load_media(media, self._writer.vision, timeout=_DECODE_TIMEOUT)
                    except MediaError as error:
                        raise ValueError(f"{name_choice(choice)}: {error}") from error
                self._loaded.move_to_end(media)
                found[media] = self._loaded[media]
        # After the choices of a call: all that these need is there, even where it is more.
        while len(self._loaded) > _KEPT:
            self._loaded.popitem(last=False)
        return found

    def _encode_media(self, media: Mapping[Media, VisualInput], call: Call) -> dict[Media, Tensor]:
        """The features of each, (tokens, width), from one call of the tower."""
        return dict(zip(media, call(_encode_media, list(media.values())), strict=True))

    def _by_key(self, features: Mapping[Media, Tensor]) -> Features:
        return {
            self._key(media, offset): feature
            for media, of_one in features.items()
            for offset, feature in enumerate(of_one)
        }

    def _key(self, media: Media, offset: int) -> int:
        """What stands for a feature in rows."""
        # Below 0, where no token id is; equal for equal media, so that rows with them share beginnings.
        return -(1 + self._numbers.setdefault(media, len(self._numbers)) * _KEYS_EACH + offset)

    def _encode(
        self, choice: Choice, media: Mapping[Media, VisualInput], features: Mapping[Media, Tensor]
    ) -> list[TokenRow]:
        """The rows of a choice's candidates."""
        keys = [self._key(one, offset) for one in choice.media for offset in range(len(features[one]))]
        rows = []
        for candidate in choice.candidates:
            try:
                ids, scored = self._write(candidate.text, candidate.start, [media[one] for one in choice.media])
            except ValueError as error:
                raise ValueError(f"{name_choice(choice)}: {error}") from error
            places = [place for place, i in enumerate(ids) if i in self._visual_ids]
            if len(places) != len(keys):
                raise ValueError(
                    f"{name_choice(choice)}: a candidate has {len(places)} visual tokens and its media have "
                    f"{len(keys)} features; the text must not hold visual tokens of its own"
                )
            for place, key in zip(places, keys, strict=True):
                ids[place] = key
            rows.append(self._text.check(choice, candidate.text, ids, scored))
        return rows

    def _write(self, text: str, start: int, media: Sequence[VisualInput]) -> tuple[list[int], list[int]]:
        """The ids of a candidate with media before it, and the positions of those that are scored."""
        writer, text_format = self._writer, self._writer.text_format
        if not text_format.has_prompts:
            given = writer.write(Request(media)).ids
            space = "" if text[:1].isspace() else " "  # As where turns are joined.
            encoded = text_format.tokenizer(
                space + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            begin = start + len(space) if start else 0
            scored = [len(given) + place for place, (_, end) in enumerate(encoded["offset_mapping"]) if end > begin]
            return [*given, *encoded["input_ids"]], scored
        if text_format.writes_user_text:
            return self._write_answer(writer.write_turns(Request(media, text[:start]), media), media, text[start:])
        # The user shows the media and says nothing: all of the text is the answer, and its first part is not scored.
        turns = writer.write_turns(Request(media), media)
        ids, scored = self._write_answer(turns, media, text)
        if start:
            begun, _ = self._write_answer(turns, media, text[:start])
            shared = next((place for place, (a, b) in enumerate(zip(begun, ids, strict=False)) if a != b), len(begun))
            scored = [place for place in scored if place >= shared]
        return ids, scored

    def _write_answer(
        self, turns: Sequence[Turn], media: Sequence[VisualInput], answer: str
    ) -> tuple[list[int], list[int]]:
        """The ids of turns and an answer without its end, and the positions of the answer's tokens."""
        given, ids = encode_answer(self._writer.text_format, self._writer.expand(turns, media), answer)
        return [*given, *ids], list(range(len(given), len(given) + len(ids)))


def _encode_media(model: LlavaMetaForCausalLM, media: Sequence[VisualInput]) -> list[Tensor]:
    """The features of media, one (tokens, width) each."""
    decoder = model.get_model()
    encoded: list[Tensor] = decoder.encode_media(
        [one.frames for one in media],
        [one.kind for one in media],
        [one.original_size for one in media],
        decoder.coordinate_embeddings(),
    )
    return encoded


def embed_keys(model: LlavaMetaForCausalLM, keys: Tensor, features: Features) -> tuple[Tensor, Tensor]:
    """The embeddings of keys, (sequences, length, width), and the ids that stand in their places."""
    assert model.vision is not None
    visual = keys < 0  # bool (sequences, length)
    ids = keys.masked_fill(visual, model.vision.visual_token_ids[0])  # (sequences, length)
    tables, coordinates = model.get_model().coordinate_embeddings(), model.find_coordinates(ids, None)
    embed = cast(nn.Module, model.get_input_embeddings())
    # Every visual position is overwritten below, markers included, as in training.
    embeddings = embed(ids) if coordinates is None else embed_tokens(ids, embed, tables, coordinates)
    found = torch.stack([features[key] for key in keys[visual].tolist()])  # (visual positions, width)
    return embeddings.masked_scatter(visual[..., None], found.to(embeddings.dtype)), ids


def takes_modalities(model: Any) -> bool:
    """Whether the decoder is told which tokens are images and videos, beside their embeddings."""
    return bool(model.decoder_inputs(torch.tensor([[0]])))
