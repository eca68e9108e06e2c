"""A model trained on conversations is asked as it was trained, and stops where a turn ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import turns

from llava.constants import IGNORE_INDEX
from llava.data.dataset import SupervisedDataset
from llava.data.records import read_records
from llava.model.loading import load_model
from llava.serve.cli import main as serve
from llava.serve.generate import Captioner, Request
from llava.train.train import main as train
from llava.types import Media

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
)
SAMPLES = [
    {"id": "seen", "image": "a.png", "conversations": turns("<image>\nChe cosa vedi?", "una stella gialla")},
    {"id": "asked", "conversations": turns("Dove dorme?", "sul divano")},
    {
        "id": "spoken to", "conversations": [{"from": "system", "value": "Sei un cane."}, *turns("Chi sei?", "il cane")]
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A plain GPT-2 checkpoint whose tokenizer has ChatML's tokens and template."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("chat")
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(media_dir: Path) -> Path:
    path = media_dir / "conversations.json"
    path.write_text(json.dumps(SAMPLES))
    return path


@pytest.fixture(scope="module")
def trained(chat_dir: Path, tower_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model, after it learned the three samples by heart in the tokenizer's own chat format."""
    folder = tmp_path_factory.mktemp("trained")
    values = {
        "model_name_or_path": chat_dir, "vision_tower": tower_dir, "data_path": data, "output_dir": folder,
        "plain_lm": "false", "max_steps": 60, "per_device_train_batch_size": 3, "learning_rate": 1e-2,
        "num_frames": 1, "report_to": "none", "save_strategy": "no", "use_cpu": "true", "disable_tqdm": "true",
    }  # fmt: skip
    train([word for name, value in values.items() for word in (f"--{name}", str(value))])
    return folder


def test_the_checkpoint_says_its_format(trained: Path, chat_dir: Path) -> None:
    assert json.loads((trained / "config.json").read_text())["llava_format"] == "chat"
    assert "llava_format" not in json.loads((chat_dir / "config.json").read_text())


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--image", "a.png", "--prompt", "Che cosa vedi?"], "una stella gialla"),
        (["--prompt", "Dove dorme?"], "sul divano"),
        (["--prompt", "Chi sei?", "--system", "Sei un cane."], "il cane"),
    ],
)
def test_answers_what_it_learned_and_stops(
    trained: Path, media_dir: Path, capsys, words: list[str], answer: str
) -> None:
    words = [str(media_dir / word) if word == "a.png" else word for word in words]
    assert serve(["--model_path", str(trained), *words, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{answer}\n"


def test_the_turn_end_is_what_stops_it(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = Captioner.from_checkpoint(str(trained), device="cpu")
    made = []
    generate = captioner.model.generate

    def record(*args, **kwargs):
        made.append(generate(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(captioner.model, "generate", record)
    captioner.generate([Request([], "Dove dorme?")])
    turn_end = captioner.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert made[0][0, -1] == turn_end
    assert (made[0] == captioner.tokenizer.eos_token_id).sum() == 0


def test_prompts_are_the_beginnings_of_training_samples(trained: Path, data: Path) -> None:
    loaded = load_model(str(trained))
    captioner = Captioner(loaded, "cpu")
    dataset = SupervisedDataset(
        read_records(str(data)), loaded.tokenizer, loaded.vision, 256, text_format=captioner.text_format
    )
    image = str(data.parent / "a.png")
    requests = [Request([Media("image", image)], "Che cosa vedi?"), Request([], "Dove dorme?"),
                Request([], "Chi sei?", system="Sei un cane.")]  # fmt: skip
    for i, request in enumerate(requests):
        prompt = captioner.prompts.write(request).ids
        example = dataset[i]
        assert example.input_ids[: len(prompt)] == prompt
        assert example.labels[: len(prompt)] == [IGNORE_INDEX] * len(prompt)
        assert example.labels[len(prompt) :] == example.input_ids[len(prompt) :]


def test_going_on_in_another_format_is_said(trained: Path, data: Path, tmp_path: Path, caplog) -> None:
    from llava.train.train import build_trainer

    values = {"model_name_or_path": trained, "data_path": data, "output_dir": tmp_path, "report_to": "none",
              "use_cpu": "true", "max_steps": 1}  # fmt: skip
    trainer = build_trainer([word for name, value in values.items() for word in (f"--{name}", str(value))])
    assert "trained with the format chat; now it is plain_lm" in caplog.text
    assert trainer.model.config.llava_format == "plain_lm"
