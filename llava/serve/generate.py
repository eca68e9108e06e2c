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
from llava.model.loading import LoadedModel, choose_device, load_model
from llava.model.quantization import Quantization
from llava.model.quiet import quiet_transformers
from llava.serve.answer import Answer, read_answer
from llava.serve.decoding import MAX_NEW_TOKENS, without_own_settings
from llava.serve.requests import Prompt, PromptWriter, Request


class PromptTooLongError(ValueError):
    """Some requests leave no room for an answer in the model's context; all the others have been answered.

    Attributes:
        answers: to each request, in order: a list of ``num_return_sequences`` of them, empty where it is too long.
        reasons: why there is none, by the number of the request.
    """

    def __init__(self, requests: Sequence[Request], answers: list[list[Answer]], reasons: dict[int, str]) -> None:
        self.answers, self.reasons = answers, reasons
        first = min(reasons)
        text = reasons[first]
        if len(requests) > 1:
            text = f"request {first + 1} of {len(requests)} ({requests[first]}): {text}"
            if len(reasons) > 1:
                text += f"; {len(reasons)} requests are too long"
        super().__init__(text)


class Captioner:
    """A model with its tokenizer, ready to generate text for requests.

    Args:
        loaded: what ``load_model`` returned.
        device: where to run; by default a GPU if there is one.
    """

    def __init__(self, loaded: LoadedModel, device: str | None = None) -> None:
        self.device = choose_device(device)
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
        choose_device(device)  # Before a model is read.
        quantization = Quantization(bits, device=device) if bits != 16 else None
        loaded = load_model(
            path, model_base=model_base, vision_tower=vision_tower, quantization=quantization, flag="--model_path"
        )
        return cls(loaded, device)

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
                tokens by default. Nothing else is in force: a penalty or a temperature that the base model's
                ``generation_config.json`` sets is not taken. An answer has at most the tokens that its own
                prompt leaves in the context, whatever it is asked together with.

        Returns:
            The answer to each request (or ``num_return_sequences`` of them); without tables of coordinates text alone.

        Raises:
            ValueError: a file cannot be read, or the coordinates of a request are not those of its prompt or are
                given to a model that has none.
            PromptTooLongError: requests leave no room in the context; the others are answered first.
        """
        syntax = [self.syntax] if constrain and self.syntax is not None else []
        options["logits_processor"] = LogitsProcessorList([*options.get("logits_processor", ()), *syntax])
        sub_bin = sub_bin and self.syntax is not None
        answers: list[list[Answer]] = [[] for _ in requests]
        too_long: dict[int, str] = {}
        for start in range(0, len(requests), batch_size):
            prompts = {
                index: self.prompts.write(requests[index])
                for index in range(start, min(start + batch_size, len(requests)))
            }
            too_long |= {i: reason for i, prompt in prompts.items() if (reason := self._find_excess(prompt))}
            for group in self._group_by_room({i: p for i, p in prompts.items() if i not in too_long}, options):
                found = self._generate([prompts[i] for i in group], sub_bin, options)
                for index, generated in zip(group, found, strict=True):
                    answers[index] = generated
        if too_long:
            raise PromptTooLongError(requests, answers, too_long)
        return [answer for generated in answers for answer in generated]

    @property
    def _context(self) -> int:
        return int(self.model.config.max_position_embeddings)

    def _find_excess(self, prompt: Prompt) -> str:
        """Why a prompt leaves no room for an answer; nothing if it does."""
        if len(prompt.ids) < self._context:
            return ""
        return (
            f"the prompt has {len(prompt.ids)} tokens, but the model's context is {self._context}; shorten it or "
            "lower num_frames"
        )

    def _group_by_room(self, prompts: dict[int, Prompt], options: dict[str, Any]) -> list[list[int]]:
        """Parts of a batch that can be decoded together, by index.

        A prompt that leaves less room than ``max_new_tokens`` gets fewer; those beside it lose nothing.
        """
        wanted = options.get("max_new_tokens", MAX_NEW_TOKENS)
        groups: dict[int, list[int]] = {}
        for index, prompt in prompts.items():
            groups.setdefault(min(wanted, self._context - len(prompt.ids)), []).append(index)
        return list(groups.values())

    def _generate(self, prompts: Sequence[Prompt], sub_bin: bool, options: dict[str, Any]) -> list[list[Answer]]:
        """The answers to each of the prompts, which leave the same room or all that is wanted."""
        longest = max(len(prompt.ids) for prompt in prompts)
        options = {"do_sample": False, "eos_token_id": self.text_format.stop_token_ids, **options}
        room = min(options.get("max_new_tokens", MAX_NEW_TOKENS), self._context - longest)
        options |= {"max_new_tokens": room}
        if "min_new_tokens" in options:
            options["min_new_tokens"] = min(options["min_new_tokens"], room)
        if sub_bin:
            options |= {"return_dict_in_generate": True, "output_logits": True}
        # transformers drops a mask of ones and then warns that an end of text might be padding.
        with quiet_transformers(), without_own_settings(self.model):
            output = self.model.generate(**self._collate(prompts, longest), **options)
        generated = (output.sequences if sub_bin else output)[:, longest:]
        positions: list[list[float]] | list[None] = [None] * len(generated)
        if sub_bin:
            assert self.grounding is not None
            beams = output.get("beam_indices")
            positions = expected_positions(generated, output.logits, self.grounding, beams).tolist()
        each = len(generated) // len(prompts)
        rows = zip(generated.tolist(), positions, strict=True)
        return [[self._read(prompt, *next(rows)) for _ in range(each)] for prompt in prompts]

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
