"""transformers' Auto classes know every model type of ``AVAILABLE_MODELS``, and nothing is loaded for it.

transformers keeps names: of model types, of their classes, and of the modules to look these up in. Ours go beside
them with ``llava.model`` as the module, which loads a backbone's file when its class is asked for. The tables lie in
three modules of transformers that take seconds to load; each gets our names when it is there, or as soon as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from llava.compat import add_to_auto_configs, add_to_auto_models, add_to_auto_tokenizers

SEQUENCE_CLASSIFICATION = "ForSequenceClassification"
TOKEN_CLASSIFICATION = "ForTokenClassification"

_AUTO = "transformers.models.auto."
_OTHER_PLAIN_TYPES = {"llava_qwen": "qwen2", "llava_qwen_moe": "qwen2_moe"}


class AutoNames:
    """One model type's entries in the tables of the Auto classes.

    Args:
        model_type: of ours.
        names: of its configuration, decoder and language model with head.
        plain_type: the model type that it wraps, whose tokenizer it has.
        module: has these names as attributes.
    """

    def __init__(self, model_type: str, names: Sequence[str], plain_type: str, module: ModuleType) -> None:
        self.model_type, self.plain_type, self.module = model_type, plain_type, module
        self.config, self.decoder, self.language_model = names

    def extend(self, tables: ModuleType) -> None:
        """Add the entries to one of transformers' modules."""
        kind = tables.__name__.removeprefix(_AUTO)
        if kind == "configuration_auto":
            add_to_auto_configs(tables, self.model_type, self.config, self.module)
        elif kind == "tokenization_auto":
            add_to_auto_tokenizers(tables, self.model_type, self.config, self.plain_type)
        else:
            prefix = self.language_model.removesuffix("ForCausalLM")
            classes = {
                "MODEL_MAPPING": self.decoder,
                "MODEL_FOR_CAUSAL_LM_MAPPING": self.language_model,
                "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING": self.language_model,
                "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": prefix + SEQUENCE_CLASSIFICATION,
                "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": prefix + TOKEN_CLASSIFICATION,
            }
            add_to_auto_models(tables, self.model_type, self.config, classes, self.module)


class _WhenLoaded(MetaPathFinder):
    """Adds our names to the tables of the Auto classes right after Python has loaded them."""

    modules = tuple(_AUTO + name for name in ("configuration_auto", "modeling_auto", "tokenization_auto"))

    def __init__(self) -> None:
        self.known: dict[str, AutoNames] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.modules:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = self._then_extend(loader.exec_module)
        return spec

    def _then_extend(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute_and_extend(module: ModuleType) -> None:
            execute(module)
            for names in self.known.values():
                names.extend(module)

        return execute_and_extend


_when_loaded = _WhenLoaded()


def register(model_type: str, names: Sequence[str], module: ModuleType, plain_type: str | None = None) -> None:
    """Make the Auto classes know a model type; see ``AutoNames``. The plain type goes by ours where none is given."""
    if model_type in _when_loaded.known:
        return
    if plain_type is None:
        backbone = model_type.partition("_with_")[0]
        plain_type = _OTHER_PLAIN_TYPES.get(backbone, backbone.removeprefix("llava_"))
    entry = _when_loaded.known[model_type] = AutoNames(model_type, names, plain_type, module)
    if _when_loaded not in sys.meta_path:
        sys.meta_path.insert(0, _when_loaded)
    for name in _when_loaded.modules:
        if name in sys.modules:
            entry.extend(sys.modules[name])
