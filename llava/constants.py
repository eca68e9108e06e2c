"""Strings and numbers that text, labels and model share."""

import re
from typing import Literal

RELEASE = "0.1.0"
"""Of this library: ``llava.__version__``, and that of pyproject.toml."""

IGNORE_INDEX = -100
"""Label of a position that takes no part in the loss (the default of PyTorch's cross entropy)."""

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_VIDEO_TOKEN = "<video>"
# The character that both begin with stands first, for which a search goes through a text four times as fast.
PLACEHOLDER = re.compile(rf"<(?<!\\<)(?:{DEFAULT_IMAGE_TOKEN[1:]}|{DEFAULT_VIDEO_TOKEN[1:]})")
"""Where the text of a sample has an image or a video; behind a backslash it is the word itself."""
ESCAPED_PLACEHOLDER = re.compile(rf"\\({DEFAULT_IMAGE_TOKEN}|{DEFAULT_VIDEO_TOKEN})")
"""The word with its backslash; what reads is its group."""

IMAGE_START = "<im_start>"
IMAGE_PATCH = "<im_patch>"
IMAGE_END = "<im_end>"
VIDEO_START = "<vid_start>"
VIDEO_PATCH = "<vid_patch>"
VIDEO_END = "<vid_end>"
SLOW_VIDEO_START = "<slow_vid_start>"
SLOW_VIDEO_END = "<slow_vid_end>"

VISUAL_TOKENS = (
    IMAGE_START,
    IMAGE_PATCH,
    IMAGE_END,
    VIDEO_START,
    VIDEO_PATCH,
    VIDEO_END,
    SLOW_VIDEO_START,
    SLOW_VIDEO_END,
)
"""The tokens that visual spans are made of, in the order in which they join a vocabulary."""
VISUAL_TOKEN = re.compile("|".join(map(re.escape, VISUAL_TOKENS)))
"""Any of them, in a text."""

IMAGE_TOKEN_INDEX = -200
"""Where an image stands in ids of the LLaVA family's scripts; see ``compat_llava``."""
IMAGE_PLACEHOLDER = "<image-placeholder>"
"""What the family's scripts replace in a question by ``<image>``."""
DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN, DEFAULT_IM_END_TOKEN = IMAGE_START, IMAGE_PATCH, IMAGE_END
"""The family's names for tokens of images."""

Axis = Literal["TEMP", "HEIGHT", "WIDTH"]
AXES: tuple[Axis, ...] = ("TEMP", "HEIGHT", "WIDTH")
"""The axes of coordinates, in the order in which their bins join a vocabulary."""
