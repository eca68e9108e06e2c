"""Cards of saved models: what they say, that their Python runs, and that nobody's own is lost; and sending to a hub."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers.utils.hub
import yaml
from hub_stub import TOKEN, HubStub
from huggingface_hub import constants

from llava.model.export.__main__ import main as export
from llava.model.model_card import CARD, ModelCard, bare_name, fence, is_generated, quote, table, write_card
from llava.train import model_card
from llava.train.checkpoint import find_changes
from llava.train.command_line import parse_arguments
from llava.train.train import build_trainer, cli, main
from tests.conftest import ITALIAN, turns


@pytest.fixture(scope="module")
def words(gpt2_dir: Path, tower_dir: Path, media_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command line of two steps on two clips and a text, without --output_dir."""
    data = media_dir / "of_the_card.json"
    samples = [
        {"id": "a", "video": "a.mp4", "conversations": turns("<video>", ITALIAN[0])},
        {"id": "b", "video": "b.mp4", "conversations": turns("<video>", ITALIAN[1])},
        {"id": "t", "conversations": turns("", ITALIAN[4])},
    ]
    data.write_text(json.dumps(samples))
    values = {
        "model_name_or_path": gpt2_dir, "vision_tower": tower_dir, "data_path": data, "eval_data_path": data,
        "mm_resampler_type": "fast_slow_resampler", "mm_perceiver_latents": 9, "mm_perceiver_latents_fast": 4,
        "mm_resampler_width": 32, "mm_resampler_heads": 4, "num_frames": 3, "max_steps": 2, "report_to": "none",
        "use_cpu": "true", "disable_tqdm": "true", "save_vision_tower": "true", "card_language": "it",
        "card_license": "cc-by-4.0", "milestones": "10", "save_strategy": "no",
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run_folder(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "captions"
    main([*words, "--output_dir", str(folder)])
    return folder


def python_of(text: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    return code


def test_a_run_has_a_card(run_folder: Path, tmp_path: Path) -> None:
    card = ModelCard.read(run_folder)
    assert card is not None
    assert card.title == "captions"
    assert card.metadata == {
        "license": "cc-by-4.0", "language": ["it"], "library_name": "llava", "pipeline_tag": "video-text-to-text",
        "tags": ["llava", "llava_gpt2", "fast_slow_resampler"],
    }  # fmt: skip
    words = 2 * sum(len(ITALIAN[i].split()) for i in (0, 1, 4))
    assert f"for 2 steps on {words} words, with 4 videos" in card.sections["What this is"]
    assert f"| `of_the_card.json` | 6 | {words} |" in card.sections["Data"]
    assert "| `mm_vision_tower` | 36,672 | frozen |" in card.sections["Parts"]
    assert "| eval_loss | " in card.sections["Scores"]
    assert "cc-by-4.0" in card.sections["Licence"]
    text = (run_folder / CARD).read_text()
    assert not re.search(r"(?<!\w)/(?:tmp|home|root|work)/", text), "no path of this machine"
    # The recipe is one: what a reader gives beside it are the places of files.
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    (tmp_path / "recipe.yaml").write_text(recipe)
    parsed = parse_arguments(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", "o", "--use_cpu"])
    assert (parsed[0].mm_perceiver_latents, parsed[1].num_frames, parsed[2].max_steps) == (9, 3, 2)
    assert yaml.safe_load(recipe)["model_name_or_path"] == "llava_gpt2"


def test_the_python_of_a_runs_card_runs(run_folder: Path, media_dir: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(run_folder.parent)
    shutil.copy(media_dir / "a.mp4", "clip.mp4")
    exec(python_of((run_folder / CARD).read_text()), {})
    assert capsys.readouterr().out.strip()


def test_milestones_have_cards_that_may_be_changed(run_folder: Path) -> None:
    milestone = run_folder / "chck_10"
    assert "for 1 step on" in (milestone / CARD).read_text()
    (milestone / CARD).write_text("mine")
    assert find_changes(milestone) is None


@pytest.mark.parametrize("kind", ["text", "multimodal"])
def test_an_export_has_a_card_whose_python_runs(
    kind: str, run_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export([str(run_folder), "exported", "--as", kind]) == 0
    card = ModelCard.read(Path("exported"))
    assert card is not None
    assert (card.metadata["license"], card.metadata["library_name"]) == ("cc-by-4.0", "transformers")
    assert ModelCard.read(run_folder).sections["Data"] == card.sections["Data"]
    assert str(tmp_path) not in Path("exported", CARD).read_text()
    shutil.copy(run_folder.parents[1] / "media0" / "b.jpg", "photo.jpg") if kind == "multimodal" else None
    capsys.readouterr()
    exec(python_of(Path("exported", CARD).read_text()), {})
    assert capsys.readouterr().out.strip()
    Path("exported", CARD).write_text("mine")
    assert export([str(run_folder), "exported", "--as", kind, "--overwrite"]) == 2
    assert f"holds {CARD} beside the export" in capsys.readouterr().err


def test_a_card_of_ones_own_stays(words: list[str], run_folder: Path, tmp_path: Path, caplog) -> None:
    own = "# My model\n\nIt was mine before.\n"
    folder = shutil.copytree(run_folder, tmp_path / "run")
    written = (folder / CARD).read_text()
    for text in (own, written.replace("cc-by-4.0", "mit")):
        (folder / CARD).write_text(text)
        assert not is_generated(folder / CARD)
        with caplog.at_level(logging.WARNING):
            assert not write_card(folder, ModelCard("other"))
        assert "was written or changed by somebody" in caplog.text
        assert (folder / CARD).read_text() == text
        assert model_card.main([str(folder)]) == 2
    (folder / CARD).write_text(written)
    assert write_card(folder, ModelCard("other"))


def test_scores_that_came_later_are_added(run_folder: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "results" / "rec").mkdir(parents=True)
    content = {
        "task": "rec",
        "data": ["/home/me/boxes.json"],
        "scores": {"miou": {"value": 0.5, "low": 0.4, "high": 0.6}},
    }
    (folder / "results" / "rec" / "scores.json").write_text(json.dumps(content))
    assert model_card.main([str(folder), "--license", "mit"]) == 0
    card = ModelCard.read(folder)
    assert card.metadata["license"] == "mit"
    assert "| rec | miou, boxes.json | 0.5 [0.4, 0.6] |" in card.sections["Scores"]
    assert "results/rec/scores.json" in card.sections["Scores"]
    assert card.sections["Data"] == ModelCard.read(run_folder).sections["Data"]
    # One that somebody has written is replaced when that is asked for, from the folder's own files.
    (folder / CARD).write_text("mine")
    assert model_card.main([str(folder), "--overwrite"]) == 0
    assert "| `of_the_card.json` | 6 |" in (folder / CARD).read_text()
    assert model_card.main([str(tmp_path)]) == 2
    assert "no saved model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "name"),
    [("openai-community/gpt2", "openai-community/gpt2"), ("/home/me/gpt2", "gpt2"), ("gpt2", "gpt2"),
     ("./a/b/", "b"), ("C:\\models\\gpt2", "gpt2")],
)  # fmt: skip
def test_names_without_paths(source: str, name: str) -> None:
    assert bare_name(source) == name


# The hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubStub() as stub:
        monkeypatch.setattr(constants, "ENDPOINT", stub.endpoint)
        url = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", stub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        yield stub


def test_a_run_is_sent_and_loads_from_the_hub(words: list[str], hub: HubStub, media_dir: Path, tmp_path: Path) -> None:
    from llava.serve.generate import Captioner, Request
    from llava.types import Media

    sending = ["--push_to_hub", "--hub_token", TOKEN, "--hub_model_id", "me/captions", "--save_strategy", "steps",
               "--save_steps", "1", "--hub_always_push"]  # fmt: skip
    folder = tmp_path / "run"
    trainer = main([*words, *sending, "--output_dir", str(folder)])
    sent = hub.files["me/captions", "main"]
    assert {"model.safetensors", "config.json", "tokenizer.json", CARD, "exposure.jsonl"} <= set(sent)
    assert not [name for name in sent if name.startswith(("training_args", "run_", "checkpoint", "chck", "trainer"))]
    assert [message for _, message, _ in hub.commits] == ["Step 1", "Step 2", "Step 2"]
    assert sent[CARD] == (folder / CARD).read_bytes()
    assert b'from_checkpoint("me/captions")' in sent[CARD]
    for path in folder.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path
    assert not any(b"/tower" in content or str(tmp_path).encode() in content for content in sent.values())
    captioner = Captioner.from_checkpoint("me/captions")
    request = Request([Media("video", str(media_dir / "a.mp4"))])
    mine = Captioner.from_checkpoint(str(folder))
    assert captioner.generate([request], max_new_tokens=8) == mine.generate([request], max_new_tokens=8)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(captioner.model.state_dict()[name], tensor), name
    # A card that was changed on the hub stays; the finished run is sent once more where that is asked for.
    sent[CARD] = b"mine"
    hub.refuses = 500
    again = [*words, *sending, "--resume_from_checkpoint", "auto", "--output_dir", str(folder)]
    hub.refuses = 403
    with pytest.raises(ValueError, match=r"the model is whole in .*, and could not be sent to me/captions"):
        main(again)
    hub.refuses = 0
    main([*again, "--hub_revision", "second"])
    assert sent[CARD] == b"mine"
    assert CARD in hub.files["me/captions", "second"]


def test_what_stands_in_the_way_is_said_first(words: list[str], hub: HubStub, tmp_path: Path, capfd) -> None:
    out = ["--output_dir", str(tmp_path / "out")]
    assert cli(lambda: build_trainer([*words, *out, "--push_to_hub"])) == 2
    assert "--push_to_hub needs a token of the hub" in capfd.readouterr().err
    assert cli(lambda: build_trainer([*words, *out, "--push_to_hub", "--hub_token", "hf_wrong"])) == 2
    assert "--push_to_hub: out cannot be written on http://127.0.0.1" in capfd.readouterr().err
    given = [*words, *out, "--push_to_hub", "--hub_token", TOKEN, "--save_vision_tower", "false"]
    assert cli(lambda: build_trainer(given)) == 2
    assert "give --save_vision_tower true" in capfd.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_names_of_files_write_no_part_of_a_card() -> None:
    name = "a`b\n## Licence\n\nThe weights: mit.|x"
    shown = table(["data"], [[quote(name)]])
    assert shown == "| data |\n| --- |\n| `a'b ## Licence The weights: mit.\\|x` |"
    assert fence("yaml", "a\n  ```\n") == "````yaml\na\n  ```\n````"
    card = ModelCard(f"run {name}", {"license": "x"}, {"Data": shown})
    assert re.findall("^#+ .*", card.to_markdown(), re.M) == ["# run a`b ## Licence The weights: mit.|x", "## Data"]
