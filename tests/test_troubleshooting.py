"""The messages that docs/troubleshooting.md quotes are those that the library gives."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.data import check
from llava.eval.blind import BlindCheck
from llava.messages import explain_error
from llava.model.loading import load_model
from llava.train.nan_check import describe_numbers
from llava.train.throughput import advise
from llava.train.train import build_trainer, main
from tests.conftest import ITALIAN, turns

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
PACKER = {
    "mm_resampler_type": "fast_slow_resampler", "mm_perceiver_latents": 9, "mm_perceiver_latents_fast": 4,
    "mm_resampler_width": 32, "mm_resampler_heads": 4, "num_frames": 3,
}  # fmt: skip


def quoted() -> list[str]:
    return [line for block in re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.S) for line in block.splitlines()]


class Said:
    """All that was said, on one line each, and what makes the library say it."""

    def __init__(self, capfd: Any) -> None:
        self.capfd, self.lines = capfd, []

    def add(self, text: str) -> None:
        self.lines += [" ".join(line.split()) for line in text.splitlines()]

    def run(self, action: Callable[[], object]) -> None:
        try:
            action()
        except ValueError as error:
            self.add(str(error))
        out, err = self.capfd.readouterr()
        self.add(out + "\n" + err)

    def has(self, quote: str) -> bool:
        pattern = ".*".join(map(re.escape, quote.split("...")))
        return any(re.search(pattern, line) for line in self.lines)


def test_every_quoted_message_is_given(
    gpt2_dir: Path, tower_dir: Path, media_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = Said(capfd)

    def data(name: str, *samples: dict[str, Any]) -> Path:
        path = media_dir / f"{name}.json"
        path.write_text(json.dumps([{"id": "k", **sample} for sample in samples]))
        return path

    def words(path: Path, out: str = "out", sees: bool = True, **more: object) -> list[str]:
        values = {
            "model_name_or_path": gpt2_dir, "data_path": path, "output_dir": tmp_path / out, "max_steps": 1,
            "report_to": "none", "use_cpu": "true", "disable_tqdm": "true", "save_strategy": "no",
            **({"vision_tower": tower_dir, **PACKER} if sees else {}), **more,
        }  # fmt: skip
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    def start(*args: Any, **kwargs: Any) -> None:
        said.run(lambda: build_trainer(words(*args, **kwargs)))

    clip = {"id": "a", "video": "a.mp4", "conversations": turns("<video>", ITALIAN[0])}
    text = {"id": "t", "conversations": turns("", ITALIAN[1])}
    good = data("good", clip, text)
    (media_dir / "cut.mp4").write_bytes((media_dir / "a.mp4").read_bytes()[:1500])
    start(data("nothing", {"conversations": [{"from": "human", "value": "ciao"}]}), sees=False, version="v1")
    start(data("text", text), sees=False, mm_tunable_parts="mm_mlp_adapter")
    start(data("key", {"Video": "a.mp4", "conversations": turns("", "x")}))
    start(data("place", {"video": "a.mp4", "conversations": turns("", "x")}))
    start(data("missing", {"id": "m", "video": "gone.mp4", "conversations": turns("<video>", "x")}))
    start(good, model_max_length=40)
    start(data("long", {"conversations": turns("", " ".join(ITALIAN * 3))}), sees=False, model_max_length=20)
    broken = data("broken", clip, {"id": "bad", "video": "cut.mp4", "conversations": turns("<video>", "x")})
    said.run(lambda: check.main([str(broken), "--workers", "0", "--decode_timeout", "0"]))

    said.run(lambda: main(words(good, "run")))
    start(good, "run")
    resumed = words(good, "run", learning_rate=3e-4, resume_from_checkpoint="auto")
    said.run(lambda: main(resumed))
    run = tmp_path / "run"
    for name, change in {
        "cut": lambda folder: _cut(folder / "model.safetensors"),
        "moved": lambda folder: _move_tower(folder / "config.json"),
        "pickled": lambda folder: _pickle(folder),
        "empty": lambda folder: (folder / "model.safetensors").unlink(),
    }.items():
        folder = shutil.copytree(run, tmp_path / name)
        change(folder)
        said.run(lambda folder=folder: load_model(str(folder), flag="--model_path"))

    allocator = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 4 GiB")
    said.add(explain_error(allocator))
    said.add(advise(0.5, 0, 8))
    said.add(advise(0.5, 8, 8))
    said.add(BlindCheck(31.2, 31.0, 0.2, -1.1, 1.5, is_blind=True).describe("caption"))
    said.add(f"step 7: {describe_numbers([[1.0], [float('nan')]], float('nan'))}")
    assert len(quoted()) > 15
    assert [quote for quote in quoted() if not said.has(quote)] == []


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _move_tower(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "mm_vision_tower": "/nowhere/dinov2"}))


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Path("of another kind")}, folder / "pytorch_model.bin")
