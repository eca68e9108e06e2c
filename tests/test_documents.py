"""What the documents say holds: their commands parse, their samples read, their files exist."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from llava.command import find_parser, started_as
from llava.commands import COMMANDS, find_command, load_start
from llava.data.localized_narratives.__main__ import build_parser as narratives_parser
from llava.data.records import read_records
from llava.eval.babylm.__main__ import parse_arguments as babylm_arguments
from llava.inspect import pictures
from llava.inspect.__main__ import build_parser as inspecting_parser
from llava.model.merge_lora import build_parser as merge_parser
from llava.serve.cli import build_parser
from llava.train.command_line import parse_arguments, parse_values

ROOT = Path(__file__).parents[1]
OF_BABYLM = ("eval_finetuning.sh", "eval_aoa.sh", "collate_preds.sh")
"""Scripts of the official pipeline, which the documents show too."""
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.S)


def commands() -> list[str]:
    """Every command line of the documents, continuation lines joined and comments cut off."""
    found = []
    for document in DOCUMENTS:
        for block in blocks(document, "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return [spell_out(line) for line in found]


def spell_out(line: str) -> str:
    """A line with ``llava NAME`` as the ``python -m MODULE`` that it is."""
    start, program, words = f" {line}".partition(" llava ")
    known = find_command(words.split()) if program else None
    return " ".join([start, known[0].program, *known[1]]).strip() if known else line


def words_after(command: str, module: str) -> list[str]:
    words = shlex.split(command, comments=True)
    words = [word for word in words[words.index(module) + 1 :] if word not in ("...", "&")]
    return [word.replace("my_run.yaml", "italian_video.yaml") for word in words]  # A copy of one of the recipes.


def modules_that_are_started() -> list[tuple[str, str]]:
    """Each module behind ``python -m``, with its command line, of those that no other test here reads."""
    read = ("train.train", "train.train_mem", "train.launch", "inspect", "data.feature_cache", "eval.babylm")
    found = []
    for command in commands():
        for module in re.findall(r"python -m llava\.([\w.]+)", command)[:1]:
            if module not in read:
                found.append((f"llava.{module}", command))
    return found


@pytest.mark.parametrize(("module", "command"), modules_that_are_started())
def test_other_commands_parse(module: str, command: str) -> None:
    known = [each for each in COMMANDS if each.module == module]
    assert known, f"python -m {module} is none of the commands"
    with started_as(known[0].program, known[0].name):
        parser = find_parser(load_start(known[0]), [])
    words = words_after(re.split(r" (?:&&|>|\|) ", command)[0], module)
    if module == "llava.train.alternating":
        parser.parse_known_args(words)
    else:
        parser.parse_args(words)


@pytest.mark.parametrize("command", [c for c in commands() if "-m llava.train.train" in c])
def test_training_commands_parse(command: str) -> None:
    words = words_after(command.replace("llava.train.train_mem", "llava.train.train"), "llava.train.train")
    # Precision and engine depend on the machine, which this one may not be; test_extending.py has the plugins.
    for flag, arguments in (("--bf16", 0), ("--deepspeed", 1), ("--plugins", 2)):
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 1 + arguments]
    for flag, value in (("--model_name_or_path", "m"), ("--data_path", "d"), ("--output_dir", "o")):
        words += [] if flag in words else [flag, value]
    parse_arguments([*words, "--use_cpu"])


@pytest.mark.parametrize("command", [c for c in commands() if "-m llava.serve.cli" in c])
def test_captioning_commands_parse(command: str) -> None:
    build_parser().parse_args(words_after(command, "llava.serve.cli"))


@pytest.mark.parametrize("command", [c for c in commands() if "train_alternating.py" in c])
def test_alternating_commands_parse(command: str) -> None:
    script = runpy.run_path(str(ROOT / "train_alternating.py"))
    own, words = script["build_parser"]().parse_known_args(words_after(command, "train_alternating.py"))
    values = parse_values(words, optional=("data_path", "output_dir", "model_name_or_path"))
    assert values["model_name_or_path"] or (own.init_from_backbone and own.backbone_model)


@pytest.mark.parametrize("command", [c for c in commands() if "-m llava.inspect " in c])
def test_inspecting_commands_parse(command: str) -> None:
    own, words = inspecting_parser().parse_known_args(words_after(command.partition("&&")[0], "llava.inspect"))
    words = ["italian_video.yaml" if word == "my_run.yaml" else word for word in words]
    assert parse_values(words, optional=("data_path", "model_name_or_path"))["output_dir"]
    assert set(own.accept) <= {"KIND"}


@pytest.mark.parametrize("command", [c for c in commands() if "-m llava.model.merge_lora" in c])
def test_merging_commands_parse(command: str) -> None:
    merge_parser().parse_args(words_after(command, "llava.model.merge_lora"))


@pytest.mark.parametrize("command", [c for c in commands() if "-m llava.data.localized_narratives" in c])
def test_commands_for_narratives_parse(command: str) -> None:
    narratives_parser().parse_args(words_after(command, "llava.data.localized_narratives"))


@pytest.mark.parametrize("command", [c for c in commands() if "-m llava.eval.babylm" in c])
def test_commands_of_babylm_parse(command: str) -> None:
    babylm_arguments(words_after(command, "llava.eval.babylm"))


@pytest.mark.parametrize("command", [c for c in commands() if re.match(r"\s*make ", c)])
def test_make_targets_exist(command: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert shlex.split(command, comments=True)[1] in targets


@pytest.mark.parametrize("command", [c for c in commands() if "scripts_italian/" in c or ".sh" in c])
def test_scripts_exist(command: str) -> None:
    for path in re.findall(r"(?:scripts_italian/\w+\.py|\w+\.sh)\b", command):
        assert path in OF_BABYLM or (ROOT / path).is_file(), path


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MkDocs make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"```.*?```", "", document.read_text(), flags=re.S)):
        name, _, anchor = target.partition("#")
        place = (document.parent / name).resolve() if name else document
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", place.read_text(), re.M)
            assert anchor in map(slug, headings), target


def test_the_index_has_every_page_and_picture() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {page for page in pages if f"({page}" not in index} == set()
    pictures = sorted((ROOT / "docs" / "pictures").glob("*.png"))
    assert [picture.name for picture in pictures if f"(pictures/{picture.name})" not in index] == []
    assert all(picture.stat().st_size < 100_000 for picture in pictures)


def test_pictures_are_drawn_by_a_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"vocab_size": 100}')
    log = [{"step": 1, "loss": 4.6}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert pictures.main([str(tmp_path / "drawn"), "--run", str(run)]) == 0
    drawn = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs" / "pictures").iterdir()}
    for name in pictures.PICTURES:  # None of these depends on the machine, but for its version of the font.
        with (
            Image.open(tmp_path / "drawn" / f"{name}.png") as new,
            Image.open(ROOT / "docs/pictures" / f"{name}.png") as old,
        ):
            assert new.size == old.size, "run python -m llava.inspect.pictures docs/pictures"
    assert pictures.main([str(tmp_path / "drawn"), "--run", str(tmp_path)]) == 2


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_of_the_documents_compiles_and_finds_what_it_imports(document: Path) -> None:
    for block in blocks(document, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llava"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_readme_sample_reads(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text(blocks(ROOT / "README.md", "json")[0])
    records = read_records(str(path))
    assert [bool(record.media) for record in records] == [True, False]
    assert json.loads(path.read_text())[0]["video"] == "clips/1.mp4"


def test_readme_begins_with_a_small_picture() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:25])
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", first_screen)
    assert (ROOT / picture).stat().st_size < 300_000
    with Image.open(ROOT / picture) as image:
        assert image.width > 600
    assert picture in (ROOT / "Makefile").read_text(), "a target makes it"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document: Path) -> None:
    folders = "docs|llava|tests|benchmarks|scripts_italian"
    named = re.findall(rf"`((?:{folders})/[\w/.-]+\.(?:md|py|json|yaml))`", document.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_models_page_is_what_is_registered(warm_python: str) -> None:
    # A process of its own: other tests register parts.
    command = [warm_python, "-m", "llava.inspect.models"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert (ROOT / "docs" / "models.md").read_text() == done.stdout, "run make docs"


def test_flags_page_is_what_the_arguments_are_checked_with() -> None:
    from llava.inspect.flags import describe_flags

    assert (ROOT / "docs" / "flags.md").read_text() == describe_flags(), "run make docs"
