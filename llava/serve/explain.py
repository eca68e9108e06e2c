"""What a model made of a request: the frames that it saw, where it looked, and how likely it finds a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava.config import VisionConfig
from llava.data.formats.base import encode_answer
from llava.data.placeholders import escape_placeholders, literal_text
from llava.draw import draw_box, draw_case, fit
from llava.geometry import Box
from llava.model.patch_attention import attribute_to_patches, read_attention, split_by_media
from llava.serve.generate import Answer, Captioner, Prompt, Request
from llava.types import MediaKind, VisualInput, holds_features

if TYPE_CHECKING:
    from PIL.Image import Image

LabelledPicture = tuple["Image", str]


def shown_frames(media: Sequence[VisualInput]) -> list[LabelledPicture]:
    """The squares that the tower saw, each with what it is: its time in the clip, or which part of a picture."""
    from PIL import Image

    pictures = []
    for number, item in enumerate(media, start=1):
        if holds_features(item.frames):
            raise ValueError("the features of the tower were read from a cache, and no frame was decoded")
        for frame, label in zip(item.frames, _labels(item), strict=True):
            name = label if len(media) == 1 else f"{number}: {label}"
            pictures.append((Image.fromarray(frame.permute(1, 2, 0).numpy()), name))
    return pictures


def _labels(item: VisualInput) -> list[str]:
    if item.kind == "video":
        return [f"{time:.2f} s" for time in item.times]
    return ["picture", *(f"tile {number}" for number in range(1, len(item.frames)))]


# Where an answer points.

BOX_COLOURS = ("#ffd400", "#00b4d8", "#ef476f", "#06d6a0", "#b388ff", "#ff8c42")
_PICTURE_SIDE, _FRAME_SIDE = 640, 220
"""Pixels of a side where places are drawn: of an image, and of each frame of a video, four of which stand in a row."""


def restore_frames(item: VisualInput, vision: VisionConfig, largest: int | None = None) -> list[Image]:
    """The frames that the model saw, brought back to their shape; black where they were cut.

    Args:
        item: an image, of which one in tiles is shown as a whole, or a video.
        vision: of the model.
        largest: most pixels of a side.
    """
    from PIL import Image

    height, width = item.original_size
    scale = min(1.0, (largest or max(height, width)) / max(height, width))
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    if item.kind == "image" and vision.anyres is not None:
        # The first view is the whole picture, stretched to the square.
        return [Image.fromarray(item.frames[0].permute(1, 2, 0).numpy()).resize(size)]
    letterbox = vision.letterbox((height, width))
    # The square in the picture's own shape again: padding is cut off, what was cut off stays black.
    corners = (letterbox.left, letterbox.top, letterbox.left + letterbox.width, letterbox.top + letterbox.height)
    squares = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in item.frames]
    return [square.crop(corners).resize(size) for square in squares]


def draw_boxes(frames: Sequence[Image], answer: Answer, kind: MediaKind) -> None:
    """Draw the boxes of an answer into an image, or into the sampled frames of a video.

    The boxes of a video are taken as a tube: evenly spaced in time over the answer's first span, or over the clip if
    it has none; each is drawn on the frame that is nearest in time.
    """
    shown_on = [0] * len(answer.boxes)
    if kind == "video":
        start, end = answer.spans[0] if answer.spans else (0.0, 1.0)
        steps = max(len(answer.boxes) - 1, 1)
        times = [start + (end - start) * i / steps for i in range(len(answer.boxes))]
        # Frame i of n lies at i / (n - 1), as the model was told.
        shown_on = [round(time * (len(frames) - 1)) for time in times]
    for i, (box, frame) in enumerate(zip(answer.boxes, shown_on, strict=True)):
        picture = frames[frame]
        # Corners in the wrong order are put right: here it counts where the model points, not what it scores.
        (x1, x2), (y1, y2) = sorted((box.x1, box.x2)), sorted((box.y1, box.y2))
        draw_box(picture, Box(x1, y1, x2, y2), BOX_COLOURS[i % len(BOX_COLOURS)], max(2, min(picture.size) // 150))


def draw_places(answer: Answer, item: VisualInput, vision: VisionConfig) -> Image | None:
    """A picture of the boxes and spans of an answer; None where it tells none.

    Args:
        answer: that speaks of it.
        item: the last image or video of the question, of which answers speak.
        vision: of the model.
    """
    if not (answer.boxes or answer.spans):
        return None
    # As large as they are shown, before boxes are drawn: lines would vanish where frames are made smaller behind them.
    side = _PICTURE_SIDE if item.kind == "image" else _FRAME_SIDE
    frames = [fit(frame, side, side) for frame in restore_frames(item, vision, _PICTURE_SIDE)]
    draw_boxes(frames, answer, item.kind)
    return frames[0] if item.kind == "image" else draw_case(frames, answer=answer.spans)


# Where it looked.


@dataclass(frozen=True)
class Attention:
    """The attention of an answer's tokens on the images and videos of its prompt.

    Attributes:
        prompt: what was asked.
        tokens: the text of each token of the answer.
        weights: of each image or video, (tokens of the answer, its visual tokens): the share of all attention, the
            mean over layers and heads, at the step that chose the token.
    """

    prompt: Prompt
    tokens: list[str]
    weights: list[Tensor]

    def share(self, token: int) -> float:
        """How much of a token's attention was on images and videos; the rest was on text."""
        return float(sum(weights[token].sum() for weights in self.weights))


