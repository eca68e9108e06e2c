"""Captions, answers and continuations from a trained checkpoint.

Request -> PromptWriter -> Prompt -> Captioner -> Answer: a request's media are decoded, and its text becomes the ids
that a training sample would begin with; what the model generates is read as text, boxes and spans of time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase

from llava.config import GroundingConfig, VisionConfig
from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN
from llava.data.feature_cache.run import RunFeatures, read_features
from llava.data.feature_cache.towers import TowerRecords
from llava.data.formats import PLAIN_LM, Format, build_format
from llava.data.media import load_media
from llava.data.placeholders import add_time_instruction, clips_of, expand_placeholders, placeholder_kinds
from llava.geometry import Box, Letterbox, TimeSpan
from llava.grounding.samples import check_coordinates, move_to_square
from llava.grounding.syntax import count_bins, parse_boxes, parse_spans, write_numbers
from llava.model.coordinates import expected_positions
from llava.model.generation import CoordinateSyntax
from llava.model.loading import LoadedModel, choose_device, load_model
from llava.model.multimodal_encoder.lazy import hash_tower
from llava.model.pretrained import quiet_transformers
from llava.model.quantization import Quantization
from llava.serve.decoding import MAX_NEW_TOKENS, without_own_settings
from llava.types import NO_COORDINATES, Coordinates, Media, Turn, VisualInput


@dataclass(frozen=True)
class Answer:
    """An answer of a model.

    Attributes:
        text: as it was generated, bins included, without the prompt; if the prompt ended inside a box or a
            span, from where that begins.
        boxes: in reading order, in fractions of the width and height of the request's picture or video, the last
            of several.
        spans: in reading order, in fractions of the time from the first to the last sampled frame.
    """

    text: str
    boxes: list[Box] = field(default_factory=list)
    spans: list[TimeSpan] = field(default_factory=list)

    def __str__(self) -> str:
        """The text with numbers in the place of bins, such as "the star [0.12 0.34 0.56 0.78]"."""
        return write_numbers(self.text, self.boxes, self.spans)


def read_answer(
    text: str,
    grounding: GroundingConfig | None,
    letterbox: Letterbox | None = None,
    positions: Sequence[float | None] | None = None,
) -> Answer:
    """Read the boxes and spans of a text.

    Args:
        text: as a model generated it.
        grounding: of the model; without tables of bins no text tells a box.
        letterbox: how the picture lies in the square that the model saw; None if they are the same.
        positions: of its bins, see ``parse_boxes``.
    """
    if grounding is None or not grounding.has_tables:
        return Answer(text)
    if positions is not None and len(positions) != count_bins(text):
        # Some bin is spelled letter by letter: which of them are tokens cannot be told from the text.
        positions = None
    boxes = parse_boxes(text, grounding, positions)
    if letterbox is not None:
        # The model speaks of its square, people of their picture.
        boxes = [Box(*letterbox.from_square(*box[:2]), *letterbox.from_square(*box[2:])) for box in boxes]
    return Answer(text, boxes, parse_spans(text, grounding, positions))


# The prompt that a request becomes.

DECODE_TIMEOUT = 60.0
"""Seconds that decoding a video may take; it is done in a process of its own, which a damaged file may bring down."""

_PLACEHOLDERS = {"image": DEFAULT_IMAGE_TOKEN, "video": DEFAULT_VIDEO_TOKEN}


@dataclass(frozen=True)
class Request:
    """What to describe, to answer or to continue.

    Media, in order, then the text so far or, for a model trained on conversations, the user's question;
    ``system`` is a system turn before both. A prompt that shows the media itself, with ``<image>`` or ``<video>`` for
    each of them, is taken as it stands, as the user's turn of a training sample is; with ``history``, the turns before
    it, placeholders stand in any of them. ``coordinates`` are what the
    prompt's placeholders stand for (``<WIDTH-INPUT>``), in fractions of the last picture's width and height and of
    the clip's time.
    """

    media: Sequence[Media | VisualInput] = ()
    prompt: str = ""
    system: str = ""
    coordinates: Coordinates = NO_COORDINATES
    history: Sequence[Turn] = ()

    def __str__(self) -> str:
        """Its files and the beginning of its prompt, to name it in a message."""
        files = [item.path for item in self.media if isinstance(item, Media)]
        return ", ".join([*files, repr(self.prompt if len(self.prompt) <= 60 else f"{self.prompt[:60]}...")])


@dataclass(frozen=True)
class Prompt:
    """A request as the model gets it.

    Attributes:
        ids: of its tokens, visual spans included.
        media: loaded, in reading order.
        coordinates: in the tower's square.
        letterbox: how the picture that the answer speaks of lies in that square: the last one, as in training.
            None without media.
    """

    ids: list[int]
    media: list[VisualInput]
    coordinates: Coordinates = NO_COORDINATES
    letterbox: Letterbox | None = None


@dataclass(frozen=True)
class PromptWriter:
    """Writes requests as a model's training samples began.

    Attributes:
        tokenizer: of the model.
        text_format: that it was trained with.
        vision: None for a model of text alone.
        grounding: None for a model without coordinates.
        features: of the tower, which take the place of decoded media where there are any.
    """

    tokenizer: PreTrainedTokenizerBase
    text_format: Format
    vision: VisionConfig | None = None
    grounding: GroundingConfig | None = None
    features: RunFeatures | None = None

    def write(self, request: Request) -> Prompt:
        """Load the media of a request and write its prompt.

        Raises:
            ValueError: a file cannot be read, the model does not see, or the coordinates are not those of the
                prompt or are given to a model that has none.
        """
        media = [self.load(item) for item in request.media]
        turns = self.write_turns(request, media)
        # From the same turns: coordinates go by the placeholders before these are expanded.
        ids, coordinates = self._encode(turns, media), self._place(request, turns, media)
        if self.vision is None or not media:
            return Prompt(ids, media, coordinates)
        return Prompt(ids, media, coordinates, self.vision.letterbox(media[-1].original_size))

    def load(self, item: Media | VisualInput) -> VisualInput:
        """Load an image or a video, if that is not done yet."""
        if isinstance(item, VisualInput):
            return item
        if self.vision is None:
            raise ValueError(f"{item.path}: this model was trained on text alone and cannot look at {item.kind}s")
        return load_media(item, self.vision, timeout=DECODE_TIMEOUT, features=self.features)

    def write_turns(self, request: Request, media: Sequence[VisualInput]) -> list[Turn]:
        """The turns of a request, media and coordinates as placeholders."""
        kinds = [item.kind for item in media]
        texts = [*(turn.text for turn in request.history), request.prompt]
        shown = [kind for text in texts for kind in placeholder_kinds(text)]
        if shown and shown != kinds:
            raise ValueError(f"the prompt {request.prompt!r} shows {shown}, but the request has {kinds}; or show none")
        words = [*([] if shown else [_PLACEHOLDERS[kind] for kind in kinds]), request.prompt.strip()]
        turns = [*([Turn("system", request.system)] if request.system else []), *request.history]
        # Media first, then the words, as in training samples of the family.
        turns.append(Turn("user", self.text_format.media_separator.join(filter(None, words))))
        if self.vision is not None and self.vision.add_time_instruction:
            turns = add_time_instruction(turns, clips_of(media))
        return turns

    def expand(self, turns: Sequence[Turn], media: Sequence[VisualInput]) -> list[Turn]:
        """The turns with the spans of their media in the places of the placeholders."""
        frame_counts = [len(m.frames) for m in media if m.kind == "video"]
        image_sizes = [m.original_size for m in media if m.kind == "image"]
        return expand_placeholders(turns, self.vision, frame_counts, image_sizes)

    def _encode(self, turns: Sequence[Turn], media: Sequence[VisualInput]) -> list[int]:
        ids = [i for segment in self.text_format.encode_prompt(self.expand(turns, media)) for i in segment.ids]
        # A text model that is asked to begin on its own starts behind an end of text.
        return ids or [self.tokenizer.eos_token_id]  # type: ignore[list-item]

    def _place(self, request: Request, turns: Sequence[Turn], media: Sequence[VisualInput]) -> Coordinates:
        """The coordinates of a request in the tower's square; none for a model to which placeholders are words."""
        if self.grounding is None:
            if request.coordinates:
                raise ValueError(
                    f"the request {request.prompt!r} has coordinates, but this model has none; train it with --stage 2"
                )
            return NO_COORDINATES
        if self.vision is None or not self.grounding.has_tables:
            return NO_COORDINATES
        text = " ".join(turn.text for turn in turns)
        check_coordinates(request.coordinates, text, f"sample 'request' ({request.prompt})")
        return move_to_square(turns, request.coordinates, [m.original_size for m in media], self.vision)


