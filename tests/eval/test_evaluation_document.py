"""docs/evaluation.md: its flags are those of the command, its commands parse, its examples are read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llava.eval.annotations import read_annotations
from llava.eval.run import build_parser
from llava.eval.tasks import TASKS

DOCUMENT = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
LAYOUTS = {"rec": "expressions", "refs": "expressions", "tvg": "moments", "tubes": "tubes", "caption": "captions"}
LENGTHS = '{"AO8RW": 33.67}'


def blocks() -> list[tuple[str, str, str]]:
    """The language, the name and the text of each example of an annotation file; instances are read with refs."""
    found = re.findall(r"```(\w+) (\w+)\n(.*?)```", DOCUMENT, re.S)
    return [block for block in found if block[1] != "instances"]


INSTANCES = re.search(r"```json instances\n(.*?)```", DOCUMENT, re.S)[1]


def test_flags() -> None:
    flags = {flag for action in build_parser()._actions for flag in action.option_strings} - {"-h", "--help"}
    table = DOCUMENT.split("## Flags")[1].split("##")[0]
    assert set(re.findall(r"--\w+", table)) == flags


def test_tasks_and_templates() -> None:
    for name in TASKS:
        assert DOCUMENT.count(f"| `{name}` |") == 2
        assert f"`{TASKS.get(name).template}`" in DOCUMENT or name == "caption"


def test_commands_parse() -> None:
    commands = [c for block in re.findall(r"```bash\n(.*?)```", DOCUMENT, re.S) for c in [block.replace("\\\n", " ")]]
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        build_parser().parse_args(words[words.index("llava.eval.run") + 1 :])


@pytest.mark.parametrize("number", range(len(blocks())))
def test_examples_are_read(number: int, tmp_path: Path) -> None:
    language, name, text = blocks()[number]
    suffix = {"text": ".txt"}.get(language, f".{language}")
    files = [tmp_path / f"{name}{suffix}"]
    files[0].write_text(text)
    if name == "refs":
        files.append(tmp_path / "instances.json")
        files[-1].write_text(INSTANCES)
    if language == "text":
        files.append(tmp_path / "lengths.json")
        files[-1].write_text(LENGTHS)
    tasks = [task for task in TASKS if TASKS.get(task).layout == LAYOUTS.get(name, "expressions")]
    assert tasks
    for task in tasks:
        samples = read_annotations(TASKS.get(task).layout, list(map(str, files)))
        for sample in samples if (task, language) != ("elc", "json") else []:  # Its answer has no words.
            TASKS.get(task).check_reference(sample)
            assert TASKS.get(task).ask(sample)[0] or task == "caption"
