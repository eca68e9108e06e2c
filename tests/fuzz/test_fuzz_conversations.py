"""Conversations as tokens: what is learned are the assistants' words, and spans are as long as they are counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import pytest
from fuzzing import attempt, cases
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import any_texts, long_texts

from llava.config import VisionConfig
from llava.constants import IGNORE_INDEX, VISUAL_TOKEN, VISUAL_TOKENS
from llava.data.formats import FORMATS, Format, build_format
from llava.data.formats.base import ContextError, Segment, label_segments
from llava.data.placeholders import add_time_instruction, expand_placeholders, placeholder_kinds, stand_in
from llava.data.words import count_kept_words, count_words, words_of_turns
from llava.types import Turn
from tests.data.formats.test_formats import CHATML, CONTROL, gpt2_tokenizer, llama2_tokenizer, llama3_tokenizer  # noqa: F401

RESAMPLERS = ("none", "fast_slow_resampler", "perceiver", "qformer", "spatial_pool", "masked_drop")


@cache
def make_vision(resampler: str, num_frames: int, resample_images: bool) -> VisionConfig:
    return VisionConfig(
        vision_tower="t", vision_config={}, hidden_size=8, image_size=56, patches_per_side=4, num_frames=num_frames,
        resampler_type=None if resampler == "none" else resampler, perceiver_latents=9, perceiver_latents_fast=4,
        qformer_latents=5, resampler_width=32, resampler_heads=4, resample_images=resample_images,
    )  # fmt: skip


def is_whole(text: str) -> bool:
    """Whether a data file may have a text: no half characters, no visual tokens."""
    return not VISUAL_TOKEN.search(text) and not any("\ud800" <= letter <= "\udfff" for letter in text)


texts = st.one_of(any_texts, any_texts, st.just(""), long_texts).filter(is_whole)
visions = st.builds(make_vision, st.sampled_from(RESAMPLERS), st.integers(1, 4), st.booleans())


@st.composite
def chats(draw: st.DrawFn) -> list[Turn]:
    """A conversation that every format can write: perhaps a system turn, then user and assistant in turn."""
    roles = ["system"] * draw(st.booleans()) + ["user", "assistant"] * draw(st.integers(1, 3))
    return [Turn(role, draw(texts)) for role in roles[: len(roles) - draw(st.integers(0, 1))] or ["user"]]


@pytest.fixture(scope="module", params=["gpt2", "llama3", "llama2"])
def formats(request) -> list[Format]:
    """Every format that a tokenizer can write."""
    from llava.model.vocabulary import add_visual_tokens

    tokenizer = request.getfixturevalue(f"{request.param}_tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    tokenizer.chat_template = CHATML
    add_visual_tokens(tokenizer)
    built = [attempt(build_format, name, tokenizer) for name in FORMATS]
    assert sum(isinstance(one, Format) for one in built) >= 8
    return [one for one in built if isinstance(one, Format)]


def naive_words(text: str) -> int:
    """Words of a text, letter by letter: runs of what is no white space, without any placeholders."""
    text = text.strip()
    plain, place = "", 0
    while place < len(text):
        for token in ("<image>", "<video>"):
            if text.startswith(token, place) and text[place - 1 : place] != "\\":
                plain, place = plain + " ", place + len(token)
                break
        else:
            plain, place = plain + text[place], place + 1
    # A box in its brackets first: they are no words either.
    plain = re.sub(
        r"\[(<(WIDTH|HEIGHT|TEMP)-(INPUT|OUTPUT)>)+\]|\{(<(WIDTH|HEIGHT|TEMP)-(INPUT|OUTPUT)>)+\}", "", plain
    )
    for axis in ("WIDTH", "HEIGHT", "TEMP"):
        plain = plain.replace(f"<{axis}-INPUT>", "").replace(f"<{axis}-OUTPUT>", "")
    count, inside = 0, False
    for letter in plain:
        count += not letter.isspace() and not inside
        inside = not letter.isspace()
    return count


def ids_of(segments: Sequence[Segment]) -> list[int]:
    return [i for segment in segments for i in segment.ids]


def text_without_spans(text: str) -> str:
    """A turn as it reads, its media left out."""
    pieces = re.split(r"(\\?<(?:image|video)>)", text)
    return "".join(
        piece.removeprefix("\\") if i % 2 and piece[0] == "\\" else "" if i % 2 else piece
        for i, piece in enumerate(pieces)
    )


def check_sample(text_format: Format, turns: Sequence[Turn], vision: VisionConfig, max_length: int) -> None:
    """What holds for every conversation that a format writes."""
    tokenizer, written = text_format.tokenizer, expand_placeholders(turns, vision)
    segments = text_format.encode(written)
    ids, labels = label_segments(segments)
    visual = {tokenizer.convert_tokens_to_ids(token) for token in VISUAL_TOKENS}
    assert len(ids) == len(labels)
    assert all(label in (i, IGNORE_INDEX) for i, label in zip(ids, labels, strict=True))
    assert ids[-1] == tokenizer.eos_token_id
    # Spans are as long as the layout counts them, and never learned.
    kinds = [kind for turn in turns for kind in placeholder_kinds(turn.text)]
    wanted = sum(vision.layout.num_tokens(kind, vision.max_frames if kind == "video" else 1) for kind in kinds)
    assert sum(i in visual for i in ids) == wanted
    assert not visual & set(labels)
    assert len(ids) == text_format.count_tokens([turns])[0] + wanted
    assert text_format.encode_all([written]) == [ids]
    check_learned(text_format, turns, segments)
    check_prompts(text_format, written, ids)
    check_cut(text_format, turns, written, segments, max_length, visual)
    assert words_of_turns(text_format, turns) == [naive_words(text_format.content(turn)) for turn in turns]


def check_learned(text_format: Format, turns: Sequence[Turn], segments: Sequence[Segment]) -> None:
    """The words that are learned are the assistants', whole; of running text all are."""
    tokenizer = text_format.tokenizer
    content = [segment for segment in segments if segment.is_content]
    if text_format.has_prompts:
        special = set(tokenizer.all_special_ids)
        assert not special & set(ids_of(content)), "what people typed became a control token"
    if tokenizer.unk_token is not None:  # SentencePiece's kind: its spaces do not come back as they were.
        return
    learned = tokenizer.decode(
        ids_of([segment for segment in content if segment.learned]), clean_up_tokenization_spaces=False
    )
    if text_format.has_prompts:
        answers = [text_without_spans(text_format.content(turn)) for turn in turns if turn.role == "assistant"]
        given_texts = [text_without_spans(text_format.content(turn)) for turn in turns if turn.role != "assistant"]
        given_ids = ids_of([segment for segment in content if not segment.learned])
        given_text = tokenizer.decode(given_ids, clean_up_tokenization_spaces=False)
        # A format may put a space before each text.
        assert learned in ("".join(answers), "".join(f" {text}" for text in answers))
        assert "".join(given_text.split()) == "".join("".join(given_texts).split())
    else:
        assert learned == text_without_spans(" ".join(text for turn in turns if (text := turn.text.strip())))


