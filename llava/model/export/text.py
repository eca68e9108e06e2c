"""``--as text``: the language model of a checkpoint as a plain one of transformers, without anything that sees."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llava.config import GroundingConfig, VisionConfig
from llava.constants import VISUAL_TOKENS
from llava.grounding.syntax import COORDINATE_PLACEHOLDERS, bin_tokens
from llava.model.backbones import plain_class, split_type
from llava.model.classes import build_config, choose_classes
from llava.model.export.folder import edit_json
from llava.model.export.tokenizer import check_offsets, compare_tokenizers, removable_from, write_tokenizer
from llava.model.loading import load_model, read_pretrained
from llava.model.lora import is_adapter_folder, merge_adapters
from llava.model.pretrained import locate_model, quiet_transformers, read_config
from llava.model.visual import is_added
from llava.model.vocabulary import load_tokenizer

FLAG = "CHECKPOINT"
_OWN_ENTRY = re.compile(r"(mm|llava)_.*|auto_map|quantization_config")
_NUM_CHECKED = 48
"""Tokens of the text that is compared at the end."""


@dataclass
class Source:
    """A checkpoint that is to be exported as text.

    Attributes:
        path: its folder.
        model: its language model, of a class of transformers' own.
        tokenizer: its tokenizer.
        vision, grounding: its settings; None where it does not see, or has no coordinates.
        reference: what the checkpoint itself gives for ``checked``: float32 logits (tokens, vocabulary).
        checked: int64 (tokens,) of text.
        notes: what is to be said of the way from the checkpoint to the model.
    """

    path: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vision: VisionConfig | None
    grounding: GroundingConfig | None
    reference: Tensor
    checked: Tensor
    notes: list[str]


def read_source(
    checkpoint: str, dtype: torch.dtype | None, model_base: str | None = None, vision_tower: str | None = None
) -> Source:
    """Read the language model of a checkpoint; its tower is not needed, unless adapters have to be merged.

    Args:
        checkpoint: folder or hub name.
        dtype: of the exported weights; None keeps that of the checkpoint.
        model_base, vision_tower: as for ``load_model``.

    Raises:
        ValueError: it cannot be read, or its tokenizer cannot be exported.
    """
    path = locate_model(checkpoint, FLAG)
    settings = read_config(path, FLAG)
    config_class, model_class = choose_classes(settings["model_type"], path)
    full = build_config(config_class, {**settings, "model_type": config_class.model_type}, f"{FLAG} {path!r}")
    vision, grounding = VisionConfig.from_model_config(full), GroundingConfig.from_model_config(full)
    tokenizer = load_tokenizer(path, FLAG)
    check_offsets(tokenizer, path)
    notes = []
    plain = plain_class(model_class)
    plain_config = text_settings(settings, plain_class(config_class))
    if is_adapter_folder(path):
        merged = load_model(path, model_base=model_base, vision_tower=vision_tower, flag=FLAG).model
        checked = pick_tokens(merged.config, vision, grounding, tokenizer)
        apart = score(merged, checked)
        merge_adapters(merged)
        compare_logits(apart, score(merged, checked))
        # They were merged in float32, whatever they were trained in.
        merged.to(dtype or stored_dtype(settings))
        reference = score(merged, checked)
        plain_config.vocab_size = merged.config.vocab_size
        model = plain(plain_config).to(merged.dtype)
        state = {name: tensor for name, tensor in merged.state_dict().items() if not is_added(name)}
        model.load_state_dict(state, strict=True)
        notes.append("its LoRA adapters are merged into the weights")
    else:
        stored = dtype or "auto"
        model, info = read_pretrained(plain.from_pretrained, path, FLAG, config=plain_config, dtype=stored)
        _check_read(info, path)
        # The reference is this library's own class, with all embeddings, but for the vision modules.
        own_config = config_class.from_dict({**_without_own(settings), "model_type": config_class.model_type})
        own, _ = read_pretrained(model_class.from_pretrained, path, FLAG, config=own_config, dtype=model.dtype)
        checked = pick_tokens(own.config, vision, grounding, tokenizer)
        reference = score(own, checked)
    variant = split_type(config_class.model_type)[1]
    if variant != "base":
        notes.append(f"its {variant} attention is plain causal attention on text, and so is the exported model's")
    if _has_cap(model):
        notes.append("its attention scores have a cap, which sdpa of some releases leaves out: load it with eager")
    return Source(path, model, tokenizer, vision, grounding, reference, checked, notes)


def stored_dtype(settings: dict[str, Any]) -> torch.dtype:
    """The type of a checkpoint's weights, as its ``config.json`` says."""
    found = getattr(torch, str(settings.get("dtype") or settings.get("torch_dtype") or "float32"), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32


def _check_read(info: dict[str, Any], path: str) -> None:
    """A ValueError where the weights of a language model are not whole; what sees may be left over."""
    foreign = sorted(name for name in info["unexpected_keys"] if not is_added(name))
    wrong = sorted(info["missing_keys"]) + foreign + sorted(name for name, *_ in info["mismatched_keys"])
    if wrong:
        raise ValueError(f"{FLAG} {path!r} does not fit its config.json in {len(wrong)} tensors, such as {wrong[0]}")


def _without_own(settings: dict[str, Any]) -> dict[str, Any]:
    """The entries of a ``config.json`` without those of this library."""
    grounding = GroundingConfig().to_model_config()
    return {name: v for name, v in settings.items() if not _OWN_ENTRY.fullmatch(name) and name not in grounding}


def text_settings(settings: dict[str, Any], plain: type[PretrainedConfig]) -> PretrainedConfig:
    """The configuration of the plain language model, of a class of transformers, from the entries of a checkpoint's."""
    kept = {name: v for name, v in _without_own(settings).items() if name not in ("model_type", "architectures")}
    return plain.from_dict(kept)


def added_tokens(vision: VisionConfig | None, grounding: GroundingConfig | None) -> list[str]:
    """The tokens that mean nothing in a text alone: of visual spans, and coordinates that tables hold."""
    tokens = [] if vision is None else list(VISUAL_TOKENS)
    if grounding is not None and grounding.has_tables:
        tokens += [*COORDINATE_PLACEHOLDERS, *bin_tokens(grounding)]
    return tokens


def pick_tokens(
    config: PretrainedConfig,
    vision: VisionConfig | None,
    grounding: GroundingConfig | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Tensor:
    """Ids of words from all over the vocabulary, the same at every call, (tokens,)."""
    left_out = {*added_tokens(vision, grounding), *tokenizer.all_special_tokens}
    words = sorted(i for token, i in tokenizer.get_vocab().items() if token not in left_out and i < config.vocab_size)
    count = min(_NUM_CHECKED, int(getattr(config, "max_position_embeddings", _NUM_CHECKED)))
    chosen = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))[:count]
    return torch.tensor([words[i] for i in chosen.tolist()])


