"""Answers of grounded models: their syntax, their boxes in the picture, and coordinates in requests."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fond import Fond
from transformers import LogitsProcessorList

from llava.config import GroundingConfig
from llava.geometry import Box, Letterbox, TimeSpan
from llava.grounding.syntax import box_text, parse_boxes, parse_spans
from llava.serve.generate import Answer, Captioner, Request, read_answer
from llava.types import Coordinates, Media
from tests.conftest import FAMILIES

WHOLE = re.compile(r"\[(<WIDTH-\d{3}><HEIGHT-\d{3}>){2}\]|\{(<TEMP-\d{3}>){2}\}")
BEGUN = re.compile(r"(\[(<(WIDTH|HEIGHT)-\d{3}>){0,4}|\{(<TEMP-\d{3}>){0,2})$")
BINS = {"num_temporal_tokens": 21, "num_spatial_tokens": 41}


@pytest.fixture(scope="module")
def make_captioner(load_tiny):
    """A function that makes a tiny grounded model, whose weights are large enough that media and places matter."""

    def make(name: str = "llava_gpt2", **changes) -> Captioner:
        loaded = load_tiny(name, **{"grounding": "lape", "image_aspect_ratio": "pad", **BINS, **changes})
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.2)
        return Captioner(loaded, "cpu")

    return make


@pytest.fixture(scope="module")
def captioner(make_captioner) -> Captioner:
    return make_captioner()


def fond_of_places(captioner: Captioner) -> LogitsProcessorList:
    """Writes a box or a span as often as it may; likes bins, where none may stand, even better."""
    brackets = [captioner.tokenizer.convert_tokens_to_ids(bracket) for bracket in "[{"]
    bins = range(captioner.grounding.first_bin, len(captioner.tokenizer))
    return LogitsProcessorList([Fond(brackets, 20.0), Fond(list(bins), 40.0)])


def requests_of(media_dir: Path) -> list[Request]:
    place = Coordinates(spatial_width_input_locations=(0.1, 0.6), spatial_height_input_locations=(0.3, 0.9))
    image, video = Media("image", str(media_dir / "a.png")), Media("video", str(media_dir / "a.mp4"))
    return [
        Request([image], f"Un uomo {box_text('INPUT')}", coordinates=place),
        Request([video], "Il gatto {<TEMP-003>"),
        Request([], "una stella"),
    ]


def to_picture(box: Box, letterbox: Letterbox) -> list[float]:
    return [*letterbox.from_square(*box[:2]), *letterbox.from_square(*box[2:])]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_backbone_keeps_to_the_syntax_cached_or_not(make_captioner, media_dir: Path, name: str) -> None:
    captioner = make_captioner(name)
    requests, options = requests_of(media_dir), {"logits_processor": fond_of_places(captioner), "max_new_tokens": 24}
    for beams in (1, 3):
        answers = captioner.answer(requests, num_beams=beams, **options)
        assert answers == captioner.answer(requests, num_beams=beams, use_cache=False, **options)
        for answer in answers:
            assert not re.search(r"<(TEMP|WIDTH|HEIGHT)-", BEGUN.sub("", WHOLE.sub("", answer.text))), answer.text
            assert len(answer.boxes) + len(answer.spans) == len(WHOLE.findall(answer.text)) > 0


def test_batched_equals_single(captioner: Captioner, media_dir: Path) -> None:
    requests, options = requests_of(media_dir), {"logits_processor": fond_of_places(captioner), "max_new_tokens": 24}
    together = captioner.answer(requests, **options)
    assert together == [captioner.answer([request], **options)[0] for request in requests]
    assert captioner.generate(requests, **options) == [answer.text for answer in together]


def test_without_the_constraint_bins_come_anywhere(captioner: Captioner, media_dir: Path) -> None:
    requests, fond = requests_of(media_dir), fond_of_places(captioner)
    free = captioner.answer(requests, constrain=False, logits_processor=fond, max_new_tokens=8)
    assert all(answer.text.count("-") == 8 + answer.text.startswith("{") for answer in free)
    assert all(not answer.boxes and not answer.spans for answer in free)


@pytest.mark.parametrize("vision", [{}, {"image_aspect_ratio": "square"}], ids=["padded", "cut"])
def test_boxes_are_those_of_the_picture(make_captioner, media_dir: Path, vision: dict) -> None:
    captioner = make_captioner(**vision)
    request = Request([Media("image", str(media_dir / "a.png"))], "una stella [<WIDTH-020><HEIGHT-001>")
    (answer,) = captioner.answer([request], max_new_tokens=12)
    letterbox = captioner.vision.letterbox((60, 90))
    (told, *_) = parse_boxes(answer.text, captioner.grounding)
    assert answer.boxes[0] == pytest.approx(to_picture(told, letterbox))
    assert answer.boxes[0][:2] == pytest.approx((0.5, 0.0 if not vision else (1 / 40 * 56 + 4) / 64))


@pytest.mark.parametrize("beams", [1, 3])
def test_sub_bin_positions_are_near_their_bins(captioner: Captioner, media_dir: Path, beams: int) -> None:
    requests, options = requests_of(media_dir), {"logits_processor": fond_of_places(captioner), "num_beams": beams}
    answers = captioner.answer(requests, max_new_tokens=24, **options)
    finer = captioner.answer(requests, max_new_tokens=24, sub_bin=True, **options)
    assert [answer.text for answer in finer] == [answer.text for answer in answers]
    # Beams do not always take the likeliest of neighbouring bins.
    furthest = 0.5 if beams == 1 else 1.0
    grounding = captioner.grounding
    letterboxes = [captioner.vision.letterbox((60, 90)), captioner.vision.letterbox((48, 64))]
    for answer, letterbox in zip(finer, [*letterboxes, Letterbox(1, 1, 1)], strict=True):
        told = [to_picture(box, letterbox) for box in parse_boxes(answer.text, grounding)]
        bins = letterbox.side / np.tile([letterbox.width, letterbox.height], 2) / 40
        away = np.array([*answer.boxes, *told]).reshape(2, -1, 4)
        times = np.array([answer.spans, parse_spans(answer.text, grounding)]).reshape(2, -1, 2)
        distances = np.concatenate([np.ravel((away[0] - away[1]) / bins), np.ravel((times[0] - times[1]) * 20)])
        assert 1e-3 < np.abs(distances).max() <= furthest + 1e-6


def test_a_box_that_the_prompt_begins_is_told_whole(captioner: Captioner, media_dir: Path) -> None:
    request = Request([Media("image", str(media_dir / "a.png"))], "una stella gialla [<WIDTH-010>")
    for sub_bin in (False, True):
        (answer,) = captioner.answer([request], max_new_tokens=5, sub_bin=sub_bin)
        assert answer.text.startswith("[<WIDTH-010><HEIGHT-")
        assert len(answer.boxes) == 1
        # What the prompt says is no estimate.
        assert answer.boxes[0].x1 == 0.25


def test_several_answers_to_a_request(captioner: Captioner, media_dir: Path) -> None:
    requests, options = requests_of(media_dir), {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 9}
    answers = captioner.answer(requests, batch_size=2, sub_bin=True, **options)
    assert len(answers) == 6
    assert answers[2].text.startswith("{<TEMP-003>")
    assert answers[3].text.startswith("{<TEMP-003>")
    assert answers[0] != answers[1]


def test_coordinates_of_a_request_are_moved_to_the_square(
    captioner: Captioner, media_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    generate = captioner.model.generate

    def record(*args, **kwargs):
        seen.append(kwargs.get("variables"))
        return generate(*args, **kwargs)

    monkeypatch.setattr(captioner.model, "generate", record)
    requests = requests_of(media_dir)
    captioner.answer([requests[2], requests[0]], max_new_tokens=1)
    assert not any(seen[0][0].values())
    letterbox = captioner.vision.letterbox((60, 90))
    given = requests[0].coordinates
    assert seen[0][1]["spatial_width_input_locations"] == list(given.spatial_width_input_locations)
    heights = [(letterbox.top + y * letterbox.height) / letterbox.side for y in given.spatial_height_input_locations]
    assert seen[0][1]["spatial_height_input_locations"] == pytest.approx(heights)


def test_coordinates_of_a_request_matter(captioner: Captioner) -> None:
    answers = [
        captioner.answer(
            [Request([], "il gatto <TEMP-INPUT>", coordinates=Coordinates(temporal_input_locations=(time,)))]
        )
        for time in (0.0, 0.5, 1.0)
    ]
    assert answers[0] != answers[1] != answers[2]


def test_coordinates_must_be_those_of_the_prompt(captioner: Captioner) -> None:
    short = Request(
        [], f"una stella {box_text('INPUT')}", coordinates=Coordinates(spatial_width_input_locations=(0.1, 0.2))
    )
    with pytest.raises(ValueError, match=r"2 <HEIGHT-INPUT>, but .* has 0 numbers"):
        captioner.answer([short])


def test_a_model_without_coordinates_answers_with_text_alone(load_tiny) -> None:
    captioner = Captioner(load_tiny(), "cpu")
    (answer,) = captioner.answer([Request([], "il [")], sub_bin=True)
    assert isinstance(answer, Answer)
    assert (answer.boxes, answer.spans) == ([], [])
    assert answer.text == captioner.generate([Request([], "il [")])[0] == str(answer)
    with pytest.raises(ValueError, match="has coordinates, but this model has none; train it with --stage 2"):
        captioner.answer([Request([], "<TEMP-INPUT>", coordinates=Coordinates(temporal_input_locations=(0.1,)))])


def test_coordinates_are_words_to_a_model_with_placeholders(load_tiny) -> None:
    captioner = Captioner(load_tiny(grounding="placeholder"), "cpu")
    times = [Coordinates(temporal_input_locations=(time,)) for time in (0.1, 0.9)]
    one, other = captioner.answer([Request([], "il gatto <TEMP-INPUT>", coordinates=time) for time in times])
    assert one == other
    assert not one.boxes


def test_an_answer_reads_as_numbers() -> None:
    grounding = GroundingConfig(num_temporal=101, num_spatial=51, first_bin=7)
    text = "{<TEMP-010><TEMP-090>} la stella [<WIDTH-005><HEIGHT-010><WIDTH-025><HEIGHT-050>] e [<WIDTH-001>"
    answer = read_answer(text, grounding)
    assert answer == Answer(text, [Box(0.1, 0.2, 0.5, 1.0)], [TimeSpan(0.1, 0.9)])
    assert str(answer) == "{0.10 0.90} la stella [0.10 0.20 0.50 1.00] e [<WIDTH-001>"
    letterbox = Letterbox(side=100, height=50, width=100, top=25)
    assert read_answer(text, grounding, letterbox).boxes == [pytest.approx((0.1, 0.0, 0.5, 1.0))]


def test_bins_spelled_by_letters_are_taken_by_their_numbers() -> None:
    grounding = GroundingConfig(num_spatial=51, first_bin=7)
    text = "<WIDTH-003> [<WIDTH-005><HEIGHT-010><WIDTH-025><HEIGHT-050>]"
    assert read_answer(text, grounding, None, [0.11, 0.21, 0.51, 0.99]).boxes == [Box(0.1, 0.2, 0.5, 1.0)]
