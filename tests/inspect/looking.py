"""The recipe that inspections of the tests begin from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llava.inspect.__main__ import main

FLAGS = {
    "mm_resampler_type": "fast_slow_resampler", "mm_perceiver_latents": 9, "mm_perceiver_latents_fast": 4,
    "mm_resampler_width": 32, "mm_resampler_heads": 4, "num_frames": 3, "per_device_train_batch_size": 2,
    "dataloader_num_workers": 0, "decode_timeout": 0, "check_data": "none",
}  # fmt: skip

Look = Callable[..., tuple[int, str]]


def make_look(model: Path, tower: Path, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> Look:
    """A function that inspects the good recipe with changes: the exit status, and the text."""

    def look(*own: str, **changes: object) -> tuple[int, str]:
        given = {
            "model_name_or_path": model, "vision_tower": tower, "data_path": data, "output_dir": folder / "out",
            "data_cache_dir": folder / "cache",
        }  # fmt: skip
        flags = {name: value for name, value in (FLAGS | given | changes).items() if value is not None}
        status = main([*own, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))])
        return status, capsys.readouterr().out

    return look
