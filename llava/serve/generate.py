"""Captions and continuations from a trained checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava.config import VisionConfig
from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN
from llava.data.media import load_media
from llava.data.placeholders import expand_placeholders
from llava.data.preprocess import PLAIN_LM, build_format
from llava.data.time_instruction import add_time_instruction, clips_of
from llava.model.loading import LoadedModel, load_model
from llava.model.quantization import Quantization
from llava.model.quiet import quiet_transformers
from llava.types import Media, Turn, VisualInput

_PLACEHOLDERS = {"image": DEFAULT_IMAGE_TOKEN, "video": DEFAULT_VIDEO_TOKEN}


@dataclass(frozen=True)
class Request:
    """What to describe, to answer or to continue.

    Media, in order, then the text so far or, for a model trained on conversations, the user's question;
    ``system`` is a system turn before both.
    """

    media: Sequence[Media | VisualInput] = ()
    prompt: str = ""
    system: str = ""


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
        self.text_format = build_format(getattr(self.model.config, "llava_format", PLAIN_LM), self.tokenizer)

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
        """Generate text for each request.

        Args:
            requests: any mix of images, videos and plain prompts.
            batch_size: requests that are decoded together.
            **options: for transformers' ``generate``, such as ``num_beams``; greedy and 64 new
                tokens by default.

        Returns:
            The new text of each request, without the prompt.

        Raises:
            ValueError: a file cannot be read, or a request leaves no room in the context.
        """
        answers: list[str] = []
        for start in range(0, len(requests), batch_size):
            answers += self._generate_batch(requests[start : start + batch_size], options)
        return answers

    def _generate_batch(self, requests: Sequence[Request], options: dict[str, Any]) -> list[str]:
        stop = self.text_format.stop_token_ids
        options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": stop, **options}
        media = [[self._load(m) for m in request.media] for request in requests]
        prompts = [self._prompt_ids(request, loaded) for request, loaded in zip(requests, media, strict=True)]
        longest = max(map(len, prompts))
        room = self.model.config.max_position_embeddings - longest
        if room < 1:
            raise ValueError(
                f"the prompt has {longest} tokens, but the model's context is {longest + room}; shorten it or "
                "lower num_frames"
            )
        options["max_new_tokens"] = min(options["max_new_tokens"], room)
        input_ids = torch.full((len(prompts), longest), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompts):
            input_ids[row, longest - len(ids) :] = torch.tensor(ids)
            attention_mask[row, longest - len(ids) :] = 1
        flat = [medium for loaded in media for medium in loaded]
        visual: dict[str, Any] = {}
        if flat:
            visual = {"images": [m.frames for m in flat], "modalities": [m.kind for m in flat]}
            visual["image_sizes"] = [m.original_size for m in flat]
        # transformers drops a mask of ones and then warns that an end of text might be padding.
        with quiet_transformers():
            output = self.model.generate(
                input_ids.to(self.device), attention_mask=attention_mask.to(self.device), **visual, **options
            )
        answers = [[i for i in row if i not in stop] for row in output[:, longest:].tolist()]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _load(self, medium: Media | VisualInput) -> VisualInput:
        if isinstance(medium, VisualInput):
            return medium
        if self.vision is None:
            raise ValueError(f"{medium.path}: this model was trained on text alone and cannot look at a {medium.kind}")
        return load_media(medium, self.vision)

    def _prompt_ids(self, request: Request, media: Sequence[VisualInput]) -> list[int]:
        words = [*(_PLACEHOLDERS[medium.kind] for medium in media), request.prompt.strip()]
        turns = [Turn("system", request.system)] if request.system else []
        turns.append(Turn("user", self.text_format.media_separator.join(filter(None, words))))
        if self.vision is not None and self.vision.add_time_instruction:
            turns = add_time_instruction(turns, clips_of(media))
        frame_counts = [len(m.frames) for m in media if m.kind == "video"]
        image_sizes = [m.original_size for m in media if m.kind == "image"]
        expanded = expand_placeholders(turns, self.vision, frame_counts, image_sizes)
        ids = [i for segment in self.text_format.encode_prompt(expanded) for i in segment.ids]
        # A text model that is asked to begin on its own starts behind an end of text.
        return ids or [self.tokenizer.eos_token_id]