@torch.no_grad()
def look_again(captioner: Captioner, prompt: Prompt, answer: Sequence[int]) -> Attention:
    """Run a prompt and its answer once more, to see where each token of the answer came from.

    Args:
        captioner: that answered; nobody may use it meanwhile.
        prompt: with images or videos.
        answer: ids of at least one new token.

    Raises:
        ValueError: there is nothing to look at, or the model gives no attention weights.
    """
    if not prompt.media:
        raise ValueError("the question has no image and no video: there is nowhere to look")
    if not answer:
        raise ValueError("the answer has no token: there is nothing to explain")
    assert captioner.vision is not None
    ids = [*prompt.ids, *answer]
    batch = captioner.collate([Prompt(ids, prompt.media, prompt.coordinates, prompt.letterbox)], len(ids))
    media = {name: batch[name] for name in ("images", "modalities", "image_sizes")}
    attention = read_attention(
        captioner.model, batch["input_ids"], len(prompt.ids), variables=batch.get("variables"), **media
    )
    layout = captioner.vision.layout
    counts = [layout.num_tokens(m.kind, len(m.frames), m.original_size) for m in prompt.media]
    weights = split_by_media(attention, ids, captioner.vision.visual_token_ids, counts)
    return Attention(prompt, [str(captioner.tokenizer.decode([i])) for i in answer], weights)


@torch.no_grad()
def heat_maps(captioner: Captioner, attention: Attention, token: int) -> tuple[list[Tensor], str]:
    """Where the model looked when it chose a token of its answer.

    Args:
        captioner: as for ``look_again``.
        attention: of it.
        token: its number in the answer, from 0.

    Returns:
        For each image or video (frames, side, side) shares on the grid of its frames, of a picture in tiles one frame,
        and a sentence that says what is to be known about them, or nothing.
    """
    maps, is_told = [], True
    for item, weights in zip(attention.prompt.media, attention.weights, strict=True):
        shares, within = attribute_to_patches(
            captioner.model, item.frames, item.kind, item.original_size, weights[token].to(captioner.device)
        )
        maps.append(shares.cpu())
        is_told = is_told and within
    assert captioner.vision is not None
    note = (
        f"the resampler {captioner.vision.resampler_type!r} does not tell which patches its tokens are made of: "
        "frames are told apart, places within a frame are not"
    )
    return maps, "" if is_told else note


def draw_heat_maps(media: Sequence[VisualInput], maps: Sequence[Tensor]) -> list[LabelledPicture]:
    """The frames that the tower saw, darkened where the model did not look; the brightest patch of all is undimmed."""
    # One scale for all frames and media: they share one unit of attention.
    largest = max(float(shares.max()) for shares in maps) or 1.0
    # Of a picture in tiles the first view is the whole.
    seen = [
        VisualInput(item.kind, item.frames[: len(shares)], item.original_size, item.times)
        for item, shares in zip(media, maps, strict=True)
    ]
    levels = [frame / largest for shares in maps for frame in shares]
    return [
        (_draw_heat(picture, level), label) for (picture, label), level in zip(shown_frames(seen), levels, strict=True)
    ]


