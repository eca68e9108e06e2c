"""The queue of the page and the endpoint: batches, streams, limits and faults, without a server."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from fond import Fond
from transformers import LogitsProcessorList

from llava.serve.generate import Captioner, Request
from llava.serve.web.engine import (
    BusyError,
    Delta,
    Done,
    Engine,
    Failed,
    QueueLimits,
    Settings,
    UnknownModelError,
)
from llava.serve.web.uploads import Uploads
from llava.types import Media, Turn

GREEDY = Settings(max_new_tokens=12)


def make_captioner(load_tiny, **changes) -> Captioner:
    loaded = load_tiny(**{"image_aspect_ratio": "pad", **changes})
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return Captioner(loaded, "cpu")


@pytest.fixture(scope="module")
def captioner(load_tiny) -> Captioner:
    return make_captioner(load_tiny)


@pytest.fixture
def engine(captioner: Captioner):
    engine = Engine({"tiny": captioner}, Uploads(), QueueLimits(max_queue=3, max_batch=4), gather=0.2)
    yield engine
    engine.close()


def requests_of(media_dir: Path) -> list[Request]:
    return [
        Request([Media("image", str(media_dir / "a.png"))], "Un uomo"),
        Request([Media("video", str(media_dir / "a.mp4"))], "Il gatto"),
        Request([], "una stella"),
    ]


def collect(engine: Engine, requests: list[Request], settings: list[Settings]) -> list[list]:
    """The events of requests that are submitted together."""
    told: list[list] = [[] for _ in requests]
    over = [threading.Event() for _ in requests]

    def listen(index: int):
        def tell(event) -> None:
            told[index].append(event)
            if not isinstance(event, Delta):
                over[index].set()

        return tell

    prepared = [engine.prepare("tiny", request, how) for request, how in zip(requests, settings, strict=True)]
    for index, one in enumerate(prepared):
        engine.submit("tiny", *one, listen(index))
    assert all(event.wait(60) for event in over)
    return told


def test_requests_that_come_together_are_one_batch_and_get_the_captioners_answers(
    engine: Engine, captioner: Captioner, media_dir: Path
) -> None:
    requests = requests_of(media_dir)
    lengths = [3, 12, 7]
    told = collect(engine, requests, [Settings(max_new_tokens=length) for length in lengths])
    assert list(engine.batch_sizes) == [3]
    assert max(len(events) for events in told) > 3
    for request, length, events in zip(requests, lengths, told, strict=True):
        *deltas, done = events
        (expected,) = captioner.answer([request], max_new_tokens=length)
        assert isinstance(done, Done)
        assert (done.answer, done.text) == (expected, str(expected))
        assert "".join(delta.text for delta in deltas) == done.text
        assert done.num_tokens <= length
        assert done.reason == ("stop" if done.num_tokens > len(done.ids) else "length")


def test_only_requests_that_are_decoded_alike_are_batched(engine: Engine, media_dir: Path) -> None:
    requests = requests_of(media_dir)
    collect(engine, requests, [GREEDY, Settings(max_new_tokens=12, temperature=1.0, seed=1), GREEDY])
    assert sorted(engine.batch_sizes) == [1, 2]


def test_a_seed_gives_the_same_sample_again(engine: Engine, media_dir: Path) -> None:
    (request, *_) = requests_of(media_dir)
    sampled = Settings(max_new_tokens=12, temperature=2.0, seed=7)
    texts = [collect(engine, [request], [how])[0][-1].text for how in (sampled, sampled, GREEDY)]
    assert texts[0] == texts[1] != texts[2]


def test_a_batch_does_not_outgrow_the_context(engine: Engine, captioner: Captioner, media_dir: Path) -> None:
    long, short = Request([], "il gatto " * 120), Request([], "una stella")
    prompt, settings = engine.prepare("tiny", long, Settings(max_new_tokens=500))
    room = captioner.context - len(prompt.ids)
    assert settings.max_new_tokens == room < 400
    told = collect(engine, [long, short], [Settings(max_new_tokens=500), Settings(max_new_tokens=400)])
    assert list(engine.batch_sizes) == [1, 1]
    assert all(isinstance(events[-1], Done) for events in told)


def test_stop_texts_end_an_answer_and_are_not_told(engine: Engine, media_dir: Path) -> None:
    (request, *_) = requests_of(media_dir)
    whole = collect(engine, [request], [GREEDY])[0][-1].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    *deltas, done = collect(engine, [request], [Settings(max_new_tokens=12, stop=(stop,))])[0]
    assert done.text == whole[: whole.index(stop)] == "".join(delta.text for delta in deltas)
    assert done.reason == "stop"


def test_a_stream_that_is_closed_ends_its_request(engine: Engine, media_dir: Path) -> None:
    (request, *_) = requests_of(media_dir)
    stream = engine.stream("tiny", *engine.prepare("tiny", request, Settings(max_new_tokens=400)))
    assert isinstance(next(stream), Delta)
    stream.close()
    # The model is free again at once, and not 400 tokens later.
    assert engine.call(lambda: "free").result(20) == "free"


def test_boxes_are_told_when_they_are_closed(load_tiny, media_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = make_captioner(load_tiny, grounding="lape", num_temporal_tokens=21, num_spatial_tokens=41)
    brackets = [captioner.tokenizer.convert_tokens_to_ids("[")]
    generate = captioner.answer_prompts

    def with_boxes(prompts, room, sub_bin, options):
        fond = LogitsProcessorList([Fond(brackets, 30.0), *options["logits_processor"]])
        return generate(prompts, room, sub_bin, {**options, "logits_processor": fond})

    monkeypatch.setattr(captioner, "answer_prompts", with_boxes)
    engine = Engine({"tiny": captioner}, Uploads())
    (request, *_) = requests_of(media_dir)
    *deltas, done = engine.stream("tiny", *engine.prepare("tiny", request, Settings(max_new_tokens=14)))
    engine.close()
    assert len(done.answer.boxes) == 2
    assert "".join(delta.text for delta in deltas) == done.text
    assert "[0." in deltas[0].text
    # Only the box that is still open at the end is told with its bins.
    assert not any("<WIDTH" in delta.text for delta in deltas[:-1])


def test_the_queue_is_bounded(engine: Engine) -> None:
    with engine.admit(), engine.admit():
        with engine.admit(), pytest.raises(BusyError, match="3 requests are waiting or running"), engine.admit():
            pass
        with engine.admit():
            pass


def test_conversations_and_media_in_them(engine: Engine, captioner: Captioner, media_dir: Path) -> None:
    media = [Media("image", str(media_dir / "a.png")), Media("video", str(media_dir / "a.mp4"))]
    history = [Turn("user", "<image>\nUn uomo"), Turn("assistant", "una stella")]
    request = Request(media, "<video>\nIl gatto", history=history)
    prompt, _ = engine.prepare("tiny", request, GREEDY)
    spans = captioner.vision.layout
    assert len(prompt.media) == 2
    visual = sum(i in set(captioner.vision.visual_token_ids) for i in prompt.ids)
    assert visual == spans.num_tokens("image") + spans.num_tokens("video", 3)
    text = captioner.tokenizer.decode(prompt.ids, skip_special_tokens=True)
    assert text.index("uomo") < text.index("stella") < text.index("gatto")
    with pytest.raises(ValueError, match="the request has"):
        engine.prepare("tiny", Request(media[:1], "Il gatto", history=[Turn("user", "<video>")]), GREEDY)


def test_what_cannot_be_answered(engine: Engine, media_dir: Path) -> None:
    with pytest.raises(UnknownModelError, match="there is no model 'other'; there is tiny"):
        engine.prepare("other", Request([], "Un uomo"), GREEDY)
    with pytest.raises(ValueError, match="but the context of tiny is 512; shorten it"):
        engine.prepare("tiny", Request([], "il gatto " * 300), GREEDY)
    with pytest.raises(ValueError, match="visual tokens of its own"):
        engine.prepare("tiny", Request([], "il gatto <im_patch>"), GREEDY)


def test_a_request_at_fault_spoils_no_others(
    engine: Engine, captioner: Captioner, media_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of(media_dir)
    generate = captioner.model.generate

    def refuse_videos(*args, **kwargs):
        if "video" in (kwargs.get("modalities") or ()):
            raise ValueError("no videos today")
        return generate(*args, **kwargs)

    monkeypatch.setattr(captioner.model, "generate", refuse_videos)
    image, video, text = (events[-1] for events in collect(engine, requests, [GREEDY] * 3))
    assert isinstance(image, Done)
    assert isinstance(text, Done)
    assert video == Failed("no videos today", is_users=True)


def test_a_fault_of_the_program_is_logged_and_nobody_waits_for_ever(
    engine: Engine, captioner: Captioner, media_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    def fail(*args, **kwargs):
        raise KeyError("a fault")

    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(captioner.model, "generate", fail)
        (events,) = collect(engine, requests_of(media_dir)[:1], [GREEDY])
        engine.call(int).result(20)  # The log is written behind the answer.
    assert events == [Failed("the model failed; the server's log says why")]
    assert "KeyError" in caplog.text
    assert isinstance(collect(engine, requests_of(media_dir)[:1], [GREEDY])[0][-1], Done)
    with monkeypatch.context() as patch:
        patch.setattr(captioner.model, "generate", run_out)
        (events,) = collect(engine, requests_of(media_dir)[:1], [GREEDY])
    assert "no memory" in events[-1].message
