"""What others write and send: annotations of benchmarks, rows of corpora, requests of a server; read, or named."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

from fuzzing import attempt, cases, names
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import any_texts, damaged, json_values, numbers, plain_texts

from llava.data.localized_narratives.rows import parse_narrative
from llava.data.placeholders import literal_text
from llava.data.webvid import read_rows
from llava.eval.annotations import read_annotations
from llava.serve.web.chat import ChatError, parse_chat

some = st.one_of(st.none(), json_values)


def either(right: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """What should stand there, mostly."""
    return st.one_of(right, right, right, right, json_values)


_places = st.one_of(st.lists(st.floats(0, 100), min_size=4, max_size=4), st.lists(numbers, max_size=5))
_spans = st.one_of(st.lists(st.floats(0, 9), min_size=2, max_size=2), st.lists(numbers, max_size=3))
_ids = st.one_of(st.integers(1, 3), st.sampled_from(("1", "2")))
_sentences = st.one_of(
    plain_texts, st.lists(st.one_of(plain_texts, st.fixed_dictionaries({"sent": plain_texts})), max_size=3)
)
_rows = st.fixed_dictionaries(
    {},
    optional={
        "id": either(_ids),
        "image": either(st.just("a.png")),
        "video": either(st.just("b.mp4")),
        "file_name": either(st.just("c.png")),
        "expression": either(plain_texts),
        "sentence": either(plain_texts),
        "sentences": either(_sentences),
        "caption": either(plain_texts),
        "captions": either(_sentences),
        "question": either(plain_texts),
        "answer": either(plain_texts),
        "bbox": either(_places),
        "box": either(_places),
        "boxes": either(st.lists(_places, max_size=2)),
        "span": either(_spans),
        "timestamps": either(_spans),
        "timestamp": either(_spans),
        "duration": either(st.floats(0, 99)),
        "height": either(st.integers(1, 99)),
        "width": either(st.integers(1, 99)),
        "image_id": either(_ids),
        "ann_id": either(_ids),
        "ref_id": either(_ids),
        "split": either(st.just("val")),
        "meta": either(
            st.fixed_dictionaries(
                {},
                optional={
                    "time_token": either(st.dictionaries(st.sampled_from(("<s>", "<e>", "<t0>")), numbers, max_size=3)),
                    "spatial_token": either(
                        st.fixed_dictionaries(
                            {},
                            optional={
                                "<bboxes>": either(
                                    st.dictionaries(st.sampled_from(("1", "2", "x")), _places, max_size=2)
                                )
                            },
                        )
                    ),
                    "split": either(_spans),
                    "width": numbers,
                    "height": numbers,
                },
            )
        ),
        "conversations": either(
            st.lists(st.fixed_dictionaries({"from": st.just("human"), "value": any_texts}), max_size=2)
        ),
    },
)
_objects = st.one_of(
    st.fixed_dictionaries(
        {}, optional={"images": either(st.lists(_rows, max_size=2)), "annotations": either(st.lists(_rows, max_size=2))}
    ),
    st.dictionaries(st.sampled_from(("v1", "v2")), either(st.one_of(st.floats(0, 9), _rows)), max_size=2),
    st.dictionaries(
        st.just("v1"),
        st.fixed_dictionaries(
            {"sentences": either(_sentences), "timestamps": either(st.lists(_spans, max_size=3)), "duration": numbers}
        ),
    ),
)
_LINES = st.tuples(st.sampled_from(("v1", "a b", "")), numbers.map(str), numbers.map(str), plain_texts).map(
    lambda parts: f"{parts[0]} {parts[1][:50]} {parts[2][:50]}##{parts[3]}"
)


def write_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


@st.composite
def annotation_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file of a benchmark, whole or damaged."""
    suffix = draw(st.sampled_from((".json", ".json", ".jsonl", ".txt", ".csv")))
    if suffix == ".json":
        content = write_json(draw(st.one_of(st.lists(_rows, max_size=3), _objects)))
    elif suffix == ".jsonl":
        content = b"\n".join(map(write_json, draw(st.lists(_rows, max_size=3))))
    elif suffix == ".txt":
        content = "\n".join(draw(st.lists(_LINES, max_size=3))).encode("utf-8", "surrogatepass")
    else:
        content = draw(tables(("id", "video", "length", "duration"))).encode("utf-8", "surrogatepass")
    return suffix, draw(damaged(content)) if draw(st.integers(0, 3)) == 0 else content


