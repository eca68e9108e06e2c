"""The spellings of the field are read with their meaning, and no key is passed over in silence."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ITALIAN, turns
from PIL import Image

from llava.data.dataset import SupervisedDataset
from llava.data.formats import build_format
from llava.data.formats.base import label_segments
from llava.data.placeholders import placeholder_kinds
from llava.data.records import describe_notes, parse_record, read_records
from llava.data.train_tokenizer import text_without_media
from llava.types import Turn

SOURCE = "data.json, sample 1"
ANSWER = {"role": "assistant", "content": "un gatto"}
PICTURE = {"type": "image", "image": "a.png"}
CLIP = {"type": "video", "path": "c.mp4"}


def png(colour: int = 9) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def parse(sample: dict, **options):
    return parse_record({"id": "s", **sample}, SOURCE, "/pics", "/clips", **options)


def asked(*parts, **beside) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **beside}


def names(record) -> list[str]:
    return [Path(file.path).name for file in record.media]


SPELLINGS = {
    "images": {"images": ["a.png"], "conversations": turns("<image>", "x")},
    "images as one path": {"images": "a.png", "conversations": turns("<image>", "x")},
    "videos": {"videos": ["c.mp4"], "conversations": turns("<video>", "x")},
    "objects": {"image": {"path": "a.png", "bytes": None}, "conversations": turns("<image>", "x")},
    "list of objects": {"videos": [{"path": "c.mp4"}], "messages": turns("<video>", "x")},
    "messages": {"image": "a.png", "messages": [{"role": "user", "content": "<image>"}, ANSWER]},
    "list of objects as datasets stores it": {
        "image": "a.png", "conversations": {"from": ["human", "gpt"], "value": ["<image>", "x"]},
    },
    "parts": asked(PICTURE, {"type": "text", "text": "che cos'è?"}),
    "part of a clip": asked(CLIP, "che cos'è?"),
    "address of a part": asked({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}),
    "address as a string": asked({"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "?"}),
    "video address": asked({"type": "video_url", "video_url": {"url": "file:///clips/c.mp4"}}),
    "part without a type": asked({"image": "a.png"}, {"text": "?"}),
    "null columns of a table": asked(
        {"type": "image", "image": "a.png", "text": None, "video": None}, {"type": "text", "text": "?", "image": None}
    ),
    "places in parts, files beside": asked({"type": "image"}, {"type": "text", "text": "?"}, images=["a.png"]),
    "both, saying the same": asked(PICTURE, images=["a.png"]),
    "beside a turn's text": {"messages": [{"role": "user", "content": "che cos'è?", "images": ["a.png"]}, ANSWER]},
    "beside a turn's place": {"messages": [{"role": "user", "content": "ecco <video>", "video": "c.mp4"}, ANSWER]},
}  # fmt: skip


@pytest.mark.parametrize("case", SPELLINGS)
def test_spelling_is_read_with_its_media(case):
    notes = {"unread": {}, "habits": {}, "without_id": 0}
    record = parse(SPELLINGS[case], notes=notes)
    kinds = placeholder_kinds(record.turns[0].text)
    assert names(record) == (["a.png"] if kinds == ["image"] else ["c.mp4"])
    assert [file.kind for file in record.media] == kinds
    assert record.turns[1].role == "assistant"
    assert notes == {"unread": {}, "habits": {}, "without_id": 0}


def test_parts_stay_in_order_and_are_joined_as_the_family_writes():
    record = parse(
        asked({"type": "text", "text": "Prima "}, {**PICTURE, "image": "1.png"}, {"type": "text", "text": " poi\\"},
              {**PICTURE, "image": "2.png"}, CLIP, {"type": "text", "text": "fine"})
    )  # fmt: skip
    assert record.turns[0] == Turn("user", "Prima <image> poi\\\n<image><video>\nfine")
    assert names(record) == ["1.png", "2.png", "c.mp4"]


def test_own_media_of_parts_and_the_sample_s_list_meet_in_reading_order():
    bare = {"type": "image"}
    record = parse(asked(bare, {**PICTURE, "image": "own.png"}, "e <image>", images=["first.png", "third.png"]))
    assert names(record) == ["first.png", "own.png", "third.png"]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (asked({"type": "audio", "audio": "a.wav"}), r"turn 1: a part has the unknown type 'audio'; known: "),
        (asked({"type": "text"}), 'turn 1: "text" of a part must be a string, found null'),
        (asked(7), "turn 1: expected a part with a type, found int"),
        (asked({"type": "image", "image": "a.png", "url": "b.png"}), "a part of type 'image' has image and url"),
        (asked(PICTURE, images=["b.png"]), "has 1 <image>, but the sample has 2 image files; .* write <image> where"),
        (asked({"type": "image"}), r"1 <image>, but the sample has 0 image files; .* write \\<image>"),
        ({"image": "a", "images": ["b"], "conversations": turns("<image>", "x")}, "both 'image' and 'images', and"),
        ({"messages": turns("a", "b"), "conversations": turns("c", "d")}, "both 'conversations' and 'messages'"),
        (asked({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}), r"https://x\.org/a\.png: is an a"),
        ({"image": "s3://b/a.png", "conversations": turns("<image>", "x")}, r"\(s3://\), and only files .* fetch"),
        ({"image": "QUJD" * 9999, "conversations": turns("<image>", "x")}, "39996 characters and is no path; write"),
        ({"image": "data:image/png;base64,@@", "conversations": turns("<image>", "x")}, "is not base64"),
        ({"image": {"height": 3}, "conversations": turns("<image>", "x")}, '"image" must be a path'),
        ({"image": b"", "conversations": turns("<image>", "x")}, "0 image files"),
        ({"conversatons": turns("", "x")}, 'needs "conversations".*did you mean "conversatons" to be that'),
        ({"image": "a.png", "imgae": "b.png", "conversations": turns("<image> <image>", "x")},
         '2 <image>, but the sample has 1 image file; .*; nothing reads "imgae"; did you mean "image"'),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_spelling_is_one_clear_line(sample, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(sample)
    assert str(caught.value).startswith("sample 's' (data.json, sample 1)")
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


BLIND = {
    "Image": "a.png", "IMAGES": ["a.png"], "img": "a", "frames": ["1.jpg", "2.jpg"], "video_path": "c.mp4",
    "image_path": "x/y", "image_file": "a.png", "imgae": "a.png", "vidoe": "c.mp4", "video_url": "http://x.org/c",
    "file": "a.JPG", "media": [{"path": "a.png"}], "image_base64": "QUJD" * 99, "clip": "c.mp4",
    "pictures": {"path": "p"}, "column": {"bytes": b"x", "path": None}, "image1": "a.png", "img_bytes": b"x",
}  # fmt: skip


@pytest.mark.parametrize("key", BLIND)
def test_a_key_that_looks_like_media_is_an_error_where_a_sample_has_none(key):
    sample = {"conversations": turns("", "un gatto"), key: BLIND[key]}
    with pytest.raises(
        ValueError, match=f'has no media, but "{key}" .* it would be trained on blind.*--ignore_keys {key}'
    ):
        parse(sample)
    assert parse(sample, ignore_keys=[key]).media == ()


@pytest.mark.parametrize(
    ("turn", "key"),
    [({"from": "human", "value": "guarda", "img": "a.png"}, "turn.img"),
     ({"from": "human", "value": [{"type": "text", "text": "guarda", "photo": "a.jpg"}]}, "part.photo")],
)  # fmt: skip
def test_a_key_of_a_turn_or_a_part_that_looks_like_media_is_an_error_too(turn, key):
    with pytest.raises(ValueError, match=f'has no media, but "{key}" .* blind.*remove the key'):
        parse({"conversations": [turn, turns("", "un gatto")[1]]})


@pytest.mark.parametrize(
    "harmless",
    [{"frames": 120}, {"image_id": "000123"}, {"video_id": "x7"}, {"Image": None}, {"video_path": ""}, {"images": []},
     {"caption": "il file a.png è rotto, dice"}, {"url": "https://it.wikipedia.org/wiki/File:A.jpg"}, {"fps": 8.0}],
)  # fmt: skip
def test_keys_that_hold_no_media_stop_nothing(harmless):
    assert parse({"conversations": turns("", "un gatto"), **harmless}).media == ()


def test_other_keys_are_named_once_with_their_number(tmp_path):
    text = turns("", "un gatto")
    samples = [
        {"id": n, "conversations": text, "licence_note": "x", "license": "CC", **({"varables": {}} if n else {})}
        for n in range(3)
    ]
    samples[2]["varables"] = {"temporal_input_locations": [0.5]}
    samples[2]["conversations"] = [{"from": "human", "value": "ciao", "weight": 0}, *text[1:]]
    samples.append({"conversations": text, "image": "a.png"} | {"conversations": turns("<image>", "x"), "Video": "b"})
    samples.append({"id": 9, "image": "", "conversations": text})
    path = tmp_path / "a.json"
    path.write_text(json.dumps(samples))
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        lines = describe_notes(read_records(str(path), cache_dir=cache and str(cache)))
        assert sorted(lines) == [
            f"{path}: 1 of 5 samples have no id; they are named after file and place",
            f"{path}: 1 sample of 5 has an empty string where a file of media would stand, which is none",
            f'{path}: nothing reads the key "Video", which 1 sample of 5 has; did you mean "video"?',
            f'{path}: nothing reads the key "licence_note", which 3 samples of 5 have',
            f'{path}: nothing reads the key "varables", which 1 sample of 5 has; did you mean "variables"?',
            f'{path}: nothing reads the key "weight" of a turn, which 1 sample of 5 has',
        ]


HABITS = {
    "a clip shown as <image>": (
        {"video": "c.mp4", "conversations": turns("<image>\nche cosa succede?", "x")}, "video_as_image", ["c.mp4"]
    ),
    "two clips shown as <image>": (
        {"video": ["c.mp4", "d.mp4"], "conversations": turns("<image> e <image>", "x")}, "video_as_image",
        ["c.mp4", "d.mp4"],
    ),
    "an empty image": ({"image": "", "conversations": turns("ciao", "x")}, "empty_media", []),
    "an empty image of a turn": ({"conversations": [turns("ciao", "x")[0] | {"image": ""}]}, "empty_media", []),
    "an empty video beside an image": (
        {"video": "", "image": "a.png", "conversations": turns("<image>", "x")}, "empty_media", ["a.png"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HABITS)
def test_habits_of_the_family_are_read_as_they_are_meant_and_counted(case):
    sample, habit, expected = HABITS[case]
    notes = {"unread": {}, "habits": {}, "without_id": 0}
    record = parse(sample, notes=notes)
    assert names(record) == expected
    assert [file.kind for file in record.media] == placeholder_kinds(record.turns[0].text)
    assert notes["habits"] == {habit: 1}


@pytest.mark.parametrize(
    ("sample", "error"),
    [
        # One <image> for two clips, or a picture beside a clip: which is meant cannot be told.
        ({"video": ["c.mp4", "d.mp4"], "conversations": turns("<image>", "x")}, "1 <image>, but the sample has 0"),
        ({"video": "c.mp4", "conversations": turns("<image> <video>", "x")}, "1 <image>, but the sample has 0"),
        ({"image": "", "conversations": turns("<image>", "x")}, "1 <image>, but the sample has 0"),
        ({"image": ["a.png", ""], "conversations": turns("<image> <image>", "x")}, "must be a path or a list of"),
    ],
)
def test_what_only_looks_like_a_habit_of_the_family_is_an_error(sample, error):
    with pytest.raises(ValueError, match=error):
        parse(sample)


def test_an_id_that_is_missing_is_made_up_from_file_and_place(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps({"id": None, "conversations": turns("", "x")}) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([{"conversations": turns("", "x")}] * 2))
    records = read_records([str(tmp_path / name) for name in ("a.jsonl", "b.json")])
    assert [record.id for record in records] == ["a.jsonl:2", "b.json:1", "b.json:2"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_number_of_thousands_of_digits_is_one_line(tmp_path, name):
    sample = '{"id": 1, "seed": ' + "9" * 5000 + ', "conversations": [{"from": "gpt", "value": "x"}]}'
    path = tmp_path / name
    path.write_text(f"[\n{sample}]" if name == "a.json" else f"\n{sample}")
    with pytest.raises(ValueError, match=rf"{name}(:|,) line 2: has a whole number of thousands of digits"):
        read_records(str(path))
    with pytest.raises(ValueError, match=r"has 9{40}; a coordinate is a fraction"):
        parse(
            {"conversations": turns("<TEMP-INPUT>", "x"), "variables": {"temporal_input_locations": [int("9" * 400)]}}
        )


@pytest.mark.parametrize(
    "value", [png(), {"bytes": png(), "path": "x/a.png"}, "data:image/png;base64," + base64.b64encode(png()).decode()]
)
def test_bytes_become_a_file_of_their_own(tmp_path, value):
    record = parse({"image": value, "conversations": turns("<image>", "x")}, media_dir=tmp_path)
    (file,) = record.media
    assert Path(file.path).read_bytes() == png()
    assert file.path[: file.root] == str(tmp_path)
    again = parse({"images": [value], "conversations": turns("<image>", "x")}, media_dir=tmp_path)
    assert again.media == record.media


def test_a_picture_of_pillow_is_kept_without_loss(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    record = parse({"image": Image.fromarray(pixels), "conversations": turns("<image>", "x")}, media_dir=tmp_path)
    assert (np.asarray(Image.open(record.media[0].path)) == pixels).all()


@pytest.fixture
def dataset_rows() -> list[dict]:
    return [
        {"id": n, "images": [png(n)], "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": ITALIAN[n]}]},
        ]}
        for n in range(3)
    ]  # fmt: skip


def test_parquet_and_saved_datasets_give_their_pictures(tmp_path, dataset_rows):
    from datasets import Dataset, DatasetDict, Features, List, Value
    from datasets import Image as ImageFeature

    part = {"type": Value("string"), "text": Value("string")}
    features = Features(
        id=Value("int64"), images=List(ImageFeature()), messages=List({"role": Value("string"), "content": List(part)})
    )
    dataset = Dataset.from_list(dataset_rows, features=features)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        records = read_records(str(path), cache_dir=str(tmp_path / "cache"))
        assert [record.turns[1].text for record in records] == ITALIAN[:3]
        assert [Path(record.media[0].path).read_bytes() for record in records] == [png(n) for n in range(3)]
        assert [record.turns[0].text for record in records] == ["<image>\n?"] * 3
    DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "dict")
    with pytest.raises(ValueError, match=r"holds several splits; give one of them: .*dict/test, .*dict/train"):
        read_records(str(tmp_path / "dict"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"b\.parquet: cannot be read as parquet"):
        read_records(str(tmp_path / "b.parquet"))


@pytest.mark.parametrize("version", ["plain_lm", "qwen", "v1"])
def test_an_escaped_placeholder_is_the_word(tokenizer, version):
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    text_format = build_format(version, tokenizer)
    record = parse({"conversations": turns(r"il tag \<image> e \<video>", r"va in <p>, \<image>, C:\\<video>")})
    assert record.media == ()
    dataset = SupervisedDataset([record], tokenizer, None, 512, text_format=text_format)
    ids, labels = dataset.tokenize(record)
    learned = tokenizer.decode([label for label in labels if label != -100])
    assert "<image>, C:\\<video>" in learned
    assert "\\<image>" not in tokenizer.decode(ids)
    assert dataset.count_tokens([record]) == [len(ids)]
    assert text_without_media(record) == "il tag <image> e <video> va in <p>, <image>, C:\\<video>"


def test_an_escaped_placeholder_has_the_ids_of_the_literal_text(visual_tokenizer, tiny_vision):
    record = parse({"image": "a.png", "conversations": turns(r"<image> un \<image>", r"\<video> sì")})
    dataset = SupervisedDataset([record], visual_tokenizer, tiny_vision, 512)
    ids, _ = dataset.tokenize(record)
    words = visual_tokenizer(" un <image> <video> sì", add_special_tokens=False)["input_ids"]
    assert ids[-len(words) - 1 : -1] == words
    assert len(ids) == len(words) + 1 + tiny_vision.layout.num_tokens("image")
    assert label_segments(dataset.text_format.encode([Turn("user", r"\<image>")]))[0] == [
        *visual_tokenizer("<image>", add_special_tokens=False)["input_ids"], visual_tokenizer.eos_token_id,
    ]  # fmt: skip
