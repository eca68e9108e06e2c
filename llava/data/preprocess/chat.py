"""The tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava.data.preprocess.base import CHAT, FORMATS
from llava.data.preprocess.conversation import ConversationFormat
from llava.types import Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@FORMATS.register(CHAT)
class ChatFormat(ConversationFormat):
    """What the Jinja template in the tokenizer's files writes.

    The template is run with stand-ins for the turns' texts, and its output is cut where these stand: a
    template that strips or rewrites texts cannot move a boundary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            named = ", ".join(name for name in FORMATS if name != CHAT)
            raise ValueError(
                f"--version {CHAT} needs a chat template, and the tokenizer of {tokenizer.name_or_path!r} has none; "
                f"give --version one of: {named}"
            )
        super().__init__(tokenizer)

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint} {self.tokenizer.chat_template}"

    def markup(self, roles: Sequence[Role]) -> list[str]:
        import jinja2

        stand_ins = [f"@@turn{i}@@" for i in range(len(roles))]
        messages = [{"role": role, "content": text} for role, text in zip(roles, stand_ins, strict=True)]
        try:
            rendered = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"{self._whose()} refuses turns of {', '.join(roles)}: {error}; {_REMEDY}") from error
        return self._cut(rendered, stand_ins, roles)

    def _cut(self, rendered: str, stand_ins: Sequence[str], roles: Sequence[Role]) -> list[str]:
        """The pieces of a rendered conversation before, between and behind the stand-ins."""
        pieces: list[str] = []
        for i, stand_in in enumerate(stand_ins):
            times = sum(text.count(stand_in) for text in (*pieces, rendered))
            piece, found, rendered = rendered.partition(stand_in)
            if times != 1 or not found:
                what = "leaves out" if not times else "repeats" if times > 1 else "moves"
                raise ValueError(f"{self._whose()} {what} turn {i + 1} of {', '.join(roles)}; {_REMEDY}")
            pieces.append(piece)
        return [*pieces, rendered]

    def _whose(self) -> str:
        return f"the chat template of the tokenizer of {self.tokenizer.name_or_path!r}"


_REMEDY = "mend the samples or the template, or give --version a named format"