@st.composite
def tables(draw: st.DrawFn, columns: tuple[str, ...]) -> str:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(draw(st.one_of(st.just(columns), st.permutations(columns), st.lists(plain_texts, max_size=3))))
    for _ in range(draw(st.integers(0, 3))):
        writer.writerow(draw(st.lists(st.one_of(plain_texts, numbers.map(lambda n: str(n)[:40])), max_size=5)))
    return file.getvalue()


@cases(offline=900, in_ci=60)
@example(
    [(".json", b'[{"image": "a.png", "expression": "x", "bbox": [1' + b"0" * 400 + b", 1, 1, 1]}]")], "expressions"
)
@example(
    [(".json", b'{"images": [{"id": [1], "file_name": "a.png"}], "annotations": [{"image_id": {}, "caption": "x"}]}')],
    "captions",
)
@example([(".csv", b"id,length\na\x00,1\n")], "moments")
@example([(".json", b'{"a": ' * 3000)], "captions")
@given(
    st.lists(annotation_files(), min_size=1, max_size=2),
    st.sampled_from(("expressions", "moments", "tubes", "captions")),
)
def test_annotations_are_read_or_named(tmp_path_factory, files, layout):
    folder = tmp_path_factory.getbasetemp() / "annotations"
    folder.mkdir(exist_ok=True)
    paths = []
    for number, (suffix, content) in enumerate(files):
        paths.append(folder / f"f{number}{suffix}")
        paths[-1].write_bytes(content)
    found = attempt(read_annotations, layout, list(map(str, paths)))
    if isinstance(found, ValueError):
        assert names(found, *(path.name for path in paths))
        return
    assert found
    for sample in found:
        assert sample.media
        for box in sample.reference.boxes:
            assert 0 <= box.x1 < box.x2 <= 1
            assert 0 <= box.y1 < box.y2 <= 1
        if (span := sample.reference.span) is not None:
            assert 0 <= span.start <= span.end <= 1


@cases(offline=300, in_ci=20)
@example(".jsonl", b'{"videoid": 1, "name": "x", "a": 1' + b"0" * 5000 + b"}")
@example(".jsonl", b'{"videoid": ' * 3000)
@example(".csv", b"videoid,name\n1,a\x00b\n")
@given(st.sampled_from((".csv", ".jsonl")), st.binary(max_size=40))
def test_rows_of_webvid_are_read_or_named(tmp_path_factory, suffix, content):
    path = tmp_path_factory.getbasetemp() / f"rows{suffix}"
    path.write_bytes(content)
    found = attempt(read_rows, str(path), "name")
    if isinstance(found, ValueError):
        assert names(found, str(path))
    else:
        assert all("videoid" in row and "name" in row for row in found)


@cases(offline=200, in_ci=20)
@given(st.data())
def test_tables_of_webvid_are_read_or_named(tmp_path_factory, data):
    content = data.draw(tables(("videoid", "name"))).encode("utf-8", "surrogatepass")
    path = tmp_path_factory.getbasetemp() / "table.csv"
    path.write_bytes(data.draw(damaged(content)) if data.draw(st.booleans()) else content)
    found = attempt(read_rows, str(path), "name")
    assert not isinstance(found, ValueError) or names(found, str(path))


