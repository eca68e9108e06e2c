"""The processor of exported models: texts with pictures and clips -> ids, offsets and pixels, as training has them.

An export has a copy of this class, and of what it uses, in its own module (``llava.model.export``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PretrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

from llava.config import VisionConfig
from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, ESCAPED_PLACEHOLDER, PLACEHOLDER, VISUAL_TOKEN
from llava.data.images import to_rgb
from llava.data.media import cut_views, fit_frames
from llava.types import MediaKind

_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

Picture = Image.Image | NDArray[np.generic] | Tensor | str
"""As a program has one: PIL's, an array or tensor of RGB, or the path of a file."""
Clip = Sequence[Picture] | NDArray[np.generic] | Tensor
"""Frames."""
Shown = tuple[MediaKind, Tensor, tuple[int, int]]
"""Kind, uint8 frames (views under anyres) (frames, 3, side, side), and the original (height, width)."""


class MultimodalProcessor(ProcessorMixin):
    """A tokenizer, and how pictures and clips are shown to the model.

    ``<image>`` and ``<video>`` in a text become the tokens that the model puts features on. A text without them, but
    with media, gets them in front, with ``separator`` behind, as training samples have them.

    Args:
        tokenizer: of the model.
        vision: the model's visual settings.
        separator: what stands between media and the text behind them.
        chat_template: for ``apply_chat_template``; by default the tokenizer's.
    """

    image_token = DEFAULT_IMAGE_TOKEN
    video_token = DEFAULT_VIDEO_TOKEN

    def __init__(
        self,
        tokenizer: Any = None,
        vision: VisionConfig | None = None,
        separator: str = " ",
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or getattr(tokenizer, "chat_template", None))
        assert vision is not None, "MultimodalProcessor.from_pretrained reads the settings of the model"
        self.vision = vision
        self.separator = separator
        # Where the BabyLM pipeline looks for it.
        tokenizer.image_token = self.image_token

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that are loaded by classes of their own: the tokenizer alone."""
        return ["tokenizer"]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: object, **kwargs: Any
    ) -> Any:
        """Load from the folder of an export; what is not about the download goes to the tokenizer."""
        where = {name: kwargs.pop(name) for name in _DOWNLOAD if kwargs.get(name) is not None}
        for name in ("trust_remote_code", "code_revision", "_from_auto", "use_fast", *_DOWNLOAD):
            kwargs.pop(name, None)
        settings, _ = PretrainedConfig.get_config_dict(pretrained_model_name_or_path, **where)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **where, **kwargs)
        vision = VisionConfig.from_model_config(SimpleNamespace(**settings))
        return cls(tokenizer, vision, settings.get("llava_separator", " "))

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """The tokenizer's files; the settings are saved with the model."""
        return list(self.tokenizer.save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs))

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "modalities", "image_sizes"]

    def __call__(  # type: ignore[override]
        self,
        images: Picture | Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
        text: str | Sequence[str] | None = None,
        videos: Clip | Sequence[Clip] | Sequence[Sequence[Clip]] | None = None,
        return_offsets_mapping: bool = False,
        return_tensors: str | None = None,
        padding: bool | str = False,
        add_special_tokens: bool = True,
        **kwargs: object,
    ) -> BatchFeature:
        """The inputs of the model for texts and the media that they show.

        Args:
            images: a picture (PIL, or an array or tensor of RGB, its channels first or last, uint8 or in [0, 1]) or
                a list of them in the order of the texts, or for several texts a list of lists.
            text: one or several.
            videos: the same for clips, each a list of frames; a prompt shows all frames that are given.
            return_offsets_mapping: whether to tell where in its text each token lies: visual ones on their placeholder.
            return_tensors: "pt" for tensors, which pads; else lists, one for each text, of a single one too.
            padding: whether lists of several texts are padded, on the tokenizer's side.
            add_special_tokens: whether texts begin as the tokenizer begins them.
            **kwargs: others are not taken: truncation would cut a picture's tokens.

        Raises:
            ValueError: media and placeholders do not go together.
        """
        if text is None:
            raise ValueError("the processor needs a text, which may be empty; pictures are shown within one")
        if kwargs.get("truncation"):
            raise ValueError("truncation would cut the tokens of pictures; shorten the text itself")
        texts = [text] if isinstance(text, str) else list(text)
        media = [
            [*self._frames_of(shown), *self._clips_of(clips)]
            for shown, clips in zip(_by_text(images, texts), _by_text(videos, texts, nested=True), strict=True)
        ]
        encoded = [self._encode(one, shown, add_special_tokens) for one, shown in zip(texts, media, strict=True)]
        result: dict[str, Any] = {name: [row[name] for row in encoded] for name in ("input_ids", "offset_mapping")}
        result["attention_mask"] = [[1] * len(ids) for ids in result["input_ids"]]
        if return_tensors is not None or padding:
            self._pad(result)
        if not return_offsets_mapping:
            del result["offset_mapping"]
        in_order = [item for row in encoded for item in row["media"]]
        if return_tensors is not None:
            result = {name: torch.tensor(rows) for name, rows in result.items()}
        return BatchFeature({**result, **self._pixels(in_order)})

    def _frames_of(self, images: Sequence[Picture]) -> list[Shown]:
        found: list[Shown] = []
        for image in images:
            pixels = _to_pixels(image)  # (height, width, 3)
            views = (
                fit_frames(pixels[None], self.vision) if self.vision.anyres is None else cut_views(pixels, self.vision)
            )
            found.append(("image", views, (pixels.shape[0], pixels.shape[1])))
        return found

    def _clips_of(self, clips: Sequence[Clip]) -> list[Shown]:
        found: list[Shown] = []
        for clip in clips:
            frames = torch.stack([_to_pixels(frame) for frame in clip])  # (frames, height, width, 3)
            found.append(("video", fit_frames(frames, self.vision), (frames.shape[1], frames.shape[2])))
        return found

    def _encode(self, text: str, media: Sequence[Shown], add_special_tokens: bool) -> dict[str, Any]:
        """Ids, offsets and media, in reading order, of one text."""
        shown = ["image" if token == DEFAULT_IMAGE_TOKEN else "video" for token in PLACEHOLDER.findall(text)]
        kinds = [kind for kind, _, _ in media]
        if sorted(shown) != sorted(kinds) and (shown or not media):
            raise ValueError(f"the text {text[:80]!r} shows {shown}, but {kinds} were given; or show none in the text")
        if not media:
            plain = self.tokenizer(_literal(text), add_special_tokens=add_special_tokens, return_offsets_mapping=True)
            return {"input_ids": plain["input_ids"], "offset_mapping": list(plain["offset_mapping"]), "media": []}
        in_front = 0
        if not shown:
            front = "".join(DEFAULT_IMAGE_TOKEN if kind == "image" else DEFAULT_VIDEO_TOKEN for kind in kinds)
            front += self.separator if text else ""
            text, in_front = front + text, len(front)
        waiting = {kind: iter([item for item in media if item[0] == kind]) for kind in ("image", "video")}
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        if add_special_tokens:
            ids += self._prefix()
            offsets += [(0, 0)] * len(ids)
        order, last = [], 0
        # As training writes samples: the text between two spans is tokenised on its own.
        for match in PLACEHOLDER.finditer(text):
            self._encode_piece(text, last, match.start(), ids, offsets)
            item = next(waiting["image" if match.group() == DEFAULT_IMAGE_TOKEN else "video"])
            span = self._span(*item)
            ids += span
            offsets += [(match.start(), match.end())] * len(span)
            order.append(item)
            last = match.end()
        self._encode_piece(text, last, len(text), ids, offsets)
        # Into the text as it was given, without what was put in front of it.
        offsets = [(max(start - in_front, 0), max(end - in_front, 0)) for start, end in offsets]
        return {"input_ids": ids, "offset_mapping": offsets, "media": order}

    def _prefix(self) -> list[int]:
        """What the tokenizer begins every text with: its beginning of text, or nothing."""
        begins: list[int] = self.tokenizer("")["input_ids"][:1]
        return begins if self.tokenizer.bos_token_id is not None and begins == [self.tokenizer.bos_token_id] else []

    def _encode_piece(self, text: str, start: int, end: int, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        if start == end:
            return
        piece = _literal(text[start:end])
        encoded = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        ids += encoded["input_ids"]
        offsets += [(first + start, last + start) for first, last in encoded["offset_mapping"]]

    def _span(self, kind: MediaKind, frames: Tensor, size: tuple[int, int]) -> list[int]:
        """Ids of the tokens of one picture or clip."""
        count = len(frames) if kind == "video" else 1
        tokens = VISUAL_TOKEN.findall(self.vision.layout.text(kind, count, size if kind == "image" else None))
        return [self.vision.token_ids[token] for token in tokens]

    def _pad(self, result: dict[str, list[Any]]) -> None:
        longest = max(map(len, result["input_ids"]))
        filler = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "offset_mapping": (0, 0)}
        for name, rows in result.items():
            padded = [[filler[name]] * (longest - len(row)) for row in rows]
            left = self.tokenizer.padding_side == "left"
            result[name] = [[*pad, *row] if left else [*row, *pad] for pad, row in zip(padded, rows, strict=True)]

    def _pixels(self, media: Sequence[Shown]) -> dict[str, Any]:
        """Normalised pixels, and what the model cannot tell from their shape."""
        if not media:
            return {}
        pixels = [self._normalize(frames) for _, frames, _ in media]  # (frames, 3, side, side) each
        kinds = [kind for kind, _, _ in media]
        if self.vision.anyres is not None:
            return {"pixel_values": pixels, "modalities": kinds, "image_sizes": [size for _, _, size in media]}
        if set(kinds) == {"image"}:
            return {"pixel_values": torch.cat(pixels)}  # (pictures, 3, side, side)
        if set(kinds) == {"video"} and len({len(frames) for frames in pixels}) == 1:
            return {"pixel_values": torch.stack(pixels)}  # (clips, frames, 3, side, side)
        return {"pixel_values": pixels, "modalities": kinds}

    def _normalize(self, frames: Tensor) -> Tensor:
        """uint8 (frames, 3, side, side) to float32, as the tower does it."""
        scale = frames.new_tensor(self.vision.image_std, dtype=torch.float32).view(3, 1, 1) * 255
        shift = frames.new_tensor(self.vision.image_mean, dtype=torch.float32).view(3, 1, 1) * 255
        return (frames.float() - shift) / scale


