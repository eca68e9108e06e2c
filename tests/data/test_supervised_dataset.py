"""From records to examples: ids, labels, media, lengths and what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ITALIAN, turns, write_video
from torch.utils.data import DataLoader

from llava.constants import IGNORE_INDEX
from llava.data import dataset as dataset_module
from llava.data import dataset_stats
from llava.data.chunking import ChunkedDataset
from llava.data.dataset import SupervisedDataset, find_unsupervised
from llava.data.media import load_media
from llava.data.module import make_supervised_data_module
from llava.data.records import read_records
from llava.train.arguments import DataArguments
from llava.types import BadSample, BadSampleError, Media, Record, Turn

EOS = 0
TEXTS = [
    [""], ["una stella"], ["  una ", "", " stella\n"], ["una stella<|endoftext|>"], ["<|endoftext|>"],
    ["a<|endoftext|>b"], [ITALIAN[0], ITALIAN[1]],
]  # fmt: skip
MEDIA_TEXTS = [
    ["<video>", ITALIAN[0]], ["<video>"], ["prima <video> dopo"], ["prima<image>dopo <video>"], ["<image><image>"],
    ["<image> <image>", "due gatti"], ["ecco <image>"], ["<video>", "fine<|endoftext|>"], ["fine<|endoftext|><image>"],
]  # fmt: skip


def record(texts: list[str], *media: Media, **changes) -> Record:
    return Record("s1", tuple(Turn("user", text) for text in texts), media, **{"source": "x.json, sample 1", **changes})


def with_media(texts: list[str], folder: Path | None = None) -> Record:
    from llava.data.placeholders import placeholder_kinds

    files = {"image": "a.png", "video": "a.mp4"}
    return record(texts, *(Media(kind, str((folder or Path()) / files[kind])) for kind in placeholder_kinds(texts[0])))


@pytest.fixture
def mixed(mixed_data, visual_tokenizer, tiny_vision):
    return SupervisedDataset(read_records(str(mixed_data)), visual_tokenizer, tiny_vision, 512)


@pytest.fixture(params=["gpt2", "llama"])
def either_tokenizer(request, tokenizer_dir, visual_tokenizer):
    """One that begins texts with nothing, and one that begins them with a token of its own."""
    if request.param == "gpt2":
        return visual_tokenizer
    from tokenizers.processors import TemplateProcessing

    from llava.model.vocabulary import add_visual_tokens, load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_dir))
    add_visual_tokens(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A $B", special_tokens=[begin]
    )
    return tokenizer


def test_examples_of_a_mixed_file(mixed, tiny_vision):
    examples = [mixed[i] for i in range(len(mixed))]
    assert [example.id for example in examples] == [
        "video-a", "video-b", "image-a", "image-b", "both", "text-1", "text-2",
    ]  # fmt: skip
    assert [[m.kind for m in example.media] for example in examples] == [
        ["video"], ["video"], ["image"], ["image"], ["video", "image"], [], [],
    ]  # fmt: skip
    for example in examples:
        visual = sum(tiny_vision.layout.num_tokens(m.kind, len(m.frames)) for m in example.media)
        assert len(example.input_ids) == len(example.labels)
        assert example.labels.count(IGNORE_INDEX) == visual
        assert example.input_ids[-1] == example.labels[-1] == EOS
        assert all(label in (IGNORE_INDEX, i) for i, label in zip(example.input_ids, example.labels, strict=True))
        assert example.labels.count(EOS) == 1


def test_images_and_videos_keep_reading_order(media_dir, visual_tokenizer, tiny_vision):
    first, second, clip = (
        Media("image", str(media_dir / "a.png")), Media("image", str(media_dir / "b.jpg")),
        Media("video", str(media_dir / "a.mp4")),
    )  # fmt: skip
    sample = record(["<image> e <video>", "poi <image>"], first, second, clip)
    media = SupervisedDataset([sample], visual_tokenizer, tiny_vision, 512)[0].media
    for found, expected in zip(media, (first, clip, second), strict=True):
        assert found.kind == expected.kind
        assert torch.equal(found.frames, load_media(expected, tiny_vision).frames)
    swapped = SupervisedDataset([replace(sample, media=(second, first, clip))], visual_tokenizer, tiny_vision, 512)
    assert torch.equal(swapped[0].media[0].frames, media[2].frames)


def test_text_only_sample_stays_text(mixed, monkeypatch):
    monkeypatch.setattr(dataset_module, "load_media", lambda *args: pytest.fail("media were loaded"))
    example = mixed[5]
    assert example.media == []
    assert example.labels == example.input_ids == mixed.tokenizer(ITALIAN[4])["input_ids"] + [EOS]
    assert mixed.visual_tokens(mixed.records[5]) == 0


@pytest.mark.parametrize("texts", TEXTS + MEDIA_TEXTS, ids=str)
def test_lengths_are_the_real_numbers_of_tokens(either_tokenizer, tiny_vision, texts):
    dataset = SupervisedDataset([with_media(texts)], either_tokenizer, tiny_vision, 10_000)
    assert dataset.lengths.tolist() == [len(dataset.tokenize(dataset.records[0])[0])]


def test_lengths_of_many_records(either_tokenizer, tiny_vision, monkeypatch):
    monkeypatch.setattr(dataset_stats, "_RECORDS_AT_ONCE", 3)
    records = [with_media(texts) for texts in TEXTS + MEDIA_TEXTS]
    dataset = SupervisedDataset(records, either_tokenizer, tiny_vision, 10_000)
    assert dataset.lengths.tolist() == [len(dataset.tokenize(r)[0]) for r in records]
    signs = [1 if r.media else -1 for r in records]
    assert dataset.modality_lengths.tolist() == [n * sign for n, sign in zip(dataset.lengths, signs, strict=True)]
    mixing = SupervisedDataset(records, either_tokenizer, tiny_vision, 10_000, early_mix_text=True)
    assert mixing.modality_lengths.tolist() == dataset.lengths.tolist()


def test_lengths_count_what_truncation_cuts(visual_tokenizer):
    dataset = SupervisedDataset([record([ITALIAN[0]])], visual_tokenizer, None, 5)
    assert len(dataset[0].input_ids) == 5 < dataset.lengths[0]
    assert dataset[0].input_ids[-1] == EOS


def test_frames_a_second_give_each_video_its_own_span(tmp_path, visual_tokenizer, tiny_vision):
    vision = replace(tiny_vision, video_fps=2.0, frames_upbound=5)
    short, long = write_video(tmp_path / "short.mp4", 8), write_video(tmp_path / "long.mp4", 80)
    samples = [record(["<video>", "ciao"], Media("video", str(path))) for path in (short, long)]
    dataset = SupervisedDataset(samples, visual_tokenizer, vision, 512)
    for example, frames in zip((dataset[0], dataset[1]), (2, 5), strict=True):
        assert len(example.media[0].frames) == frames
        assert example.labels.count(IGNORE_INDEX) == vision.layout.num_tokens("video", frames)
    assert dataset.lengths[0] == dataset.lengths[1] == len(dataset[1].input_ids)


def test_split_reaches_the_decoder(media_dir, visual_tokenizer, tiny_vision):
    sample = replace(with_media(["<video>"], media_dir), split=(4, 8))
    example = SupervisedDataset([sample], visual_tokenizer, tiny_vision, 512)[0]
    assert example.media[0].times == pytest.approx((0.5, 0.75, 1.0))


@pytest.mark.parametrize(
    ("texts", "changes", "limit", "needed", "visual", "remedy"),
    [
        (["<video>", "ciao"], {}, 300, 362, 360, " or lower --num_frames or lower --mm_perceiver_latents"),
        (
            ["<video>", "ciao"], {"video_fps": 1.0, "frames_upbound": 8}, 700, 722, 720,
            " or lower --frames_upbound or lower --mm_perceiver_latents",
        ),
        (["<video>", "ciao"], {"resampler_type": None}, 1025, 1026, 1024, " or lower --num_frames"),
        (["<image>", "ciao"], {}, 257, 258, 256, ""),
        (["<image>", "ciao"], {"resample_images": True}, 80, 83, 81, " or lower --mm_perceiver_latents"),
        (["<video>"], {}, 360, 361, 360, " or lower --num_frames or lower --mm_perceiver_latents"),
    ],
)  # fmt: skip
def test_clip_that_does_not_fit(visual_tokenizer, italian_vision, texts, changes, limit, needed, visual, remedy):
    vision = replace(italian_vision, **changes)
    dataset = SupervisedDataset([with_media(texts)], visual_tokenizer, vision, limit)
    with pytest.raises(ValueError, match="the limit is") as caught:
        dataset.tokenize(dataset.records[0])
    assert str(caught.value) == (
        f"sample 's1' (x.json, sample 1): it needs at least {needed} tokens ({visual} of them visual), "
        f"but the limit is {limit}; raise --model_max_length (within the model's context){remedy}"
    )
    fitting = SupervisedDataset([with_media(texts)], visual_tokenizer, vision, needed)
    assert len(fitting.tokenize(fitting.records[0])[0]) == needed


def test_real_clip_that_does_not_fit(media_dir, visual_tokenizer, tiny_vision):
    dataset = SupervisedDataset([with_media(["<video>", "ciao"], media_dir)], visual_tokenizer, tiny_vision, 40)
    with pytest.raises(ValueError, match=r"'s1' .* at least 41 tokens \(39 of them visual\), but the limit is 40"):
        dataset[0]


def test_bad_file_is_one_error_naming_sample_and_file(tmp_path, visual_tokenizer, tiny_vision):
    (tmp_path / "a.mp4").write_text("non è un video")
    dataset = SupervisedDataset([with_media(["<video>"], tmp_path)], visual_tokenizer, tiny_vision, 512)
    with pytest.raises(
        BadSampleError, match=r"^sample 's1' \(x\.json, sample 1\): .*a\.mp4: cannot be decoded"
    ) as caught:
        dataset[0]
    assert "\n" not in str(caught.value)


def test_bad_samples_are_skipped_only_when_that_is_asked_for(tmp_path, media_dir, visual_tokenizer, tiny_vision):
    (tmp_path / "a.mp4").write_text("non è un video")
    samples = [with_media(["<video>", "ciao"], folder) for folder in (media_dir, tmp_path)] + [record(["<video>" * 9])]
    skipping = SupervisedDataset(samples, visual_tokenizer, tiny_vision, 512, on_bad_sample="skip")
    assert skipping[0].id == "s1"
    broken = skipping[1]
    assert (broken.id, broken.source, broken.file) == ("s1", "x.json, sample 1", str(tmp_path / "a.mp4"))
    assert broken.reason.startswith("cannot be decoded as a video: ")
    stopping = SupervisedDataset(samples, visual_tokenizer, tiny_vision, 512)
    with pytest.raises(BadSampleError) as caught:
        stopping[1]
    assert str(caught.value) == str(broken)
    with pytest.raises(ValueError, match="--on_bad_sample is 'ignore'; known: error, skip"):
        SupervisedDataset(samples, visual_tokenizer, tiny_vision, 512, on_bad_sample="ignore")


def test_sample_that_does_not_fit_is_a_bad_sample_without_a_file(media_dir, visual_tokenizer, tiny_vision):
    sample = with_media(["<video>", "ciao"], media_dir)
    bad = SupervisedDataset([sample], visual_tokenizer, tiny_vision, 40, on_bad_sample="skip")[0]
    assert isinstance(bad, BadSample)
    assert bad.file == ""
    assert bad.reason.startswith("it needs at least 41 tokens (39 of them visual), but the limit is 40; raise")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_medium_of_several_samples_of_a_batch_is_decoded_once(
    tmp_path, media_dir, visual_tokenizer, tiny_vision, monkeypatch, chunked
):
    """Five captions of one clip, another part of it, and a broken one twice: each sample is as it is alone."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    clip, bad = Media("video", str(media_dir / "a.mp4")), Media("video", str(broken))
    records = [replace(record(["<video>", text], clip), id=str(i)) for i, text in enumerate(ITALIAN)]
    records += [replace(records[0], id="part", split=(0, 5)), *(record(["<video> x"], bad, source=s) for s in "ab")]
    asked = []
    monkeypatch.setattr(dataset_module, "load_media", lambda *words: asked.append(words[0]) or load_media(*words))
    data = SupervisedDataset(records, visual_tokenizer, tiny_vision, 512, on_bad_sample="skip")
    dataset = ChunkedDataset(data) if chunked else data
    alone = [dataset[i] for i in range(len(records))]
    assert len(asked) == len(records)
    asked.clear()
    loader = DataLoader(dataset, batch_sampler=[range(len(records)), [0]], collate_fn=list)
    together, (again,) = loader
    assert asked == [clip, clip, bad, clip]  # Whole and in part; what a batch has decoded is gone with it.
    assert [repr(one) for one in together] == [repr(one) for one in alone]
    assert {sample.source for sample in together[-2:]} == {"a", "b"}
    for one, other in zip([*together[:-2], again], [*alone[:-2], alone[0]], strict=True):
        assert torch.equal(one.media[0].frames, other.media[0].frames)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_error_in_a_worker_reaches_the_user_as_one_line(tmp_path, visual_tokenizer, tiny_vision, method):
    from torch.utils.data import DataLoader

    dataset = SupervisedDataset([with_media(["<video>"], tmp_path)], visual_tokenizer, tiny_vision, 512)
    with pytest.raises(BadSampleError) as caught:
        next(iter(DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=method)))
    assert str(caught.value) == f"sample 's1' (x.json, sample 1): {tmp_path / 'a.mp4'}: no such file"


