"""A checkpoint's tokenizer, and room for visual tokens and coordinates in it, in the embeddings and in the head."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from llava.config import GroundingConfig, VisionConfig
from llava.constants import VISUAL_TOKENS
from llava.grounding.syntax import COORDINATE_PLACEHOLDERS, bin_tokens
from llava.model.loading_errors import check_steps
from llava.model.pretrained import foreign_code_note, locate_model

logger = logging.getLogger(__name__)

_FEWEST_USED = 0.9
"""Share of the embeddings that a model's own tokenizer uses: vocabularies are padded by less than a tenth."""


_NO_FILES = (
    ": it has no vocabulary; put the files of the model's tokenizer (tokenizer.json, tokenizer_config.json) into that "
    "folder"
)
_NEEDS_PACKAGES = (
    ": it is a tokenizer.model, which Llama's, Vicuna's and others' need SentencePiece for (pip install sentencepiece "
    "protobuf); or put the tokenizer.json of the same tokenizer into the folder"
)


def load_tokenizer(name_or_path: str, flag: str = "--model_name_or_path") -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a padding token pads with its end of text.

    Attention never depends on padding ids here: masks are made from lengths. ``flag`` is what an error calls the path.
    """
    path = locate_model(name_or_path, flag)
    check_steps(path, f"{flag}: the tokenizer of {name_or_path!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (AttributeError, TypeError, KeyError, StrictDataclassError) as error:  # JSON, but of another kind.
        raise ValueError(f"{flag}: no tokenizer can be read from {name_or_path!r}: {error!r}") from error
    except (OSError, ValueError) as error:
        note = foreign_code_note(get_tokenizer_config(path))
        if "tiktoken" in str(error):  # What transformers asks for wherever it finds no tokenizer.json.
            is_empty = Path(path).is_dir() and not Path(path, "tokenizer.model").is_file()
            note = note or (_NO_FILES if is_empty else _NEEDS_PACKAGES)
        raise ValueError(f"{flag}: no tokenizer can be read from {name_or_path!r}{note or f': {error}'}") from error
    except Exception as error:
        if type(error) is not Exception:  # The tokenizers package has no class of its own.
            raise
        raise ValueError(f"{flag}: no tokenizer can be read from {name_or_path!r}: {error}") from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # transformers makes one of special tokens alone where a folder has a config.json and no tokenizer's files.
        raise ValueError(f"{flag}: no tokenizer can be read from {name_or_path!r}{_NO_FILES}")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {name_or_path!r} has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what a tokenizer does: its model and rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    if backend is not None:  # Truncation and padding are set by whoever used it last.
        rules = json.dumps({**json.loads(rules), "truncation": None, "padding": None}, sort_keys=True)
    special = [str(tokenizer.special_tokens_map), tokenizer.chat_template]
    return hashlib.sha256(json.dumps([rules, special], default=str).encode()).hexdigest()


def warn_of_other_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str, config: Mapping[str, Any]) -> None:
    """Warn where the folder of a trained model has another tokenizer than the one that it was trained with.

    Its ``run_identity.json`` has the hash. Another release of transformers may make others of the same files.
    """
    identity = Path(path, "run_identity.json")
    if not identity.is_file() or config.get("transformers_version") != transformers.__version__:
        return
    try:
        trained_with = json.loads(identity.read_text(encoding="utf-8"))["fixed"]["tokenizer"]["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # Whoever goes on from it says what is wrong with it.
    if trained_with and trained_with != hash_tokenizer(tokenizer):
        logger.warning(
            "the tokenizer in %s is not the one that the model was trained with (other tokens, rules or template): "
            "unless you know why, copy that run's tokenizer files there again", path,
        )  # fmt: skip


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    path: str,
    grounding: GroundingConfig | None = None,
    special_ids: Mapping[str, Any] | None = None,
    unused: str | None = None,
) -> None:
    """A ValueError if the tokenizer has ids that the model has no embedding for, or is another model's.

    Args:
        vocab_size: number of the model's embeddings.
        path: of its folder, for errors.
        grounding: what coordinates are to it; bins, which come last, have tables of their own.
        special_ids: entries of its ``config.json``, whose ``eos_token_id`` and ``bos_token_id`` must be those of a
            tokenizer that leaves many embeddings without a token.
        unused: what to say of so many of them; by default that the tokenizer may be another model's.
    """
    ids = tokenizer.get_vocab().values()
    num_tokens = len(tokenizer) if grounding is None or grounding.first_bin is None else grounding.first_bin
    largest = max(ids) if grounding is None or grounding.first_bin is None else num_tokens - 1
    remedy = "put the tokenizer that the model was trained with into its folder"
    if max(num_tokens, largest + 1) > vocab_size:
        also = f" with ids up to {largest}" if largest >= num_tokens else ""
        raise ValueError(
            f"the tokenizer of {path!r} has {num_tokens} tokens{also}, but the model has embeddings for "
            f"{vocab_size}; {remedy}"
        )
    # A tokenizer that leaves many embeddings unused may be another model's: its special tokens tell.
    if num_tokens < _FEWEST_USED * vocab_size:
        message = f"the tokenizer of {path!r} has {num_tokens} tokens, but the model has embeddings for {vocab_size}"
        own = {name: (special_ids or {}).get(name) for name in ("eos_token_id", "bos_token_id")}
        differ = [name for name, i in own.items() if isinstance(i, int) and i not in (getattr(tokenizer, name), -1)]
        if differ:
            name = differ[0]
            raise ValueError(
                f"{message}, and {name} {getattr(tokenizer, name)}, where its config.json has {own[name]}: it is "
                f"another model's; {remedy}"
            )
        logger.warning("%s: %s", message, unused or f"if it is another model's, {remedy}")
    warn_of_other_tokenizer(tokenizer, path, special_ids or {})


def add_tokens(
    tokenizer: PreTrainedTokenizerBase, vision: VisionConfig, grounding: GroundingConfig | None
) -> tuple[VisionConfig, GroundingConfig | None]:
    """Add what the tokenizer lacks of visual tokens and, behind these, of coordinates; both settings with the ids."""
    # In this order: bins have to be the last of all tokens.
    vision = replace(vision, token_ids=add_visual_tokens(tokenizer))
    return vision, None if grounding is None else add_coordinate_tokens(tokenizer, grounding)


def add_visual_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Add the visual tokens that the tokenizer does not know yet, each kept whole in any text.

    Returns:
        The id of every visual token.
    """
    return _add_tokens(tokenizer, VISUAL_TOKENS, special=True)


