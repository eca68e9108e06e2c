"""Formats: from the turns of a conversation to ids and labels, made together.

base.py       what a format is and makes: segments, their labels, cutting them to a length; and plain_lm
chat.py       markup around turns, only the assistant's learned; the tokenizer's own chat template
templates.py  the named templates, as data
"""

from __future__ import annotations

from llava.data.formats import chat, templates
from llava.data.formats.base import CHAT, FORMATS, PLAIN_LM, Format, build_format

__all__ = ["CHAT", "FORMATS", "PLAIN_LM", "Format", "build_format", "chat", "templates"]