@torch.no_grad()
def score(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """float32 logits (tokens, vocabulary) of one text, computed in float32 whatever the weights are stored in."""
    # In 16 bits a wrong weight would be lost among the rounding errors.
    dtype = model.dtype
    model.float().eval()
    logits = model(input_ids=ids.unsqueeze(0)).logits[0].clone()  # type: ignore[operator]
    model.to(dtype)  # type: ignore[arg-type]
    return logits


def export_text(source: Source, folder: Path) -> list[str]:
    """Write the language model of a checkpoint and its tokenizer to a folder.

    Returns:
        What was done, a line each.
    """
    known = source.tokenizer.get_vocab()
    tokens = [token for token in added_tokens(source.vision, source.grounding) if token in known]
    first = removable_from(source.tokenizer, tokens)
    lines = list(source.notes)
    if source.vision is not None:
        lines.append("removed: vision modules" + (", tables of coordinates" if _has_tables(source.grounding) else ""))
    rows = cast(nn.Embedding, source.model.get_input_embeddings()).num_embeddings
    if first is not None:
        if first < rows:
            source.model.resize_token_embeddings(first, mean_resizing=False)
        lines.append(f"removed: {_list(tokens)} from the tokenizer, and rows {first} to {rows - 1} of the embeddings")
    elif tokens:
        ids = [known[token] for token in tokens]
        suppressed = {*(source.model.generation_config.suppress_tokens or ()), *ids}  # type: ignore[union-attr]
        source.model.generation_config.suppress_tokens = sorted(suppressed)  # type: ignore[union-attr]
        lines.append(
            f"kept: {_list(tokens)}, as other tokens stand behind them or the vocabulary itself has them; "
            "generation_config.json has them in suppress_tokens, so that generate never gives one"
        )
    removed = tokens if first is not None else []
    with quiet_transformers():
        source.model.save_pretrained(folder)
    write_tokenizer(source.tokenizer, folder, removed)
    edit_json(folder / "config.json", _older_names(folder / "config.json"))
    return lines


def _has_tables(grounding: GroundingConfig | None) -> bool:
    return grounding is not None and grounding.has_tables


def _has_cap(model: PreTrainedModel) -> bool:
    """Whether attention scores are capped, as Gemma 2's are."""
    return getattr(model.config, "attn_logit_softcapping", None) is not None


def _list(tokens: Iterable[str]) -> str:
    names = list(tokens)
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:8])} and {len(names) - 8} more"