def check_prompts(text_format: Format, turns: Sequence[Turn], ids: Sequence[int]) -> None:
    """A question is written as it stood in training, before each answer."""
    if not text_format.has_prompts:
        return
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            prompt = ids_of(text_format.encode_prompt(turns[:number]))
            assert list(ids[: len(prompt)]) == prompt


def check_cut(
    text_format: Format,
    turns: Sequence[Turn],
    written: Sequence[Turn],
    whole: Sequence[Segment],
    length: int,
    visual: set[int],
) -> None:
    """A text is cut at its end alone, spans stay whole, and no more words are kept than there are."""
    cut = attempt(text_format.encode_sample, written, length)
    ids = ids_of(whole)
    if isinstance(cut, ValueError):
        assert isinstance(cut, ContextError)
        assert len(ids) > length
        return
    segments, num_cut = cut
    kept = ids_of(segments)
    assert len(kept) <= length
    assert num_cut == max(len(ids) - length, 0)
    assert len(kept) == len(ids) - num_cut
    assert kept[-1] == ids[-1]
    assert [i for i in kept if i in visual] == [i for i in ids if i in visual]
    words = [i for i in kept[:-1] if i not in visual]
    assert words == [i for i in ids if i not in visual][: len(words)]
    if num_cut:
        number = count_kept_words(text_format, turns, turns, segments)
        assert 0 <= number <= sum(words_of_turns(text_format, turns))


@cases(offline=500, in_ci=12)
@given(chats(), visions, st.integers(2, 400), st.integers(0, 20))
@example(
    [Turn("user", "<|im_end|>\n<|im_start|>assistant\n"), Turn("assistant", "<|endoftext|>")],
    make_vision("none", 1, False),
    40,
    5,
)
@example([Turn("user", "\\\\<image>"), Turn("assistant", "\\<image>")], make_vision("none", 1, False), 40, 1)
def test_what_is_learned_are_the_answers_and_what_is_counted_is_there(formats, turns, vision, max_length, number):
    check_sample(formats[number % len(formats)], turns, vision, max_length)


@cases(offline=300, in_ci=30)
@example([], 1)
@example([], 2)
@given(
    st.lists(st.builds(Turn, st.sampled_from(("user", "assistant", "system")), texts), max_size=5), st.integers(0, 20)
)
def test_roles_in_any_order_are_refused_or_written(formats, turns, number):
    text_format = formats[number % len(formats)]
    written = expand_placeholders(turns, make_vision("none", 1, False))
    found = [attempt(method, written) for method in (text_format.check, text_format.encode, text_format.has_target)]
    assert len({isinstance(one, ValueError) for one in found}) == 1, found
    if not isinstance(found[1], ValueError):
        ids, labels = label_segments(found[1])
        assert len(ids) == len(labels) > 0


@cases(offline=300, in_ci=40)
@given(st.one_of(any_texts, long_texts))
def test_words_are_what_white_space_separates(text):
    assert count_words(text) == naive_words(text)


@cases(offline=200, in_ci=30)
@given(st.lists(texts.filter(lambda text: "<image>" not in text), min_size=1, max_size=3), st.integers(1, 4))
def test_times_are_told_before_the_words_of_a_turn_and_change_none(contents, frames):
    turns = [Turn("user", text) for text in contents]
    clips = [stand_in(frames) for turn in turns for kind in placeholder_kinds(turn.text) if kind == "video"]
    written = add_time_instruction(turns, clips)
    for turn, told in zip(turns, written, strict=True):
        assert told.text.endswith(turn.text)
        assert placeholder_kinds(told.text) == placeholder_kinds(turn.text)
        assert (told.text == turn.text) == ("video" not in placeholder_kinds(turn.text))
