"""Likelihood scores: how probable a causal language model finds texts, alone or with images and clips.

A ``Choice`` holds several candidates, of which the most probable is the model's answer; a ``Scorer`` gives each
candidate the sum of the log-probabilities of its completion's tokens, in float32 and at temperature 1.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava.eval.choices import Candidate, Choice, Scorer
from llava.eval.logprobs import PLAIN, ModelRunner
from llava.eval.near_ties import NearTies
from llava.eval.token_batches import Sizes, pad_rows, read_alone, share_beginnings
from llava.eval.token_rows import TextEncoder, TokenRow, find_context, name_choice
from llava.eval.visual_rows import Features, VisualEncoder, takes_modalities
from llava.model.backbones import AVAILABLE_MODELS
from llava.model.loading import choose_device, load_model
from llava.model.pretrained import find_layout, locate_model, quiet_transformers, read_config
from llava.types import Media

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["Candidate", "Choice", "LikelihoodScorer", "Scorer", "load_any_model"]


_BATCH_CPU, _BATCH_GPU = 512, 16384
"""Tokens that are read together."""

_TREE_CPU, _TREE_GPU = 128, 512
"""Positions of a tree; on a GPU attention is the smaller part of the time, and longer sequences the faster ones."""

_WIDTH = 768
"""Of a model whose configuration does not say it."""

_FULL_LOGITS = 2**28
"""The most logits of a batch of a model whose head cannot be run on its own: 1 GB in float32."""

_MEDIA_TOGETHER = 16
"""Images and videos that go through the tower together."""


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
        on_cpu = model.device.type == "cpu"
        text_config = model.config.get_text_config()
        self._sizes = Sizes(
            batch_tokens or (_BATCH_CPU if on_cpu else _BATCH_GPU),
            _TREE_CPU if on_cpu else _TREE_GPU,
            getattr(text_config, "hidden_size", _WIDTH),
        )
        vision = getattr(model, "vision", None)
        visual_ids = vision.token_ids.values() if vision is not None else ()
        self._text = TextEncoder(tokenizer, find_context(model.config), name, list(visual_ids))
        self._visual: VisualEncoder | None = None
        self._near_ties = NearTies()

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

    def check(self, choices: Sequence[Choice]) -> None:
        """Read texts without running the model: a ValueError for one that cannot be scored, or media without vision.

        Texts behind media are not looked at: how long they become, only decoding tells.
        """
        self._text.encode([choice for choice in choices if not choice.media])
        if any(choice.media for choice in choices):
            self._visual = self._visual or VisualEncoder(self.model, self._text)

    def score(
        self, choices: Sequence[Choice], on_scored: Callable[[int], None] | None = None
    ) -> list[tuple[float, ...]]:
        """The score of each candidate; see ``Scorer``.

        Weights, mode, configuration and random states of the model stay as they are, bit for bit.
        """
        if empty := next((choice for choice in choices if not choice.candidates), None):
            raise ValueError(f"{name_choice(empty)}: it has no candidates")
        scores: dict[int, tuple[float, ...]] = {}
        with self._runner.running():
            for group in _group_by_media(choices):
                found = self._score_group([choices[index] for index in group], on_scored or (lambda _: None))
                # By number: groups come in another order than the choices.
                scores |= zip(group, found, strict=True)
        return [scores[index] for index in range(len(choices))]

    def _score_group(self, choices: Sequence[Choice], on_scored: Callable[[int], None]) -> list[tuple[float, ...]]:
        """The scores of choices that have all media or all none."""
        call = self._runner.call
        features: Features = {}
        if choices[0].media:
            self._visual = self._visual or VisualEncoder(self.model, self._text)
            rows, features = self._visual.read(choices, call)
        else:
            rows = self._text.encode(choices)
        progress = _Progress(rows, on_scored)
        # Sequences that stand in several places are scored once, and so have one score, to the last bit.
        unique = list(dict.fromkeys(row for of_choice in rows for row in of_choice))
        scores = dict(zip(unique, self._score_rows(unique, features, progress.add), strict=True))
        self._check_finite(choices, rows, scores)

        def score_again(near: Sequence[TokenRow], alone: bool) -> list[float]:
            again = self._visual.read_features(choices, call) if self._visual and choices[0].media else {}
            if alone:
                return [self._runner.score(read_alone(row), again, PLAIN)[0] for row in near]
            return self._score_rows(near, again)

        self._near_ties.settle(rows, scores, self._runner.in_double, score_again)
        progress.finish()
        return [tuple(scores[row] for row in of_choice) for of_choice in rows]

    def _score_rows(
        self, rows: Sequence[TokenRow], features: Features, on_done: Callable[[TokenRow], None] = lambda row: None
    ) -> list[float]:
        """The scores of different rows, read together as is fastest."""
        ways = self._runner.find_ways()
        sizes = replace(self._sizes, window=ways.longest)
        if not ways.head:
            # These models give logits at all positions, of which the batch is then kept small.
            most = max(_FULL_LOGITS // self.model.config.get_text_config().vocab_size, 1)
            sizes = replace(sizes, batch_tokens=min(sizes.batch_tokens, most))
        # Alternating attention tells text and images apart by their places in a sequence.
        trees = ways.trees and not (features and takes_modalities(self.model))
        in_tree = [n for n, row in enumerate(rows) if trees and len(row.inputs) <= (ways.longest or len(row.inputs))]
        apart = sorted(set(range(len(rows))) - set(in_tree))
        scores = [math.nan] * len(rows)
        for numbers, batches in (
            (in_tree, share_beginnings([rows[n] for n in in_tree], sizes)),
            (apart, pad_rows([rows[n] for n in apart], sizes.batch_tokens)),
        ):
            for members, batch in batches:
                of_batch = self._runner.score(batch, features, ways)
                for member, score in zip(members, of_batch, strict=True):
                    scores[numbers[member]] = score
                    on_done(rows[numbers[member]])
        return scores

    def _check_finite(
        self, choices: Sequence[Choice], rows: Sequence[Sequence[TokenRow]], scores: Mapping[TokenRow, float]
    ) -> None:
        for choice, of_choice in zip(choices, rows, strict=True):
            own = [scores[row] for row in of_choice]
            # Compared with nan nothing is larger, and the first candidate would win in silence.
            if not all(map(math.isfinite, own)):
                raise ValueError(
                    f"{name_choice(choice)}: {self.name} gives the scores {own}, which are no finite numbers; its "
                    "weights are damaged, or its dtype is too small for them"
                )


class _Progress:
    """Tells how many choices are done, while their rows come in another order.

    Args:
        rows: of each choice.
        on_scored: is called with the number of choices that were done since its last call, a few times a second.
    """

    def __init__(self, rows: Sequence[Sequence[TokenRow]], on_scored: Callable[[int], None]) -> None:
        self._waiting = [len(set(of_choice)) for of_choice in rows]
        self._users: dict[TokenRow, list[int]] = {}
        for index, of_choice in enumerate(rows):
            for row in set(of_choice):
                self._users.setdefault(row, []).append(index)
        self._on_scored, self._untold, self._told_at = on_scored, 0, time.monotonic()

    def add(self, row: TokenRow) -> None:
        for index in self._users[row]:
            self._waiting[index] -= 1
            self._untold += self._waiting[index] == 0
        if time.monotonic() - self._told_at > 0.2:
            self.finish()

    def finish(self) -> None:
        if self._untold:
            self._on_scored(self._untold)
        self._untold, self._told_at = 0, time.monotonic()


def _group_by_media(choices: Sequence[Choice]) -> Iterator[list[int]]:
    """Numbers of choices that are scored together: all that have no media, then those with the same few."""
    by_media: dict[tuple[Media, ...], list[int]] = {}
    for index, choice in enumerate(choices):
        by_media.setdefault(choice.media, []).append(index)
    if alone := by_media.pop((), []):
        yield alone
    group: list[int] = []
    seen: set[Media] = set()
    for media, indices in by_media.items():
        if group and len(seen | set(media)) > _MEDIA_TOGETHER:
            yield group
            group, seen = [], set()
        # Choices of the same images stay together, however many they are: the limit is on images.
        group += indices
        seen |= set(media)
    if group:
        yield group


def load_any_model(
    path: str, revision: str | None, dtype: torch.dtype | None, vision_tower: str | None, flag: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint of this library or of another, and its tokenizer; a ValueError, beginning with ``flag``, if not."""
    path, revision = _locate_revision(path, revision, flag)
    config = read_config(path, flag) if os.path.isdir(path) else {}
    if config.get("model_type") in AVAILABLE_MODELS or find_layout(config, path, flag) is not None:
        loaded = load_model(path, dtype=dtype or torch.float32, vision_tower=vision_tower, flag=flag)
        loaded.check_complete(f"{flag} {path!r}")
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


def count_tokens(path: str, revision: str | None, choices: Sequence[Choice], flag: str) -> list[list[int]]:
    """How many tokens of each candidate a model of ``load_any_model`` scores, by its tokenizer alone; no media."""
    path, revision = _locate_revision(path, revision, flag)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    rows = TextEncoder(tokenizer, None, f"{flag} {path}").encode(choices)
    return [[len(row.scored) for row in of_choice] for of_choice in rows]


def _locate_revision(path: str, revision: str | None, flag: str) -> tuple[str, str | None]:
    """A folder or a hub name, and the revision of the latter."""
    if revision not in (None, "main") and os.path.isdir(os.path.join(path, str(revision))):
        path, revision = os.path.join(path, str(revision)), None
    path = locate_model(path, flag)
    if os.path.isdir(path) and revision not in (None, "main"):
        raise ValueError(f"{flag} {path}: has no folder {revision!r} within it, the revision that was asked for")
    return path, revision