def test_media_for_a_model_without_vision(media_dir, visual_tokenizer):
    dataset = SupervisedDataset([with_media(["<image>"], media_dir)], visual_tokenizer, None, 512)
    with pytest.raises(ValueError, match=r"'s1'.*--vision_tower"):
        dataset[0]
    with pytest.raises(ValueError, match=r"'s1'.*--vision_tower"):
        dataset.tokenize(dataset.records[0])


def test_samples_with_nothing_to_learn_are_reported_before_training(tmp_path, visual_tokenizer, tiny_vision):
    samples = [
        {"id": "full", "conversations": turns("", "ciao")},
        {"id": "hollow", "conversations": turns(" ", "")},
        {"id": "seen", "video": "a.mp4", "conversations": turns("<video>", "")},
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(samples))
    dataset = SupervisedDataset(read_records(str(path)), visual_tokenizer, tiny_vision, 512)
    assert [r.id for r in find_unsupervised(dataset)] == ["hollow", "seen"]
    arguments = DataArguments(data_path=[str(path)])
    with pytest.raises(ValueError, match=r"2 samples .*'hollow' \(a\.json, sample 2\)"):
        make_supervised_data_module(visual_tokenizer, arguments, tiny_vision, 512)


def test_data_module(mixed_data, visual_tokenizer, tiny_vision):
    arguments = DataArguments(data_path=[str(mixed_data)], early_mix_text=True)
    module = make_supervised_data_module(visual_tokenizer, arguments, tiny_vision, 512)
    assert set(module) == {"train_dataset", "eval_dataset", "data_collator"}
    assert len(module["train_dataset"]) == 7
    assert module["train_dataset"].early_mix_text
    assert module["eval_dataset"] is None
    arguments.eval_data_path = [str(mixed_data), str(mixed_data)]
    assert len(make_supervised_data_module(visual_tokenizer, arguments, None, 512)["eval_dataset"]) == 14


