"""The command ``llava``: every subcommand is found, has its help at once, and examples that its flags read."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llava import __main__ as program
from llava.command import CommandLineError, CommandParser, find_parser, rename_flags, started_as
from llava.commands import COMMANDS, OTHER_NAMES, Command, find_command, load_start
from llava.inspect.commands import describe_commands
from llava.recipes.__main__ import MODELS, RECIPES
from llava.recipes.__main__ import main as init_recipe
from llava.train.command_line import parse_values
from tests.test_command import COMMANDS as MODULES

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
OF_TRAINING = {"train", "alternating", "inspect"}
by_name = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)


def parser_of(command: Command, words: list[str] | None = None) -> CommandParser:
    with started_as(command.program, command.name):
        return find_parser(load_start(command), words or ())


def words_of(example: str) -> list[str]:
    return [word for word in shlex.split(example) if word != "..."]


def test_every_module_that_can_be_run_has_a_command() -> None:
    assert {command.module for command in COMMANDS} == {f"llava.{name}" for name in MODULES}
    assert len({command.name for command in COMMANDS}) == len(COMMANDS)


def test_help_of_every_command_loads_nothing_large(tmp_path: Path) -> None:
    # One process for all: it has imported nothing else, and what one help loads is there for the next.
    names = [*([*command.name.split(), "--help"] for command in COMMANDS), ["--help"], ["cache", "build", "--help"]]
    code = (
        "import sys\nfrom llava.__main__ import main\n"
        f"for words in {names!r}:\n"
        "    try:\n        status = main(words)\n    except SystemExit as left:\n        status = left.code\n"
        "    assert not status, words\n"
        "    large = [name for name in ('torch', 'transformers', 'datasets', 'av') if name in sys.modules]\n"
        "    assert not large, (words, large)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"usage: llava {command.name} " in done.stdout


@by_name
def test_help_has_a_sentence_topics_and_examples(command: Command) -> None:
    parser = parser_of(command)
    text = parser.format_help()
    assert text.startswith(f"usage: llava {command.name} ")
    assert parser.description
    assert parser.description.endswith(".")
    assert f"examples:\n  llava {command.name}" in text
    assert all(action.help for action in parser._actions if action.option_strings and command.name != "launch")


@by_name
def test_examples_parse(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(command)
    for example in command.examples:
        words = words_of(example)
        if command.name in OF_TRAINING or words[:1] == ["build"]:
            own, rest = parser_of(command, words[:1] if words[:1] == ["build"] else []), words
            if command.name != "train":
                _, rest = own.parse_known_args(words[1:] if words[:1] == ["build"] else words)
            rest = [str(RECIPES / "italian_video.yaml") if word == "my_run.yaml" else word for word in rest]
            parse_values(rest, optional=("data_path", "output_dir", "model_name_or_path"))
        elif command.name in ("launch", "slurm"):
            at = words.index("-m")
            assert all(word in parser._option_string_actions for word in words[:at] if word.startswith("--"))
            assert find_command(words[at + 2 :]) is not None
        else:
            parser.parse_args(words)


def test_the_page_of_commands_is_what_there_is() -> None:
    assert (ROOT / "docs" / "commands.md").read_text() == describe_commands(), "run make docs"


def commands_of_documents() -> list[str]:
    found = []
    for name in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(), re.S):
            found += [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("llava ")]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("line", commands_of_documents())
def test_commands_of_documents_parse(line: str) -> None:
    words = words_of(line.partition(" #")[0])[1:]
    found = find_command(words)
    assert found is not None, line
    command, rest = found
    if command.name in OF_TRAINING or rest[:1] == ["build"] or command.name == "launch":
        known = {
            *parser_of(find_command(["train"])[0])._option_string_actions,
            *parser_of(command)._option_string_actions,
        }
        inner = [*parser_of(command, ["build"])._option_string_actions] if rest[:1] == ["build"] else []
        unknown = [word for word in rest if word.startswith("--") and word.partition("=")[0] not in {*known, *inner}]
        assert unknown == []
    else:
        parser_of(command).parse_args(rest)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "error: unknown command 'trian'; did you mean train?"),
        ("prepare localised", "error: unknown command 'prepare localised'; did you mean prepare localized-narratives?"),
        ("generat --help", "did you mean generate?"),
        ("xyzzy", "error: unknown command 'xyzzy'; see llava --help"),
        ("check", "error: DATA is missing; see --help"),
        ("eval --tsak x", "error: unknown flag --tsak; did you mean --task"),
    ],
)
def test_mistakes_are_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_other_ways_to_ask_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 2  # A script whose variable is empty must not go on as if all were well.
    assert program.main(["prepare"]) == 2
    assert capsys.readouterr().out == ""
    assert program.main(["prepare", "--help"]) == 0
    assert "localized-narratives" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        program.main(["help", "generate"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("usage: llava generate ")
    with pytest.raises(SystemExit):
        program.main(["merge_lora", "--help"])
    assert program.main(["--version"]) == 0


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module, extra, message in (
        ("absent_package", "web", "llava x needs the package absent_package, which is not installed: pip install"
         " 'llava-babylm[web]'"),
        ("llava.absent", "", "llava x is not part of this installation: no llava.absent"),
    ):  # fmt: skip
        command = Command("x", module, "", "", (), extra=extra)
        monkeypatch.setattr("llava.commands.COMMANDS", (command,))
        assert program.main(["x"]) == 2
        assert message in capsys.readouterr().err


# The same flag means the same everywhere.


def all_flags() -> dict[str, dict[str, tuple[object, ...]]]:
    """For each flag, by command, what kind of value it takes."""
    found: dict[str, dict[str, tuple[object, ...]]] = {}
    for command in COMMANDS:
        if command.name in ("launch", "train"):  # torchrun's; and without types in the help.
            continue
        for words in ([], ["build"]) if command.name == "cache" else ([],):
            parser = parser_of(command, words)
            for action in parser._actions:
                for name in action.option_strings:
                    kind = action.type if action.nargs != 0 else "switch"
                    found.setdefault(name, {})[" ".join([command.name, *words])] = (getattr(kind, "__name__", kind),)
    return found


def test_a_flag_takes_the_same_kind_of_value_in_every_command() -> None:
    paths = {("Path",): (None,), ("str",): (None,)}
    different = {
        name: commands
        for name, commands in all_flags().items()
        if len({paths.get(k, k) for k in commands.values()}) > 1
    }
    assert different == {}


def test_one_meaning_has_one_name_in_a_command() -> None:
    for command in COMMANDS:
        names = set(parser_of(command)._option_string_actions)
        for name, others in OTHER_NAMES.items():
            if name in names and command.name != "launch":
                assert not names & set(others), f"{command.name} has {name} and {others}"


def test_other_names_and_dashes_are_taken() -> None:
    parser = CommandParser(prog="x")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--video-dir")
    args = parser.parse_args(["--out", "a", "--data-path", "b", "c", "--video_folder=d"])
    assert (args.output_dir, args.data, args.video_dir) == ("a", ["b", "c"], "d")
    assert rename_flags(["--out=a", "--", "--out"], ["--output_dir"]) == ["--output_dir=a", "--", "--out"]


def test_what_has_a_place_may_have_its_flag() -> None:
    def parse(name: str, line: str) -> dict[str, object]:
        return vars(parser_of(find_command([name])[0]).parse_args(line.split()))

    assert parse("check", "--data_path a.json b.json --num_frames 2") == parse("check", "a.json b.json --num_frames 2")
    by_place = parse("export", "a b --as text")
    assert by_place == parse("export", "--model_path a --as text --out b") == parse("export", "a --as text --output b")
    assert parse("convert", "--model a --output_dir b") == parse("convert", "a b") != parse("convert", "a")
    with pytest.raises(CommandLineError, match="--output_dir is 'c', but its place has a value already"):
        parse("export", "a b --as text --out c")
    with pytest.raises(CommandLineError, match=r"^DATA is missing"):
        parse("check", "--num_frames 2")


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("train --batch_size 4", "--per_device_train_batch_size"),
        ("train --lr 4", "--learning_rate"),
        ("train --num-workers 4", "--dataloader_num_workers"),
        ("eval --max_length 4", "--max_new_tokens"),
        ("babylm --batch_size 4", "--batch_tokens"),
    ],
)
def test_what_is_called_otherwise_elsewhere_is_named(line: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(line.split()) == 2
    flag = line.split()[1]
    assert capsys.readouterr().err == f"error: unknown flag {flag}; did you mean {meant}?\n"


def test_force_never_comes_to_mean_that_a_run_is_removed() -> None:
    # In `llava alternating` it is about the kind of attention, in `llava init-recipe` about a file.
    assert "--force" not in OTHER_NAMES
    with pytest.raises(CommandLineError, match="unknown flag --force"):
        parse_values(["--force", "--model", "m", "--data", "d", "--out", "o"])


def test_training_takes_them_too(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: m\nlearning-rate: 0.5\n")
    values = parse_values(["--config", str(recipe), "--data", "d", "--out", "o", "--num-frames", "3"])
    assert (values["model_name_or_path"], values["data_path"], values["output_dir"]) == ("m", ["d"], "o")
    assert (values["learning_rate"], values["num_frames"]) == (0.5, 3)


# init-recipe.


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_copied_recipe_says_what_the_first_one_does(name: str, tmp_path: Path) -> None:
    target = tmp_path / "new" / "mine.yaml"
    assert init_recipe([name, "--output", str(target)]) == 0
    assert yaml.safe_load(target.read_text()) == yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    # Every setting has a comment, and what is left to fill in is one line each that only lacks its #.
    lines = target.read_text().splitlines()
    assert all("#" in line for line in lines if line)
    filled = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines if re.match(r"# [a-z_0-9]+: ", line)))
    assert {"model_name_or_path", "data_path", "output_dir"} <= {*filled, *yaml.safe_load(target.read_text())}
    if name in MODELS:
        assert (tmp_path / "new" / MODELS[name] / "config.json").is_file()


def test_a_recipe_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init_recipe(["italian_text", "--output", str(tmp_path)]) == 0
    assert "edit the top of" in capsys.readouterr().out
    target = tmp_path / "italian_text.yaml"
    target.write_text("mine: 1\n")
    assert init_recipe(["italian_text.yaml", "--output", str(tmp_path)]) == 2
    assert target.read_text() == "mine: 1\n"
    assert "exists already; give another --output, or --force" in capsys.readouterr().err
    assert init_recipe(["italian_text", "--output", str(tmp_path), "--force"]) == 0
    assert "mine" not in target.read_text()


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert init_recipe([]) == 0
    assert "italian_video" in capsys.readouterr().out
    assert init_recipe(["italian_vdeo"]) == 2
    assert "known: baby_llama_t," in capsys.readouterr().err
