"""Everything for a GPU in one script of at most eight minutes: is it right there, and how fast is it?

    python benchmarks/gpu.py --out benchmarks/gpu.json

Checks: a tiny GPT-2 with a tiny tower learns text, pictures and clips that are written here, and is held against the
CPU in 32 bits: losses by precision, answers, a run that is killed and resumed, kinds of attention, packs, adapters, the
same run twice. Each has ``ok``; the exit status is 1 where one is not.

Figures: a GPT-2 of 12 x 768 in bf16 on captions of 5 to 60 tokens, padded, grouped, packed, with flash attention where
it is installed, compiled; and the Italian recipe (DINOv2-large, 4 frames, TokenPacker), live and with cached features.
Tokens and samples a second and MFU are those of the trainer's own log, the median of its lines behind the first ones.

The result is written after each section, so that what was done is there if time runs out; each has a limit of its own,
and what no time is left for is named. Without a GPU it tries itself on the CPU, in tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Sums of fixed order: a resumed run can then be compared bit for bit.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch  # noqa: E402 (the path and the variable come first)
from conftest import ITALIAN, TinyBackbones, make_tower, turns, write_video  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from text import write_captions, write_model  # noqa: E402

STEPS = 20
TOTAL_LIMIT, SECTION_LIMIT = 480, 120
"""Seconds of all sections together, and of each."""
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

    def run(self, output: str, **changes: Any) -> Any:
        """The trainer of a run that has come to its end."""
        from llava.train.train import main

        return main(self.words(output, **changes))

    def train(self, output: str, **changes: Any) -> list[float]:
        """The loss of each step of a run."""
        trainer = self.run(output, **changes)
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


def attention_names(bench: Bench) -> list[str]:
    """Kinds of attention that there are here."""
    has_flash = bench.device != "cpu" and importlib.util.find_spec("flash_attn") is not None
    return ["eager", "sdpa", *(["flash_attention_2"] if has_flash else [])]


def check_attention(bench: Bench) -> dict[str, Any]:
    """Ways to compute attention agree."""
    names = attention_names(bench)
    extra: dict[str, Any] = {"bf16": "true"} if "flash_attention_2" in names else {}
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


def check_packs(bench: Bench) -> dict[str, Any]:
    """A step of packs has the loss and the gradient norm of one of padded samples, for each kind of attention."""
    far = {}
    for name in attention_names(bench):
        # Flash attention is for half precision alone.
        precision = {"bf16": "true"} if name == "flash_attention_2" else {"tf32": "false"}
        runs = []
        for output, own in (("padded", {}), ("packed", {"packing": "true", "model_max_length": 250})):
            trainer = bench.run(
                f"{output}-{name}", model_name_or_path=bench.models["llava_llama"], attn_implementation=name,
                max_steps=1, per_device_train_batch_size=15, **precision, **own,
            )  # fmt: skip
            runs.append([trainer.state.log_history[0][number] for number in ("loss", "grad_norm")])
        far[name] = max(abs(a - b) / b for a, b in zip(*runs, strict=True))
    limits = {name: 0.02 if name == "flash_attention_2" else 1e-4 for name in far}
    return {"ok": all(far[name] < limits[name] for name in far), "relative_difference": far}


def check_determinism(bench: Bench) -> dict[str, Any]:
    """The same run twice: bit for bit with ``--full_determinism``, and how far apart without it."""
    found = {}
    for name, own in (("deterministic", {"full_determinism": "true"}), ("default", {})):
        runs = [bench.train(f"{name}-{i}", bf16="true", **own) for i in range(2)]
        found[name] = max(abs(a - b) for a, b in zip(*runs, strict=True))
    return {"ok": found["deterministic"] == 0.0, "furthest_losses": found}


# Figures.


def rates_of(trainer: Any) -> dict[str, float]:
    """What the trainer's log says of throughput: the median of its lines behind the first ones."""
    lines = [entry for entry in trainer.state.log_history if "tokens_per_second" in entry]
    kept = lines[len(lines) // 2 :]
    names = ("samples_per_second", "tokens_per_second", "supervised_tokens_per_second", "padding", "data_wait", "mfu")
    rates = {n: statistics.median(entry[n] for entry in kept) for n in names if all(n in entry for entry in kept)}
    return rates | {"peak_memory_gib": lines[-1]["peak_memory_gib"]}


def measure_text(bench: Bench) -> Iterator[tuple[str, dict[str, float]]]:
    """Captions on 12 x 768: kinds of batches, attention, compiled."""
    width, layers, vocabulary, rows = (64, 1, 300, 1) if bench.device == "cpu" else (768, 12, 30_000, 32)
    model = bench.folder / "speed"
    write_model(model, width, layers, vocabulary, dropout=0.0, context=1024)
    write_captions(model / "captions.jsonl", 1120 if bench.device == "cpu" else 60_000, vocabulary)
    captions = {"per_device_train_batch_size": 32 * rows}
    packs = {"packing": "true", "per_device_train_batch_size": rows}
    kinds: dict[str, dict[str, Any]] = {
        "padded": captions,
        "grouped": {**captions, "train_sampling_strategy": "group_by_length"},
        "packed": packs,
        "packed, compiled": {**packs, "torch_compile": "true"},
    }
    if "flash_attention_2" in attention_names(bench):
        kinds["packed, flash attention"] = {**packs, "attn_implementation": "flash_attention_2"}
    for name, own in kinds.items():
        trainer = bench.run(
            f"speed {name}", model_name_or_path=model, vision_tower=None, mm_resampler_type=None,
            mm_perceiver_latents=None, mm_perceiver_latents_fast=None, mm_resampler_width=None, num_frames=None,
            data_path=model / "captions.jsonl", bf16="true", logging_steps=5,
            max_steps=30 if bench.device == "cpu" else 60,
            dataloader_num_workers=0 if bench.device == "cpu" else 4, learning_rate=1e-4, **own,
        )  # fmt: skip
        yield name, rates_of(trainer)


def measure_recipe(bench: Bench) -> Iterator[tuple[str, dict[str, float]]]:
    """The Italian recipe: the tower live, and its features from a cache."""
    recipe: dict[str, Any] = {}
    if bench.device != "cpu":
        make_tower(bench.folder / "large", side=224, patch=14, width=1024, layers=24)
        write_model(bench.folder / "gpt2", 768, 12, 30_000, dropout=0.1, context=1024)
        recipe = {
            "model_name_or_path": bench.folder / "gpt2", "vision_tower": bench.folder / "large", "num_frames": 4,
            "mm_perceiver_latents": 81, "mm_resampler_width": 1024, "dataloader_num_workers": 8,
        }  # fmt: skip
    videos = [sample for sample in json.loads(bench.data.read_text()) if "video" in sample]
    data = bench.folder / "clips.json"
    data.write_text(json.dumps([{**sample, "id": f"{i}-{sample['id']}"} for i in range(80) for sample in videos]))
    cache = {"feature_cache": bench.folder / "features"}
    kinds: dict[str, dict[str, Any]] = {
        "live": {}, "filling the cache": {**cache, "feature_cache_fill": "true"}, "cached": cache,
    }  # fmt: skip
    for name, own in kinds.items():
        trainer = bench.run(
            f"recipe {name}", data_path=data, bf16="true", per_device_train_batch_size=16, logging_steps=5,
            max_steps=25 if bench.device == "cpu" else 50, learning_rate=1e-4, **recipe, **own,
        )  # fmt: skip
        yield name, rates_of(trainer)


CHECKS: tuple[Callable[[Bench], dict[str, Any]], ...] = (
    check_losses, check_generation, check_resume, check_attention, check_packs, check_determinism, check_lora,
)  # fmt: skip
FIGURES: tuple[Callable[[Bench], Iterator[tuple[str, dict[str, float]]]], ...] = (measure_text, measure_recipe)


class OutOfTimeError(RuntimeError):
    """A section has used up its time."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Within it, ``OutOfTimeError`` is raised after so many seconds."""

    def stop(*_: object) -> None:
        raise OutOfTimeError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_section(section: Callable[[Bench], Any], bench: Bench, limit: float, found: dict[str, Any]) -> Iterator[None]:
    """Run a check or a measurement, whose result grows in ``found``; after each part of it, control comes back."""
    start = time.perf_counter()
    try:
        with within(limit):
            if section in CHECKS:
                found |= section(bench)
            else:
                for name, rates in section(bench):
                    found[name] = rates
                    yield
    except (ValueError, RuntimeError, AssertionError, ImportError, OSError) as error:
        found |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
    found["seconds"] = round(time.perf_counter() - start, 1)
    yield


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file of the result, JSON")
    parser.add_argument("--only", nargs="+", help="sections to run, such as measure_text (default: all)")
    args = parser.parse_args(argv)
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    deadline = time.perf_counter() + TOTAL_LIMIT
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), device)
        for section in (*CHECKS, *FIGURES):
            if args.only and section.__name__ not in args.only:
                continue
            left = min(SECTION_LIMIT, deadline - time.perf_counter())
            found: dict[str, Any] = {}
            if left <= 0:
                found = {"ok": False, "error": "no time was left"}
            result[section.__name__] = found
            for _ in run_section(section, bench, left, found) if left > 0 else ():
                write_result(args.out, result)
            print(section.__name__, json.dumps(found)[:600], flush=True)
            write_result(args.out, result)
    return 0 if all(entry.get("ok", True) for entry in result.values() if isinstance(entry, dict)) else 1


def write_result(path: Path, result: dict[str, Any]) -> None:
    """The result so far, lists of numbers in one line."""
    text = re.sub(r"\[[^][{}]*\]", lambda row: " ".join(row[0].split()), json.dumps(result, indent=1))
    path.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
