"""Projectors: from the tower's width to the language model's."""
