"""The tokenizer and the untrained language model that the demo of grounding starts from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llava.demo.base_model import write_random_gpt2, write_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Turns behind one another, an end of text behind each answer: of a conversation only the answers are learned."""

# Brackets with a space before them, as they stand in answers, are tokens of their own.
_BRACKETS = "[ ] { }"
_CONTEXT_LENGTH = 512
_NUM_LAYERS = 3
_POSITION_RANGE = 1.0
# Wider than the usual 0.02: places in a picture must be told apart from the first step.
_RANGE_OF_NEW = 0.1


def write_base_model(folder: Path, questions: Iterable[str], *, seed: int) -> None:
    """Write a plain GPT-2 checkpoint with random weights, and a tokenizer trained on ``questions``."""
    from transformers import AutoTokenizer

    vocabulary_size = write_tokenizer(folder, [*questions, _BRACKETS])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    write_random_gpt2(
        folder,
        seed=seed,
        vocabulary_size=vocabulary_size,
        context_length=_CONTEXT_LENGTH,
        num_layers=_NUM_LAYERS,
        dropout=0.0,
        position_range=_POSITION_RANGE,
        range_of_new=_RANGE_OF_NEW,
    )