def _literal(text: str) -> str:
    return ESCAPED_PLACEHOLDER.sub(r"\1", text)


def _is_many(value: object) -> bool:
    return isinstance(value, list | tuple)


def _by_text(media: Any, texts: Sequence[str], nested: bool = False) -> list[list[Any]]:
    """The media of each text, from one of them, a list of them, or a list of lists.

    Args:
        media: as given.
        texts: as many lists are returned.
        nested: whether one medium is a list itself, as the frames of a clip.
    """
    if media is None:
        return [[] for _ in texts]
    depth, probe = 0, media
    while _is_many(probe) and len(probe):
        depth, probe = depth + 1, probe[0]
    depth -= int(nested)
    if depth < 1:
        media, depth = [media], 1
    if depth == 1 and len(texts) == 1:
        return [list(media)]
    if depth == 1:
        # In the order of the texts: as many as each shows, or one for each where none shows any.
        token = DEFAULT_VIDEO_TOKEN if nested else DEFAULT_IMAGE_TOKEN
        counts = [PLACEHOLDER.findall(text).count(token) for text in texts]
        counts = counts if sum(counts) else [1] * len(texts)
        if sum(counts) != len(media):
            raise ValueError(f"{len(texts)} texts show {sum(counts)} {token} in all, but {len(media)} were given")
        waiting = iter(media)
        return [[next(waiting) for _ in range(count)] for count in counts]
    if len(media) != len(texts):
        raise ValueError(f"{len(texts)} texts came with media for {len(media)}; give a list for each text")
    return [list(of_one) for of_one in media]


def _to_pixels(image: Picture) -> Tensor:
    """A picture as uint8 (height, width, 3)."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(to_rgb(image))
    if isinstance(image, str):
        with Image.open(image) as opened:
            return torch.from_numpy(to_rgb(opened))
    pixels = torch.as_tensor(np.asarray(image) if not isinstance(image, Tensor) else image).cpu()
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[-1] != 3:
        pixels = pixels.permute(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"a picture has the shape {tuple(pixels.shape)}; expected RGB, (height, width, 3)")
    if pixels.is_floating_point():
        # What transforms.ToTensor makes of a picture, back to its bytes.
        if float(pixels.min()) < 0 or float(pixels.max()) > 1:
            raise ValueError("a picture of floats must be in [0, 1]; give it as PIL or uint8, not normalised")
        pixels = (pixels * 255).round()
    return cast(Tensor, pixels.to(torch.uint8)).contiguous()
