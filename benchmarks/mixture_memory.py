"""What a mixture of a million samples costs: seconds to the first batch, and memory for each worker.

    python benchmarks/mixture_memory.py --output benchmarks/mixture_memory.json

A mixture of text samples in four files is generated, and read in processes that are started anew for each
line of the table: cold, which parses and indexes it, then warm with 0, 2 and 8 workers. "first batch" counts
from the start of the process, "import" being the part of it that loads the libraries, "data" what reads
and checks the records. Lengths, which only grouping by length asks for, are measured beside them. Seconds are
those of the clock: the committed ones come from two busy cores, on which other work came first (nice).

Memory is read from the kernel after every worker has given as many batches of random samples as ``--batches``
says. PSS counts a page that several processes share in parts, USS not at all. A worker's cost is what the PSS
of all processes together grows by for each worker, over the run without workers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ALLOWED_MB = 60
WORKERS = (0, 2, 8)
BATCH = 8
WORDS = ["il", "la", "un", "una", "gatto", "cane", "stella", "bambina", "strada", "mare", "sole", "verde", "rosso",
         "grande", "piccolo", "corre", "dorme", "guarda", "mangia", "gioca", "salta", "apre", "verso", "sopra",
         "sotto", "dentro", "davanti", "dietro", "con", "per"]  # fmt: skip


def write_mixture(folder: Path, num_samples: int) -> None:
    """A YAML mixture of two ``.json`` and two ``.jsonl`` files that have the samples between them."""
    rng = random.Random(0)
    for number in range(4):
        lines = (_sample(i, rng) for i in range(number, num_samples, 4))
        path = folder / (f"part{number}.json" + "l" * (number % 2))
        with path.open("w", encoding="utf-8") as file:
            if number % 2:
                file.writelines(line + "\n" for line in lines)
            else:
                file.write("[" + next(lines))
                file.writelines(",\n" + line for line in lines)
                file.write("]")
    (folder / "mixture.yaml").write_text(
        "datasets:\n"
        "  - {json_path: 'part{0,2}.json'}\n"
        "  - {json_path: part1.jsonl}\n"
        "  - {json_path: part3.jsonl, sampling_strategy: 'random:100%'}\n"
    )


def _sample(number: int, rng: random.Random) -> str:
    text = " ".join(rng.choices(WORDS, k=rng.randint(8, 40)))
    return json.dumps(
        {"id": f"s{number}", "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": text}]}
    )


def write_tokenizer(folder: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([" ".join(WORDS)] * 4, 500, special_tokens=["<|endoftext|>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def measure(folder: Path, num_workers: int, num_batches: int, lengths: bool) -> dict[str, Any]:
    """One line of the table, in this process and its workers."""
    from llava.data.module import make_supervised_data_module
    from llava.model.vocabulary import load_tokenizer
    from llava.train.arguments import DataArguments

    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    arguments = DataArguments(data_path=[str(folder / "mixture.yaml")], data_cache_dir=str(folder / "cache"))
    imported = time.time()
    module = make_supervised_data_module(tokenizer, arguments, None, 512)
    read = time.time()
    result = {"workers": num_workers, "samples": len(module["train_dataset"])}
    if lengths:
        _ = module["train_dataset"].lengths
        return result | {"lengths_s": time.time() - read}
    first, memory = go_through(module, num_workers, num_batches)
    start = float(os.environ["BENCHMARK_START"])
    result |= {"import_s": imported - start, "data_s": read - imported, "first_batch_s": first - start}
    return result | memory


def go_through(module: dict[str, Any], num_workers: int, num_batches: int) -> tuple[float, dict[str, Any]]:
    """When the first batch was there, and the memory behind the last."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    dataset = module["train_dataset"]
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(1))
    batches = order[: BATCH * num_batches * max(num_workers, 1)].view(-1, BATCH)
    loader: Any = DataLoader(
        dataset, batch_sampler=map(torch.Tensor.tolist, batches), collate_fn=module["data_collator"],
        num_workers=num_workers,
    )  # fmt: skip
    iterator = iter(loader)
    next(iterator)
    first = time.time()
    for _ in range(len(batches) - 2):
        next(iterator)
    # The last batch is still to come, so the workers are still there.
    workers = [process.pid for process in getattr(iterator, "_workers", [])]
    memory = {pid: read_memory(pid) for pid in (os.getpid(), *workers)}
    return first, {
        "pss_total_mb": sum(of_one["Pss"] for of_one in memory.values()),
        "uss_main_mb": memory[os.getpid()]["Uss"],
        "uss_worker_mb": max((memory[pid]["Uss"] for pid in workers), default=None),
        "pss_worker_mb": max((memory[pid]["Pss"] for pid in workers), default=None),
    }


