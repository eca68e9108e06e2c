"""How answers are decoded: as the flags say, whatever a base model's ``generation_config.json`` sets."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GREEDY, MODEL = "greedy", "model"
CONFIG_FILE = "generation_config.json"
MAX_NEW_TOKENS = 64
"""Of an answer, unless something else is said."""

_NOT_TAKEN = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",  # The text format's own.
    "max_length", "num_return_sequences",  # An answer each, of --max_new_tokens.
    "return_dict_in_generate", "output_logits", "output_scores", "output_attentions", "output_hidden_states",
    "use_cache", "cache_implementation", "cache_config", "return_legacy_cache", "trust_remote_code", "compile_config",
    "transformers_version", "_from_model_config",
}  # fmt: skip
"""Settings of a file that say nothing about which token comes next."""

_FLAGS: dict[str, tuple[type, float, float, str]] = {
    "max_new_tokens": (int, 1, float("inf"), "longest answer"),
    "min_new_tokens": (int, 0, float("inf"), "shortest answer"),
    "num_beams": (int, 1, float("inf"), "beams; 1 is greedy search"),
    "temperature": (float, 0, float("inf"), "above 0 samples, at this temperature"),
    "top_k": (int, 0, float("inf"), "sampling: only from so many of the likeliest tokens"),
    "top_p": (float, 0, 1, "sampling: only from the likeliest tokens of this joint probability"),
    "repetition_penalty": (float, 0, float("inf"), "divides the scores of tokens that stand in the text already"),
    "no_repeat_ngram_size": (int, 0, float("inf"), "no sequence of so many tokens comes twice"),
    "length_penalty": (float, float("-inf"), float("inf"), "of beams; above 0 prefers longer answers"),
}
_POSITIVE = {"top_p", "repetition_penalty"}
_SAMPLING = ("temperature", "top_k", "top_p")


def add_model_flags(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add the flags of a command that asks a model: where it lies, how it runs, and how its answers are decoded."""
    parser.add_argument("--model_path", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--vision_tower", metavar="DIR", help="where the model's vision tower lies, if it has moved")
    parser.add_argument("--feature_cache", metavar="DIR", help="features of the tower to read (docs/feature_cache.md)")
    parser.add_argument("--feature_cache_strict", action="store_true", help="stop where it lacks an image or a clip")
    parser.add_argument(
        "--model_base", metavar="DIR", help="where the base model of its adapters lies, if it has moved"
    )
    parser.add_argument(
        "--bits", type=int, default=16, choices=(16, 8, 4), help="bits of the linear layers (default 16: as they come)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: GPUs if there are any)")
    parser.add_argument("--plugins", nargs="+", metavar="MODULE", help="modules to import first (docs/extending.md)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of resamples (default 0)")
    parser.add_argument(
        "--sub_bin", action="store_true", help="tell boxes and spans more precisely than by bins (docs/grounding.md)"
    )
    shown = {"max_new_tokens": f"default {max_new_tokens}", "num_beams": "default 1", "temperature": "default 0"}
    for name, (kind, _, _, meaning) in _FLAGS.items():
        text = f"{meaning} ({shown.get(name, 'default: off')})"
        parser.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=text)
    parser.add_argument(
        "--generation_config", default=GREEDY, choices=(GREEDY, MODEL),
        help=f"model: start from the settings of the model's {CONFIG_FILE} (default greedy: from none)",
    )  # fmt: skip


def decoding_options(args: argparse.Namespace, max_new_tokens: int) -> dict[str, Any]:
    """What a command line asks for, as options of ``Captioner.answer``: all that is in force.

    Args:
        args: with the flags of ``add_model_flags``.
        max_new_tokens: unless the flag, or the file that was asked for, says otherwise.

    Raises:
        ValueError: a flag is out of its range, or the model has no settings to start from; names it.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": 1, "do_sample": False}
    if args.generation_config == MODEL:
        # First the file, then the flags, which take the place of single settings.
        options |= read_settings(args.model_path)
    for name, (_, least, most, _) in _FLAGS.items():
        value = getattr(args, name)
        if value is None:
            continue
        if not least <= value <= most or (name in _POSITIVE and value == 0):
            limits = [f"{'above' if name in _POSITIVE else 'at least'} {least}", *(["at most 1"] if most == 1 else [])]
            raise ValueError(f"--{name} is {value}; it must be {', '.join(limits)}")
        options[name] = value
    if args.temperature is not None:
        options["do_sample"] = args.temperature > 0
    if not options["do_sample"]:
        given = [name for name in _SAMPLING[1:] if getattr(args, name) is not None]
        if given:
            raise ValueError(f"--{given[0]} is for sampling; give --temperature above 0 with it")
        return {name: value for name, value in options.items() if name not in _SAMPLING}
    # transformers would take the 50 likeliest tokens of its own accord.
    return {"top_k": 0, "top_p": 1.0, **options}


def read_settings(model_path: str) -> dict[str, Any]:
    """What a checkpoint's own ``generation_config.json`` sets about which token comes next; nothing without the file.

    Raises:
        ValueError: the file cannot be read; names it.
    """
    from transformers import GenerationConfig

    from llava.model.pretrained import quiet_transformers

    if not Path(model_path, CONFIG_FILE).is_file():
        return {}
    try:
        with quiet_transformers():
            config = GenerationConfig.from_pretrained(model_path)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{Path(model_path, CONFIG_FILE)} cannot be read: {error}") from error
    settings = {name: value for name, value in config.to_diff_dict().items() if value is not None}
    # Vicuna's file sets a temperature without sampling: it is without effect.
    idle = () if settings.get("do_sample") else ("do_sample", *_SAMPLING)
    return {name: value for name, value in settings.items() if name not in (*_NOT_TAKEN, *idle)}


@contextmanager
def without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Within it ``generate`` takes from the model's generation config the special tokens alone."""
    from transformers import GenerationConfig

    own = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(own, name) for name in names})
    try:
        yield
    finally:
        model.generation_config = own


def describe_decoding(options: dict[str, Any], model_path: str) -> str:
    """One line that says what is in force, and what the model's own file would change."""
    how = "sampling" if options.get("do_sample") else "greedy search" if options["num_beams"] == 1 else "beam search"
    hidden = {"do_sample"} | ({"num_beams"} if options["num_beams"] == 1 else set())
    line = f"decoding: {how}, {_list({name: value for name, value in options.items() if name not in hidden})}"
    unused = {name: value for name, value in read_settings(model_path).items() if options.get(name) != value}
    if unused:
        line += f"; the model's {CONFIG_FILE} has {_list(unused)}: not used (--generation_config {MODEL} takes it)"
    return line


def _list(values: dict[str, Any]) -> str:
    texts = [f"{name} {value}" for name, value in values.items()]
    return ", ".join(text if len(text) < 80 else f"{text[:80]}..." for text in texts)