_NARRATIVES = st.fixed_dictionaries(
    {},
    optional={
        "dataset_id": either(plain_texts),
        "image_id": either(plain_texts),
        "annotator_id": either(_ids),
        "caption": either(any_texts),
        "timed_caption": either(
            st.lists(
                either(
                    st.fixed_dictionaries(
                        {}, optional={"utterance": either(any_texts), "start_time": numbers, "end_time": numbers}
                    )
                ),
                max_size=3,
            )
        ),
        "traces": either(
            st.lists(
                either(
                    st.lists(
                        either(st.fixed_dictionaries({}, optional={"x": numbers, "y": numbers, "t": numbers})),
                        max_size=3,
                    )
                ),
                max_size=2,
            )
        ),
    },
)


@cases(offline=400, in_ci=30)
@given(st.one_of(_NARRATIVES, json_values))
def test_narratives_are_read_or_say_why_not(row):
    found = attempt(parse_narrative, row)
    if isinstance(found, ValueError):
        return
    assert found.caption == " ".join(found.caption.split()) != ""
    assert all(math.isfinite(number) for point in found.points for number in point)
    assert [point.t for point in found.points] == sorted(point.t for point in found.points)


_PARTS = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": either(any_texts)}),
    st.fixed_dictionaries(
        {"type": st.sampled_from(("image_url", "video_url", "file", "x")), "image_url": some, "video_url": some}
    ),
    st.fixed_dictionaries(
        {
            "type": st.just("image_url"),
            "image_url": st.fixed_dictionaries(
                {
                    "url": st.sampled_from(
                        (
                            "data:image/png;base64,AA==",
                            "http://a/b.png",
                            "file-1",
                            "file:///etc/passwd",
                            "javascript:x",
                            "",
                        )
                    )
                }
            ),
        }
    ),
    st.fixed_dictionaries(
        {
            "type": st.just("file"),
            "file": st.dictionaries(
                st.sampled_from(("file_id", "file_data", "filename")), either(plain_texts), max_size=3
            ),
        }
    ),
    json_values,
)
_MESSAGES = st.fixed_dictionaries(
    {
        "role": either(st.sampled_from(("user", "assistant", "system", "developer"))),
        "content": either(st.one_of(any_texts, st.lists(_PARTS, max_size=3))),
    },
    optional={"name": json_values},
)
_REQUESTS = st.fixed_dictionaries(
    {"model": either(plain_texts), "messages": either(st.lists(_MESSAGES, min_size=1, max_size=3))},
    optional={
        "max_tokens": numbers,
        "max_completion_tokens": numbers,
        "temperature": numbers,
        "top_p": numbers,
        "top_k": numbers,
        "seed": numbers,
        "stop": either(st.lists(plain_texts, max_size=5)),
        "stream": st.booleans(),
        "n": numbers,
        "stream_options": either(st.fixed_dictionaries({}, optional={"include_usage": st.booleans(), "x": some})),
        "repetition_penalty": numbers,
        "logit_bias": some,
        "tools": some,
        "user": some,
        "foo": some,
    },
)


@cases(offline=600, in_ci=60)
@given(st.one_of(_REQUESTS, json_values))
def test_a_request_is_refused_by_its_field_or_read_as_it_stands(body):
    found = attempt(parse_chat, body, 512)
    if isinstance(found, ValueError):
        assert isinstance(found, ChatError)
        return
    assert 1 <= found.settings.max_new_tokens <= 512
    assert 0 <= found.settings.temperature <= 2
    assert 0 < found.settings.top_p <= 1
    assert len(found.messages) == len(body["messages"])
    for message, sent in zip(found.messages, body["messages"], strict=True):
        content = sent["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        words = [part["text"] for part in parts if part.get("type") == "text"]
        # Whatever placeholders somebody typed are words.
        assert literal_text(message.text) == literal_text("\n".join(words).strip()) or "\\<" in "".join(words)
        assert len(message.media) == len(parts) - len(words)
    assert found.messages[-1].role == "user"
