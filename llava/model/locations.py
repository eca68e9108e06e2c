"""Where a model lies: a folder here, or a name on the Hugging Face hub, which is asked once and briefly."""

from __future__ import annotations

import difflib
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from llava.messages import list_names, shorten, shorten_text

_TIMEOUT = 5.0
"""Seconds that the hub has for the first answer."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_FILE_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".git", ".yaml", ".yml", ".index")


def locate_model(name_or_path: str, flag: str) -> str:
    """Check that a model is there, so that what is read of it later is read from a folder or a hub that answers.

    Args:
        name_or_path: a folder, or a name such as ``facebook/dinov2-large``.
        flag: what an error calls it.

    Returns:
        The same; a folder below the home directory (~) with its whole path.

    Raises:
        ValueError: there is no such folder, it is a file, or the hub has no such model or does not answer.
    """
    if not name_or_path.strip():
        raise ValueError(f"{flag} is empty; give the folder of a model, or leave the flag out")
    path = os.path.expanduser(name_or_path)  # noqa: PTH111 (Path's raises for a user that there is not)
    if os.path.isdir(path):
        return path
    if os.path.exists(path):  # noqa: PTH110
        raise ValueError(f"{flag} {shorten(name_or_path)} is a file; give the folder that it lies in")
    if (reason := _find_sign_of_path(name_or_path)) is not None:
        raise ValueError(f"{flag} {shorten(name_or_path)} is no folder{reason}")
    _ask_hub(name_or_path, flag)
    return name_or_path


def _find_sign_of_path(name: str) -> str | None:
    """What makes a name that is no folder a path all the same, as the end of an error; None for a hub's name."""
    folder, _, last = name.rstrip("/").rpartition("/")
    near = _find_near(folder or ".", last)
    hint = f"; did you mean {near}?" if near else ""
    # A hub's names have no other characters, and no more than one slash.
    if not _HUB_NAME.fullmatch(name) or ".." in name or "--" in name or name.endswith(_FILE_SUFFIXES):
        return hint
    if near or (folder and os.path.isdir(folder)):
        return hint or f" ({folder} is a folder here)"
    return None


def _find_near(folder: str, name: str) -> str | None:
    """The model's folder beside a name that is spelled almost like it."""
    try:
        beside = [entry.name for entry in os.scandir(folder) if Path(entry.path, "config.json").is_file()]
    except OSError:
        return None
    near = difflib.get_close_matches(name, beside, n=1, cutoff=0.75)
    return os.path.normpath(os.path.join(folder, near[0])) if near else None


@cache
def _ask_hub(name: str, flag: str) -> None:
    """A ValueError if the hub, or what was downloaded before, has no such model; one question, no second try."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    what = f"{flag} {shorten(name)} is no folder here"
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{what}, and was not downloaded before (HF_HUB_OFFLINE is set); give a folder")
    # The base of what its library for HTTP raises, which is not always an OSError.
    unreachable: Any = (*HfHubHTTPError.__bases__, OSError)
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_TIMEOUT)
    except GatedRepoError as error:
        raise ValueError(
            f"{what}, and on the hub it is only for those who were granted access (hf auth login)"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ValueError(f"{what}, and no model on the hub has this name; check the path") from error
    except OfflineModeIsEnabled as error:
        raise ValueError(f"{what}, and the hub is not asked (HF_HUB_OFFLINE is set); give a folder") from error
    except EntryNotFoundError as error:
        raise ValueError(f"{what}, and on the hub {name} has no config.json: it is no model") from error
    except unreachable as error:
        reason = shorten_text(str(error), 150) or type(error).__name__
        raise ValueError(
            f"{what}, and the hub at {constants.ENDPOINT} cannot be reached ({reason}); check the path, or the network"
        ) from error


def describe_damage(folder: str, error: BaseException) -> str:
    """Which file of weights in a folder is missing, cut short or damaged, for an error that came of reading them."""
    from safetensors import SafetensorError, safe_open

    for index in sorted(Path(folder).glob("*.index.json")):
        try:
            files = set(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{index.name} cannot be read: it is cut short or damaged; copy the folder again"
        missing = sorted(str(file) for file in files if not Path(folder, str(file)).is_file())
        if missing:
            return f"{list_names(missing)} is missing, which {index.name} names; copy the folder again"
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as reason:
            return f"{file.name} cannot be read: it is cut short or damaged ({reason}); copy the folder again"
    return f"its weights cannot be read: {shorten_text(str(error), 300)}"
