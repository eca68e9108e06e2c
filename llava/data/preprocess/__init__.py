"""Formats: from the turns of a conversation to ids and labels, made together."""
