"""Conversations as scripts of the LLaVA family write them. Today: ``Captioner``, which asks in its model's format."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from llava.data.formats.templates import TEMPLATES, write_turns
from llava.types import Role, Turn

# What the family's scripts take for a name with "v1" in it: not the words that LLaVA-1.5 was trained with.
_V1 = TEMPLATES["v1"]
_TEMPLATES = {**TEMPLATES, "llava_v1": replace(_V1, default_system=_V1.default_system.replace("user", "human"))}
SeparatorStyle = Enum("SeparatorStyle", ["TWO", "LLAMA_2", "LLAMA_3", "CHATML", "MPT", "GEMMA"])
SeparatorStyle.__doc__ = "What a conversation writes between turns: only ``TWO`` has two separators."


@dataclass(slots=True)  # An attribute that is none here, such as system, is an error and not passed over.
class Conversation:
    """A conversation in one of the family's templates, which are the named formats of ``--version``.

    Attributes:
        version: name of the format here, or ``llava_v1``.
        roles: of the user and the assistant.
        sep_style, sep, sep2: what ends turns; ``sep2``, where there is one, ends answers.
        messages: role and text; a text of None is the answer that is asked for.
    """

    version: str
    roles: tuple[str, str]
    sep_style: SeparatorStyle
    sep: str
    sep2: str | None = None
    messages: list[list[str | None]] = field(default_factory=list)

    def copy(self) -> Conversation:
        return replace(self, messages=[list(message) for message in self.messages])

    def append_message(self, role: str, message: str | None) -> None:
        if role not in self.roles or not isinstance(message, str | None):
            raise ValueError(f"expected a role of {self.roles} and a text, found {role!r} and {message!r:.80}")
        self.messages.append([role, message])

    def get_prompt(self) -> str:
        """The text of all messages, up to where the answer that is asked for begins."""
        names: dict[str, Role] = {self.roles[0]: "user", self.roles[1]: "assistant"}
        turns = [Turn(names[str(role)], text or "") for role, text in self.messages]
        is_open = bool(self.messages) and self.messages[-1][1] is None
        return write_turns(_TEMPLATES[self.version], turns, is_open)


_USER = ("USER", "ASSISTANT")
_CHATML = (("<|im_start|>user", "<|im_start|>assistant"), SeparatorStyle.CHATML, "<|im_end|>")
conv_templates = {
    **dict.fromkeys(("v1", "vicuna_v1"), Conversation("v1", _USER, SeparatorStyle.TWO, " ", "</s>")),
    "llava_v1": Conversation("llava_v1", _USER, SeparatorStyle.TWO, " ", "</s>"),
    "llava_llama_2": Conversation("llama_2", _USER, SeparatorStyle.LLAMA_2, "<s>", "</s>"),
    "llava_llama_3": Conversation("llama_v3", ("user", "assistant"), SeparatorStyle.LLAMA_3, "<|eot_id|>"),
    **dict.fromkeys(("qwen_1_5", "qwen_2"), Conversation("qwen", *_CHATML)),
    "mpt": Conversation("mpt", _CHATML[0], SeparatorStyle.MPT, "<|im_end|>"),
    "gemma_instruct": Conversation("gemma", ("user", "model"), SeparatorStyle.GEMMA, "<end_of_turn>"),
}
"""Templates by the family's names; take a ``copy`` of one."""
default_conversation = conv_templates["vicuna_v1"]
