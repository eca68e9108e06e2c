"""What a model is asked, and the prompt that this becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llava.config import VisionConfig
from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN
from llava.coordinates import GroundingConfig
from llava.data.coordinates import check_coordinates, move_to_square
from llava.data.media import load_media
from llava.data.placeholders import expand_placeholders, placeholder_kinds
from llava.data.preprocess import Format
from llava.data.time_instruction import add_time_instruction, clips_of
from llava.framing import Framing, frame_picture
from llava.types import NO_COORDINATES, Coordinates, Media, Record, Turn, VisualInput

_PLACEHOLDERS = {"image": DEFAULT_IMAGE_TOKEN, "video": DEFAULT_VIDEO_TOKEN}


@dataclass(frozen=True)
class Request:
    """What to describe, to answer or to continue.

    Media, in order, then the text so far or, for a model trained on conversations, the user's question;
    ``system`` is a system turn before both. A prompt that shows the media itself, with ``<image>`` or ``<video>`` for
    each of them, is taken as it stands, as the user's turn of a training sample is. ``coordinates`` are what the
    prompt's placeholders stand for (``<WIDTH-INPUT>``), in fractions of the last picture's width and height and of
    the clip's time.
    """

    media: Sequence[Media | VisualInput] = ()
    prompt: str = ""
    system: str = ""
    coordinates: Coordinates = NO_COORDINATES

    def __str__(self) -> str:
        """Its files and the beginning of its prompt, to name it in a message."""
        files = [medium.path for medium in self.media if isinstance(medium, Media)]
        return ", ".join([*files, repr(self.prompt if len(self.prompt) <= 60 else f"{self.prompt[:60]}...")])


@dataclass(frozen=True)
class Prompt:
    """A request as the model gets it.

    Attributes:
        ids: of its tokens, visual spans included.
        media: loaded, in reading order.
        coordinates: in the tower's square.
        framing: how the picture that the answer speaks of lies in that square: the last one, as in training.
            None without media.
    """

    ids: list[int]
    media: list[VisualInput]
    coordinates: Coordinates = NO_COORDINATES
    framing: Framing | None = None


@dataclass(frozen=True)
class PromptWriter:
    """Writes requests as a model's training samples began.

    Attributes:
        tokenizer: of the model.
        text_format: that it was trained with.
        vision: None for a model of text alone.
        grounding: None for a model without coordinates.
    """

    tokenizer: PreTrainedTokenizerBase
    text_format: Format
    vision: VisionConfig | None = None
    grounding: GroundingConfig | None = None

    def write(self, request: Request) -> Prompt:
        """Load the media of a request and write its prompt.

        Raises:
            ValueError: a file cannot be read, the model does not see, or the coordinates are not those of the
                prompt or are given to a model that has none.
        """
        media = [self.load(medium) for medium in request.media]
        turns = self._write_turns(request, media)
        ids, coordinates = self._encode(turns, media), self._place(request, turns, media)
        if self.vision is None or not media:
            return Prompt(ids, media, coordinates)
        return Prompt(ids, media, coordinates, frame_picture(media[-1].original_size, self.vision))

    def load(self, medium: Media | VisualInput) -> VisualInput:
        """Load an image or a video, if that is not done yet."""
        if isinstance(medium, VisualInput):
            return medium
        if self.vision is None:
            raise ValueError(f"{medium.path}: this model was trained on text alone and cannot look at {medium.kind}s")
        return load_media(medium, self.vision)

    def _write_turns(self, request: Request, media: Sequence[VisualInput]) -> list[Turn]:
        """The turns of a request, media and coordinates as placeholders."""
        kinds, shown = [medium.kind for medium in media], placeholder_kinds(request.prompt)
        if shown and shown != kinds:
            raise ValueError(f"the prompt {request.prompt!r} shows {shown}, but the request has {kinds}; or show none")
        words = [*([] if shown else [_PLACEHOLDERS[kind] for kind in kinds]), request.prompt.strip()]
        turns = [Turn("system", request.system)] if request.system else []
        turns.append(Turn("user", self.text_format.media_separator.join(filter(None, words))))
        if self.vision is not None and self.vision.add_time_instruction:
            turns = add_time_instruction(turns, clips_of(media))
        return turns

    def _encode(self, turns: Sequence[Turn], media: Sequence[VisualInput]) -> list[int]:
        frame_counts = [len(m.frames) for m in media if m.kind == "video"]
        image_sizes = [m.original_size for m in media if m.kind == "image"]
        expanded = expand_placeholders(turns, self.vision, frame_counts, image_sizes)
        ids = [i for segment in self.text_format.encode_prompt(expanded) for i in segment.ids]
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
        check_coordinates(Record("request", tuple(turns), source=request.prompt, coordinates=request.coordinates))
        return move_to_square(turns, request.coordinates, [m.original_size for m in media], self.vision)
