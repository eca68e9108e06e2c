"""What a loaded model generates with: its tokenizer's special tokens, and no setting that could not be saved again."""

from __future__ import annotations

import logging

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# What a generation configuration has no use for where it does not sample, or searches without beams.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("early_stopping", "length_penalty")


def prepare_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Give the configurations the tokenizer's special tokens, and take from them what could not be saved again."""
    # GPT-2 ships with ids of its own vocabulary in both files, and ``generate`` goes by them.
    assert model.generation_config is not None
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
    _drop_unused_sampling(model.generation_config, source)


def _drop_unused_sampling(config: GenerationConfig, source: str) -> None:
    """Leave out settings without effect that transformers refuses to save, and with them the whole model.

    Vicuna's ``generation_config.json`` is the best known: a temperature, but no sampling.

    Args:
        config: of a model that was loaded; what it generates stays the same.
        source: the model's folder or hub name, for the note.
    """
    if _can_be_saved(config):
        return
    # Back to transformers' own defaults, but only if that is what makes the configuration one that can be saved.
    unused = [] if config.do_sample else [name for name in _SAMPLING if hasattr(config, name)]
    unused += [name for name in _BEAMS if (config.num_beams or 1) == 1]
    fresh = GenerationConfig()
    given = {name: getattr(config, name) for name in unused if getattr(config, name) != getattr(fresh, name)}
    for name in given:
        setattr(config, name, getattr(fresh, name))
    if given and _can_be_saved(config):
        settings = ", ".join(f"{name} {value}" for name, value in given.items())
        logger.warning(
            "generation_config.json of %s sets %s, without effect as it neither samples nor searches with beams, and "
            "could not be saved again; left out", source, settings
        )  # fmt: skip
        return
    for name, value in given.items():
        setattr(config, name, value)


def _can_be_saved(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True
