"""The tokenizer and the untrained language model that the demo starts from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"

_VOCABULARY_SIZE = 512
_CONTEXT_LENGTH = 128
# Deeper ones learn by heart which shape comes in which colour.
_NUM_LAYERS = 2
# GPT-2's 0.02 was made for widths of 768 and more. In so narrow a model attention would start out
# blind to positions, and it would take most of the training to find out that frames have an order,
# which is all there is to a movement. Projector and resampler keep 0.02: larger features would drown
# the positions again.
_MATRIX_RANGE, _POSITION_RANGE = 0.1, 0.5
# Without it the model learns by heart which pairs of shape and colour never occur, and denies them.
_DROPOUT = 0.2


def write_base_model(folder: Path, sentences: Iterable[str], *, seed: int) -> None:
    """Write a plain GPT-2 checkpoint with random weights, and a tokenizer trained on `sentences`."""
    vocabulary_size = write_tokenizer(folder, sentences)
    write_random_gpt2(
        folder,
        seed=seed,
        vocabulary_size=vocabulary_size,
        context_length=_CONTEXT_LENGTH,
        num_layers=_NUM_LAYERS,
        dropout=_DROPOUT,
        position_range=_POSITION_RANGE,
    )


def write_random_gpt2(
    folder: Path,
    *,
    seed: int,
    vocabulary_size: int,
    context_length: int,
    num_layers: int,
    dropout: float,
    position_range: float,
    range_of_new: float = 0.02,
) -> None:
    """Write a GPT-2 with random weights.

    Args:
        folder: where to write.
        seed: of the weights.
        vocabulary_size: rows of the embeddings.
        context_length: most positions of a sample.
        num_layers: blocks of width 128, with 4 heads.
        dropout: share of the residual stream and of the embeddings that drops out.
        position_range: standard deviation of the position embeddings.
        range_of_new: standard deviation of what is added later: projector, resampler, tables of coordinates.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

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
    model.config.initializer_range = range_of_new
    model.save_pretrained(folder)


def write_tokenizer(folder: Path, sentences: Iterable[str]) -> int:
    """Train a byte-level BPE tokenizer; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # With a space before the first word it is the same token here and behind a video.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    fast.save_pretrained(folder)
    return len(fast)
