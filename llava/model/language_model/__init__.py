"""Backbones: one short file for each family of language models.

Importing this package registers them all with transformers' ``AutoConfig`` and
``AutoModelForCausalLM``.
"""

from llava.model.language_model import llava_gpt2, llava_llama

__all__ = ["llava_gpt2", "llava_llama"]
