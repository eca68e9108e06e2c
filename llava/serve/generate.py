"""Captions, answers and continuations from a trained checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList

from llava.config import VisionConfig
from llava.coordinates import GroundingConfig
from llava.data.preprocess import PLAIN_LM, build_format
from llava.model.coordinate_positions import expected_positions
from llava.model.coordinate_syntax import CoordinateSyntax
from llava.model.loading import LoadedModel, load_model
from llava.model.quantization import Quantization
from llava.model.quiet import quiet_transformers
from llava.serve.answer import Answer, read_answer
from llava.serve.requests import Prompt, PromptWriter, Request


class Captioner:
    """A model with its tokenizer, ready to generate text for requests.

    Args:
        loaded: what ``load_model`` returned.
        device: where to run; by default a GPU if there is one.
    """

    def __init__(self, loaded: LoadedModel, device: str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = loaded.model.to(self.device).eval()
        self.tokenizer = loaded.tokenizer
        self.vision: VisionConfig | None = loaded.vision
        self.grounding: GroundingConfig | None = self.model.grounding
        self.text_format = build_format(getattr(self.model.config, "llava_format", PLAIN_LM), self.tokenizer)
        self.prompts = PromptWriter(self.tokenizer, self.text_format, self.vision, self.grounding)
        self.syntax: CoordinateSyntax | None = None
        if self.grounding is not None and self.grounding.has_tables:
            self.syntax = CoordinateSyntax(self.tokenizer, self.grounding, self.device)

    @classmethod
    def from_checkpoint(
        cls,
        path: str,
        vision_tower: str | None = None,
        device: str | None = None,
        model_base: str | None = None,
        bits: int = 16,
    ) -> Captioner:
        """Load a checkpoint folder.

        Args:
            path: the folder.
            vision_tower: where its tower lies, if it has moved.
            device: where to run; by default a GPU if there is one.
            model_base: where the base model of its adapters lies, if it has any and that has moved.
            bits: 8 or 4 holds the language model's linear layers in so many bits.
        """
        quantization = Quantization(bits, device=device) if bits != 16 else None
        return cls(
            load_model(path, model_base=model_base, vision_tower=vision_tower, quantization=quantization), device
        )

    def generate(self, requests: Sequence[Request], batch_size: int = 16, **options: Any) -> list[str]:
        """The text alone of what ``answer`` returns for the same arguments."""
        return [answer.text for answer in self.answer(requests, batch_size, **options)]

    def answer(
        self,
        requests: Sequence[Request],
        batch_size: int = 16,
        *,
        sub_bin: bool = False,
        constrain: bool = True,
        **options: Any,
    ) -> list[Answer]:
        """Generate an answer to each request.

        Args:
            requests: any mix of images, videos and plain prompts.
            batch_size: requests that are decoded together.
            sub_bin: whether boxes and spans are told more precisely than by bins, see ``expected_positions``;
                takes the memory of every step's logits.
            constrain: whether bins come only where boxes and spans want them, see ``CoordinateSyntax``.
            **options: for transformers' ``generate``, such as ``num_beams``; greedy and 64 new
                tokens by default.

        Returns:
            The answer to each request (or ``num_return_sequences`` of them); without tables of coordinates text alone.

        Raises:
            ValueError: a file cannot be read, a request leaves no room in the context, or its coordinates
                are not those of its prompt or are given to a model that has none.
        """
        syntax = [self.syntax] if constrain and self.syntax is not None else []
        options["logits_processor"] = LogitsProcessorList([*options.get("logits_processor", ()), *syntax])
        answers: list[Answer] = []
        for start in range(0, len(requests), batch_size):
            prompts = [self.prompts.write(request) for request in requests[start : start + batch_size]]
            generated, positions = self._generate(prompts, sub_bin and self.syntax is not None, options)
            each = len(generated) // len(prompts)
            answers += [
                self._read(prompts[i // each], ids, None if positions is None else positions[i])
                for i, ids in enumerate(generated)
            ]
        return answers

    def _generate(
        self, prompts: Sequence[Prompt], sub_bin: bool, options: dict[str, Any]
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """The new tokens of each row and, with ``sub_bin``, their ``expected_positions``."""
        options = {
            "max_new_tokens": 64,
            "do_sample": False,
            "eos_token_id": self.text_format.stop_token_ids,
            **options,
        }
        if sub_bin:
            options |= {"return_dict_in_generate": True, "output_logits": True}
        longest = max(len(prompt.ids) for prompt in prompts)
        room = self.model.config.max_position_embeddings - longest
        if room < 1:
            raise ValueError(
                f"the prompt has {longest} tokens, but the model's context is {longest + room}; shorten it or "
                "lower num_frames"
            )
        options["max_new_tokens"] = min(options["max_new_tokens"], room)
        # transformers drops a mask of ones and then warns that an end of text might be padding.
        with quiet_transformers():
            output = self.model.generate(**self._collate(prompts, longest), **options)
        if not sub_bin:
            return output[:, longest:].tolist(), None
        assert self.grounding is not None
        generated = output.sequences[:, longest:]
        positions = expected_positions(generated, output.logits, self.grounding, output.get("beam_indices"))
        return generated.tolist(), positions.tolist()

    def _collate(self, prompts: Sequence[Prompt], longest: int) -> dict[str, Any]:
        """A batch of prompts, padded on the left, with media and coordinates where there are any."""
        input_ids = torch.full((len(prompts), longest), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
            attention_mask[row, longest - len(prompt.ids) :] = 1
        batch: dict[str, Any] = {"input_ids": input_ids.to(self.device)}
        batch["attention_mask"] = attention_mask.to(self.device)
        media = [medium for prompt in prompts for medium in prompt.media]
        if media:
            batch |= {"images": [m.frames for m in media], "modalities": [m.kind for m in media]}
            batch["image_sizes"] = [m.original_size for m in media]
        if any(prompt.coordinates for prompt in prompts):
            batch["variables"] = [prompt.coordinates.to_variables() for prompt in prompts]
        return batch

    def _read(self, prompt: Prompt, ids: Sequence[int], positions: Sequence[float] | None) -> Answer:
        """The answer that new tokens are; a box that the prompt began belongs to it."""
        begun = prompt.ids[len(prompt.ids) - self.syntax.count_open(prompt.ids) :] if self.syntax is not None else []
        stop = self.text_format.stop_token_ids
        written = [*begun, *(i for i in ids if i not in stop)]
        text = self.tokenizer.batch_decode([written], skip_special_tokens=True)[0].strip()
        if self.grounding is None or positions is None:
            return read_answer(text, self.grounding, prompt.framing)
        assert self.grounding.first_bin is not None
        known = [None for i in begun if i >= self.grounding.first_bin]
        finer = [position for position in positions if not math.isnan(position)]
        return read_answer(text, self.grounding, prompt.framing, [*known, *finer])
