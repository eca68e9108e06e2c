"""Grounding: boxes and times in text (syntax.py) and in the variables of samples (samples.py)."""
