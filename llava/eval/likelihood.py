"""Likelihood scores: how probable a causal language model finds texts, alone or with images and clips.

A ``Choice`` holds several candidates, of which the most probable is the model's answer; a ``Scorer`` gives each
candidate the sum of the log-probabilities of its completion's tokens, in float32 and at temperature 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava.eval.choices import Candidate, Choice, Scorer
from llava.eval.logprobs import ModelRunner, build_padded, group_by_length
from llava.eval.token_rows import TextEncoder, find_context, name_choice
from llava.model.backbones import AVAILABLE_MODELS
from llava.model.loading import choose_device, load_model
from llava.model.pretrained import locate_model, quiet_transformers, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["Candidate", "Choice", "LikelihoodScorer", "Scorer", "load_any_model"]


class LikelihoodScorer:
    """Scores choices with a causal language model.

    Args:
        model: with head, of this library or any other of transformers.
        tokenizer: its own, a fast one.
        dtype: that its weights are converted to while it scores; None runs it in its own. Log-softmax is in
            float32 in any case.
        batch_tokens: about how many tokens are read together; by default what suits the device.
        name: what errors call the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype | None = torch.float32,
        batch_tokens: int | None = None,
        name: str = "the model",
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self._runner = ModelRunner(model, dtype)
        self._batch_tokens = batch_tokens or (1024 if model.device.type == "cpu" else 16384)
        self._encoder = TextEncoder(tokenizer, find_context(model.config), name)

    @classmethod
    def from_folder(
        cls,
        path: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = torch.float32,
        batch_tokens: int | None = None,
        vision_tower: str | None = None,
        flag: str = "--model_path",
    ) -> LikelihoodScorer:
        """Load a checkpoint of this library, or any causal language model that transformers knows.

        Args:
            path: folder or hub name.
            revision: of a model on the hub, or a folder of this name within the folder (``chck_10M``).
            device: where to run; by default a GPU if there is one.
            dtype: of the weights; None takes them as they are stored.
            batch_tokens: as for the class.
            vision_tower: where the checkpoint's tower lies, if it has moved.
            flag: what an error calls the path.

        Raises:
            ValueError: there is no such model, or it cannot be scored with.
        """
        where = choose_device(device)  # Before a model is read.
        model, tokenizer = load_any_model(path, revision, dtype, vision_tower, flag)
        model.to(device=where)  # type: ignore[call-arg]
        return cls(model, tokenizer, dtype=dtype, batch_tokens=batch_tokens, name=f"{flag} {path}")

    def score(
        self, choices: Sequence[Choice], on_scored: Callable[[int], None] | None = None
    ) -> list[tuple[float, ...]]:
        """The score of each candidate; see ``Scorer``."""
        for choice in choices:
            if choice.media:
                raise ValueError(f"{name_choice(choice)}: it has media, which are not scored yet")
        encoded = self._encoder.encode(choices)
        # Sequences that stand in several places are scored once, and so have one score, to the last bit.
        unique = {row: number for number, row in enumerate(dict.fromkeys(row for rows in encoded for row in rows))}
        rows = list(unique)
        users: list[list[int]] = [[] for _ in rows]
        for index, of_choice in enumerate(encoded):
            for row in set(of_choice):
                users[unique[row]].append(index)
        waiting = [len(set(of_choice)) for of_choice in encoded]
        scores = [math.nan] * len(rows)
        with self._runner.running():
            for group in group_by_length(rows, self._batch_tokens):
                done = 0
                sums = self._runner.sums(build_padded([rows[number] for number in group]))
                for number, score in zip(group, sums, strict=True):
                    scores[number] = score
                    for index in users[number]:
                        waiting[index] -= 1
                        done += waiting[index] == 0
                if on_scored is not None and done:
                    on_scored(done)
        found = [tuple(scores[unique[row]] for row in of_choice) for of_choice in encoded]
        for choice, own in zip(choices, found, strict=True):
            if not all(map(math.isfinite, own)):
                raise ValueError(
                    f"{name_choice(choice)}: {self.name} gives the scores {own}, which are no finite numbers; "
                    "its weights are damaged, or its dtype is too small for them"
                )
        return found


def load_any_model(
    path: str, revision: str | None, dtype: torch.dtype | None, vision_tower: str | None, flag: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint of this library or of another, and its tokenizer; a ValueError, beginning with ``flag``, if not."""
    if revision not in (None, "main") and os.path.isdir(os.path.join(path, str(revision))):
        path, revision = os.path.join(path, str(revision)), None
    path = locate_model(path, flag)
    if os.path.isdir(path) and revision not in (None, "main"):
        raise ValueError(f"{flag} {path}: has no folder {revision!r} within it, the revision that was asked for")
    if os.path.isdir(path) and read_config(path, flag).get("model_type") in AVAILABLE_MODELS:
        loaded = load_model(path, dtype=dtype or torch.float32, vision_tower=vision_tower, flag=flag)
        return loaded.model, loaded.tokenizer
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                path, revision=revision or "main", dtype=dtype or "auto", trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{flag} {path}: it cannot be loaded as a causal language model: {error}") from error
    return model, tokenizer
