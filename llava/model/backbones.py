"""Backbones: the table of families of language models, their classes by name, and transformers' Auto classes.

A family is three classes, configuration, decoder and language model with head: transformers' own with vision. They are
made from a row of the table, or written in a file where there is more to say. From these, variants with alternating
attention and text classifiers are made. All are made when they are asked for by name; until then nothing heavy is
imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, TypeVar

from llava.compat import (
    OwnGenerationDefaults,
    add_to_auto_configs,
    add_to_auto_models,
    add_to_auto_tokenizers,
    inherit_conversions,
)

LanguageModel = TypeVar("LanguageModel", bound=type[Any])
"""A class that mixes ``LlavaMetaForCausalLM`` into one of transformers'."""


class Backbone(NamedTuple):
    """A family of language models with vision.

    Attributes:
        prefix: how the names of its classes begin.
        plain_type: transformers' model type of the checkpoints that it loads, whose tokenizer it has.
        module: where its three classes are written; None where they are made by ``language_model.families``.
    """

    prefix: str
    plain_type: str
    module: str | None = None


BACKBONES = {
    "llava_gemma": Backbone("LlavaGemma", "gemma"),
    "llava_gemma2": Backbone("LlavaGemma2", "gemma2"),
    "llava_gemma3": Backbone("LlavaGemma3", "gemma3_text"),
    "llava_gpt2": Backbone("LlavaGPT2", "gpt2", "llava.model.language_model.llava_gpt2"),
    "llava_gpt_neox": Backbone("LlavaGPTNeoX", "gpt_neox"),
    "llava_llama": Backbone("LlavaLlama", "llama"),
    "llava_mistral": Backbone("LlavaMistral", "mistral"),
    "llava_mixtral": Backbone("LlavaMixtral", "mixtral"),
    "llava_mpt": Backbone("LlavaMpt", "mpt", "llava.model.language_model.llava_mpt"),
    "llava_olmo": Backbone("LlavaOlmo", "olmo"),
    "llava_olmo2": Backbone("LlavaOlmo2", "olmo2"),
    "llava_opt": Backbone("LlavaOPT", "opt"),
    "llava_phi3": Backbone("LlavaPhi3", "phi3"),
    "llava_qwen": Backbone("LlavaQwen", "qwen2"),
    "llava_qwen3": Backbone("LlavaQwen3", "qwen3"),
    "llava_qwen_moe": Backbone("LlavaQwenMoe", "qwen2_moe"),
    "llava_smollm3": Backbone("LlavaSmolLM3", "smollm3"),
    "llava_stablelm": Backbone("LlavaStableLm", "stablelm", "llava.model.language_model.llava_stablelm"),
}
"""The families by model type; ``register_backbone`` adds others."""

VARIANTS = {"base": "", "alternating": "Alternating", "alternating_cross": "AlternatingCross"}
"""Kinds of attention (see ``language_model.alternating``), and what class names of each have behind their prefix."""

SEQUENCE_CLASSIFICATION = "ForSequenceClassification"
TOKEN_CLASSIFICATION = "ForTokenClassification"

AVAILABLE_MODELS: dict[str, tuple[str, str, str]] = {}
"""Model types and the names of their classes: configuration, decoder, language model with head."""

PLAIN_TYPES = {backbone.plain_type: model_type for model_type, backbone in BACKBONES.items()}
"""The model type of each plain language model ("qwen2") and of the family that loads it ("llava_qwen")."""

_MODEL_TYPES: dict[str, str] = {}
"""The model type of each class by the class's name, text classifiers included."""

_LANGUAGE_MODELS: dict[str, type[Any]] = {}
"""By model type, the language models with head of the families that have been asked for."""


def variant_type(backbone: str, variant: str) -> str:
    """The model type of a family with one of the ``VARIANTS`` of attention."""
    return backbone if variant == "base" else f"{backbone}_with_{variant}_attn"


