"""What ``--fsdp`` and ``--fsdp_config`` may be, and what they do not go together with.

Loads neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.messages import shorten

if TYPE_CHECKING:
    from transformers import TrainingArguments

GIVEN = (True, "true", "True", "full_shard", "full_shard auto_wrap")
"""What ``--fsdp`` may be."""
_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "version": lambda value: value in (2, "2"),
    "reshard_after_forward": lambda value: isinstance(value, bool),
    "transformer_layer_cls_to_wrap": lambda value: isinstance(value, str | list),
}
"""What of ``--fsdp_config`` may be given."""
_DEFAULTS: dict[str, object] = {
    "min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False,
    "cpu_ram_efficient_loading": False, "activation_checkpointing": False, "cpu_offload": False,
    "state_dict_type": "FULL_STATE_DICT", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
}  # fmt: skip
"""What transformers adds to it: may be there, and only so."""
_NOT_TOGETHER = {
    "deepspeed": "both share weights out; leave one of them out",
    "lora_enable": "adapters have not been tried with it; give --deepspeed zero3",
    "fp16": "its loss scale has not been tried with it; give --bf16",
    "bf16_weights": "it has weights of its own in 32 bits; leave one of the two out",
    "torch_compile": "a compiled model has not been tried with it; leave one of the two out",
    "sample_every": "samples need whole weights; describe them from a checkpoint (llava generate)",
    "wants_scores": "scores need whole weights; give --score_tasks none, and score checkpoints (llava babylm)",
}
"""Flags that do not go together with ``--fsdp``, and why."""
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
"""Those whose step is the same on shares of tensors. Adafactor mixes shares with whole tensors, Adagrad keeps states of
the tensors before they are shared out, and those of other packages have not been tried."""


def check_fsdp(args: TrainingArguments, launched: bool) -> None:
    """Check what ``--fsdp`` stands beside; to be called before transformers reads it.

    Raises:
        ValueError: names the flag that does not go together with it, or the launcher that it needs.
    """
    if args.fsdp not in GIVEN or find_unknown_setting(args.fsdp_config):
        return  # What the flags themselves may be is looked at next.
    for name, reason in _NOT_TOGETHER.items():
        if getattr(args, name, None):
            flag = "score_tasks" if name == "wants_scores" else name
            raise ValueError(f"--{flag} and --fsdp do not go together: {reason}")
    optim = getattr(args.optim, "value", args.optim)
    if optim not in _OPTIMIZERS:
        raise ValueError(
            f"--optim {optim} does not step on shares of tensors, as --fsdp has them; known: {', '.join(_OPTIMIZERS)}"
        )
    if not args.do_train:
        raise ValueError("--fsdp is for training, but --do_train is false; leave it out: ranks work without it")
    if not launched:
        raise ValueError(
            "--fsdp shares weights out to several ranks: llava launch --nproc_per_node N -m llava.train.train ..., or "
            "leave it out"
        )
    args.fsdp = True  # type: ignore[assignment] # As transformers has it once it has read the word.


def find_unknown_setting(given: object) -> str:
    """What of ``--fsdp_config`` is not taken here, as "name: value"; empty where all of it is."""
    settings = given
    if isinstance(given, str):
        try:
            settings = json.loads(given if given.startswith("{") else Path(given).read_bytes())
        except (OSError, ValueError):
            return ""  # That it cannot be read is said elsewhere.
    if not isinstance(settings, Mapping):
        return "" if settings is None else shorten(settings)
    for key, value in settings.items():
        name = str(key).removeprefix("fsdp_")
        known = _SETTINGS[name](value) if name in _SETTINGS else name in _DEFAULTS and value == _DEFAULTS[name]
        if not known:
            return f"{name}: {shorten(value)}"
    return ""