def read_memory(pid: int) -> dict[str, float]:
    """Megabytes of a process: PSS, and USS, which is what goes when it ends."""
    rows = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]]
    kilobytes = {row[0].rstrip(":"): int(row[1]) for row in rows}
    uss = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    return {"Pss": kilobytes["Pss"] / 1e3, "Uss": uss / 1e3}


def run_alone(folder: Path, num_workers: int, num_batches: int, *flags: str) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    words = [__file__, "--folder", folder, "--workers", num_workers, "--batches", num_batches, *flags]
    environment = os.environ | {
        "BENCHMARK_START": str(time.time()),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, *map(str, words)], env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, num_samples: int, num_batches: int) -> dict[str, Any]:
    """Every line of the table."""
    start = time.time()
    write_mixture(folder, num_samples)
    write_tokenizer(folder / "tokenizer")
    print(f"{num_samples} samples written in {time.time() - start:.0f} s", file=sys.stderr)
    table = [{"index": "cold", **run_alone(folder, 0, num_batches)}]
    table += [{"index": "warm", **run_alone(folder, workers, num_batches)} for workers in WORKERS]
    lengths = [run_alone(folder, 0, 0, "--lengths")["lengths_s"] for _ in range(2)]
    base = table[1]["pss_total_mb"]
    added = {str(row["workers"]): (row["pss_total_mb"] - base) / row["workers"] for row in table[2:]}
    return {
        "samples": num_samples,
        "data_mb": sum(path.stat().st_size for path in folder.glob("part*")) / 1e6,
        "index_mb": sum(path.stat().st_size for path in (folder / "cache").glob("*.arrow")) / 1e6,
        "table": table,
        "lengths_cold_s": lengths[0],
        "lengths_warm_s": lengths[1],
        "mb_for_each_added_worker": added,
        "allowed_mb": ALLOWED_MB,
        "holds": max(added.values()) < ALLOWED_MB,
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
    }


def show(result: dict[str, Any]) -> str:
    columns = (
        "index",
        "workers",
        "import_s",
        "data_s",
        "first_batch_s",
        "pss_total_mb",
        "uss_main_mb",
        "uss_worker_mb",
    )
    rows = [columns, *([row[column] for column in columns] for row in result["table"])]
    lines = ["  ".join(f"{c:>13.1f}" if isinstance(c, float) else f"{c or '-'!s:>13}" for c in row) for row in rows]
    added = ", ".join(f"{mb:.1f} MB with {n}" for n, mb in result["mb_for_each_added_worker"].items())
    lines.append(f"each added worker: {added} (allowed: {ALLOWED_MB})")
    lines.append(f"lengths: {result['lengths_cold_s']:.1f} s the first time, {result['lengths_warm_s']:.2f} s again")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=500, help="batches of each worker before memory is read")
    parser.add_argument("--output", type=Path, help="file for the result, as JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--lengths", action="store_true", help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.folder:
        print(json.dumps(measure(own.folder, own.workers, own.batches, own.lengths)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), own.samples, own.batches)
    print(show(result))
    if own.output:
        own.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