def split_type(model_type: str) -> tuple[str, str]:
    """The family and the variant of a model type: the inverse of ``variant_type``."""
    for variant in VARIANTS:
        # "base" has no suffix, which every name would end with.
        suffix = variant_type("", variant)
        if suffix and model_type.endswith(suffix):
            return model_type.removesuffix(suffix), variant
    return model_type, "base"


def known_types() -> list[str]:
    """Model types that can be loaded: of plain language models, then of this library."""
    return sorted(PLAIN_TYPES) + sorted(AVAILABLE_MODELS)


def plain_class(own: type) -> Any:
    """The class of transformers that one of ours is made from."""
    return next(base for base in own.__mro__ if base.__module__.startswith("transformers."))


def register_backbone(backbone: LanguageModel) -> LanguageModel:
    """Class decorator for a language model with head: makes its family known here and to transformers.

    The class mixes ``LlavaMetaForCausalLM`` into one of transformers', and names its ``config_class`` and its
    ``decoder_class``. What the configuration is made from says which plain checkpoints the family loads.

    Raises:
        ValueError: another family has this model type, or loads the same plain one.
    """
    model_type, plain_type = backbone.config_class.model_type, plain_class(backbone.config_class).model_type
    # A plain checkpoint says "qwen2" and nothing else: two families for it could not be told apart.
    if PLAIN_TYPES.setdefault(plain_type, model_type) != model_type:
        raise ValueError(f"{plain_type!r} is wrapped by {PLAIN_TYPES[plain_type]!r} and by {model_type!r}; keep one")
    names = (backbone.config_class.__name__, backbone.decoder_class.__name__, backbone.__name__)
    if AVAILABLE_MODELS.get(model_type, names) != names:
        raise ValueError(
            f"the model type {model_type!r} is taken by {AVAILABLE_MODELS[model_type][2]}; give {names[2]} another"
        )
    if model_type not in BACKBONES:  # A plug-in's.
        BACKBONES[model_type] = Backbone(names[2].removesuffix("ForCausalLM"), plain_type, backbone.__module__)
        _list_classes(model_type, names)
    _LANGUAGE_MODELS[model_type] = backbone
    for variant in VARIANTS:
        own_type = variant_type(model_type, variant)
        inherit_conversions(plain_type, own_type)
        inherit_conversions(plain_class(backbone).__name__, AVAILABLE_MODELS[own_type][2])
    return backbone


class FamilyDefaults(OwnGenerationDefaults):
    """Mixin for a configuration: the LLaVA family's defaults for generating. Put it first.

    The family's configurations say that a model answers greedily with at most 1,024 new tokens. They are class
    attributes, read from here as from the family's: what one model generates with is in its ``generation_config``.
    """

    temperature: ClassVar[float] = 0.0
    max_new_tokens: ClassVar[int] = 1024
    do_sample: ClassVar[bool] = False
    top_p: ClassVar[float | None] = None


def find_class(name: str) -> type[Any]:
    """A class of a model type by its name; makes the family's classes, or loads their file.

    It is also the ``__getattr__`` of families' files and of ``llava.model``, by which pickle finds variants and
    classifiers in any process.

    Raises:
        AttributeError: no model type has such a class.
    """
    if name not in _MODEL_TYPES:
        raise AttributeError(f"llava.model has no attribute {name!r}, and no model type such a class")
    # Here and not before: with all families' modules of transformers, ``--help`` would take seconds.
    family, _ = split_type(_MODEL_TYPES[name])
    prefix, plain_type, module = BACKBONES[family]
    if module is not None:
        import_module(module)  # Registers its language model, the first time.
    elif family not in _LANGUAGE_MODELS:
        from llava.model.language_model.families import make_family

        register_backbone(make_family(prefix, family, plain_type))
    backbone = _LANGUAGE_MODELS[family]
    written = {own.__name__: own for own in (backbone.config_class, backbone.decoder_class, backbone)}
    # mypy takes no class for hashable.
    return written[name] if name in written else _derive_classes(backbone)[name]  # type: ignore[arg-type]


