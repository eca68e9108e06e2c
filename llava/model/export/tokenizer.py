"""The tokenizer of an export: a ``tokenizer.json`` that any release of transformers reads, with fewer added tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava.messages import shorten
from llava.model.export.folder import edit_json

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""The one name that transformers 4 and 5 both know; 5 writes another, at which 4 stops."""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SETTINGS = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "chat_template")
_SAMPLES = (
    "The cats that the dog sees are sleeping.",
    "  È così: l'acqua n'è più d'1,234.50 €!\n\tPerché no? ",
    "x" * 40 + " [0.1 0.2] {a} <b> 日本語 \U0001f642 naïve ﬁ",
    "",
)
"""Texts of many kinds, which the exported tokenizer has to cut as the checkpoint's does."""


def check_offsets(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """A ValueError for a tokenizer that does not tell where in a text its tokens lie, or cannot be written as JSON."""
    if not tokenizer.is_fast or getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"the tokenizer of {path!r} ({type(tokenizer).__name__}) gives no offsets, which likelihood scores need; "
            "convert it to a tokenizer.json first (tokenizers library) and put that into the folder"
        )


def removable_from(tokenizer: PreTrainedTokenizerBase, tokens: Collection[str]) -> int | None:
    """The first id of tokens that can be taken out of a tokenizer: they are its last ones, and none is needed.

    Returns:
        None where they cannot: other tokens follow one of them, or one is not added but of the vocabulary itself.
    """
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[token] for token in tokens if token in vocabulary}
    if not ids:
        return None
    first = min(ids)
    behind = {i for i in vocabulary.values() if i >= first}
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()).get_vocab(with_added_tokens=False)
    # A padding token that is also a visual one has to stay.
    used = {getattr(tokenizer, name) for name in _SPECIAL}
    return None if behind != ids or any(token in inner or token in used for token in tokens) else first


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    without: Collection[str] = (),
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a tokenizer, some of its added tokens left out or under other names.

    Args:
        tokenizer: a fast one.
        folder: of the export.
        without: added tokens, see ``removable_from``.
        renamed: new names of added tokens, which keep their ids.
    """
    # Through its JSON: the tokenizers library has no way to take an added token out.
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] not in without]
    for token in backend["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    kept = {name: getattr(tokenizer, name, None) for name in _SETTINGS}
    special = {name: str(token) for name in _SPECIAL if (token := getattr(tokenizer, name)) is not None}
    # transformers 5 names these "extra", where 4 expects a mapping under that name.
    named = set(special.values())
    others = [token for token in tokenizer.all_special_tokens if token not in without and token not in named]
    others = [renamed.get(token, token) for token in others]
    # Without this list transformers 4 would give every model token_type_ids, which GPT-2 adds to its embeddings.
    inputs = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        model_input_names=inputs,
        additional_special_tokens=others,
        **special,
        **{name: value for name, value in kept.items() if value is not None},
    )
    plain.save_pretrained(folder)
    edit_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": TOKENIZER_CLASS,
            "model_input_names": inputs,
            "extra_special_tokens": None,
            "additional_special_tokens": others or None,
            "chat_template": kept["chat_template"] if isinstance(kept["chat_template"], str) else None,
            "is_local": None,
            "backend": None,
        },
    )


def compare_tokenizers(original: PreTrainedTokenizerBase, exported: PreTrainedTokenizerBase) -> None:
    """A ValueError where the tokenizer of an export cuts a text otherwise than the checkpoint's."""
    for text in _SAMPLES:
        ours, theirs = (t(text, return_offsets_mapping=True) for t in (original, exported))
        for name in ("input_ids", "offset_mapping"):
            if ours[name] != theirs[name]:
                raise ValueError(
                    f"the exported tokenizer gives other {name} for {shorten(text)}: {shorten(theirs[name])} in place "
                    f"of {shorten(ours[name])}; its class {type(original).__name__} cannot be exported as "
                    f"{TOKENIZER_CLASS}"
                )
