"""What is asked of the data before the first step: answers, cut texts, media, files, and whether text is known."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from conftest import ITALIAN, turns

from llava.compat import set_attention
from llava.data import media_files
from llava.data.dataset import SupervisedDataset, check_samples
from llava.data.formats import build_format
from llava.data.index import Mixture, RecordStore
from llava.data.records import read_records
from llava.train import report
from llava.train.arguments import TrainingArguments
from llava.train.parts import fuse_gelu
from llava.train.report import (
    advise_on_kernels,
    budget_table,
    check_media,
    check_media_files,
    check_text_is_known,
    cut_table,
    media_table,
    supervision_table,
)
from llava.types import BadSample


def write(path: Path, *samples: dict) -> str:
    path.write_text(json.dumps([{"id": f"s{i}", **sample} for i, sample in enumerate(samples)]))
    return str(path)


def text(answer: str, question: str = "") -> dict:
    return {"conversations": turns(question, answer)}


def build(paths, tokenizer, vision=None, max_length=512, version="plain_lm", on_bad_sample="error", **options):
    records = read_records(paths, on_bad_sample=on_bad_sample, **options)
    text_format = build_format(version, tokenizer)
    return SupervisedDataset(
        records,
        tokenizer,
        vision,
        max_length,
        text_format=text_format,
        on_bad_sample=on_bad_sample,
    )


IMAGE = {"image": "a", "conversations": turns("<image>", "x")}
VIDEO = {"video": "c", "conversations": turns("<video>", "x")}

EMPTY = {
    "under an image": {"image": "a.png", "conversations": turns("<image>", "")},
    "under a clip": {"video": "a.mp4", "conversations": turns("<video>", " \n\t")},
    "behind a question": {"image": "a.png", "conversations": turns("<image> che cos'è?", "")},
    "text alone": text(" "),
    "media alone": {"image": "a.png", "conversations": turns("", "<image>")},
}


@pytest.mark.parametrize("version", ["plain_lm", "v1"])
@pytest.mark.parametrize("case", EMPTY)
def test_an_empty_answer_is_an_error_or_skipped(tmp_path, visual_tokenizer, tiny_vision, version, case):
    path = write(tmp_path / "a.json", text("ciao"), EMPTY[case])
    with pytest.raises(
        ValueError, match=r"1 samples have no text .*: sample 's1' \(a\.json, sample 2\); where an answer"
    ):
        check_samples(build(path, visual_tokenizer, tiny_vision, version=version))
    skipping = build(path, visual_tokenizer, tiny_vision, version=version, on_bad_sample="skip")
    check_samples(skipping)
    assert skipping[1] == BadSample(
        "s1", "a.json, sample 2", "", "has no text to learn from: an answer is empty, or there is none", path
    )
    assert not isinstance(skipping[0], BadSample)


def test_one_empty_answer_of_several_counts(tmp_path, tokenizer):
    path = write(tmp_path / "a.json", {"conversations": turns("a", "b") + turns("c", "")})
    with pytest.raises(ValueError, match="1 samples have no text to learn from"):
        check_samples(build(path, tokenizer, version="v1"))
    check_samples(build(path, tokenizer))


@pytest.mark.parametrize("indexed", [True, False])
def test_samples_and_tokens_that_are_cut_are_counted_by_source(tmp_path, tokenizer, indexed):
    long, short = text(" ".join(ITALIAN) * 3), text("ciao")
    paths = [write(tmp_path / "a.json", long, short, long), write(tmp_path / "b.json", short, long)]
    options = {"cache_dir": str(tmp_path / "cache")} if indexed else {}
    dataset = build(paths, tokenizer, max_length=60, **options)
    length = len(dataset.tokenizer(long["conversations"][1]["value"])["input_ids"]) + 1
    assert length > 100
    assert cut_table(dataset).splitlines()[:3] == [
        "text that is cut to 60 tokens",
        f"  {paths[0]}: 2 of 3 samples lose {2 * (length - 60)} tokens",
        f"  {paths[1]}: 1 of 2 samples lose {length - 60} tokens",
    ]
    assert len(dataset[0].input_ids) == 60
    assert cut_table(build(paths, tokenizer, max_length=length, **options)) == ""


def test_media_are_counted_by_kind_and_source(tmp_path, tokenizer, tiny_vision):
    paths = [write(tmp_path / "a.json", IMAGE, IMAGE, VIDEO, text("x")), write(tmp_path / "b.json", text("x"))]
    assert media_table(build(paths, tokenizer, tiny_vision)).splitlines()[1:] == [
        f"  {paths[0]}: 4 samples, with 2 images (50.0%), 1 videos (25.0%), 1 text alone (25.0%)",
        f"  {paths[1]}: 1 samples, with 1 text alone (100.0%)",
    ]


def test_media_without_vision_are_an_error_at_once(tmp_path, tokenizer):
    path = write(tmp_path / "a.json", text("x"), {"video": "c", "conversations": turns("<video>", "x")})
    with pytest.raises(
        ValueError, match=r"sample 's1' .* as 1 of 2 samples have, but the model has no vision; give --vision_t"
    ):
        check_media(build(path, tokenizer))


def test_only_the_media_that_are_there_must_fit(tmp_path, visual_tokenizer, tiny_vision):
    images, videos = write(tmp_path / "i.json", IMAGE, text("x")), write(tmp_path / "v.json", VIDEO)
    words = write(tmp_path / "t.json", text("x"))
    sizes = {"image": tiny_vision.layout.num_tokens("image"), "video": tiny_vision.layout.num_tokens("video", 3)}
    assert sizes == {"image": 16, "video": 39}
    check_media(build(images, visual_tokenizer, tiny_vision, 20))
    check_media(build(words, visual_tokenizer, tiny_vision, 5))
    with pytest.raises(ValueError, match="a video of 3 frames takes 39 tokens, but a sample may have 20; raise"):
        check_media(build(videos, visual_tokenizer, tiny_vision, 20))
    with pytest.raises(ValueError, match="an image takes 16 tokens, but a sample may have 16"):
        check_media(build(images, visual_tokenizer, tiny_vision, 16))


@pytest.mark.parametrize("indexed", [True, False])
def test_files_that_are_missing_are_listed(tmp_path, tokenizer, tiny_vision, caplog, indexed):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "empty.png").touch()
    names = ["a.png", "none.png", "a.png", "empty.png", "x.mp4", "y.png", "z.png"]
    samples = [
        {"video": name, "conversations": turns("<video>", "x")}
        if name.endswith("mp4")
        else {"image": name, "conversations": turns("<image>", "x")}
        for name in names
    ]
    path = write(tmp_path / "a.json", text("x"), *samples)
    options = {"cache_dir": str(tmp_path / "cache")} if indexed else {}
    with pytest.raises(ValueError, match="5 of 8 samples name files that cannot be used; see --image_folder") as caught:
        check_media_files(build(path, tokenizer, tiny_vision, **options))
    assert str(caught.value).startswith(
        f"sample 's2' (a.json, sample 3): {tmp_path / 'none.png'}: no such file; "
        f"sample 's4' (a.json, sample 5): {tmp_path / 'empty.png'}: the file is empty; sample 's5'"
    )
    assert "; and 2 more: 5 of 8" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        check_media_files(build(path, tokenizer, tiny_vision, on_bad_sample="skip", **options))
    assert "5 of 8 samples name files that cannot be used and are skipped, the first: sample 's2'" in caplog.text


def test_only_chosen_samples_are_looked_at(tmp_path):
    samples = [{"image": f"{i}.png", "conversations": turns("<image>", "x")} for i in range(30)]
    write(tmp_path / "a.json", *samples)
    (tmp_path / "m.yaml").write_text("datasets: [{json_path: a.json, sampling_strategy: 'random:7'}]")
    records = read_records(str(tmp_path / "m.yaml"))
    assert isinstance(records, Mixture)
    assert media_files.find_missing(records) == [f"{r}: {r.media[0].path}: no such file" for r in records]


def test_each_file_is_looked_at_once_and_no_record_is_made(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")
    path = tmp_path / "a.jsonl"
    line = json.dumps({"image": "a.png", "conversations": turns("<image>", "x")})
    path.write_text("\n".join([line] * 3000))
    records = read_records(str(path))
    looked, made = [], []
    monkeypatch.setattr(media_files, "check_file", looked.append)
    monkeypatch.setattr(RecordStore, "__getitem__", lambda store, row: made.append(row))
    assert media_files.find_missing(records) == []
    # To make a record of each takes many times as long as to look at its file.
    assert (len(looked), set(looked), made) == (3000, {str(tmp_path / "a.png")}, [])


def test_reports_say_what_fits_and_what_is_supervised(load_tiny, mixed_data) -> None:
    loaded = load_tiny()
    budget = budget_table(loaded.vision, 300, 512)
    assert "video of 3 frames: 39 tokens (10 patches and 2 markers + 25 patches and 2 markers), leaves 261" in budget
    dataset = SupervisedDataset(read_records(str(mixed_data)), loaded.tokenizer, loaded.vision, 300)
    supervised = supervision_table(dataset, 1)
    caption = loaded.tokenizer(" Un uomo con una maglia nera muove le mani davanti al petto.")["input_ids"]
    assert f"video-a: {len(caption) + 1} of {len(caption) + 40} tokens" in supervised
    assert "<vid_patch>" not in supervised


class TestTokenizers:
    """A tokenizer must know the text of the data."""

    @pytest.fixture
    def check(self, tmp_path):
        def run(tokenizer, texts) -> None:
            check_text_is_known(build(write(tmp_path / "a.json", *map(text, texts)), tokenizer))

        return run

    def words(self, vocabulary, **options):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        ids = {word: i for i, word in enumerate(["<unk>", "<eos>", *dict.fromkeys(vocabulary)])}
        raw = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>", **options)

    def test_the_own_text_is_known(self, check, tokenizer, caplog):
        check(tokenizer, ITALIAN)
        check(tokenizer, ["日本語のテキスト \U0001f389", "è ò ù"])
        check(tokenizer, ["la la la la " * 50])
        check(self.words(" ".join(ITALIAN).replace(".", " .").split()), ITALIAN)
        assert caplog.text == ""

    def test_mostly_unknown_words_are_an_error(self, check):
        with pytest.raises(ValueError, match=r"does not know \d+% of the text of the data \('.*'\); give the model's"):
            check(self.words(["cat", "dog", "."]), ITALIAN)

    def test_some_unknown_words_are_a_warning(self, check, caplog):
        words = " ".join(ITALIAN).replace(".", " .").split()
        with caplog.at_level(logging.WARNING):
            check(self.words([w for w in words if w not in ("gatto", "stella", "divano", "porta", "mani")]), ITALIAN)
        assert "of the text of the data" in caplog.text

    def test_letters_that_vanish_are_an_error(self, check):
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        # Without an unknown token, what is in no vocabulary is dropped in silence.
        raw = Tokenizer(models.BPE({"<eos>": 0, "a": 1, "b": 2, " ": 3}, []))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
        with pytest.raises(ValueError, match=r"does not know \d+% of the text of the data"):
            check(tokenizer, ITALIAN)
        with pytest.raises(ValueError, match="makes no token at all of the text of the data"):
            check(tokenizer, ["Hôtel"[:2], "MMXX"])

    def test_one_id_for_nearly_everything_is_an_error(self, check):
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        raw = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "x": 2, ".": 3}, unk_token="<unk>"))
        raw.normalizer = normalizers.Replace(__import__("tokenizers").Regex(r"\w+"), "x")
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        raw.decoder = decoders.Replace("x", " ".join("abcdefghilmnopqrstuvz" * 3))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
        with pytest.raises(ValueError, match=r"makes \d+ of \d+ tokens of the text of the data the same, id 2 \('x'\)"):
            check(tokenizer, ITALIAN * 2)


def test_kernels_that_do_the_same_in_less_time_are_named(load_tiny, tmp_path, monkeypatch) -> None:
    model, args = load_tiny().model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    set_attention(model.config, "sdpa")
    drops = [module for name, module in model.named_modules() if name.endswith("attn_dropout")]
    for module in drops:
        module.p = 0.25
    assert len(advise_on_kernels(model, args)) == 1
    args.bf16 = True
    fused, eager = advise_on_kernels(model, args)
    assert fused.startswith("--fused_gelu true")
    assert "attention drops out 0.25 of its weights: on a CPU --attn_implementation eager" in eager
    for module in drops:
        module.p = 0.0
    assert advise_on_kernels(model, args) == [fused]
    fuse_gelu(model)
    assert advise_on_kernels(model, args) == []
    args.bf16 = False
    # Products are tried where they are most of a step, and are not yet chosen.
    monkeypatch.setattr(report, "onednn_gain", lambda: 2.0)
    assert advise_on_kernels(model, args) == []
    monkeypatch.setattr(report, "_WIDE", 1)
    (onednn,) = advise_on_kernels(model, args)
    assert onednn == "--onednn true: products of matrices take 50% of the time on this CPU, in a trial"
    args.onednn = True
    assert advise_on_kernels(model, args) == []