def _draw_heat(picture: Image, level: Tensor) -> Image:
    """A picture under a map (side, side) in [0, 1]: grey and dark at 0, as it is with a glow of orange at 1."""
    from PIL import Image

    mask = Image.fromarray((level.clamp(0, 1).sqrt() * 255).to(torch.uint8).numpy(), "L")
    # Not smoothed: a patch is what the model knows, and a smooth map would promise more.
    mask = mask.resize(picture.size, Image.Resampling.NEAREST)
    dark = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, (16, 16, 40)), 0.6)
    glowing = Image.blend(picture, Image.new("RGB", picture.size, (255, 140, 0)), 0.3)
    return Image.composite(glowing, dark, mask)


# How likely a sentence is.


@dataclass(frozen=True)
class Word:
    """A word of a sentence and its log-probability, of all its tokens together, behind the words before it."""

    text: str
    logprob: float


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds a sentence as its answer, with what it was shown and, where there was any, without.

    The end of the answer is not counted.
    """

    words: list[Word]
    blind_words: list[Word] | None

    @property
    def logprob(self) -> float:
        return sum(word.logprob for word in self.words)

    @property
    def blind_logprob(self) -> float | None:
        return None if self.blind_words is None else sum(word.logprob for word in self.blind_words)


def score_sentence(captioner: Captioner, request: Request, sentence: str) -> Likelihood:
    """How likely a model finds a sentence as the answer to a request, and to the same request without its media.

    Args:
        captioner: nobody may use it meanwhile.
        request: with its media loaded.
        sentence: what is scored, as it reads: ``<image>`` in it is a word.

    Raises:
        ValueError: the sentence is empty, has visual tokens, or is too long for the context.
    """
    sentence = " ".join(escape_placeholders(sentence).split())
    if not sentence:
        raise ValueError("there is no sentence to score; write one")
    words = _score(captioner, request, sentence)
    blind = None
    if request.media:
        blind = _score(captioner, Request((), request.prompt, request.system), sentence)
    return Likelihood(words, blind)


@torch.no_grad()
def _score(captioner: Captioner, request: Request, sentence: str) -> list[Word]:
    prompt = captioner.prompts.write(request)
    given, ids = _encode_answer(captioner, request, prompt, sentence)
    if len(given) + len(ids) > captioner.context:
        raise ValueError(
            f"the sentence has {len(ids)} tokens behind {len(given)} of the question, but the model's context is "
            f"{captioner.context}; shorten it"
        )
    whole = Prompt([*given, *ids], prompt.media, prompt.coordinates, prompt.letterbox)
    logits = captioner.model(
        **captioner.collate([whole], len(whole.ids)), logits_to_keep=len(ids) + 1, use_cache=False, return_dict=True
    ).logits  # (1, tokens + 1, vocabulary)
    logprobs = logits[0, :-1].float().log_softmax(-1).cpu()  # (tokens, vocabulary)
    scores = logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
    words: list[Word] = []
    for place, score in enumerate(scores):
        # By the text so far: a token may be part of a word, or of a letter.
        text = str(captioner.tokenizer.decode(ids[: place + 1])).split()
        if len(text) <= len(words) and words:
            words[-1] = Word(text[-1] if text else words[-1].text, words[-1].logprob + score)
        else:
            words.append(Word(text[-1] if text else "", score))
    return words


def _encode_answer(
    captioner: Captioner, request: Request, prompt: Prompt, sentence: str
) -> tuple[list[int], list[int]]:
    """The ids of a prompt, and those of a sentence as its answer, without the end of it."""
    text_format = captioner.text_format
    if not text_format.has_prompts:
        # One text: the sentence goes on behind what stands before it, with a space as turns are joined.
        begins = not (prompt.media or request.prompt.strip() or request.system.strip())
        text = literal_text(sentence if begins else f" {sentence}")
        return prompt.ids, list(captioner.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    turns = captioner.prompts.write_turns(request, prompt.media)
    # Where nothing is given ``prompt`` has an end of text, as where answers are generated.
    return prompt.ids, encode_answer(text_format, captioner.prompts.expand(turns, prompt.media), sentence)[1]


def perplexity(words: Sequence[Word]) -> float:
    """The inverse of the words' mean probability (geometric)."""
    return math.exp(-sum(word.logprob for word in words) / len(words))
