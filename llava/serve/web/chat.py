"""Requests of ``/v1/chat/completions``: read, checked, and brought into this library's form.

OpenAI's form, with parts of content for video as other servers have them (``video_url``). What would be passed over in
silence elsewhere is an error here: a field that is not known, or that asks for what is not done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from llava.data.placeholders import PLACEHOLDERS, escape_placeholders
from llava.serve.web.engine import Settings
from llava.types import MediaKind, Role, Turn

_PLACEHOLDERS: dict[MediaKind, str] = {kind: placeholder for placeholder, kind in PLACEHOLDERS.items()}
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Fields that say nothing about the answer."""
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logprobs": (False,), "top_logprobs": (0,),
    "logit_bias": ({},), "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False), "functions": ([],), "modalities": (["text"],), "verbosity": ("medium",),
}  # fmt: skip
"""Fields with the values that ask for nothing; any other is an error."""
_MOST_STOPS = 4
_MOST_MESSAGES = 256


class ChatError(ValueError):
    """A request that cannot be meant, or asks for what is not done; ``param`` is the field at fault."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


@dataclass(frozen=True)
class MediaPart:
    """An image or a video in a message, not fetched yet.

    Attributes:
        claimed: what the part is called; None where it does not say.
        source: where it comes from: a ``data:`` address, the id of a file, or an address of the web.
        value: the address, or the id.
        param: names it in errors.
        name: of a file that is in the request itself.
    """

    claimed: MediaKind | None
    source: Literal["data", "file", "remote"]
    value: str
    param: str
    name: str = ""


@dataclass(frozen=True)
class Message:
    """A turn, and the media that it shows."""

    role: Role
    text: str
    media: tuple[MediaPart, ...] = ()

    def to_turn(self, kinds: list[MediaKind], separator: str) -> Turn:
        """As training samples have it: the media first, then the words; ``kinds`` are those of its media."""
        shown = [_PLACEHOLDERS[kind] for kind in kinds]
        return Turn(self.role, separator.join(filter(None, [*shown, self.text])))


@dataclass(frozen=True)
class Chat:
    """A request of the endpoint."""

    model: str
    messages: tuple[Message, ...]  # the system's, if there is one, first; the user's last
    settings: Settings
    stream: bool = False
    include_usage: bool = False

    @property
    def media(self) -> list[MediaPart]:
        """All images and videos, in reading order."""
        return [part for message in self.messages for part in message.media]


@dataclass
class _Fields:
    """The fields of a JSON object, taken one by one."""

    values: dict[str, object]
    where: str = ""
    _left: set[str] = field(init=False)

    def __post_init__(self) -> None:
        # An explicit null is a field that was left out.
        self.values = {name: value for name, value in self.values.items() if value is not None}
        self._left = set(self.values)

    def take(self, name: str) -> object:
        self._left.discard(name)
        return self.values.get(name)

    def text(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str):
            raise ChatError(f"{self.where}{name} must be a text, found {value!r:.80}", f"{self.where}{name}")
        return value

    def truth(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise ChatError(f"{self.where}{name} must be true or false, found {value!r:.80}", f"{self.where}{name}")
        return bool(value)

    def number(self, name: str, default: float, least: float, most: float, whole: bool = False) -> float:
        value = self.take(name)
        if value is None:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
        if not is_number or (whole and not isinstance(value, int)) or not is_finite:
            kind = "whole number" if whole else "number"
            raise ChatError(f"{name} must be a {kind}, found {value!r:.80}", name)
        if not least <= cast(float, value) <= most:
            raise ChatError(f"{name} is {str(value)[:40]}; it must be from {least:g} to {most:g}", name)
        return cast(float, value)

    def check_rest(self) -> None:
        """A ChatError for a field that is not known, or that asks for what is not done."""
        for name in sorted(self._left - _WITHOUT_EFFECT):
            if name not in _NEUTRAL:
                raise ChatError(f"unknown field {name!r}", name, "unknown_parameter")
            if self.values[name] not in _NEUTRAL[name]:
                raise ChatError(
                    f"{name} is {self.values[name]!r:.80}, which this server does not do; leave it out", name,
                    "unsupported_parameter",
                )  # fmt: skip


def parse_chat(body: object, max_new_tokens: int) -> Chat:
    """Read the JSON of a request.

    Args:
        body: that was sent.
        max_new_tokens: the most that an answer may have.

    Raises:
        ChatError: it cannot be meant; names the field.
    """
    if not isinstance(body, dict):
        raise ChatError(f"the request must be a JSON object, found {type(body).__name__}")
    fields = _Fields(body)
    model = fields.text("model")
    messages = _parse_messages(fields.take("messages"))
    stream = fields.truth("stream")
    options = fields.take("stream_options")
    include_usage = False
    if options is not None:
        if not stream or not isinstance(options, dict):
            raise ChatError("stream_options is an object for requests with stream", "stream_options")
        of_stream = _Fields(options, "stream_options.")
        include_usage = of_stream.truth("include_usage")
        of_stream.truth("include_obfuscation")
        of_stream.check_rest()
    settings = _parse_settings(fields, max_new_tokens)
    fields.check_rest()
    return Chat(model, messages, settings, stream, include_usage)


def _parse_settings(fields: _Fields, max_new_tokens: int) -> Settings:
    default = Settings()
    # The newer name, and the older one.
    newer, older = fields.take("max_completion_tokens"), fields.take("max_tokens")
    if newer is not None and older is not None and newer != older:
        raise ChatError(f"max_completion_tokens is {newer!r:.40} and max_tokens {older!r:.40}; give one", "max_tokens")
    name = "max_tokens" if newer is None else "max_completion_tokens"
    longest = fields.number(name, min(default.max_new_tokens, max_new_tokens), 1, max_new_tokens, True)
    seed = fields.take("seed")
    stop = fields.take("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ChatError(f"stop must be a text or up to {_MOST_STOPS} of them, found {stop!r:.80}", "stop")
    top_p = fields.number("top_p", 1.0, 0, 1)
    penalty = fields.number("repetition_penalty", 1.0, 0, 10)
    for positive, value in (("top_p", top_p), ("repetition_penalty", penalty)):
        if value == 0:
            raise ChatError(f"{positive} is 0; it must be above 0", positive)
    return Settings(
        max_new_tokens=int(longest),
        temperature=float(fields.number("temperature", 0.0, 0, 2)),
        top_p=float(top_p),
        top_k=int(fields.number("top_k", 0, 0, 1_000_000, True)),
        repetition_penalty=float(penalty),
        seed=None if seed is None else int(fields.number("seed", 0, 0, 2**32 - 1, True)),
        stop=tuple(stops),
    )


def _parse_messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ChatError(f"messages must be a list of at least one message, found {value!r:.80}", "messages")
    if len(value) > _MOST_MESSAGES:
        raise ChatError(f"there are {len(value)} messages; at most {_MOST_MESSAGES} are taken", "messages")
    messages = [_parse_message(one, f"messages[{i}]") for i, one in enumerate(value)]
    for i, message in enumerate(messages):
        if message.role == "system" and i > 0:
            raise ChatError("the system's message must be the first, and the only one", f"messages[{i}].role")
        if message.media and message.role != "user":
            raise ChatError("only the user's messages may have images and videos", f"messages[{i}].content")
    if messages[-1].role != "user":
        raise ChatError("the last message must be the user's, to be answered", f"messages[{len(messages) - 1}].role")
    return tuple(messages)


def _parse_message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise ChatError(f"{where} must be an object, found {value!r:.80}", where)
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise ChatError(f"{where}.role is {role!r:.40}; known: {', '.join(_ROLES)}", f"{where}.role")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise ChatError(f"{where}.content must be a text or a list of parts, found {content!r:.80}", f"{where}.content")
    found = [_parse_part(part, f"{where}.content[{i}]") for i, part in enumerate(parts)]
    text = "\n".join(part for part in found if isinstance(part, str)).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start : error.end]
        raise ChatError(f"{where}.content has half a character ({half!r:.40})", f"{where}.content") from error
    try:
        # A question may speak of "<image>" and shows none by that.
        text = escape_placeholders(text)
    except ValueError as error:
        raise ChatError(f"{where}.content: {error}", f"{where}.content") from error
    return Message(_ROLES[role], text, tuple(part for part in found if isinstance(part, MediaPart)))


def _parse_part(part: object, where: str) -> str | MediaPart:
    """The text of a part of a message's content, or its image or video."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise ChatError(f"{where} must be an object with a type, found {part!r:.80}", where)
    if kind == "text":
        return _Fields(part, f"{where}.").text("text")
    if kind in ("image_url", "video_url"):
        value = part.get(kind)
        url = value.get("url") if isinstance(value, Mapping) else value
        claimed: MediaKind = "image" if kind == "image_url" else "video"
        return _parse_address(url, claimed, f"{where}.{kind}")
    if kind == "file":
        value = part.get("file")
        if isinstance(value, Mapping) and isinstance(value.get("file_id"), str):
            return MediaPart(None, "file", value["file_id"], f"{where}.file.file_id")
        if isinstance(value, Mapping) and isinstance(data := value.get("file_data"), str):
            name = value.get("filename")
            return MediaPart(None, "data", data, f"{where}.file.file_data", name if isinstance(name, str) else "")
        raise ChatError(f"{where}.file needs a file_id, or file_data", f"{where}.file")
    raise ChatError(f"{where}.type is {kind!r:.40}; known: text, image_url, video_url, file", f"{where}.type")


def _parse_address(url: object, claimed: MediaKind, where: str) -> MediaPart:
    if not isinstance(url, str) or not url:
        raise ChatError(f"{where} must have a url, found {url!r:.80}", where)
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return MediaPart(claimed, "data", url, where)
    if scheme in ("http", "https"):
        return MediaPart(claimed, "remote", url, where)
    if url.startswith("file-"):
        return MediaPart(claimed, "file", url, where)
    raise ChatError(
        f"{where}: {url[:40]!r} is no data: address, no id of an uploaded file, and no http or https address", where
    )
