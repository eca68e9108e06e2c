"""Backbones: one short file for each family of language models.

Importing this package registers them all with transformers' ``AutoConfig`` and
``AutoModelForCausalLM``.
"""

from importlib import import_module

from llava.model import BACKBONES

for _name in BACKBONES:
    import_module(f"llava.model.language_model.{_name}")