@cache
def _derive_classes(backbone: type[Any]) -> dict[str, type[Any]]:
    """By name, the classes that are made from a language model with head; the same ones at every call."""
    from llava.model.language_model.alternating import make_variant
    from llava.model.language_model.classification import make_classifiers

    variants = [make_variant(backbone, variant) for variant in VARIANTS if variant != "base"]
    classes: list[type[Any]] = []
    for language_model in (backbone, *variants):
        # In this order a class is there before another names it as its own.
        classes += [language_model.config_class, language_model.decoder_class, language_model]
        classes += make_classifiers(language_model)
    return {derived.__name__: derived for derived in classes}


# transformers' Auto classes look model types up in tables of names, in three modules that take seconds to load. Our
# names are added to each when it is there, or as soon as it is; the classes are then found in ``llava.model``.

_AUTO = "transformers.models.auto."
_TABLES = tuple(_AUTO + name for name in ("configuration_auto", "modeling_auto", "tokenization_auto"))


class _WhenLoaded(MetaPathFinder):
    """Adds all model types to transformers' tables right after Python has loaded these."""

    def __init__(self) -> None:
        self.awaited = {name for name in _TABLES if name not in sys.modules}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.awaited:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            # Wrapped, not replaced: reading and compiling stay Python's own.
            loader.exec_module = self._then_extend(loader.exec_module)
        return spec

    def _then_extend(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute_and_extend(module: ModuleType) -> None:
            execute(module)
            for model_type in AVAILABLE_MODELS:
                _extend(module, model_type)
            self.awaited.discard(module.__name__)
            if not self.awaited:  # From here on Python's imports need not pass by this finder.
                sys.meta_path.remove(self)

        return execute_and_extend


_when_loaded = _WhenLoaded()
if _when_loaded.awaited:
    sys.meta_path.insert(0, _when_loaded)


def _extend(tables: ModuleType, model_type: str) -> None:
    """Add a model type to one of transformers' modules of tables."""
    config, decoder, language_model = AVAILABLE_MODELS[model_type]
    # The tables hold names, not classes: transformers looks these up in ``llava.model`` when one is asked for.
    kind, here = tables.__name__.removeprefix(_AUTO), sys.modules["llava.model"]
    if kind == "configuration_auto":
        add_to_auto_configs(tables, model_type, config, here)
    elif kind == "tokenization_auto":
        add_to_auto_tokenizers(tables, model_type, config, BACKBONES[split_type(model_type)[0]].plain_type)
    else:
        prefix = language_model.removesuffix("ForCausalLM")
        classes = {
            "MODEL_MAPPING": decoder,
            "MODEL_FOR_CAUSAL_LM_MAPPING": language_model,
            "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING": language_model,
            "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": prefix + SEQUENCE_CLASSIFICATION,
            "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": prefix + TOKEN_CLASSIFICATION,
        }
        add_to_auto_models(tables, model_type, config, classes, here)


def _list_classes(family: str, written: tuple[str, str, str]) -> None:
    """Enter a family's classes, those of its variants too, into the tables above and into transformers'."""
    for variant, infix in VARIANTS.items():
        model_type, start = variant_type(family, variant), BACKBONES[family].prefix + infix
        derived = (f"{start}Config", f"{start}Model", f"{start}ForCausalLM")
        AVAILABLE_MODELS[model_type] = names = written if variant == "base" else derived
        classifiers = (start + SEQUENCE_CLASSIFICATION, start + TOKEN_CLASSIFICATION)
        _MODEL_TYPES.update(dict.fromkeys((*names, *classifiers), model_type))
        for name in _TABLES:
            if name not in _when_loaded.awaited:
                _extend(sys.modules[name], model_type)


for _family, (_prefix, *_) in BACKBONES.items():
    _list_classes(_family, (f"{_prefix}Config", f"{_prefix}Model", f"{_prefix}ForCausalLM"))
