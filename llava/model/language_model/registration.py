"""What the configurations of all backbones have in common: the LLaVA family's defaults for generating."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

import llava.model as models
from llava.model import backbones
from llava.model.language_model.alternating import make_variant
from llava.model.language_model.classification import make_classifiers
from llava.model.llava_arch import LlavaMetaForCausalLM


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


# Makes a backbone known: to this library by its model type, and to transformers' Auto classes.

Backbone = TypeVar("Backbone", bound=type[LlavaMetaForCausalLM])

PLAIN_TYPES: dict[str, str] = {}
"""The model type of each plain language model ("qwen2") and of the backbone that wraps it ("llava_qwen")."""


def register_backbone(backbone: Backbone) -> Backbone:
    """Class decorator for a language model with head: puts it and its variants into ``AVAILABLE_MODELS``.

    Args:
        backbone: mixes ``LlavaMetaForCausalLM`` into a class of transformers, and names its
            ``config_class`` and its ``decoder_class``. The class of transformers that the
            configuration is made from says which plain checkpoints it loads.

    Raises:
        ValueError: another backbone has this model type, or wraps the same plain one.
    """
    config_class = backbone.config_class
    plain_type, model_type = _plain_class(config_class).model_type, config_class.model_type
    if PLAIN_TYPES.setdefault(plain_type, model_type) != model_type:
        raise ValueError(f"{plain_type!r} is wrapped by {PLAIN_TYPES[plain_type]!r} and by {model_type!r}; keep one")
    _publish(backbone)
    for variant in models.VARIANTS:
        if variant != "base":
            _publish(make_variant(backbone, variant))
    return backbone


def _publish(backbone: type[LlavaMetaForCausalLM]) -> None:
    """List a backbone in ``AVAILABLE_MODELS`` and with transformers."""
    config_class = backbone.config_class
    names = (config_class.__name__, backbone.decoder_class.__name__, backbone.__name__)
    if models.AVAILABLE_MODELS.setdefault(config_class.model_type, names) != names:
        raise ValueError(
            f"the model type {config_class.model_type!r} is taken by "
            f"{models.AVAILABLE_MODELS[config_class.model_type][2]}; give {backbone.__name__} another"
        )
    models.list_names(names, backbone.__module__)
    make_classifiers(backbone)
    plain_type = _plain_class(config_class).model_type
    backbones.register(config_class.model_type, names, models.this_module(), plain_type)
    _inherit_conversions(_plain_class(config_class).model_type, config_class.model_type)
    _inherit_conversions(_plain_class(backbone).__name__, backbone.__name__)


def _plain_class(own: type) -> Any:
    """The class of transformers that one of ours is made from."""
    return next(base for base in own.__mro__ if base.__module__.startswith("transformers."))


def _inherit_conversions(plain: str, own: str) -> None:
    """Read and write weights as transformers does for the plain model.

    Some checkpoints are stored under other names than the model's own (every expert of a mixture by
    itself, for one). transformers finds the translation by model type or by class name, and would not
    find it under ours.
    """
    conversions = get_checkpoint_conversion_mapping(plain)
    if conversions is not None:
        register_checkpoint_conversion_mapping(own, conversions, overwrite=True)