def test_padding_with_the_end_of_text_leaves_the_real_one_visible_and_supervised(mixed, visual_tokenizer):
    from llava.data.collator import SupervisedCollator

    assert visual_tokenizer.pad_token_id == visual_tokenizer.eos_token_id == EOS
    examples = [mixed[i] for i in (0, 2, 5)]
    batch = SupervisedCollator(visual_tokenizer.pad_token_id)(examples)
    for row, example in enumerate(examples):
        end = len(example.input_ids) - 1
        assert batch["input_ids"][row, end] == batch["labels"][row, end] == EOS
        assert batch["attention_mask"][row, end] == 1
        assert batch["attention_mask"][row, end + 1 :].sum() == 0
        assert (batch["labels"][row, end + 1 :] == IGNORE_INDEX).all()


def test_worker_processes_give_the_same_examples(mixed):
    from torch.utils.data import DataLoader

    loader = DataLoader(mixed, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for i, example in enumerate(loader):
        expected = mixed[i]
        assert (example.id, example.input_ids, example.labels) == (expected.id, expected.input_ids, expected.labels)
        for found, wanted in zip(example.media, expected.media, strict=True):
            assert torch.equal(found.frames, wanted.frames)


@pytest.mark.parametrize(("fps", "bound", "frames"), [(2, 32, 3), (8, 32, 12), (4, 32, 6), (4, 5, 5), (0.1, 32, 1)])
def test_frames_a_second_are_seen_and_counted(visual_tokenizer, tiny_vision, media_dir, fps, bound, frames) -> None:
    """Of the clip's 12 frames of an eighth of a second; as many as if they had been asked for by number."""
    data = media_dir / f"fps-{fps}-{bound}.json"
    data.write_text(json.dumps([{"id": "a", "video": "a.mp4", "conversations": turns("<video>", "una stella")}]))
    visions = [replace(tiny_vision, video_fps=fps, frames_upbound=bound), replace(tiny_vision, num_frames=frames)]
    datasets = [SupervisedDataset(read_records(str(data)), visual_tokenizer, vision, 512) for vision in visions]
    found, expected = (dataset[0] for dataset in datasets)
    assert found.media[0].frames.shape == (frames, 3, 56, 56)
    assert torch.equal(found.media[0].frames, expected.media[0].frames)
    assert found.input_ids == expected.input_ids


def test_real_clips_supervise_exactly_the_caption_and_the_end(real_videos, visual_tokenizer, italian_vision):
    records = read_records(str(real_videos))
    dataset = SupervisedDataset(records, visual_tokenizer, italian_vision, 1024)
    raw = json.loads(real_videos.read_text(encoding="utf-8"))
    assert len(dataset) == len(raw) > 4
    for i, sample in enumerate(raw):
        ids, labels = dataset.tokenize(records[i])
        caption = sample["conversations"][1]["value"]
        supervised = [label for label in labels if label != IGNORE_INDEX]
        assert visual_tokenizer.decode(supervised).strip() == f"{caption}<|endoftext|>"
        assert supervised == visual_tokenizer(f" {caption}")["input_ids"] + [EOS]
        assert labels[:360] == [IGNORE_INDEX] * 360
        assert len(ids) == 360 + len(supervised) == dataset.lengths[i]


def test_real_clip_is_decoded_and_tokenised(real_videos, visual_tokenizer, italian_vision):
    records = read_records(str(real_videos))
    example = SupervisedDataset(records, visual_tokenizer, italian_vision, 1024)[0]
    assert example.media[0].frames.shape == (4, 3, 224, 224)
    assert example.media[0].original_size == (480, 640)
    assert example.labels.count(IGNORE_INDEX) == 360
