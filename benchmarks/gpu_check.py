"""What the CPUs of CI cannot try: training, resume and generation on one GPU, held against the CPU where that can be.

python benchmarks/gpu_check.py --out benchmarks/gpu_check.json

A tiny GPT-2 with a tiny tower learns text, pictures and clips that are written here. Each check is an entry of the
result with ``ok``; the exit status is 1 where one is not. It takes a minute or two.
Without a GPU it tries itself on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Sums of fixed order: a resumed run can then be compared bit for bit.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402 (the path and the variable come first)
from conftest import ITALIAN, TinyBackbones, make_tower, turns, write_video  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

STEPS = 20
CLOSE = {"fp32": 2e-3, "bf16": 0.15, "fp16": 0.05}
"""How far a loss may lie from the CPU's in 32 bit at any of the first steps."""


class Bench:
    """The files of all checks, and runs on them."""

    def __init__(self, folder: Path, device: str) -> None:
        from tokenizers import ByteLevelBPETokenizer
        from transformers import PreTrainedTokenizerFast

        self.folder, self.device = folder, device
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(ITALIAN * 20, vocab_size=400, special_tokens=["<|endoftext|>"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
        tokenizer.save_pretrained(folder / "tokenizer")
        backbones = TinyBackbones(folder, folder / "tokenizer")
        self.models = {name: backbones[name] for name in ("llava_gpt2", "llava_llama")}
        self.tower = make_tower(folder / "tower")
        samples = []
        for i, text in enumerate(ITALIAN):
            write_video(folder / f"{i}.mp4", seed=i)
            Image.new("RGB", (90, 60), (40 * i, 200 - 30 * i, 90)).save(folder / f"{i}.png")
            samples += [
                {"id": f"v{i}", "video": f"{i}.mp4", "conversations": turns("<video>\nDescrivi.", text)},
                {"id": f"i{i}", "image": f"{i}.png", "conversations": turns("<image>\nDescrivi.", text)},
                {"id": f"t{i}", "conversations": turns("Scrivi.", text)},
            ]
        self.data = folder / "data.json"
        self.data.write_text(json.dumps(samples))

    def words(self, output: str, **changes: Any) -> list[str]:
        values = {
            "model_name_or_path": self.models["llava_gpt2"], "vision_tower": self.tower, "data_path": self.data,
            "output_dir": self.folder / output, "mm_resampler_type": "fast_slow_resampler",
            "mm_perceiver_latents": 9, "mm_perceiver_latents_fast": 4, "mm_resampler_width": 32, "num_frames": 3,
            "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1,
            "report_to": "none", "save_strategy": "no", "disable_tqdm": "true", "seed": 5,
            "use_cpu": str(self.device == "cpu").lower(), **changes,
        }  # fmt: skip
        return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]

    def train(self, output: str, **changes: Any) -> list[float]:
        """Run to the end, and give the loss of each step."""
        from llava.train.train import main

        trainer = main(self.words(output, **changes))
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def weights(self, output: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / output / "model.safetensors")


def check_losses(bench: Bench) -> dict[str, Any]:
    """Every precision follows the CPU's loss in 32 bit, and learns."""
    curves = {"cpu": bench.train("cpu", use_cpu="true"), "fp32": bench.train("fp32", tf32="false")}
    curves["bf16"] = bench.train("bf16", bf16="true")
    if bench.device != "cpu":
        curves["fp16"] = bench.train("fp16", fp16="true")
    far = {
        name: max(abs(a - b) for a, b in zip(curve, curves["cpu"], strict=True))
        for name, curve in curves.items()
        if name != "cpu"
    }
    learns = all(curve[-1] < 0.8 * curve[0] for curve in curves.values())
    return {"ok": learns and all(far[name] < CLOSE[name] for name in far), "furthest_from_cpu": far, "losses": curves}


def check_attention(bench: Bench) -> dict[str, Any]:
    """Ways to compute attention agree."""
    names = ["eager", "sdpa"]
    extra: dict[str, Any] = {}
    if bench.device != "cpu" and importlib.util.find_spec("flash_attn") is not None:
        names.append("flash_attention_2")
        extra["bf16"] = "true"
    model = bench.models["llava_llama"]
    curves = {n: bench.train(n, model_name_or_path=model, attn_implementation=n, **extra) for n in names}
    far = max(abs(a - b) for curve in curves.values() for a, b in zip(curve, curves["eager"], strict=True))
    return {"ok": far < (0.15 if extra else 2e-3), "furthest_from_eager": far, "tried": names}


def check_lora(bench: Bench) -> dict[str, Any]:
    curve = bench.train("lora", lora_enable="true", lora_r=4, lora_alpha=8, bf16="true")
    return {"ok": curve[-1] < curve[0], "losses": curve}


def check_resume(bench: Bench) -> dict[str, Any]:
    """A run that is killed and resumed ends with the weights of one that was not, bit for bit."""
    options = {"save_strategy": "steps", "save_steps": 10, "max_steps": 40, "full_determinism": "true"}
    bench.train("whole", **options)
    command = [sys.executable, "-m", "llava.train.train", *bench.words("killed", **options)]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while started.poll() is None and not (bench.folder / "killed" / "checkpoint-10").is_dir():
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    for late in (20, 30, 40):  # Where it was too quick for the signal.
        shutil.rmtree(bench.folder / "killed" / f"checkpoint-{late}", ignore_errors=True)
    bench.train("killed", resume_from_checkpoint="auto", **options)
    whole, resumed = bench.weights("whole"), bench.weights("killed")
    differing = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    return {"ok": not differing and whole.keys() == resumed.keys(), "differing": differing[:5]}


def check_generation(bench: Bench) -> dict[str, Any]:
    """With the cache and without it, on the GPU and on the CPU, greedy answers are the same."""
    from llava.model.loading import load_model

    bench.train("answers", model_name_or_path=bench.models["llava_llama"], max_steps=60)
    answers = {}
    for device in dict.fromkeys(("cpu", bench.device)):
        loaded = load_model(str(bench.folder / "answers"))
        model = loaded.model.to(device).eval()
        spans = [model.vision.visual_token_ids[0]] * model.vision.layout.num_tokens("image", 1)
        ids = torch.tensor([loaded.tokenizer("Descrivi.")["input_ids"] + spans], device=device)
        image = torch.zeros(1, 3, 56, 56, device=device)
        for cached in (True, False):
            found = model.generate(ids, images=image, max_new_tokens=24, do_sample=False, use_cache=cached)
            answers[f"{device}, {'cached' if cached else 'whole'}"] = found[0].tolist()
    return {"ok": len({tuple(answer) for answer in answers.values()}) == 1, "answers": answers}


CHECKS: tuple[Callable[[Bench], dict[str, Any]], ...] = (
    check_losses, check_generation, check_resume, check_attention, check_lora,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file of the result, JSON")
    args = parser.parse_args()
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), device)
        for check in CHECKS:
            start = time.perf_counter()
            try:
                found = check(bench)
            except (ValueError, RuntimeError, AssertionError, ImportError) as error:
                found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
            result[check.__name__] = found | {"seconds": round(time.perf_counter() - start, 1)}
            print(check.__name__, "ok" if found["ok"] else f"NOT OK {found}", flush=True)
            text = re.sub(r"\[[^][{}]*\]", lambda row: " ".join(row[0].split()), json.dumps(result, indent=1))
            args.out.write_text(text + "\n")
    return 0 if all(result[check.__name__]["ok"] for check in CHECKS) else 1


if __name__ == "__main__":
    sys.exit(main())