def add_coordinate_tokens(tokenizer: PreTrainedTokenizerBase, grounding: GroundingConfig) -> GroundingConfig:
    """Add the placeholders and, behind all other tokens, the bins of coordinates that the tokenizer does not know yet.

    They are no special tokens: they are written in texts and stay in answers. Returns the settings with their ids.

    Raises:
        ValueError: the tokenizer has other bins, or tokens behind them.
    """
    token_ids = _add_tokens(tokenizer, COORDINATE_PLACEHOLDERS, special=False)
    if not grounding.has_tables:
        return replace(grounding, token_ids=token_ids, first_bin=None)
    # The last tokens, in order: a bin's id is the first one's plus its number, and its logit stands there.
    ids = list(_add_tokens(tokenizer, bin_tokens(grounding), special=False).values())
    if ids != list(range(len(tokenizer) - len(ids), len(tokenizer))):
        raise ValueError(
            f"the bins of coordinates must be the tokenizer's last {len(ids)} tokens, in order, but "
            f"{tokenizer.name_or_path!r} has tokens behind or between them; begin from a tokenizer without bins"
        )
    return replace(grounding, token_ids=token_ids, first_bin=ids[0])


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], special: bool) -> dict[str, int]:
    """Add those tokens that are new; the ids of all of them."""
    vocabulary = tokenizer.get_vocab()
    new = [AddedToken(token, special=special, normalized=False) for token in tokens if token not in vocabulary]
    tokenizer.add_tokens(new, special_tokens=special)
    vocabulary = tokenizer.get_vocab()
    return {token: vocabulary[token] for token in tokens}


def grow_vocabulary(model: PreTrainedModel, new_ids: Sequence[int]) -> None:
    """Give new tokens, whose ids are all above the old ones, embeddings and logits.

    A new embedding is the mean of the old ones, so that it starts as an unremarkable token; logits of old
    tokens stay as they were, and tied heads stay tied. Where a model came with spare embeddings behind its
    tokenizer, the new tokens take those.
    """
    if not new_ids:
        return
    old_size = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if max(new_ids) >= old_size:
        model.resize_token_embeddings(max(new_ids) + 1, mean_resizing=False)
    modules = (cast(nn.Embedding, model.get_input_embeddings()), cast(nn.Linear, model.get_output_embeddings()))
    with torch.no_grad():
        for weight in {id(module.weight): module.weight for module in modules}.values():  # Once where they are tied.
            old = weight[: min(*new_ids, old_size)]  # (old tokens, width)
            weight[list(new_ids)] = old.mean(0, dtype=torch.float32).to(weight.dtype)  # (width,)
