"""Nothing that a base model's generation_config.json sets is in force, and the room is each prompt's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from llava.eval.run import main as evaluate
from llava.messages import escape_controls
from llava.serve.cli import main as caption
from llava.serve.decoding import read_settings
from llava.serve.generate import Captioner, PromptTooLongError, Request
from llava.types import Media

CONTEXT = 512
REPEATED = "il gatto dorme e il gatto dorme e il gatto"


@pytest.fixture(scope="module")
def loaded(load_tiny):
    """A tiny model whose weights are large enough that its greedy answers are no chance."""
    loaded = load_tiny()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return loaded


@pytest.fixture
def captioner(loaded) -> Captioner:
    return Captioner(loaded, "cpu")


SETTINGS = [
    {"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"do_sample": True, "temperature": 50.0, "top_k": 0},
    {"num_beams": 4, "length_penalty": -9.0}, {"min_new_tokens": 9}, {"min_length": 400},
    {"suppress_tokens": list(range(5, 200))}, {"begin_suppress_tokens": list(range(5, 200))},
    {"forced_bos_token_id": 17}, {"forced_eos_token_id": 17}, {"bad_words_ids": [[i] for i in range(5, 200)]},
    {"exponential_decay_length_penalty": (0, 9.0)}, {"sequence_bias": [[[17], 90.0]]}, {"max_length": 5},
    {"num_beams": 2, "num_return_sequences": 2}, {"guidance_scale": 7.0}, {"eos_token_id": list(range(5, 200))},
    {"max_new_tokens": 1}, {"penalty_alpha": 0.6, "top_k": 4}, {"prompt_lookup_num_tokens": 3},
    {"stop_strings": ["a", "e"]}, {"return_dict_in_generate": True}, {"renormalize_logits": True}, {"top_p": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_greedy_takes_nothing_from_the_base_model(captioner: Captioner, monkeypatch, settings: dict) -> None:
    request = Request([], REPEATED)
    expected = argmax_answer(captioner, request, 20)
    own = GenerationConfig(**{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **settings})
    monkeypatch.setattr(captioner.model, "generation_config", own)
    (answer,) = captioner.generate([request], max_new_tokens=20)
    assert answer == expected
    assert captioner.model.generation_config is own


def argmax_answer(captioner: Captioner, request: Request, length: int) -> str:
    """The likeliest token, again and again, by the model alone."""
    ids = captioner.prompts.write(request).ids
    suppressed = captioner.vision.visual_token_ids
    start = len(ids)
    for _ in range(length):
        with torch.no_grad():
            logits = captioner.model(torch.tensor([ids])).logits[0, -1]
        logits[suppressed] = -torch.inf
        ids = [*ids, int(logits.argmax())]
        if ids[-1] in captioner.text_format.stop_token_ids:
            break
    return captioner.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_what_is_asked_for_is_in_force(captioner: Captioner) -> None:
    request = Request([], REPEATED)
    plain = captioner.generate([request], max_new_tokens=20)
    assert captioner.generate([request], max_new_tokens=20, repetition_penalty=9.0) != plain
    assert captioner.generate([request], max_new_tokens=20, suppress_tokens=list(range(5, 200))) != plain


def test_plain_generate_keeps_the_suppressed_tokens_of_its_config(captioner: Captioner, monkeypatch) -> None:
    """Ours are added to them."""
    ids = torch.tensor([captioner.prompts.write(Request([], REPEATED)).ids])
    first = int(captioner.model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1])
    own = GenerationConfig(pad_token_id=0, suppress_tokens=[first])
    assert int(captioner.model.generate(ids, generation_config=own, max_new_tokens=1)[0, -1]) != first
    monkeypatch.setattr(captioner.model, "generation_config", own)
    assert int(captioner.model.generate(ids, max_new_tokens=1)[0, -1]) != first


@pytest.fixture(scope="module")
def checkpoint(loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the settings of a chat model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 9.0, "eos_token_id": 0})
    )
    return folder


def test_the_command_says_what_is_in_force(checkpoint: Path, captioner: Captioner, capsys) -> None:
    words = ["--model_path", str(checkpoint), "--prompt", REPEATED, "--max_new_tokens", "20", "--device", "cpu"]
    assert caption(words) == 0
    said = capsys.readouterr()
    answer = captioner.generate([Request([], REPEATED)], max_new_tokens=20)[0]
    assert said.out.strip() == escape_controls(answer)
    assert said.err.strip() == (
        "decoding: greedy search, max_new_tokens 20; the model's generation_config.json has do_sample True, "
        "temperature 0.6, top_p 0.9, repetition_penalty 9.0: not used (--generation_config model takes it)"
    )
    assert caption([*words, "--repetition_penalty", "9"]) == 0
    penalised = capsys.readouterr()
    assert penalised.out != said.out
    assert penalised.err.startswith("decoding: greedy search, max_new_tokens 20, repetition_penalty 9.0;")
    assert caption([*words, "--generation_config", "model", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == penalised.out
    assert caption([*words, "--generation_config", "model"]) == 0
    assert capsys.readouterr().err.strip() == (
        "decoding: sampling, top_k 0, top_p 0.9, max_new_tokens 20, temperature 0.6, repetition_penalty 9.0"
    )


def test_a_temperature_without_sampling_is_without_effect(tmp_path: Path) -> None:
    """Vicuna's file."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6, "max_length": 4096}))
    assert read_settings(str(tmp_path)) == {}
    assert read_settings(str(tmp_path / "nothing")) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens is 0; it must be at least 1"),
        (["--repetition_penalty", "0"], "--repetition_penalty is 0.0; it must be above 0"),
        (["--temperature", "1", "--top_p", "1.5"], "--top_p is 1.5; it must be above 0, at most 1"),
        (["--temperature", "-1"], "--temperature is -1.0; it must be at least 0"),
        (["--top_k", "5"], "--top_k is for sampling; give --temperature above 0 with it"),
    ],
)
def test_settings_out_of_range_are_named(checkpoint: Path, capsys, words: list[str], message: str) -> None:
    assert caption(["--model_path", str(checkpoint), "--prompt", "x", *words]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def lengths(captioner: Captioner, prompts: list[str]) -> list[int]:
    return [len(captioner.prompts.write(Request([], prompt)).ids) for prompt in prompts]


def test_the_room_is_each_prompts_own(captioner: Captioner, monkeypatch) -> None:
    """A long prompt beside it takes nothing from a short one's answer, and what is together equals what is alone."""
    eos = captioner.tokenizer.eos_token_id
    long, longer = " e" * (CONTEXT - 7), " e" * (CONTEXT - 2)
    prompts = [long, "il gatto", longer, "una stella", long]
    assert [CONTEXT - length for length in lengths(captioner, prompts)][::2] == [7, 2, 7]
    requests = [Request([], prompt) for prompt in prompts]
    options = {"max_new_tokens": 30, "suppress_tokens": [eos]}
    together = captioner.answer(requests, **options)
    alone = [captioner.answer([request], **options)[0] for request in requests]
    assert together == alone
    written = []
    generate = captioner.model.generate
    monkeypatch.setattr(captioner.model, "generate", lambda **words: written.append(generate(**words)) or written[-1])
    captioner.answer(requests, **options)
    new = [out.shape[1] for out in written]
    assert sorted(new) == [*[n for n in new if n < CONTEXT], *[CONTEXT] * 2]
    assert max(n for n in new if n < CONTEXT) == max(lengths(captioner, ["il gatto", "una stella"])) + 30


def test_a_prompt_that_is_too_long_stops_only_itself(captioner: Captioner) -> None:
    requests = [
        Request([], "il gatto"),
        Request([], " e" * CONTEXT),
        Request([], "una stella"),
        Request([], " e" * 600),
    ]
    with pytest.raises(PromptTooLongError) as raised:
        captioner.answer(requests, batch_size=2)
    error = raised.value
    assert str(error).startswith(
        f"request 2 of 4 ({requests[1]}): the prompt has 512 tokens, but the model's context is 512;"
    )
    assert str(error).endswith("; 2 requests are too long")
    assert error.answers[0] == captioner.answer([requests[0]])
    assert error.answers[2] == captioner.answer([requests[2]])
    assert (error.answers[1], error.answers[3]) == ([], [])
    assert set(error.reasons) == {1, 3}
    with pytest.raises(ValueError, match=r"^the prompt has 600 tokens, but the model's context is 512; shorten it"):
        captioner.answer([requests[3]])


def test_the_command_refuses_a_prompt_that_is_too_long(checkpoint: Path, capsys) -> None:
    assert caption(["--model_path", str(checkpoint), "--prompt", " e" * CONTEXT, "--device", "cpu"]) == 2
    assert "error: the prompt has 512 tokens, but the model's context is 512" in capsys.readouterr().err


def evaluation(checkpoint: Path, media_dir: Path, tmp_path: Path, *more: str) -> int:
    questions = ["il gatto", " e" * 600, "una stella", " e" * (CONTEXT - 30)]
    data = tmp_path / "data.jsonl"
    rows = [{"id": i, "image": "a.png", "caption": "x", "question": text} for i, text in enumerate(questions)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return evaluate([
        "--task", "caption", "--model_path", str(checkpoint), "--data", str(data), "--image_folder", str(media_dir),
        "--out", str(tmp_path / "out"), "--batch_size", "4", "--max_new_tokens", "20", "--device", "cpu",
        "--num_pictures", "0", *more,
    ])  # fmt: skip


def test_an_evaluation_answers_the_others(checkpoint: Path, media_dir: Path, tmp_path: Path, capsys) -> None:
    captioner = Captioner.from_checkpoint(str(checkpoint), device="cpu")
    assert evaluation(checkpoint, media_dir, tmp_path) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.startswith(
        "error: 1 of 4 samples have no answer, all others have; the first: sample '1' (data.jsonl, line 2): "
        "the prompt has "
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions-00.jsonl").read_text().splitlines()]
    assert ["bad" in row for row in rows] == [False, True, False, False]
    image = Media("image", str(media_dir / "a.png"))
    for row in (rows[0], rows[2], rows[3]):
        assert row["answer"] == captioner.generate([Request([image], row["question"])], max_new_tokens=20)[0]
    assert evaluation(checkpoint, media_dir, tmp_path, "--on_bad_sample", "skip") == 0
    said = capsys.readouterr().out
    assert "decoding: greedy search, max_new_tokens 20; the model's generation_config.json has" in said
    content = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert content["settings"]["decoding"] == {"max_new_tokens": 20, "num_beams": 1, "do_sample": False}
    assert [bad["id"] for bad in content["bad_samples"]] == ["1"]
    assert evaluation(checkpoint, media_dir, tmp_path, "--on_bad_sample", "skip", "--repetition_penalty", "2") == 2
    assert "has an evaluation with decoding" in capsys.readouterr().err


def test_a_sampled_evaluation_is_the_same_with_its_seed(checkpoint: Path, media_dir: Path, tmp_path: Path) -> None:
    answers = []
    for seed in "112":
        more = ["--temperature", "1", "--seed", seed, "--on_bad_sample", "skip", "--overwrite"]
        assert evaluation(checkpoint, media_dir, tmp_path, *more) == 0
        rows = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
        answers.append([json.loads(row)["answer"] for row in rows])
    assert answers[0] == answers[1] != answers[2]
