"""``llava completion``: what TAB offers, and the scripts that ask for it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava.completion import SHELLS, VALUES, complete, main
from llava.eval.tasks import TASKS
from llava.model.multimodal_projector.projectors import PROJECTORS
from llava.model.multimodal_resampler import RESAMPLERS

ROOT = Path(__file__).parents[1]


def offered(line: str) -> list[str]:
    return [word for word, _ in complete(line.split(" ")[1:])]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("llava tr", ["train"]),
        ("llava prepare loc", ["localized-narratives"]),
        ("llava demo gr", ["grounding"]),
        ("llava eval --num_pr", ["--num_processes"]),
        ("llava eval --bits ", ["16", "8", "4"]),
        ("llava eval --bits=8", ["--bits=8"]),
        ("llava train --bf16 t", ["true"]),
        ("llava train --bf16 = t", ["true"]),  # bash has the sign as a word of its own.
        ("llava train --learning_rate ", []),
        ("llava train --data_path ", [":files"]),
        ("llava train --data_path a.json ", [":files"]),
        ("llava train --config italian_t", ["italian_text.yaml", ":files"]),
        ("llava check ", [":files"]),
        ("llava check a.json --rep", ["--report"]),
        ("llava cache ", ["build", "info", "verify"]),
        ("llava cache build --sto", ["--storage", "--stop_on_bad_numbers"]),
        ("llava cache info ", [":files"]),
        ("llava alternating --vari", ["--variant"]),
        ("llava alternating --word_l", ["--word_limit"]),
        ("llava init-recipe italian_t", ["italian_text"]),
        ("llava completion ", ["bash", "zsh", "fish"]),
        ("llava launch --nproc_per_node 2 -m llava train --word_l", ["--word_limit"]),
        ("llava nothing ", []),
    ],
)
def test_what_is_offered(line: str, words: list[str]) -> None:
    found = offered(line)
    # Of flags of two parsers the order does not matter.
    assert sorted(found) == sorted(words)


def test_a_flag_is_not_offered_twice() -> None:
    assert "--task" not in offered("llava eval --task rec --")
    assert "--image" in offered("llava generate --image a.png --")  # It may be given several times.


def test_values_are_those_that_are_known() -> None:
    assert set(RESAMPLERS) <= set(VALUES["mm_resampler_type"])
    assert {name for name in VALUES["mm_projector_type"] if name != "mlp2x_gelu"} == set(PROJECTORS)
    assert set(VALUES["task"]) == set(TASKS)


def test_the_script_of_bash_completes(tmp_path: Path) -> None:
    # Its first word is the program that is asked: here this source.
    program = tmp_path / "llava"
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} -m llava "$@"\n'
    )
    program.chmod(0o755)
    (tmp_path / "my clips.json").touch()
    code = "\n".join([
        SHELLS["bash"],
        'ask() { COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _llava_complete; printf "%s;" "${COMPREPLY[@]}"; echo; }',
        "ask ./llava conv",
        "ask ./llava train --config my",
    ])  # fmt: skip
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == ["convert;", "my clips.json;"], done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_of_their_shell(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([shell]) == 0
    script = tmp_path / shell
    script.write_text(capsys.readouterr().out)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert subprocess.run([shell, "-n", str(script)], capture_output=True).returncode == 0


def test_an_unknown_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tcsh"]) == 2
    assert capsys.readouterr().err == "error: SHELL is 'tcsh'; known: bash, zsh, fish\n"