def _older_names(path: Path) -> dict[str, object]:
    """Entries of a ``config.json`` under the names that transformers 4 reads, which would take a default without."""
    config = json.loads(path.read_text(encoding="utf-8"))
    changes: dict[str, object] = {"torch_dtype": config.get("dtype")}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "full_attention" in rope:  # Gemma 3: one for its global layers, one for the others
        changes["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if isinstance(rope, dict) and "rope_theta" in rope:
        changes["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            left_out = ("rope_theta", "partial_rotary_factor")
            changes["rope_scaling"] = {name: value for name, value in rope.items() if name not in left_out}
        if "partial_rotary_factor" in rope:
            changes["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if config["model_type"] == "phi3" and "rope_scaling" in changes:  # These three and no others are taken.
            named = {"type": rope["rope_type"], **{name: rope[name] for name in ("short_factor", "long_factor")}}
            changes["rope_scaling"] = named
        if config["model_type"] == "gpt_neox":
            changes |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor")}
    return changes


def check_text(source: Source, folder: Path) -> tuple[float, float]:
    """Reload a text export and compare it with the checkpoint.

    Returns:
        The largest difference of a logit on a text, and the largest share of the probability that the checkpoint gives
        to tokens which the export does not have.

    Raises:
        ValueError: the tokenizer or the logits are others.
    """
    compare_tokenizers(source.tokenizer, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    with quiet_transformers():
        attention = "eager" if _has_cap(source.model) else None
        exported = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, attn_implementation=attention)
    logits = score(exported, source.checked)
    words = logits.shape[1]
    difference = compare_logits(source.reference[:, :words], logits)
    lost = source.reference.softmax(-1)[:, words:].sum(-1)  # (tokens,)
    return difference, float(lost.max()) if lost.numel() else 0.0


_TOLERANCE = 1e-4
"""Of the largest logit: what float32 may differ by where sums are made in another order."""


def compare_logits(reference: Tensor, logits: Tensor) -> float:
    """The largest difference of two float32 tensors of logits; a ValueError where it is more than rounding."""
    difference = float((reference - logits).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(reference.abs().max())):
        raise ValueError(
            f"the exported model's logits differ from the checkpoint's by up to {difference:.3g}; it is not written"
        )
    return difference
