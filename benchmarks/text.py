"""What batches of captions cost: padded, grouped by length, by tokens and packed, beside transformers' own trainer.

    python benchmarks/text.py --output benchmarks/text.json

Captions of 5 to 60 tokens, as many of each, and a GPT-2 of random weights. Each kind is a real run of the trainer,
from data file to optimizer's step; they alternate in one process, round after round, and what counts is supervised
tokens (those that are predicted) in a CPU second of one thread:

- ``padded``       batches of 16 random captions
- ``grouped``      the same, ``--train_sampling_strategy group_by_length``
- ``tokens``       ``--max_tokens_per_batch``, of as many positions as 16 captions have tokens
- ``packed``       ``--packing``, one row of as many tokens
- ``transformers`` transformers' ``Trainer`` and ``GPT2LMHeadModel`` on the batches of ``padded``
- ``full``         ``GPT2LMHeadModel`` without a trainer on rows of the same length, all tokens of one text: the floor

The steps of ``padded`` and ``transformers`` do the same, so their ratio is what this library's trainer costs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)

from llava.data.collator import SupervisedCollator, model_inputs
from llava.train.train import build_trainer

KINDS = ("padded", "grouped", "tokens", "packed", "transformers", "full")
SHORTEST, LONGEST, BATCH = 5, 60, 16
ROW = 512
"""Positions of a pack: those of some 16 captions."""
WARM_UP = 2


def write_model(folder: Path, width: int, layers: int, vocabulary: int, dropout: float, context: int = ROW) -> None:
    """A GPT-2 of random weights, with a tokenizer to which each word is one token."""
    words = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, vocabulary)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=width // 64, n_positions=context, **rates
    )
    set_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)


def write_captions(path: Path, number: int, vocabulary: int) -> None:
    """Captions of all lengths, each with its end of text."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for i in range(number):
            length = SHORTEST + i % (LONGEST - SHORTEST + 1) - 1
            text = " ".join(f"w{word}" for word in rng.integers(1, vocabulary, length))
            file.write(json.dumps({"id": str(i), "conversations": [{"from": "gpt", "value": text}]}) + "\n")


class Clock(TrainerCallback):
    """CPU seconds and supervised tokens of the steps behind the first ones."""

    def __init__(self, steps: int) -> None:
        self.last = WARM_UP + steps
        self.begun = self.seconds = 0.0
        self.tokens: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.begun = time.process_time()
        elif state.global_step == self.last:
            self.seconds = time.process_time() - self.begun

    def rate(self) -> float:
        return sum(self.tokens[WARM_UP : self.last]) / self.seconds


def count_tokens(collate: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
    """A collator that tells the clock how many tokens a batch predicts."""

    def counting(samples: Sequence[Any]) -> Any:
        batch = collate(samples)
        clock.tokens.append(int((batch["labels"][:, 1:] != -100).sum()))
        return batch

    return counting


class Kinds:
    """One trainer for each kind of batches, all of them over the same captions and from the same weights."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps

    def flags(self, kind: str) -> list[str]:
        own = {
            "padded": {},
            "grouped": {"train_sampling_strategy": "group_by_length"},
            "tokens": {"max_tokens_per_batch": ROW},
            "packed": {"packing": "true", "per_device_train_batch_size": 1},
        }[kind]
        values = {
            "model_name_or_path": self.folder, "data_path": self.folder / "captions.jsonl",
            "max_steps": WARM_UP + self.steps,
            "output_dir": tempfile.mkdtemp(dir=self.folder), "per_device_train_batch_size": BATCH, "report_to": "none",
            "save_strategy": "no", "logging_steps": 1000, "use_cpu": "true", "disable_tqdm": "true", "seed": 1, **own,
        }  # fmt: skip
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    def run(self, kind: str) -> float:
        """Supervised tokens a CPU second of some steps."""
        if kind == "full":
            return self.run_bare()
        clock = Clock(self.steps)
        trainer = build_trainer(self.flags("padded" if kind == "transformers" else kind), callbacks=[clock])
        if kind == "transformers":
            trainer = self.replace_trainer(trainer, clock)
        elif kind == "packed":
            # The collator is made anew, with the length of a pack, when the loader is.
            load = trainer.data.build_loader
            trainer.data.build_loader = lambda collate: load(count_tokens(collate, clock))  # type: ignore[method-assign]
        else:
            trainer.data_collator = count_tokens(trainer.data_collator, clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return clock.rate()

    def replace_trainer(self, ours: Any, clock: Clock) -> Trainer:
        """transformers' own, with plain GPT-2 and the same arguments, data and order."""
        plain = transformers.TrainingArguments(
            output_dir=ours.args.output_dir, max_steps=ours.args.max_steps, per_device_train_batch_size=BATCH, seed=1,
            report_to="none", save_strategy="no", logging_steps=1000, use_cpu=True, disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip
        collate = SupervisedCollator(0)
        return Trainer(
            model=GPT2LMHeadModel.from_pretrained(self.folder), args=plain, train_dataset=ours.train_dataset,
            data_collator=count_tokens(lambda samples: model_inputs(collate(samples)), clock), callbacks=[clock],
        )  # fmt: skip

    def run_bare(self) -> float:
        """Rows without padding, each one text of the length of a pack."""
        model = GPT2LMHeadModel.from_pretrained(self.folder).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
        seconds = 0.0
        for step in range(WARM_UP + self.steps):
            ids = torch.randint(1, model.config.vocab_size, (1, ROW))
            begun = time.process_time()
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step >= WARM_UP:
                seconds += time.process_time() - begun
        return self.steps * (ROW - 1) / seconds


def alternate(kinds: Kinds, rounds: int) -> Iterator[dict[str, float]]:
    """The rates of all kinds, one round after the other."""
    while True:
        yield {kind: kinds.run(kind) for kind in KINDS}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=6, help="that are measured of each kind in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.width, args.layers, args.vocabulary, args.dropout)
        write_captions(Path(folder, "captions.jsonl"), 1120, args.vocabulary)
        rounds = list(islice(alternate(Kinds(Path(folder), args.steps), args.rounds), args.rounds))
    rates = {kind: statistics.median(found[kind] for found in rounds) for kind in KINDS}

    def ratio(one: str, other: str) -> float:
        return round(statistics.median(found[one] / found[other] for found in rounds), 3)

    result = {
        "model": f"GPT-2 {args.layers} x {args.width}, {args.vocabulary} tokens, dropout {args.dropout}",
        "supervised_tokens_per_cpu_second": {kind: round(rate, 1) for kind, rate in rates.items()},
        "packed_over_padded": ratio("packed", "padded"),
        "packed_over_grouped": ratio("packed", "grouped"),
        "packed_over_full": ratio("packed", "full"),
        "tokens_over_padded": ratio("tokens", "padded"),
        "step_of_this_library_over_transformers": ratio("transformers", "padded"),
        "rounds": args.rounds, "steps": args.steps,
        "machine": f"{platform.processor() or platform.machine()}, one thread",
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
