"""``generate`` for prompts with images, videos and coordinates, the same for every backbone."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from llava.model.coordinates import Variables, embed_tokens
from llava.types import MediaKind

logger = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("early_stopping", "length_penalty")


def drop_unused_sampling(config: GenerationConfig, source: str) -> None:
    """Leave out settings without effect that transformers refuses to save, and with them the whole model.

    Vicuna's ``generation_config.json`` is the best known: a temperature, but no sampling.

    Args:
        config: of a model that was loaded; what it generates stays the same.
        source: the model's folder or hub name, for the note.
    """
    if _can_be_saved(config):
        return
    unused = [] if config.do_sample else [name for name in _SAMPLING if hasattr(config, name)]
    unused += [name for name in _BEAMS if (config.num_beams or 1) == 1]
    fresh = GenerationConfig()
    given = {name: getattr(config, name) for name in unused if getattr(config, name) != getattr(fresh, name)}
    for name in given:
        setattr(config, name, getattr(fresh, name))
    if given and _can_be_saved(config):
        settings = ", ".join(f"{name} {value}" for name, value in given.items())
        logger.warning(
            "generation_config.json of %s sets %s, without effect as it neither samples nor searches with beams, and "
            "could not be saved again; left out", source, settings
        )  # fmt: skip
        return
    for name, value in given.items():
        setattr(config, name, value)


def _can_be_saved(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


class MultimodalGeneration:
    """The part of ``LlavaMetaForCausalLM`` that generates."""

    config: Any
    generation_config: Any
    get_model: Any
    get_input_embeddings: Any
    place_coordinates: Any
    embed_multimodal: Any

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
            **kwargs: as for transformers' ``generate``; with ``inputs_embeds`` media and coordinates are in them
                already, and an ``assistant_model`` or ``prompt_lookup_num_tokens`` are for prompts of text alone.

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
        tokens = None if input_ids is None else self.place_coordinates(input_ids, variables)
        vision, grounding = self.get_model().vision, self.get_model().grounding
        if vision is not None and vision.token_ids:
            visual = vision.visual_token_ids
            if images is None and input_ids is not None and torch.isin(input_ids, input_ids.new_tensor(visual)).any():
                raise ValueError("the prompt has places for images or videos, but no images were given")
            placeholders = [] if grounding is None else grounding.filled_token_ids
            settings = kwargs.get("generation_config") or self.generation_config
            suppressed = kwargs.get("suppress_tokens") or settings.suppress_tokens or []
            kwargs["suppress_tokens"] = [*suppressed, *visual, *placeholders]
        if kwargs.get("inputs_embeds") is None and (images is not None or tokens is not None):
            rows = self.get_model().coordinate_rows()
            kwargs["prompt_embeds"] = self.embed_multimodal(input_ids, images, modalities, image_sizes, rows, tokens)
        return super().generate(input_ids, **kwargs)  # type: ignore[misc]

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
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers, with ``prompt_embeds`` (batch, prompt, width) in place of the prompt's ids.

        A step whose input still holds the prompt (the first one, or every one without the cache)
        gets the prompt's embeddings followed by those of the tokens generated since.
        """
        # transformers takes inputs_embeds only for classes whose signature has them.
        model_inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        step_ids = model_inputs.get("input_ids")
        if prompt_embeds is not None and step_ids is not None and step_ids.shape[1] == input_ids.shape[1]:
            generated = self._embed_generated(input_ids[:, prompt_embeds.shape[1] :])
            model_inputs["inputs_embeds"] = torch.cat([prompt_embeds, generated.to(prompt_embeds.dtype)], dim=1)
            model_inputs["input_ids"] = None
        return model_inputs

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, releases of which (5.17) take the number of scores from the configuration.

        There it is the number of embeddings; a model with tables of coordinates scores its bins too.
        """
        config, grounding = self.config, self.get_model().grounding
        num_embeddings = config.vocab_size
        if grounding is not None and grounding.has_tables:
            config.vocab_size = grounding.first_bin + grounding.total_bins
        try:
            return super()._beam_search(*args, **kwargs)  # type: ignore[misc]
        finally:
            config.vocab_size = num_embeddings

    def _embed_generated(self, input_ids: Tensor) -> Tensor:
        """Embeddings of generated tokens, bins of coordinates among them."""
        rows, tokens = self.get_model().coordinate_rows(), self.place_coordinates(input_ids, None)
        embed = self.get_input_embeddings()
        return embed(input_ids) if rows is None or tokens is None else embed_tokens(input_ids, embed, rows, tokens)
