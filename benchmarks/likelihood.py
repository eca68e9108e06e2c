"""How fast BLiMP is scored, and whether the winners are those of one sentence at a time in float64.

    python benchmarks/likelihood.py --tokenizer DIR --speed --uids 7 --pairs 120
    python benchmarks/likelihood.py --tokenizer DIR --parity MODEL_FOLDER

Each adds its figures to the file beside this one. BLiMP is read from ``LLAVA_SHARED_DATA``, tokenised with the
tokenizer of ``--tokenizer``. Times are those of the processor that this process used, not of the clock, as other
programs may run beside it; the ways that are compared take turns on parts of the same sample.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from llava.eval.likelihood import Candidate, Choice, LikelihoodScorer
from llava.eval.token_batches import count_positions
from llava.eval.token_rows import TextEncoder
from llava.io import write_json

RESULT = Path(__file__).with_suffix(".json")
BATCH = 64
TURNS = 4


def read_blimp(uids: int, pairs: int) -> list[Choice]:
    """The first pairs of some paradigms, these drawn with a fixed seed."""
    archive = Path(os.environ.get("LLAVA_SHARED_DATA", "../shared/data")) / "blimp" / "blimp_en.zip"
    choices = []
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".jsonl"))
        for name in sorted(random.Random(0).sample(names, min(uids, len(names)))):
            for line in file.read(name).decode().splitlines()[:pairs]:
                row = json.loads(line)
                sentences = (Candidate(row["sentence_good"]), Candidate(row["sentence_bad"]))
                choices.append(Choice(f"{row['UID']}_{row['pairID']}", sentences))
    return choices


def score_in_file_order(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, choices: Sequence[Choice]
) -> list[float]:
    """Batches of 64 sentences as they come, padded, with full logits."""
    texts = [candidate.text for choice in choices for candidate in choice.candidates]
    scores: list[float] = []
    with torch.no_grad():
        for start in range(0, len(texts), BATCH):
            rows = tokenizer(texts[start : start + BATCH]).input_ids
            length = max(map(len, rows))
            ids, mask = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(2))
            for number, row in enumerate(rows):
                ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
            log_probs = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
            of_tokens = log_probs.gather(2, ids[:, 1:, None])[..., 0]
            scores += (of_tokens * mask[:, 1:]).sum(1).tolist()
    return scores


def measure(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure_speed(tokenizer: PreTrainedTokenizerBase, uids: int, pairs: int) -> dict[str, object]:
    """A random GPT-2 of 12 x 768 with 50,257 tokens, in float32."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).eval()
    scorer = LikelihoodScorer(model, tokenizer)
    choices = read_blimp(uids, pairs)
    scorer.score(choices[:20])
    seconds = {"file_order": 0.0, "ours": 0.0}
    step = math.ceil(len(choices) / TURNS)
    largest = 0.0
    for start in range(0, len(choices), step):
        part = choices[start : start + step]
        found: dict[str, list[float]] = {}

        def file_order(part: Sequence[Choice] = part, found: dict[str, list[float]] = found) -> None:
            found["file_order"] = score_in_file_order(model, tokenizer, part)

        def ours(part: Sequence[Choice] = part, found: dict[str, list[float]] = found) -> None:
            found["ours"] = [score for scores in scorer.score(part) for score in scores]

        for name, work in (("file_order", file_order), ("ours", ours)):
            seconds[name] += measure(work)
        pairs_of_scores = zip(found["file_order"], found["ours"], strict=True)
        largest = max(largest, *(abs(one - other) for one, other in pairs_of_scores))
    return {
        "sample": f"the first {pairs} pairs of {uids} paradigms of BLiMP, in {TURNS} parts",
        "sentences_a_second": {name: round(2 * len(choices) / value, 2) for name, value in seconds.items()},
        "times_as_fast": round(seconds["file_order"] / seconds["ours"], 2),
        "largest_difference_of_scores": largest,
    }


def count_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """What limits the gain on all of BLiMP: tokens that file order reads for each that has to be read."""
    rows = [row for of_one in TextEncoder(tokenizer, None, "").encode(read_blimp(67, 1000)) for row in of_one]
    lengths = [len(row.keys) for row in rows]
    padded = sum(max(lengths[i : i + BATCH]) * len(lengths[i : i + BATCH]) for i in range(0, len(lengths), BATCH))
    _, distinct = count_positions(list(dict.fromkeys(rows)))
    return {
        "sentences": len(rows),
        "tokens": sum(lengths),
        "tokens_with_padding_in_file_order": padded,
        "distinct_beginnings": distinct,
        "share_of_distinct_beginnings": round(distinct / sum(lengths), 4),
        "limit_of_the_gain_at_equal_cost_of_a_token": round(padded / distinct, 2),
    }


def check_parity(folder: str, uids: int, pairs: int) -> dict[str, object]:
    """Winners of pairs, against float64 and one sentence at a time."""
    choices = read_blimp(uids, pairs)
    scorer = LikelihoodScorer.from_folder(folder, device="cpu")
    found = scorer.score(choices)
    del scorer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def score(text: str) -> float:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        return log_probs.gather(1, ids[0, 1:, None]).sum().item()

    expected = [tuple(score(candidate.text) for candidate in choice.candidates) for choice in choices]
    errors = [abs(a - b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True)]
    together = list(zip(found, expected, strict=True))
    return {
        "model": Path(folder).name,
        "pairs": len(choices),
        "same_winner": sum((a > b) == (c > d) and (a < b) == (c < d) for (a, b), (c, d) in together),
        "share_of_pairs_won_by_the_right_sentence": round(sum(a > b for a, b in found) / len(found), 4),
        "smallest_difference_of_a_pair_in_float64": min(abs(a - b) for a, b in expected),
        "largest_difference_of_scores": max(errors),
    }


def save_random_model(folder: str, tokenizer: PreTrainedTokenizerBase) -> str:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="a folder with a fast tokenizer of 30k to 50k"
    )
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--parity", nargs="*", metavar="DIR", help="models beside a random one of 4 x 256")
    parser.add_argument("--uids", type=int, default=67)
    parser.add_argument("--pairs", type=int, default=20)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result["versions"] = {
        "torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    if args.speed:
        result["speed"] = measure_speed(tokenizer, args.uids, args.pairs)
        result["blimp"] = count_tokens(tokenizer)
    if args.parity is not None:
        with tempfile.TemporaryDirectory() as folder:
            folders = [save_random_model(str(Path(folder, "random_4x256")), tokenizer), *args.parity]
            result["parity"] = [check_parity(folder, args.uids, args.pairs) for folder in folders]
    write_json(RESULT, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
