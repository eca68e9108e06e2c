"""What a model's files may make Python, torch and transformers do: one line that names the folder, nothing endless."""

from __future__ import annotations

import json
import logging
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ParamSpec, TypeVar

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PretrainedConfig

from llava.messages import is_out_of_memory, shorten, shorten_text

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_OF_FILES = (
    KeyError, IndexError, AttributeError, TypeError, AssertionError, ArithmeticError, RuntimeError,
    MemoryError, EOFError, UnpicklingError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What loading a model raises over files that are not as whoever reads them expects."""
_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".model", ".txt", ".jinja")
_MOST_OF = {"layer": 1_000, "expert": 10_000, "num_labels": 100_000}
"""The most of whole numbers in a ``config.json`` that are counts of modules, by a part of their names."""
_MOST_STEPS = 200
_MOST_GROWTH = 64
_AT_LEAST_ONE = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "max_position_embeddings")
_FEWEST_BYTES = 0.5
"""Bytes of a weight in a file, at least: 4 bits."""
_SMALL = 1 << 28
"""Bytes that a model may be larger than its files, as new modules are."""


def one_line_errors(load: Callable[P, T]) -> Callable[P, T]:
    """Let a function that loads a model raise a ValueError that begins with the folder, whatever its files contain.

    Its first argument is the folder; ``flag`` is what an error calls it. The error that was raised is the cause, and
    its traceback is logged for ``--log_level debug``.
    """

    @wraps(load)
    def load_or_say(*args: P.args, **kwargs: P.kwargs) -> T:
        where = f"{kwargs.get('flag', '--model_name_or_path')} {shorten(args[0])}"
        try:
            return load(*args, **kwargs)
        except ValueError as error:
            # Of ours each says which flag or file it is about; transformers' own say neither.
            if "--" in str(error) or str(args[0]) in str(error):
                raise
            raise ValueError(f"{where}: {shorten_text(str(error), 500)}") from error
        except _OF_FILES as error:
            raise _explain(error, where) from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # Of tokenizers and safetensors, which are written in Rust.
                raise
            raise _explain(error, where) from error

    return load_or_say


def _explain(error: BaseException, where: str) -> ValueError:
    logger.debug("%s cannot be loaded", where, exc_info=error)
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return ValueError(f"{where}: the model that its config.json describes does not fit into memory")
    return ValueError(f"{where}: it cannot be loaded as its files are: {shorten_text(repr(error), 300)}")


def check_files(folder: str, flag: str) -> None:
    """A ValueError for a pipe or a device in the place of a model's file: opening it would wait for ever."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return  # Reading it says what is wrong.
    for entry in entries:
        if entry.name.endswith(_SUFFIXES) and not entry.is_file() and not entry.is_dir() and Path(entry.path).exists():
            raise ValueError(f"{flag} {shorten(folder)}: {shorten(entry.name)} is a pipe or a device, not a file")


def check_steps(folder: str, where: str) -> None:
    """A ValueError for a ``tokenizer.json`` whose steps would make texts many times as long, and so end the process.

    Args:
        folder: of the tokenizer; a name on the hub, or one without the file, passes.
        where: how the error begins.
    """
    try:
        content = json.loads(Path(folder, "tokenizer.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # Loading it says what is wrong.
    for part in ("normalizer", "decoder") if isinstance(content, dict) else ():
        steps, growth = [content.get(part)], 1.0
        for number, step in enumerate(steps):
            if number > _MOST_STEPS:
                raise ValueError(f"{where} has more than {_MOST_STEPS} steps in its {part}")
            if not isinstance(step, dict):
                continue
            for name in ("normalizers", "decoders"):
                steps += step[name] if isinstance(step.get(name), list) else []
            pattern, text = step.get("pattern"), str(step.get("content", step.get("prepend", "")))
            given = pattern.get("String") if isinstance(pattern, dict) else None
            growth *= max(len(text) / max(len(given), 1) if isinstance(given, str) else len(text), 1.0)
        if growth > _MOST_GROWTH:
            raise ValueError(
                f"{where} may make texts {growth:.3g} times as long in its {part}; it is none to train with"
            )


def check_counts(settings: Mapping[str, Any], where: str) -> None:
    """A ValueError for a ``config.json`` with a number that is none, or with more modules than any model has.

    Args:
        settings: its entries.
        where: how the error begins.
    """
    for name, value in _numbers(settings):
        if not math.isfinite(value):
            raise ValueError(f"{where}: its config.json has {shorten(name)} {value}; expected a finite number")
        for part, most in _MOST_OF.items():
            if part in name and value > most:
                raise ValueError(
                    f"{where}: its config.json has {shorten(name)} {shorten(value)}; more than {most:,} are not built"
                )


def _numbers(settings: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    waiting = [settings]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, Mapping):
                waiting.append(value)
            elif isinstance(value, int | float):
                yield str(name), value


def check_sizes(config: PretrainedConfig, path: str, where: str) -> None:
    """A ValueError for sizes that no model has, or that a folder's files cannot hold the weights of.

    Args:
        config: of a language model.
        path: its folder, or a name on the hub, of which only the sizes themselves are looked at.
        where: how the error begins.
    """
    sizes = {name: getattr(config, name, None) for name in _AT_LEAST_ONE}
    for name, value in sizes.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{where}: its config.json has {name} {shorten(value)}; it must be at least 1")
    width, words, layers = (sizes[name] for name in ("hidden_size", "vocab_size", "num_hidden_layers"))
    stored = _stored_bytes(path)
    if not stored or not (isinstance(width, int) and isinstance(words, int) and isinstance(layers, int)):
        return
    # A layer holds a square of the width at least: its queries' weights.
    least = int((words * width + layers * width * width) * _FEWEST_BYTES)
    if least > stored + _SMALL:
        raise ValueError(
            f"{where}: its config.json describes a model of {least / 1e9:,.1f} GB and more (width {shorten(width)}, "
            f"{shorten(layers)} layers, {shorten(words)} tokens), and its files have {stored / 1e9:,.3f} GB"
        )


def _stored_bytes(path: str) -> int:
    """Bytes of the files of weights in a folder; 0 for one without any, or a name on the hub."""
    try:
        return sum(
            entry.stat().st_size
            for entry in os.scandir(path)
            if entry.name.endswith((".safetensors", ".bin")) and stat.S_ISREG(entry.stat().st_mode)
        )
    except OSError:
        return 0
