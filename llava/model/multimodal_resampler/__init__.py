"""Resamplers: from patch features of frames to the tokens of an image or a video."""
