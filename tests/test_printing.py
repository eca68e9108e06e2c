"""What is printed never ends a run, and nothing that data or names of files hold is obeyed by a terminal."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path

import pytest
from conftest import turns

from llava.data.check import main as check
from llava.messages import escape_controls, explain_error, print_anything, shorten_text
from llava.train.train import cli, main
from tests.train.test_training import flags, write_json

HALF, EMOJI, ESCAPE = "\ud83d", "\U0001f600", "\x1b]0;title\x07\x1b[2J"


def test_control_characters_are_escaped_and_lines_stay() -> None:
    assert escape_controls(f"a{ESCAPE}\u202eb\n\tè {HALF}{EMOJI}") == (
        f"a\\x1b]0;title\\x07\\x1b[2J\\u202eb\n\tè \\ud83d{EMOJI}"
    )
    assert "\x1b" not in shorten_text(f"x{ESCAPE}" * 500)
    assert "\x1b" not in explain_error(FileNotFoundError(2, "No such file", f"{ESCAPE}.json"))


class Terminal(io.TextIOWrapper):
    """One that knows the letters of Western Europe alone."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="latin-1", write_through=True)

    def written(self) -> bytes:
        self.flush()
        return self.buffer.getvalue()  # type: ignore[attr-defined]


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, terminal)
    return terminal


def test_a_run_on_a_terminal_without_the_characters_of_its_data(
    gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (f"half {HALF}", f"smile {EMOJI}", f"ring {ESCAPE}")
    samples = [{"id": name, "conversations": turns("", f"il gatto {i} dorme")} for i, name in enumerate(names)]
    folder = tmp_path / f"data {EMOJI}"
    folder.mkdir()
    data = folder / f"ring {ESCAPE.replace('/', '')} {EMOJI}.json"
    data.write_text(json.dumps(samples))
    terminal = open_terminal(monkeypatch)
    main(flags(gpt2_dir, None, data, tmp_path / "out", max_steps=1, sample_every=1, num_samples=3))
    written = terminal.written()
    assert b"\x1b" not in written
    assert b"\\U0001f600" in written
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_error_and_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_json(tmp_path / "data.json", [])
    data.write_text(json.dumps([{"id": 1, "image": f"{EMOJI}{ESCAPE}.png", "conversations": turns("<image>", "ciao")}]))
    terminal = open_terminal(monkeypatch)
    assert check(["--data_path", str(data)]) != 0
    assert (
        cli(
            lambda: main(
                ["--model_name_or_path", f"{ESCAPE}{EMOJI}", "--data_path", "x", "--output_dir", str(tmp_path)]
            )
        )
        == 2
    )
    assert b"\x1b" not in terminal.written()
    assert b"\\x1b]0;title" in terminal.written()


def test_lines_of_a_log(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        print_anything()
        print_anything()  # Every command does so.
        logging.getLogger("a").warning("%s", ESCAPE)
    finally:
        logging.getLogger().removeHandler(handler)
    assert stream.getvalue() == "WARNING \\x1b]0;title\\x07\\x1b[2J\n"
