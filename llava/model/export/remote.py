"""What an exported model does beside those of this library; a part of its module (see ``multimodal``)."""

from __future__ import annotations

from typing import Any

from llava.messages import list_names


class WholeModel:
    """Mixin for an exported language model, put first: weights that do not fit are an error and no warning.

    transformers renames parameters of vision models from release to release. A tower whose weights were not found would
    stay random, and nothing but a line of the log would say so.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers; a ValueError if a weight is missing, left over, or has another shape."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        wrong = sorted(
            {*info["missing_keys"], *info["unexpected_keys"], *(name for name, *_ in info["mismatched_keys"])}
        )
        if wrong:
            raise ValueError(
                f"{len(wrong)} weights of {args[0] if args else 'the model'} do not fit its code: {list_names(wrong)}; "
                "its files are incomplete, or this release of transformers is none that it was exported for"
            )
        return (model, info) if output_loading_info else model
