"""How a run was started, each time: command, settings, versions, code, machine; a line of ``run_starts.jsonl`` each.

Nothing secret is written: of the environment only variables of a list, of a command line no value of a token's or
password's flag, and no password within an address.
"""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import psutil
import torch

import llava
from llava.eval import list_versions
from llava.io import append_json_lines, appending, cut_unfinished_line, num_cores, read_json_lines
from llava.messages import shorten_text
from llava.train.command_line import PROGRAM, read_variables

if TYPE_CHECKING:
    from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments

RUN_STARTS = "run_starts.jsonl"

VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "WORLD_SIZE",
    "LOCAL_WORLD_SIZE", "NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SOCKET_IFNAME", "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION",
    "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_GPUS_ON_NODE", "SLURM_CPUS_PER_TASK", "SLURM_MEM_PER_NODE",
    "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID", "CONDA_DEFAULT_ENV", "VIRTUAL_ENV",
)  # fmt: skip
"""Variables of the environment that are told; of those whose names have a word of ``_SECRET_WORDS`` none ever is."""
_SECRET_WORDS = ("token", "key", "secret", "password")
_HIDDEN = "(hidden)"
_ADDRESS = re.compile(r"(\w+://)[^/\s@]+@")
_QUERY = re.compile(r"([?&][^=&\s]*(?:token|key|secret|password|signature|credential|sig)[^=&\s]*=)[^&\s]+", re.I)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_PACKAGES = ("accelerate", "datasets", "tokenizers", "safetensors", "av", "decord", "peft", "deepspeed", "bitsandbytes")
_MOST_FILES = 5
_PATIENCE = 10.0  # seconds that git may take


class Start(TypedDict):
    """A line of ``run_starts.jsonl``.

    ``flags`` are those that a program gave in place of its command line; "" where it gave none. ``code`` is the state
    of the checkout that llava lies in; "" where it lies in none.
    """

    time: str
    step: int
    command: str
    flags: str
    settings: dict[str, str]
    versions: dict[str, str]
    code: str
    machine: dict[str, str]
    environment: dict[str, str]


def describe_start(
    argv: Sequence[str] | None, groups: Sequence[ModelArguments | DataArguments | TrainingArguments]
) -> Start:
    """How this process was started, for a run that begins at step 0.

    Args:
        argv: the words that the flags were read from; None for those of the process.
        groups: what became of them.
    """
    words = list(sys.orig_argv)
    own = list(argv or ())
    given = "" if not own or words[-len(own) :] == own else f"{PROGRAM} {shlex.join(hide_secrets(own))}"
    return Start(
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        step=0,
        command=shlex.join(hide_secrets(words)),
        flags=given,
        settings=list_settings(groups),
        versions=_list_packages(),
        code=describe_code(),
        machine=_describe_machine(),
        environment=read_variables([name for name in VARIABLES if not is_secret(name)]),
    )


def is_secret(name: str) -> bool:
    """Whether a variable of the environment may hold what nobody should read."""
    return any(word in name.lower() for word in _SECRET_WORDS)


def _is_secret_flag(name: str) -> bool:
    """The same of a flag, where only a whole word counts: --hub_token, not --max_tokens_per_batch."""
    return not {*re.split(r"[_-]", name.lower())}.isdisjoint(_SECRET_WORDS)


def hide_secrets(words: Sequence[str]) -> list[str]:
    """Words of a command line without the values of flags that hold secrets, and without passwords in addresses."""
    shown: list[str] = []
    hides = False
    for word in words:
        name, equals, _ = word.partition("=")
        if word.startswith("--"):
            hides = _is_secret_flag(name[2:])
            shown.append(f"{name}={_HIDDEN}" if hides and equals else _without_password(word))
        else:
            shown.append(_HIDDEN if hides else _without_password(word))
    return shown


def _without_password(text: str) -> str:
    for secret, shown in ((_ADDRESS, rf"\1{_HIDDEN}@"), (_QUERY, rf"\1{_HIDDEN}"), (_HUB_TOKEN, _HIDDEN)):
        text = secret.sub(shown, text)
    return text


def list_settings(groups: Sequence[ModelArguments | DataArguments | TrainingArguments]) -> dict[str, str]:
    """Every flag that is not at its default, whoever has set it: command line, recipe, or the library itself."""
    settings: dict[str, str] = {}
    for group in groups:
        for flag in fields(group):
            default: Any = flag.default if flag.default_factory is MISSING else flag.default_factory()
            value = getattr(group, flag.name, None)
            if not flag.init or value is None or value == default:
                continue
            text = " ".join(map(str, value)) if isinstance(value, list) else str(getattr(value, "value", value))
            settings[flag.name] = _HIDDEN if _is_secret_flag(flag.name) else shorten_text(_without_password(text), 300)
    return dict(sorted(settings.items()))


def _list_packages() -> dict[str, str]:
    versions = list_versions()
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


@cache
def describe_code() -> str:
    """The commit of the checkout that llava lies in, and what has changed since; "" without one, or without git."""
    folder = Path(llava.__file__).parent
    # A folder of installed packages may lie within somebody else's checkout, which says nothing of them.
    if _ask_git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return ""
    commit = _ask_git(folder, "rev-parse", "HEAD")
    if not commit:
        return ""
    branch = _ask_git(folder, "rev-parse", "--abbrev-ref", "HEAD") or "HEAD"
    changed = _ask_git(folder, "status", "--porcelain", "--", ":/")
    said = f"commit {commit.strip()}" + ("" if branch.strip() == "HEAD" else f" of branch {branch.strip()}")
    if changed is None:
        return f"{said}; whether files have changed since is not known"
    files = [line[3:] for line in changed.splitlines()]
    more = f" and {len(files) - _MOST_FILES} more" if len(files) > _MOST_FILES else ""
    return f"{said}, with changes in {', '.join(files[:_MOST_FILES])}{more}" if files else f"{said}, unchanged"


def _ask_git(folder: Path, *words: str) -> str | None:
    """What git says; None where it fails or is not there."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "backslashreplace")


def _describe_machine() -> dict[str, str]:
    machine = {"system": platform.platform(), "cores": str(num_cores())}
    machine["memory"] = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        machine["GPUs"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        machine["CUDA"] = str(torch.version.cuda)
    return machine


def read_starts(folder: Path) -> list[Start]:
    """How the run in a folder was started so far; a ValueError for a file that is none of a run's."""
    starts: list[Start] = read_json_lines(folder / RUN_STARTS)
    if not all(isinstance(start, Mapping) and set(Start.__annotations__) <= set(start) for start in starts):
        raise ValueError(f"{folder / RUN_STARTS} is none that a run has written")
    return starts


def add_start(folder: Path, start: Start) -> None:
    """Add a line; one of step 0 is the first of a new run."""
    path = folder / RUN_STARTS
    if start["step"] == 0 and read_starts(folder):
        path.unlink(missing_ok=True)
    cut_unfinished_line(path)
    with appending(path) as file:
        append_json_lines(file, [start])
