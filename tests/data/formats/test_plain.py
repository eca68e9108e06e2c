"""Golden: exact ids and labels of plain language modelling, on the tiny tokenizer of conftest.py."""

from __future__ import annotations

import pytest

from llava.constants import IGNORE_INDEX
from llava.data.formats.base import (
    ContextError,
    PlainFormat,
    Segment,
    label_segments,
    preprocess_plain_lm,
    truncate_segments,
)
from llava.types import Turn

EOS = 0
CAPTION = "una stella gialla"
SPAN = "<vid_start><vid_patch><vid_end><slow_vid_start><vid_patch><vid_patch><slow_vid_end>"
SPAN_IDS = [386, 387, 388, 389, 387, 387, 390]
IMAGE = "<im_start><im_patch><im_end>"
IMAGE_IDS = [383, 384, 385]


def turns(*texts):
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(texts)]


def encode(tokenizer, *texts):
    encoded = preprocess_plain_lm([turns(*texts)], tokenizer, has_image=True)
    return encoded["input_ids"][0], encoded["labels"][0]


@pytest.fixture(scope="module")
def llama_tokenizer(tokenizer_dir):
    """A tokenizer that begins every text with a token of its own, as Llama's do."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    from llava.model.vocabulary import add_visual_tokens, load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_dir))
    add_visual_tokens(tokenizer)
    tokenizer.add_special_tokens({"bos_token": AddedToken("<s>", special=True)})
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A $B", special_tokens=[begin]
    )
    assert tokenizer("ciao")["input_ids"][0] == tokenizer.bos_token_id != EOS
    return tokenizer


def test_caption_of_a_video(visual_tokenizer):
    ids, labels = encode(visual_tokenizer, SPAN, CAPTION)
    assert ids == [*SPAN_IDS, 295, 380, 363, EOS]
    assert labels == [*7 * [IGNORE_INDEX], 295, 380, 363, EOS]


def test_text_is_supervised_from_its_first_token(visual_tokenizer):
    ids, labels = encode(visual_tokenizer, "", CAPTION)
    assert ids == [336, 380, 363, EOS]
    assert labels == ids


def test_text_before_between_and_behind_spans(visual_tokenizer):
    ids, labels = encode(visual_tokenizer, f"{CAPTION} {IMAGE} {CAPTION}{SPAN}", CAPTION)
    assert ids == [336, 380, 363, 221, *IMAGE_IDS, 295, 380, 363, *SPAN_IDS, 295, 380, 363, EOS]
    visual = {*IMAGE_IDS, *SPAN_IDS}
    assert labels == [IGNORE_INDEX if i in visual else i for i in ids]


def test_every_visual_position_and_no_other_is_ignored(visual_tokenizer, italian_vision):
    from llava.data.placeholders import expand_placeholders

    (video,) = expand_placeholders([Turn("user", "<video>")], italian_vision)
    ids, labels = encode(visual_tokenizer, video.text, CAPTION)
    assert len(ids) == 360 + 4
    assert labels == [*360 * [IGNORE_INDEX], 295, 380, 363, EOS]


def test_all_turns_are_joined_by_single_spaces(visual_tokenizer):
    ids, labels = encode(visual_tokenizer, " una ", "\nstella", "", "gialla  ")
    assert ids == encode(visual_tokenizer, "una stella gialla")[0] == labels
    assert encode(visual_tokenizer, " a ", "", "  ", "b\n", "c  d") == encode(visual_tokenizer, "a b c  d")


def test_role_and_content_spelling(visual_tokenizer):
    source = [{"role": "user", "content": SPAN}, {"role": "assistant", "content": CAPTION}]
    encoded = preprocess_plain_lm([source], visual_tokenizer, has_image=True)
    assert encoded["input_ids"][0] == encode(visual_tokenizer, SPAN, CAPTION)[0]


def test_end_of_text_is_not_doubled(visual_tokenizer):
    ids, labels = encode(visual_tokenizer, f"{CAPTION}<|endoftext|>")
    assert ids == labels == [336, 380, 363, EOS]


def test_end_of_text_within_the_text_stays_and_is_supervised(visual_tokenizer):
    ids, labels = encode(visual_tokenizer, f"{CAPTION}<|endoftext|>{CAPTION}")
    assert ids == labels == [336, 380, 363, EOS, 336, 380, 363, EOS]


def test_span_alone_still_ends_the_text(visual_tokenizer):
    assert encode(visual_tokenizer, SPAN) == ([*SPAN_IDS, EOS], [*7 * [IGNORE_INDEX], EOS])


def test_several_conversations(visual_tokenizer):
    encoded = preprocess_plain_lm([turns(CAPTION), turns("ciao")], visual_tokenizer)
    assert encoded == {
        "input_ids": [[336, 380, 363, EOS], [67, 73, 65, 79, EOS]],
        "labels": [[336, 380, 363, EOS], [67, 73, 65, 79, EOS]],
    }


def test_beginning_of_text_is_kept_once(llama_tokenizer):
    bos = llama_tokenizer.bos_token_id
    ids, labels = encode(llama_tokenizer, SPAN, CAPTION)
    assert ids == [bos, *SPAN_IDS, 295, 380, 363, EOS]
    assert labels == [bos, *7 * [IGNORE_INDEX], 295, 380, 363, EOS]


def test_visual_tokens_without_media_are_an_error(visual_tokenizer):
    with pytest.raises(ValueError, match="has_image is False"):
        preprocess_plain_lm([turns(SPAN)], visual_tokenizer)


def test_placeholder_left_in_the_text_is_an_error(visual_tokenizer):
    with pytest.raises(ValueError, match="unexpanded"):
        encode(visual_tokenizer, "<video>")


def test_tokenizer_without_visual_tokens_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="does not know <im_"):
        encode(tokenizer, IMAGE)


def test_truncation_cuts_text_from_the_end_and_keeps_spans_and_last_token(visual_tokenizer):
    segments = PlainFormat(visual_tokenizer).encode([Turn("user", f"{CAPTION} {IMAGE} {CAPTION}")])
    full = [336, 380, 363, 221, *IMAGE_IDS, 295, 380, 363, EOS]

    def cut(length):
        return label_segments(truncate_segments(segments, length))[0]

    assert cut(99) == cut(11) == full
    assert cut(10) == [336, 380, 363, 221, *IMAGE_IDS, 295, 380, EOS]
    assert cut(8) == [336, 380, 363, 221, *IMAGE_IDS, EOS]
    assert cut(6) == [336, 380, *IMAGE_IDS, EOS]
    assert cut(5) == [336, *IMAGE_IDS, EOS]
    with pytest.raises(ContextError, match=r"needs at least 5 tokens \(3 of them visual\), but the limit is 4"):
        cut(4)


def test_truncation_of_text_alone():
    segments = [Segment([1, 2, 3, 4], visual=False), Segment([0], visual=False)]
    assert label_segments(truncate_segments(segments, 3))[0] == [1, 2, 0]
    assert label_segments(truncate_segments(segments, 2))[0] == [1, 0]


def test_truncated_labels_still_belong_to_their_ids(visual_tokenizer):
    segments = PlainFormat(visual_tokenizer).encode([Turn("user", f"{IMAGE} {CAPTION}")])
    ids, labels = label_segments(truncate_segments(segments, 6))
    assert (ids, labels) == ([*IMAGE_IDS, 295, 380, EOS], [*3 * [IGNORE_INDEX], 295, 380, EOS])
