"""train_tokenizer.py and create_random_weights_model.py: from text to a model to start from."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ITALIAN, ROOT, load_script
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llava.model.loading import load_model
from llava.model.vocabulary import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer_script() -> ModuleType:
    return load_script("scripts_italian/train_tokenizer.py")


@pytest.fixture(scope="module")
def weights_script() -> ModuleType:
    return load_script("scripts_italian/create_random_weights_model.py")


@pytest.fixture(scope="module")
def trained_tokenizer(tokenizer_script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("\n".join(ITALIAN[:3] * 5) + "\n\n", encoding="utf-8")
    with gzip.open(folder / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(ITALIAN[3:] * 5))
    data = [{"id": 1, "video": "x.mp4", "conversations": [{"from": "gpt", "value": "<video> perché così"}]}] * 9
    (folder / "c.json").write_text(json.dumps(data), encoding="utf-8")
    files = [str(folder / name) for name in ("a.txt", "b.txt.gz", "c.json")]
    assert tokenizer_script.main(["--data", *files, "--output_dir", str(folder / "out"), "--vocab_size", "400"]) == 0
    return folder / "out"


@pytest.mark.parametrize("text", [*ITALIAN, "perché l'alba è «rosa»?", "日本 \U0001f642\t due  spazi\n"])
def test_tokenizer_gives_any_text_back(trained_tokenizer: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained_tokenizer)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_has_one_special_token(trained_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(str(trained_tokenizer))
    assert 257 < len(tokenizer) <= 400
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    assert tokenizer("Il gatto<|endoftext|>")["input_ids"].count(0) == 1


def test_tokenizer_learns_words_but_no_placeholders(trained_tokenizer: Path) -> None:
    vocabulary = AutoTokenizer.from_pretrained(trained_tokenizer).get_vocab()
    assert "Ġuna" in vocabulary
    assert not any("video" in token for token in vocabulary)


def test_too_little_text_is_said(
    tokenizer_script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("una stella")
    assert tokenizer_script.main(["--data", str(tmp_path / "a.txt"), "--output_dir", str(tmp_path / "out")]) == 0
    assert "fewer than --vocab_size 30,000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("gone.txt", None, (), "no such file"),
        ("a.pdf", b"x", (), "unknown kind of file"),
        ("a.txt", b"\n \n", (), "no text in it"),
        ("a.txt", b"\xff\xfe", (), "not UTF-8"),
        ("a.txt.gz", b"not gzip", (), "cannot be read to its end"),
        ("a.jsonl", b"{", (), "not JSON"),
        ("a.txt", b"x", ("--vocab_size", "100"), "at least 257"),
        ("a.txt", b"x", ("--min_frequency", "0"), "at least 1"),
        ("a.txt", b"x", ("--output_dir", "."), "not an empty folder"),
    ],
)
def test_tokenizer_mistakes_are_one_line(
    tokenizer_script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    flags: tuple[str, ...],
    message: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    argv = ["--data", str(tmp_path / name), "--output_dir", str(tmp_path / "out"), *flags]
    assert tokenizer_script.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def create(script: ModuleType, source: Path, target: Path, *flags: str) -> dict[str, torch.Tensor]:
    assert script.main(["--model_path", str(source), "--output_dir", str(target), *flags]) == 0
    return weights(target)


@pytest.mark.parametrize("name", ["llava_gpt2", "llava_llama"])
def test_same_config_and_tokenizer_other_weights(
    weights_script: ModuleType, backbone_dirs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    source = backbone_dirs[name]
    fresh, old = create(weights_script, source, tmp_path / "new", "--seed", "11"), weights(source)
    assert (
        AutoConfig.from_pretrained(tmp_path / "new").to_diff_dict() == AutoConfig.from_pretrained(source).to_diff_dict()
    )
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert fresh.keys() == old.keys()
    matrices = [key for key in old if old[key].ndim == 2]
    assert not any(torch.equal(fresh[key], old[key]) for key in matrices)


def test_the_seed_decides_the_weights(weights_script: ModuleType, gpt2_dir: Path, tmp_path: Path) -> None:
    first, again, other = (
        create(weights_script, gpt2_dir, tmp_path / name, "--seed", seed)
        for name, seed in (("first", "7"), ("again", "7"), ("other", "8"))
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_from_scratch_with_a_config_and_a_tokenizer(
    weights_script: ModuleType, trained_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config").mkdir()
    settings = {"model_type": "gpt2", "vocab_size": 500, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    (tmp_path / "config" / "config.json").write_text(json.dumps(settings))
    create(weights_script, tmp_path / "config", tmp_path / "model", "--tokenizer", str(trained_tokenizer))
    # A tokenizer that was named is no mistake: what is said is how to be rid of embeddings without a token.
    num_tokens = len(load_tokenizer(str(trained_tokenizer)))
    assert f'"vocab_size": {num_tokens} in {tmp_path / "config"}/config.json makes the model smaller' in caplog.text
    assert "another model's" not in caplog.text
    loaded = load_model(str(tmp_path / "model"))
    assert loaded.new_parameters == []
    assert loaded.model.config.eos_token_id == 0


def test_the_shipped_config_is_the_italian_gpt2() -> None:
    config = AutoConfig.from_pretrained(ROOT / "scripts_italian" / "gpt2_12x768")
    assert (config.n_layer, config.n_embd, config.vocab_size, config.n_positions) == (12, 768, 30_000, 1024)
    assert (config.bos_token_id, config.eos_token_id) == (0, 0)


def test_weights_mistakes_are_one_line(
    weights_script: ModuleType,
    gpt2_dir: Path,
    tower_dir: Path,
    trained_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = tmp_path / "small"
    shutil.copytree(gpt2_dir, small)
    config = json.loads((small / "config.json").read_text()) | {"vocab_size": 260}
    (small / "config.json").write_text(json.dumps(config))
    out = str(tmp_path / "out")
    for source, target, flags, message in (
        (tmp_path, out, (), "expected a folder with a config.json"),
        (gpt2_dir, str(gpt2_dir), (), "not an empty folder"),
        (tower_dir, out, ("--tokenizer", str(trained_tokenizer)), "is no language model"),
        (small, out, (), "has embeddings for 260"),
        (tower_dir, out, (), "no tokenizer can be read"),
    ):
        assert weights_script.main(["--model_path", str(source), "--output_dir", target, *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("error: ")
        assert not Path(out).exists()


def test_a_checkpoint_with_vision_is_refused(
    weights_script: ModuleType, load_tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_tiny().model.save_pretrained(tmp_path / "vision")
    argv = ["--model_path", str(tmp_path / "vision"), "--output_dir", str(tmp_path / "out")]
    assert weights_script.main(argv) == 2
    assert "with vision" in capsys.readouterr().err


def test_a_shape_without_a_vocabulary_takes_the_tokenizers(
    trained_tokenizer: Path, weights_script: ModuleType, tmp_path: Path
) -> None:
    shape = ROOT / "llava" / "recipes" / "start_gpt2"
    words = ["--model_path", str(shape), "--tokenizer", str(trained_tokenizer), "--output_dir", str(tmp_path / "m")]
    assert weights_script.main(words) == 0
    assert AutoConfig.from_pretrained(tmp_path / "m").vocab_size == len(load_tokenizer(str(trained_tokenizer)))
