"""What each form of keeping features costs: bytes, the error of the features, and of the loss of some samples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from llava.data.collator import SupervisedCollator, model_inputs
from llava.data.dataset import SupervisedDataset
from llava.data.feature_cache.storage import POOLS, STORAGES, Storage
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.types import BadSample, Example, holds_features

_SAMPLES = 8


def storage_table(
    model: LlavaMetaForCausalLM, dataset: SupervisedDataset, chosen: Storage, autocast: AbstractContextManager[None]
) -> str:
    """A table of all forms, measured on the first samples with media.

    Args:
        model: on its device.
        dataset: of the samples; their media are decoded and run through the tower.
        chosen: the form that a star marks.
        autocast: what the tower and the model compute in.
    """
    examples = _first_examples(dataset)
    if not examples:
        return ""
    was_training, tower = model.training, model.get_vision_tower()
    assert tower is not None
    model.eval()
    with torch.no_grad(), autocast:
        batches = [model_inputs(SupervisedCollator(dataset.tokenizer.pad_token_id)([one])) for one in examples]  # type: ignore[arg-type]
        batches = [{name: _move(value, model.device) for name, value in batch.items()} for batch in batches]
        exact = [[tower(frames)[:, None] for frames in batch["images"]] for batch in batches]
        losses = _losses(model, batches, exact)
        lines = [f"{'kept as':>24} {'bytes a frame':>14} {'error of features':>18} {'difference of the loss':>23}"]
        for storage in (Storage(kind, pool) for pool in POOLS for kind in STORAGES):
            kept = [[storage.round(one.squeeze(1))[:, None] for one in media] for media in exact]
            pairs = [(a, b) for own, other in zip(exact, kept, strict=True) for a, b in zip(own, other, strict=True)]
            error = _norm([b.float() - a.float() for a, b in pairs]) / _norm([a.float() for a, _ in pairs])
            found = _losses(model, batches, kept)
            differences = [abs(a - b) for a, b in zip(losses, found, strict=True)]
            name = f"{storage}{' *' if storage == chosen else ''}"
            frame = storage.num_bytes(1, exact[0][0].shape[2], exact[0][0].shape[3])
            mean = sum(differences) / len(differences)
            lines.append(f"{name:>24} {frame:>14,} {error:>18.2e} {mean:>23.2e}")
    model.train(was_training)
    mean = sum(losses) / len(losses)
    return "\n".join([f"forms of features, on {len(examples)} samples with a loss of {mean:.4f} (* chosen):", *lines])


def _first_examples(dataset: SupervisedDataset) -> list[Example]:
    found: list[Example] = []
    for i in range(len(dataset.records)):
        if len(found) == _SAMPLES:
            break
        if dataset.records[i].media:
            example = dataset[i]
            if not isinstance(example, BadSample) and not any(holds_features(one.frames) for one in example.media):
                found.append(example)
    return found


def _losses(
    model: LlavaMetaForCausalLM, batches: Sequence[dict[str, object]], features: Sequence[list[Tensor]]
) -> list[float]:
    pairs = zip(batches, features, strict=True)
    return [float(model(**batch | {"images": media}, return_logits=False).loss) for batch, media in pairs]


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())


def _move(value: object, device: torch.device) -> object:
    if isinstance(value, list):
        return [_move(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value
