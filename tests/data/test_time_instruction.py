"""--add_time_instruction: a user's turn tells how long its videos are and when their frames were taken."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from llava.constants import IGNORE_INDEX
from llava.data.dataset import SupervisedDataset, check_samples
from llava.data.formats import FORMATS, build_format
from llava.data.media import load_media, sample_video
from llava.data.placeholders import add_time_instruction
from llava.train.command_line import parse_arguments
from llava.types import Media, Record, Turn, VisualInput

# A clip of the tests has 12 frames, 8 a second; its 3 sampled ones are the first, the sixth and the last.
SENTENCE = "The video lasts 1.50 seconds. Frames shown: 3, at 0.00, 0.75, 1.38 seconds."


@pytest.fixture
def telling(tiny_vision):
    return replace(tiny_vision, add_time_instruction=True)


def ask(media_dir, question: str = "<video>\nChe cosa vedi?", count: int = 1, **changes) -> Record:
    clips = tuple(Media("video", str(media_dir / name)) for name in ("a.mp4", "b.mp4")[:count])
    return Record("s1", (Turn("user", question), Turn("assistant", "un gatto")), clips, "x.json, sample 1", **changes)


def read(record: Record, tokenizer, vision, version: str = "v1", **options) -> tuple[str, str, SupervisedDataset]:
    """The text of an example without its visual tokens, what of it is learned, and the data set."""
    dataset = SupervisedDataset([record], tokenizer, vision, 512, text_format=build_format(version, tokenizer))
    example = dataset[0]
    text = tokenizer.decode(example.input_ids, skip_special_tokens=False)
    for token in ("<vid_start>", "<vid_patch>", "<vid_end>", "<slow_vid_start>", "<slow_vid_end>"):
        text = text.replace(token, "")
    return text, tokenizer.decode([i for i in example.labels if i != IGNORE_INDEX]), dataset


def test_the_sentence_stands_before_the_users_text_and_is_not_learned(media_dir, visual_tokenizer, telling):
    text, learned, _ = read(ask(media_dir), visual_tokenizer, telling)
    assert f"USER: {SENTENCE}\n\nChe cosa vedi? ASSISTANT:" in text
    assert learned == " un gatto<|endoftext|>"
    plain, same, _ = read(ask(media_dir), visual_tokenizer, replace(telling, add_time_instruction=False))
    assert plain == text.replace(f"{SENTENCE}\n", "")
    assert same == learned


def test_several_videos_of_a_turn_are_numbered(media_dir, visual_tokenizer, telling):
    text, _, _ = read(ask(media_dir, "<video> o <video>?", 2), visual_tokenizer, telling)
    assert f"USER: {SENTENCE.replace('The video', 'Video 1')}\n{SENTENCE.replace('The video', 'Video 2')}\n" in text


def test_a_part_of_a_clip_keeps_the_times_of_the_clip(media_dir, visual_tokenizer, telling):
    text, _, _ = read(ask(media_dir, split=(4, 8)), visual_tokenizer, telling)
    assert "The video lasts 1.50 seconds. Frames shown: 3, at 0.50, 0.75, 1.00 seconds.\n" in text


def test_videos_stay_with_their_turns():
    turns = [Turn("system", "s"), Turn("user", "ciao"), Turn("assistant", "sì"), Turn("user", "<image> <video>")]
    written = add_time_instruction([*turns, Turn("user", "<video>")], [(2.0, (0.0, 1.0)), (4.0, (3.0,))])
    assert [turn.text for turn in written] == [
        "s", "ciao", "sì", "The video lasts 2.00 seconds. Frames shown: 2, at 0.00, 1.00 seconds.\n<image> <video>",
        "The video lasts 4.00 seconds. Frames shown: 1, at 3.00 seconds.\n<video>",
    ]  # fmt: skip


def test_text_and_images_are_left_as_they_are(media_dir, visual_tokenizer, telling):
    for record in (
        Record("t", (Turn("user", "ciao"), Turn("assistant", "sì"))),
        Record("i", (Turn("user", "<image>"), Turn("assistant", "sì")), (Media("image", str(media_dir / "a.png")),)),
    ):
        without = read(record, visual_tokenizer, replace(telling, add_time_instruction=False))
        assert read(record, visual_tokenizer, telling)[:2] == without[:2]


@pytest.mark.parametrize("version", [name for name in FORMATS if name not in ("plain_lm", "plain", "chat", "gemma")])
def test_lengths_count_a_stand_in_that_is_no_shorter(version, media_dir, visual_tokenizer, telling):
    needed = {"qwen": ["<|im_start|>", "<|im_end|>"], "mpt": ["<|im_start|>", "<|im_end|>"],
              "llama_v3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}  # fmt: skip
    tokenizer = deepcopy(visual_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": needed.get(version, [])}, replace_extra_special_tokens=False)
    _, _, dataset = read(ask(media_dir), tokenizer, telling, version)
    real, counted = len(dataset[0].input_ids), int(dataset.lengths[0])
    assert counted == len(dataset.tokenize(dataset.records[0])[0])
    assert real <= counted <= real + 15


def test_a_video_is_not_judged_by_the_length_of_its_stand_in(media_dir, visual_tokenizer, telling):
    record = ask(media_dir)
    dataset = SupervisedDataset(
        [record], visual_tokenizer, telling, 512, text_format=build_format("v1", visual_tokenizer)
    )
    dataset.max_length = len(dataset[0].input_ids)
    assert dataset.lengths[0] > dataset.max_length
    check_samples(dataset)
    assert len(dataset[0].input_ids) == dataset.max_length


def test_what_is_learned_or_left_out_cannot_tell_times(visual_tokenizer, telling):
    for version, message in (("plain_lm", "learns all text"), ("plain", "leaves their text out")):
        with pytest.raises(ValueError, match=f"--add_time_instruction .*{message}; give a --version"):
            SupervisedDataset([], visual_tokenizer, telling, 512, text_format=build_format(version, visual_tokenizer))


def test_a_video_of_the_assistant_is_an_error_naming_the_sample(media_dir, visual_tokenizer, telling):
    record = replace(ask(media_dir), turns=(Turn("user", "ciao"), Turn("assistant", "ecco <video>")))
    with pytest.raises(ValueError, match=r"^sample 's1' \(x\.json, sample 1\): .*a turn of the assistant has <video>"):
        read(record, visual_tokenizer, telling)


def test_the_length_of_a_clip_is_that_of_all_its_frames(media_dir, tiny_vision):
    path = str(media_dir / "a.mp4")
    assert sample_video(path, 2).duration == pytest.approx(1.5)
    assert sample_video(path, 2, split=(3, 5), timeout=60).duration == pytest.approx(1.5)
    assert load_media(Media("video", path), tiny_vision).duration == pytest.approx(1.5)


def test_the_flag_reaches_the_settings_of_vision():
    words = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o", "--use_cpu"]
    for flag, value in (([], None), (["--add_time_instruction"], True), (["--add_time_instruction", "False"], False)):
        assert parse_arguments([*words, *flag])[1].vision_settings()["add_time_instruction"] is value


def test_a_checkpoint_asks_as_it_was_trained(load_tiny, media_dir, tmp_path):
    from llava.model.loading import load_model
    from llava.serve.generate import Captioner, Request

    loaded = load_tiny(add_time_instruction=True)
    loaded.model.config.llava_format = "v1"
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    captioner = Captioner(load_model(str(tmp_path)), "cpu")
    assert captioner.vision.add_time_instruction
    clip = load_media(Media("video", str(media_dir / "a.mp4")), captioner.vision)
    prompt = captioner.tokenizer.decode(captioner.prompts.write(Request([clip], "Che cosa vedi?")).ids)
    assert f"USER: {SENTENCE}\n<vid_start>" in prompt
    unknown = VisualInput("video", torch.zeros(3, 3, 56, 56, dtype=torch.uint8), (56, 56))
    with pytest.raises(ValueError, match="times of a video's frames are not known"):
        captioner.prompts.write(Request([unknown], "ciao"))
