"""Formats: from the turns of a conversation to ids and labels, made together.

base.py          what a format is and makes: segments, their labels, cutting them to a length
encoder.py       stretches of text to ids
plain.py         plain_lm: all text joined and learned
conversation.py  markup around turns, only the assistant's learned; what the two below share
  chat.py          chat: the tokenizer's own chat template
  templates.py     the named templates, as data
"""

from llava.data.preprocess import chat, plain, templates
from llava.data.preprocess.base import BUILT_IN, CHAT, FORMATS, PLAIN_LM, Format, build_format

__all__ = ["BUILT_IN", "CHAT", "FORMATS", "PLAIN_LM", "Format", "build_format", "chat", "plain", "templates"]
