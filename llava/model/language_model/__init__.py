"""Backbones: one short file for each family of language models; the table of them is ``llava.model.backbones``."""
