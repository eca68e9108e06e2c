"""What the two demos share: flags, timed phases, data written on all cores, a first model, and training."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from llava.command import CommandParser, check_at_least, check_output_folder
from llava.io import write_json

TOWER_FOLDER = Path(__file__).parent / "tower"
"""The frozen vision tower of both demos, which ``llava.demo.pretrain_tower`` has trained."""

QUICK_STEPS = 2
"""Steps of each training of a quick run; otherwise its recipe says how many."""

Item = TypeVar("Item")
Sample = dict[str, object]
"""A line of a data file (docs/data.md)."""

_CHUNK = 64
_VOCABULARY_SIZE = 512
_END_OF_TEXT = "<|endoftext|>"
# GPT-2's 0.02 was made for widths of 768 and more. In so narrow a model attention would start out
# blind to positions, and it would take most of the training to find out that frames have an order,
# which is all there is to a movement.
_MATRIX_RANGE = 0.1


def build_parser(prog: str, description: str, output_dir: str, amounts: Mapping[str, tuple[int, str]]) -> CommandParser:
    """The flags of a demo; ``amounts`` has the default and the meaning of each ``--num_*``."""
    parser = CommandParser(prog=prog, description=description)
    parser.add_argument(
        "--output_dir", type=Path, default=Path(output_dir), metavar="DIR", help=f"default: {output_dir}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order (default 0)")
    for name, (default, what) in amounts.items():
        parser.add_argument(f"--num_{name}", type=int, default=default, metavar="N", help=f"{what} (default {default})")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few seconds on a few samples, to see that everything runs; learns nothing",
    )
    return parser


def check_arguments(args: argparse.Namespace, least: Mapping[str, int]) -> None:
    """A one-line error for a number that is too small or a folder that cannot be written to."""
    check_at_least(args, {**least, "seed": 0})
    check_output_folder(str(args.output_dir), "--output_dir")


@contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a phase, and note how long it took."""
    print(f"\n== {name} ==", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def time_lines(seconds: Mapping[str, float]) -> str:
    """Seconds of all phases together and of each."""
    phases = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    minutes, rest = divmod(round(sum(seconds.values())), 60)
    return f"elapsed: {minutes} min {rest:02d} s ({phases})"


# Data.


def run_on_all_cores(function: Callable[[int], Item], number: int) -> Iterator[Item]:
    """The results of a function of 0, 1, ..., number - 1, in order; it must be one that can be pickled."""
    if number <= _CHUNK:
        yield from map(function, range(number))
        return
    # Spawned, not forked: the parent may run threads.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, range(number), chunksize=_CHUNK)


def turns(question: str, answer: str) -> list[dict[str, str]]:
    """A question and its answer, as a data file has them."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_samples(path: Path, samples: Iterable[Sample]) -> Path:
    """Write a data file."""
    write_json(path, list(samples))
    return path


def choose_examples(cases: Sequence[Item], number: int, topic: Callable[[Item], str]) -> list[Item]:
    """The first case of each topic, then the second of each, and so on; what a model said plays no part."""
    seen = Counter[str]()
    ranks = []
    for case in cases:
        ranks.append(seen[topic(case)])
        seen[topic(case)] += 1
    return [cases[index] for index in sorted(range(len(cases)), key=ranks.__getitem__)[:number]]


# Model and training.


def write_base_model(
    folder: Path,
    sentences: Iterable[str],
    *,
    seed: int,
    context_length: int = 128,
    num_layers: int = 2,
    dropout: float = 0.2,
    position_range: float = 0.5,
    range_of_new: float = 0.02,
    chat_template: str | None = None,
) -> None:
    """Write a GPT-2 checkpoint with random weights, and a tokenizer trained on ``sentences``.

    The defaults are those of the first demo: deeper models, and models without dropout, learn by heart which shape
    comes in which colour, and deny pairs that they have not seen.

    Args:
        folder: where to write.
        sentences: to train the tokenizer on.
        seed: of the weights.
        context_length: most positions of a sample.
        num_layers: blocks of width 128, with 4 heads.
        dropout: of the residual stream and of the embeddings.
        position_range: standard deviation of the position embeddings.
        range_of_new: standard deviation of what is added later: projector, resampler, tables of coordinates.
        chat_template: of the tokenizer.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    vocabulary_size = write_tokenizer(folder, sentences, chat_template)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary_size,
        n_positions=context_length,
        n_embd=128,
        n_layer=num_layers,
        n_head=4,
        initializer_range=_MATRIX_RANGE,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    torch.nn.init.normal_(model.transformer.wpe.weight, std=position_range)
    # Features of a projector as wide as the matrices would drown the positions again.
    model.config.initializer_range = range_of_new
    model.save_pretrained(folder)


def write_tokenizer(folder: Path, sentences: Iterable[str], chat_template: str | None = None) -> int:
    """Train a byte-level BPE tokenizer; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # With a space before the first word it is the same token here and behind a video.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_SIZE,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END_OF_TEXT, eos_token=_END_OF_TEXT)
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return len(fast)


def train(recipe: str, *, seed: int, max_steps: int | None, **flags: str | Path | Sequence[Path]) -> None:
    """Train as ``python -m llava.train.train`` does.

    Args:
        recipe: one of the library's, by the name of its file.
        seed: of new weights and of the order of the samples.
        max_steps: fewer steps than the recipe has, for a quick run.
        **flags: those that the recipe leaves open, by name.
    """
    from llava.train.train import main

    words = ["--config", recipe, "--seed", str(seed)]
    words += ["--overwrite_output_dir", "true"]  # A second demonstration takes the first one's place.
    words += [] if max_steps is None else ["--max_steps", str(max_steps)]
    for name, value in flags.items():
        words += [f"--{name}", *([str(value)] if isinstance(value, str | Path) else map(str, value))]
    main(words)
