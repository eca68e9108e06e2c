"""What a checkpoint may not bring along: Python code, and pickled objects that are more than tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

UNSAFE_WEIGHTS = (UnpicklingError,)
"""What ``torch.load(..., weights_only=True)`` raises for a file that is no plain file of tensors."""

NOT_JUST_TENSORS = (
    "not a file of plain tensors; what else a pickle may hold is never loaded: store the weights as .safetensors"
)


def foreign_code_note(settings: Mapping[str, Any]) -> str:
    """The end of an error about a folder whose configuration (its JSON) names code of its own; else empty.

    transformers asks on the terminal whether to run such code unless ``trust_remote_code`` is given: give
    it, as False, to every ``Auto`` class, so that no job waits for an answer.
    """
    if "auto_map" not in settings:
        return ""
    return (
        "; it brings Python code of its own (auto_map), which is never run here: take a model whose type "
        "transformers knows, or register the class yourself with --plugins (docs/extending.md)"
    )
