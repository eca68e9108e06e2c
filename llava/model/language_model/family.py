"""What the configurations of all backbones have in common: the LLaVA family's defaults for generating."""

from __future__ import annotations

from typing import Any, ClassVar


class FamilyDefaults:
    """Mixin for a configuration; put it first.

    The family's configurations say that a model answers greedily with at most 1,024 new tokens. They are read from
    here, as from the family's, but are nothing of one model's: transformers keeps what a model generates with in its
    ``generation_config``, and refuses to store such values in a ``config.json``.
    """

    temperature: ClassVar[float] = 0.0
    max_new_tokens: ClassVar[int] = 1024
    do_sample: ClassVar[bool] = False
    top_p: ClassVar[float | None] = None

    def _get_generation_parameters(self) -> dict[str, Any]:
        """Those that were set on this configuration, which transformers then refuses to save."""
        found = super()._get_generation_parameters()  # type: ignore[misc]
        return {name: value for name, value in found.items() if name in vars(self)}
