"""The named formats of the LLaVA family, as data.

``{text}`` is a turn's text, ``{eos}`` the tokenizer's end of text, ``{bos}`` its beginning of text (nothing
where the tokenizer does not begin texts with one, as GPT-2's). Sources: the conversation templates of
LLaVA and LLaVA-NeXT, and the model cards of Llama 2, Llama 3, Qwen2, Gemma and MPT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from llava.data.formats.base import FORMATS, prefix_ids, split_at_spans
from llava.data.formats.chat import ConversationFormat
from llava.types import Role, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT = "{text}"


@dataclass(frozen=True)
class Template:
    """How a named format writes each turn.

    Attributes:
        user, assistant, system: markup around ``{text}``. What stands behind the assistant's text,
            up to its first special token, is learned with it.
        default_system: text of a system turn for conversations without one; "" writes none.
        system_in_user: whether a system turn stands within the first user turn, before its text.
        special_tokens: tokens that the tokenizer must know as such.
        media_only: whether nothing but the media is kept of user turns.
    """

    user: str
    assistant: str
    system: str
    default_system: str = ""
    system_in_user: bool = False
    special_tokens: tuple[str, ...] = ()
    media_only: bool = False

    def patterns(self, roles: Sequence[Role]) -> list[str]:
        """One pattern a turn; that of a system turn, given or not, changes or joins its neighbour's."""
        patterns = [{"user": self.user, "assistant": self.assistant, "system": self.system}[role] for role in roles]
        if "system" in roles:
            if self.system_in_user:  # Llama 2 and Gemma: "[INST] <<SYS>>...<</SYS>> question [/INST]".
                opening, closing = self.user.split(_TEXT)
                patterns[:2] = [opening + self.system, _TEXT + closing][: len(roles)]
        elif self.default_system:
            system = self.system.replace(_TEXT, self.default_system)
            patterns[0] = patterns[0].replace(_TEXT, system + _TEXT) if self.system_in_user else system + patterns[0]
        return patterns


def write_turns(template: Template, turns: Sequence[Turn], is_open: bool, eos: str = "</s>", bos: str = "<s>") -> str:
    """The text of a conversation, without what the tokenizer begins texts with.

    Args:
        template: how each turn is written.
        turns: of the conversation.
        is_open: whether the last turn is an answer that is asked for, before which the text ends.
        eos, bos: end and beginning of text.
    """
    text = ""
    for pattern, turn in zip(template.patterns([turn.role for turn in turns]), turns, strict=True):
        before, behind = pattern.replace("{eos}", eos).replace("{bos}", bos).split(_TEXT)
        text += before + turn.text.strip() + behind
        if is_open and turn is turns[-1]:
            text = text.removesuffix(behind).rstrip(" ")
    return text.removeprefix(bos)


class TemplateFormat(ConversationFormat):
    """A named format.

    Args:
        name: that of ``--version``.
        template: what it writes.
        tokenizer: of the model.
    """

    def __init__(self, name: str, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        known = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
        if missing := [token for token in template.special_tokens if token not in known]:
            raise ValueError(
                f"--version {name} writes {', '.join(missing)}, which the tokenizer of {tokenizer.name_or_path!r} does "
                "not know as special tokens; take --version v1, llama_2 or plain, which need none, or --plain_lm true"
            )
        self.template = template
        self.writes_user_text = not template.media_only
        # GPT-2 has a beginning of text by name and writes none; llama_2's {bos} between rounds then stands for nothing.
        self._special = {
            "{eos}": str(tokenizer.eos_token),
            "{bos}": str(tokenizer.bos_token) if prefix_ids(tokenizer) else "",
        }
        super().__init__(tokenizer)
        self.fingerprint += f" {template}"

    def content(self, turn: Turn) -> str:
        if self.template.media_only and turn.role == "user":
            return "".join(piece for piece, visual in split_at_spans(turn.text) if visual)
        return super().content(turn)

    def markup(self, roles: Sequence[Role]) -> list[str]:
        texts = [""]
        for pattern in self.template.patterns(roles):
            before, behind = pattern.split(_TEXT)  # What stands behind one text and before the next is one markup.
            texts[-1] += self._resolve(before)
            texts.append(self._resolve(behind))
        # The beginning of a sample gets its token from the tokenizer, as with every format.
        return [texts[0].removeprefix(self._special["{bos}"]), *texts[1:]]

    def _resolve(self, text: str) -> str:
        for name, token in self._special.items():
            text = text.replace(name, token)
        return text


def register_template(name: str, template: Template) -> None:
    """File a template in ``FORMATS`` under a name for ``--version``."""
    FORMATS.register(name)(partial(TemplateFormat, name, template))


_VISION_ASSISTANT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

TEMPLATES = {
    "plain": Template(
        user="{text}",
        assistant="{text}\n",
        system="{text}\n",
        media_only=True,  # The first stage of LLaVA: an image, then its caption.
    ),
    "v1": Template(
        user="USER: {text} ",
        assistant="ASSISTANT: {text}{eos}",
        system="{text} ",
        default_system="A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions.",
    ),
    "llama_2": Template(
        user="{bos}[INST] {text} [/INST]",
        assistant=" {text} {eos}",
        system="<<SYS>>\n{text}\n<</SYS>>\n\n",
        default_system=_VISION_ASSISTANT,
        system_in_user=True,
    ),
    "llama_v3": Template(
        user="<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n{text}<|eot_id|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{text}<|eot_id|>",
        default_system=_VISION_ASSISTANT,
        special_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "qwen": Template(
        user="<|im_start|>user\n{text}<|im_end|>\n",
        assistant="<|im_start|>assistant\n{text}<|im_end|>\n",
        system="<|im_start|>system\n{text}<|im_end|>\n",
        default_system="You are a helpful assistant.",
        special_tokens=("<|im_start|>", "<|im_end|>"),
    ),
    "mpt": Template(
        user="<|im_start|>user\n{text}<|im_end|>",
        assistant="<|im_start|>assistant\n{text}<|im_end|>",
        system="<|im_start|>system\n{text}<|im_end|>",
        default_system="A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
        "honest answers.",
        special_tokens=("<|im_start|>", "<|im_end|>"),
    ),
    "gemma": Template(
        user="<start_of_turn>user\n{text}<end_of_turn>\n",
        assistant="<start_of_turn>model\n{text}<end_of_turn>\n",
        system="{text}\n\n",
        system_in_user=True,
        special_tokens=("<start_of_turn>", "<end_of_turn>"),
    ),
}  # fmt: skip

for _name, _template in TEMPLATES.items():
    register_template(_name, _template)
