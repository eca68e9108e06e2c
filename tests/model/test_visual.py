"""The features of each image and video land at its own positions, and counts must agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava.data.collator import SupervisedCollator, model_inputs
from llava.data.dataset import SupervisedDataset
from llava.data.records import read_records
from llava.model.visual import splice


def batch_of(loaded, mixed_data: Path, rows: list[int]):
    dataset = SupervisedDataset(read_records(str(mixed_data)), loaded.tokenizer, loaded.vision, 512)
    return model_inputs(SupervisedCollator(loaded.tokenizer.pad_token_id)([dataset[i] for i in rows]))


def test_features_overwrite_markers_and_patches_alike() -> None:
    ids = torch.tensor([[5, 91, 92, 6], [93, 91, 7, 8]])
    embeddings = torch.zeros(2, 4, 3)
    features = [torch.full((2, 3), 1.0), torch.full((2, 3), 2.0)]
    spliced = splice(ids, embeddings, features, [91, 92, 93])
    assert spliced[..., 0].tolist() == [[0, 1, 1, 0], [2, 2, 0, 0]]
    assert not embeddings.any()


@pytest.mark.parametrize("sizes", [(2, 1), (2, 3), (4,)])
def test_a_mismatch_prints_both_counts(sizes: tuple[int, ...]) -> None:
    ids = torch.tensor([[5, 91, 92, 6], [93, 7, 7, 8]]) if sum(sizes) != 3 else torch.tensor([[91, 92, 91, 93]])
    with pytest.raises(ValueError, match=rf"{int((ids > 90).sum())} visual positions.*{sum(sizes)} features"):
        splice(ids, torch.zeros(*ids.shape, 3), [torch.zeros(n, 3) for n in sizes], [91, 92, 93])


def test_two_images_of_a_sample_get_their_own_features(load_tiny, mixed_data: Path) -> None:
    loaded = load_tiny()
    model = loaded.model.eval()
    batch = batch_of(loaded, mixed_data, [4])  # a video, then an image
    embeddings = model.embed_multimodal(batch["input_ids"], batch["images"], batch["modalities"])
    video, image = model.get_model().encode_media(batch["images"], batch["modalities"])
    visual = torch.isin(batch["input_ids"][0], torch.tensor(loaded.vision.visual_token_ids))
    assert torch.equal(embeddings[0, visual], torch.cat([video, image]))


def test_swapping_frames_of_two_clips_swaps_their_features(load_tiny, mixed_data: Path) -> None:
    model = load_tiny().model.eval()
    batch = batch_of(load_tiny(), mixed_data, [0, 1])
    one, other = model.get_model().encode_media(batch["images"], batch["modalities"])
    swapped = model.get_model().encode_media(batch["images"][::-1], batch["modalities"])
    for found, expected in zip(swapped, (other, one), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)
    assert (one - other).abs().max() > 1e-5


def test_order_of_frames_reaches_the_features(load_tiny) -> None:
    model = load_tiny().model.eval()
    frames = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    forward, backward = model.get_model().encode_media([frames, frames.flip(0)], ["video", "video"])
    assert not torch.equal(forward, backward)


def test_mixed_lengths_of_video_encode_as_alone(load_tiny, mixed_data: Path) -> None:
    model = load_tiny().model.eval()
    frames = batch_of(load_tiny(), mixed_data, [0])["images"][0]
    media, kinds = [frames, frames[:1], frames[:2], frames], ["video", "image", "video", "video"]
    together = model.get_model().encode_media(media, kinds)
    for frames, kind, encoded in zip(media, kinds, together, strict=True):
        alone = model.get_model().encode_media([frames], [kind])[0]
        torch.testing.assert_close(encoded, alone, atol=1e-6, rtol=1e-5)
        assert len(encoded) == model.vision.layout.num_tokens(kind, len(frames))


def test_wrong_number_of_modalities_is_an_error(load_tiny, mixed_data: Path) -> None:
    model = load_tiny().model
    batch = batch_of(load_tiny(), mixed_data, [0, 1])
    with pytest.raises(ValueError, match="2 images or videos came with 1 modalities"):
        model(**{**batch, "modalities": ["video"]})


@pytest.mark.parametrize("kept", [[], [0], [1], [0, 1]], ids=["none", "the first", "the second", "all"])
def test_features_that_are_given_take_the_place_of_pixels(load_tiny, mixed_data: Path, kept: list[int]) -> None:
    loaded = load_tiny()
    model = loaded.model.train()
    batch = batch_of(loaded, mixed_data, [4])  # a video, then an image
    images, tower = batch["images"], model.get_vision_tower()

    def run(media: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(**batch | {"images": media}).loss
        loss.backward()
        return loss.detach(), model.get_model().mm_projector[0].weight.grad.clone()

    expected = run(images)
    given = [tower(frames)[:, None] if i in kept else frames for i, frames in enumerate(images)]
    seen: list[int] = []
    hook = tower.register_forward_hook(lambda module, frames, features: seen.append(len(features)))
    found = run(given)
    hook.remove()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert sum(seen) == sum(len(frames) for i, frames in enumerate(images) if i not in kept)