# The answers of a checkpoint.


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
        feature_cache: folder of features of the tower, see docs/feature_cache.md.
        feature_cache_strict: whether what is not in it is an error.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        device: str | None = None,
        feature_cache: str | None = None,
        feature_cache_strict: bool = False,
    ) -> None:
        self.device = choose_device(device)
        self.model = loaded.model.to(self.device).eval()
        self.tokenizer = loaded.tokenizer
        self.vision: VisionConfig | None = loaded.vision
        self.grounding: GroundingConfig | None = self.model.grounding
        self.text_format = build_format(getattr(self.model.config, "llava_format", PLAIN_LM), self.tokenizer)
        # GPT-2's n_positions has this name too.
        self.context = int(self.model.config.max_position_embeddings)
        self.features = self._read_features(feature_cache, feature_cache_strict) if feature_cache else None
        self.prompts = PromptWriter(self.tokenizer, self.text_format, self.vision, self.grounding, self.features)
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
        feature_cache: str | None = None,
        feature_cache_strict: bool = False,
    ) -> Captioner:
        """Load a checkpoint folder.

        Args:
            path: the folder.
            vision_tower: where its tower lies, if it has moved.
            device: where to run; by default a GPU if there is one.
            model_base: where the base model of its adapters lies, if it has any and that has moved.
            bits: 8 or 4 holds the language model's linear layers in so many bits.
            feature_cache, feature_cache_strict: as for ``Captioner``; the tower is read when it is needed.
        """
        choose_device(device)  # Before a model is read.
        quantization = Quantization(bits, device=device) if bits != 16 else None
        loaded = load_model(
            path,
            model_base=model_base,
            vision_tower=vision_tower,
            quantization=quantization,
            flag="--model_path",
            find_tower_hash=TowerRecords(feature_cache) if feature_cache else None,
        )
        loaded.check_complete(f"--model_path {path!r}")
        return cls(loaded, device, feature_cache, feature_cache_strict)

    def _read_features(self, folder: str, strict: bool) -> RunFeatures:
        tower = self.model.get_vision_tower()
        if self.vision is None or tower is None:
            raise ValueError(f"--feature_cache {folder} was given, but the model does not see; leave the flag out")
        features = read_features(folder, self.vision, hash_tower(self.model), tower.dtype, self.device, strict)
        features.round_live(tower)
        return features

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
        # Set per group below, where a prompt leaves less room.
        wanted = options.pop("max_new_tokens", MAX_NEW_TOKENS)
        for start in range(0, len(requests), batch_size):
            prompts: dict[int, Prompt] = {}
            # By the number of tokens that answers may have, what is decoded together: a prompt that leaves less
            # room than is wanted gets a shorter answer, and those beside it lose nothing.
            groups: dict[int, list[int]] = {}
            for index in range(start, min(start + batch_size, len(requests))):
                prompts[index] = self.prompts.write(requests[index])
                room = self.context - len(prompts[index].ids)
                if room > 0:
                    groups.setdefault(min(wanted, room), []).append(index)
                else:
                    too_long[index] = (
                        f"the prompt has {len(prompts[index].ids)} tokens, but the model's context is {self.context}; "
                        "shorten it or lower num_frames"
                    )
            for room, group in groups.items():
                found = self.answer_prompts([prompts[i] for i in group], room, sub_bin, options)
                for index, generated in zip(group, found, strict=True):
                    answers[index] = generated
        if too_long:
            raise PromptTooLongError(requests, answers, too_long)
        return [answer for generated in answers for answer in generated]

    def answer_prompts(
        self, prompts: Sequence[Prompt], room: int, sub_bin: bool, options: dict[str, Any]
    ) -> list[list[Answer]]:
        """The answers to each of the prompts, of at most ``room`` tokens; ``options`` are for ``generate``.

        For callers that have written the prompts themselves, and have seen that each leaves ``room`` in the context.
        """
        longest = max(len(prompt.ids) for prompt in prompts)
        # Formats end answers with tokens of their own, which the model's configuration does not name.
        options = {"do_sample": False, "eos_token_id": self.text_format.stop_token_ids, **options}
        options["max_new_tokens"] = room
        if "min_new_tokens" in options:
            options["min_new_tokens"] = min(options["min_new_tokens"], room)
        if sub_bin:
            options |= {"return_dict_in_generate": True, "output_logits": True}
        # transformers drops a mask of ones and then warns that an end of text might be padding.
        with quiet_transformers(), without_own_settings(self.model):
            output = self.model.generate(**self.collate(prompts, longest), **options)
        generated = (output.sequences if sub_bin else output)[:, longest:]  # (prompts * answers of each, new tokens)
        positions: list[list[float]] | list[None] = [None] * len(generated)
        if sub_bin:
            assert self.grounding is not None
            beams = output.get("beam_indices")
            positions = expected_positions(generated, output.logits, self.grounding, beams).tolist()
        # num_return_sequences; the answers to one prompt stand together.
        each = len(generated) // len(prompts)
        rows = zip(generated.tolist(), positions, strict=True)
        return [[self.read(prompt, *next(rows)) for _ in range(each)] for prompt in prompts]

    def collate(self, prompts: Sequence[Prompt], longest: int) -> dict[str, Any]:
        """A batch of prompts, padded on the left, with media and coordinates where there are any."""
        input_ids = torch.full((len(prompts), longest), self.tokenizer.pad_token_id)  # (prompts, longest)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
            attention_mask[row, longest - len(prompt.ids) :] = 1
        batch: dict[str, Any] = {"input_ids": input_ids.to(self.device)}
        batch["attention_mask"] = attention_mask.to(self.device)
        media = [item for prompt in prompts for item in prompt.media]
        if media:
            batch |= {"images": [m.frames for m in media], "modalities": [m.kind for m in media]}
            batch["image_sizes"] = [m.original_size for m in media]
        if any(prompt.coordinates for prompt in prompts):
            batch["variables"] = [prompt.coordinates.to_variables() for prompt in prompts]
        return batch

    def read(self, prompt: Prompt, ids: Sequence[int], positions: Sequence[float] | None = None) -> Answer:
        """The answer that new tokens are; a box that the prompt began belongs to it."""
        begun = prompt.ids[len(prompt.ids) - self.syntax.count_open(prompt.ids) :] if self.syntax is not None else []
        stop = self.text_format.stop_token_ids
        written = [*begun, *(i for i in ids if i not in stop)]
        text = self.tokenizer.batch_decode([written], skip_special_tokens=True)[0].strip()
        if self.grounding is None or positions is None:
            return read_answer(text, self.grounding, prompt.letterbox)
        assert self.grounding.first_bin is not None
        # Of bins in the prompt only the number is known: no logits were made for them.
        known = [None for i in begun if i >= self.grounding.first_bin]
        finer = [position for position in positions if not math.isnan(position)]
        return read_answer(text, self.grounding, prompt.letterbox, [*known, *finer])
