"""``python -m llava.train.model_card FOLDER``: the card of a run's model, ``README.md``, from what its folder holds.

Training writes it beside every model that it saves. The command writes it once more, with the scores that evaluations
have left since.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava import __version__
from llava.command import CommandParser, run_command
from llava.io import read_json_lines
from llava.model.model_card import (
    CARD,
    LOADING,
    ModelCard,
    bare_name,
    fence,
    is_generated,
    python,
    quote,
    table,
    write_card,
)

if TYPE_CHECKING:
    from llava.train.arguments import TrainingArguments
    from llava.train.identity import RunIdentity

_COUNTS = ("samples", "words", "supervised_tokens", "images", "videos", "seconds_of_video")
_TOLD_OF_FREE = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "attn_implementation",
    "deepspeed", "on_bad_sample", "milestones", "save_vision_tower",
)  # fmt: skip
_ALWAYS = ("learning_rate", "seed", "mm_tunable_parts", "model_max_length")
_PATHS = ("model_name_or_path", "lora_weight_path", "pretrain_mm_mlp_adapter", "vision_tower", "backbone_model")
_NOT_TOLD = {"data_content", "tokenizer", "model_type", "trainable_parameters", "ignore_keys"}
_DEPTH = 3
"""Folders below a model in which scores of it are looked for: results/NAME/main/scores.json."""


@dataclass(frozen=True)
class CardSettings:
    """What a run knows of its card beside what its folder will hold.

    Attributes:
        parts: of the model: name, parameters and how many of them train.
        license: an identifier such as apache-2.0; "" where nobody has said.
        languages: codes such as it.
        hub_name: of the model on the hub; "" where it is not sent there.
    """

    parts: Sequence[tuple[str, int, int]] = ()
    license: str = ""
    languages: Sequence[str] = ()
    hub_name: str = ""

    @classmethod
    def of(cls, parts: Sequence[tuple[str, int, int]], args: TrainingArguments) -> CardSettings:
        """Of a run, whose model has these parts."""
        return cls(parts, args.card_license or "", args.card_language or ())


def describe_run(
    folder: Path,
    name: str,
    identity: RunIdentity | None,
    presented: Mapping[str, Mapping[str, float]],
    step: int,
    settings: CardSettings,
    output_dir: Path,
) -> ModelCard:
    """The card of a model that a run has saved.

    Args:
        folder: of the model, with its ``config.json``.
        name: of the model.
        identity: of the run; None where a program of one's own does not say.
        presented: what the run has presented up to then, by source.
        step: of the run.
        settings: what else is known.
        output_dir: of the run, which has its scores.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    total = {count: sum(counts.get(count, 0) for counts in presented.values()) for count in _COUNTS}
    sees, base = bool(config.get("mm_vision_tower")), _find_base(identity)
    kind = "text-generation" if not sees else f"{'video' if total['videos'] else 'image'}-text-to-text"
    metadata = {
        "license": settings.license,
        "language": list(settings.languages),
        "library_name": "llava",
        "pipeline_tag": kind,
        "base_model": base if "/" in base else "",  # Of a folder nobody else knows the name.
        "tags": [
            "llava",
            str(config["model_type"]),
            *([str(config["mm_resampler_type"])] if _resampler(config) else []),
        ],
    }
    sections = {
        "What this is": _describe_model(config, base, total, step),
        LOADING: _describe_loading(config, settings.hub_name or name, total),
        "Data": _describe_data(identity, presented, total),
        "Recipe": _describe_recipe(identity, step),
        "Parts": _describe_parts(config, settings.parts),
        "Scores": "\n\n".join(_describe_scores(output_dir, folder, step)),
        "Licence": _describe_licence(identity, settings),
    }
    return ModelCard(name, metadata, sections)


def _resampler(config: Mapping[str, Any]) -> str:
    return str(config.get("mm_resampler_type") or "")


def _find_base(identity: RunIdentity | None) -> str:
    source = None if identity is None else (identity.fixed.get("model_name_or_path") or {}).get("source")
    return "" if source is None else bare_name(source)


def _describe_model(config: Mapping[str, Any], base: str, total: Mapping[str, float], step: int) -> str:
    tower = config.get("mm_vision_tower")
    seeing = f", with the vision model {quote(bare_name(tower))}" if tower else ", for text alone"
    seeing += f" and the resampler `{_resampler(config)}`" if tower and _resampler(config) else ""
    words = f" on {total['words']:,} words" if total["words"] else ""
    media = [f"{total[kind]:,} {kind}" for kind in ("images", "videos") if total[kind]]
    shown = f", with {' and '.join(media)}" if media else ""
    begun = f", begun from {quote(base)}" if base else ""
    return (
        f"A language model of the kind `{config['model_type']}`{seeing}{begun}. Trained with llava {__version__} for "
        f"{step:,} step{'s' * (step != 1)}{words}{shown}, repeats included."
    )


def _describe_loading(config: Mapping[str, Any], name: str, total: Mapping[str, float]) -> str:
    quoted = json.dumps(name, ensure_ascii=False)
    prompt = "" if config.get("llava_format", "plain_lm") == "plain_lm" else ', "What is this?"'
    lines = ["from llava.serve.generate import Captioner, Request"]
    if config.get("mm_vision_tower"):
        kind, file = ("video", "clip.mp4") if total["videos"] or not total["images"] else ("image", "photo.jpg")
        lines.append("from llava.types import Media")
        request = f'Request([Media("{kind}", "{file}")]{prompt})'
    else:
        request = f"Request(prompt={prompt[2:] or chr(34) + 'Il' + chr(34)})"
    lines += ["", f"captioner = Captioner.from_checkpoint({quoted})", f"print(captioner.generate([{request}])[0])"]
    text = python("\n".join(lines))
    tower = config.get("mm_vision_tower")
    if tower and not config.get("mm_save_vision_tower"):
        text += (
            f"\n\nThe vision model is not among the weights. It is read from {quote(bare_name(tower))}, whose weights "
            f"have the hash {str(config.get('mm_vision_tower_hash'))[:12]}; where it lies elsewhere, give its folder "
            "as `vision_tower=`."
        )
    return text


def _describe_data(
    identity: RunIdentity | None, presented: Mapping[str, Mapping[str, float]], total: Mapping[str, float]
) -> str:
    if not total["samples"]:
        return "What it was trained on was not counted."
    shown = [count for count in _COUNTS if total[count]]
    rows = [[quote(name), *_numbers(counts, shown)] for name, counts in presented.items()]
    if len(rows) > 1:
        rows.append(["all", *_numbers(total, shown)])
    text = table(["what was presented", *(count.replace("_", " ") for count in shown)], rows)
    order = {} if identity is None else identity.length.get("order") or {}
    if order.get("samples"):
        epochs = total["samples"] / order["samples"]
        text += f"\n\nThe data have {order['samples']:,} samples, so this is {epochs:.3g} epochs."
    return f"{text} A word is what white space separates; repeats count."


def _numbers(counts: Mapping[str, float], shown: Sequence[str]) -> list[str]:
    return [f"{round(counts.get(count, 0)):,}" for count in shown]


def _describe_recipe(identity: RunIdentity | None, step: int) -> str:
    if identity is None:
        return ""
    import yaml

    flags = dict(changed_flags(identity))
    versions, ranks = identity.free.get("versions") or {}, identity.free.get("world_size", 1)
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        "Flags that differ from their defaults, as a file for `--config`; of files and folders the names alone.\n\n"
        f"{fence('yaml', yaml.safe_dump(flags, sort_keys=False, allow_unicode=True))}\n\n"
        f"Step {step:,} of {identity.length.get('steps', step):,}, {ranks} process{'es' * (ranks != 1)}, with {told}."
    )


def changed_flags(identity: RunIdentity) -> Iterator[tuple[str, Any]]:
    """The flags of a run that differ from their defaults, as they are given; of paths the last part."""
    defaults, settings = _defaults(), {**identity.fixed, **{name: identity.free.get(name) for name in _TOLD_OF_FREE}}
    for name in _PATHS:
        if source := (settings.get(name) or {}).get("source"):
            yield name, bare_name(source)
    stored = identity.fixed["data_content"]["source"]
    yield "data_path", [bare_name(path) for path in (stored if isinstance(stored, list) else [stored])]
    for name in sorted(settings.keys() - {*_PATHS, *_NOT_TOLD}):
        value = settings[name]
        if name not in defaults or (name.endswith("_lr") and value == settings["learning_rate"]):
            continue
        if value is not None and (value != defaults[name] or name in _ALWAYS):
            yield name, bare_name(value) if name == "deepspeed" else value
    length = identity.length
    for name in ("word_limit", "max_steps", "num_train_epochs"):
        if length.get(name) not in (None, -1):
            yield name, length[name]
            break
    order = length.get("order") or {}
    if order.get("strategy", "random") != "random":
        yield "train_sampling_strategy", order["strategy"]
    if order.get("pack_length"):
        yield "packing", True


def _defaults() -> dict[str, Any]:
    """The default of every flag; of one that stands for a setting of the model, that setting's."""
    from llava.config import VisionConfig
    from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments

    of_vision = {field.name: field.default for field in fields(VisionConfig)}
    found: dict[str, Any] = {}
    for group in (ModelArguments, DataArguments, TrainingArguments):
        for field in fields(group):  # type: ignore[arg-type]
            default = None if field.default is MISSING else field.default
            kept = of_vision.get(field.name.removeprefix("mm_"), MISSING)
            found[field.name] = kept if default is None and kept is not MISSING else getattr(default, "value", default)
    return found


def _describe_parts(config: Mapping[str, Any], parts: Sequence[tuple[str, int, int]]) -> str:
    if not parts:
        return ""
    rows = [(f"`{name}`", f"{size:,}", f"{trained:,}" if trained else "frozen") for name, size, trained in parts]
    if len(rows) > 1:
        rows.append(("all", f"{sum(part[1] for part in parts):,}", f"{sum(part[2] for part in parts):,}"))
    return table(("part", "parameters", "of them trained"), rows)


def _describe_licence(identity: RunIdentity | None, settings: CardSettings) -> str:
    stated = f"The weights: {settings.license}." if settings.license else (
        "None is stated for the weights: `--card_license` names one, or write it here and at the top of this file."
    )  # fmt: skip
    source = None if identity is None else (identity.fixed.get("model_name_or_path") or {}).get("source")
    base = ModelCard.read(Path(source)) if source and Path(source).is_dir() else None
    if base is not None and (license := base.metadata.get("license")):
        stated += f" The card of the model that it was begun from says {license}."
    return f"{stated} Data and vision model have their own. The program, llava, is Apache-2.0."


# Scores: of the run itself, and of evaluations whose folders lie within its own.


def _describe_scores(output_dir: Path, folder: Path, step: int) -> Iterator[str]:
    from llava.train.score_table import SCORES, ScoreRow, read_scores

    newest: dict[str, ScoreRow] = {}
    for row in read_scores(output_dir):
        if row.step <= step:
            newest[row.task] = row
    if newest:
        rows = [
            (row.task, row.metric, _interval(row.score, row.low, row.high), f"{row.chance:g}", f"{row.items:,}",
             f"{row.step:,}")
            for row in newest.values()
        ]  # fmt: skip
        yield table(("task", "", "score [95 %]", "chance", "items", "at step"), rows) + f"\n\nFrom `{SCORES}`."
    results = output_dir / "eval_results.json"
    if folder == output_dir and results.is_file():
        numbers = json.loads(results.read_text(encoding="utf-8"))
        losses = [(name, f"{value:.4f}") for name, value in numbers.items() if name.endswith("loss")]
        if losses:
            yield table(("evaluation at the end", ""), losses)
    for path in sorted(_find_results(folder)):
        yield _describe_result(path, path.relative_to(folder))


def _find_results(folder: Path) -> Iterator[Path]:
    for depth in range(1, _DEPTH + 1):
        for path in folder.glob("/".join(["*"] * depth + ["scores.json"])):
            if not path.relative_to(folder).parts[0].startswith(("checkpoint-", "chck_")):
                yield path


def _describe_result(path: Path, shown: Path) -> str:
    """The scores of ``llava.eval.run`` or ``llava.eval.babylm``, whose files have the same name."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return ""
    if "tasks" in content:
        rows = [
            (task, result.get("metric", ""), _interval(result.get("official"), result.get("low"), result.get("high")))
            for task, result in content["tasks"].items()
        ]
    else:
        data = " ".join(bare_name(name) for name in content.get("data", ()))
        rows = [
            (content.get("task", ""), f"{name}, {data}", _interval(score["value"], score["low"], score["high"]))
            for name, score in content.get("scores", {}).items()
        ]
    return table(("task", "", "score [95 %]"), rows) + f"\n\nFrom {quote(shown.as_posix())}." if rows else ""


def _interval(score: float | None, low: float | None, high: float | None) -> str:
    if score is None:
        return "none"
    return f"{score:.4g}" if low is None or high is None else f"{score:.4g} [{low:.4g}, {high:.4g}]"


# The command.


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.train.model_card",
        description="Write the card (README.md) of a model that a run has saved, with the scores that lie in its "
        "folder by now. One that somebody has written or changed stays, unless --overwrite is given.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="of a run, a checkpoint or a milestone")
    parser.add_argument("--license", metavar="ID", help="of the weights, such as apache-2.0 (default: as it was)")
    parser.add_argument("--language", nargs="+", metavar="CODE", help="of the data, such as it (default: as it was)")
    parser.add_argument("--overwrite", action="store_true", help="replace a card that somebody has written or changed")
    return parser


def rewrite_card(folder: str, license: str | None, languages: Sequence[str] | None, overwrite: bool) -> str:
    """Write the card of a folder, or its scores and licence once more.

    Raises:
        ValueError: there is no model of a run, or the card is somebody's own.
    """
    from llava.train.exposure_log import EXPOSURE_FILE, EXPOSURE_STATE
    from llava.train.identity import RunIdentity
    from llava.train.recount import find_saved

    place = Path(folder)
    if not (place / "config.json").is_file():
        raise ValueError(
            f"{folder}: no saved model (no config.json); give the folder of a run, checkpoint or milestone"
        )
    own = (place / CARD).exists() and not is_generated(place / CARD)
    if own and not overwrite:
        raise ValueError(
            f"{place / CARD} was written or changed by somebody; move it away, or replace it with --overwrite"
        )
    output_dir = place if (place / EXPOSURE_FILE).is_file() else place.absolute().parent
    counted: dict[str, Any] = {}
    if (place / EXPOSURE_STATE).is_file():
        counted = json.loads((place / EXPOSURE_STATE).read_text(encoding="utf-8"))
    elif lines := read_json_lines(output_dir / EXPOSURE_FILE):
        counted = lines[-1]
    identity, step = RunIdentity.read(place) or RunIdentity.read(find_saved(output_dir)), counted.get("step", 0)
    before = None if own else ModelCard.read(place)
    settings = CardSettings(
        license=license or ("" if before is None else str(before.metadata.get("license") or "")),
        languages=languages or ([] if before is None else before.metadata.get("language") or []),
    )
    card = before
    if card is None:
        presented = in_seconds(counted.get("sources", {}))
        card = describe_run(place, place.absolute().name, identity, presented, step, settings, output_dir)
    else:
        # What only the run itself could see, such as names on the hub, is as it wrote it.
        card.metadata |= {"license": settings.license, "language": list(settings.languages)}
        card.sections.pop("Licence", None)
        card.sections["Scores"] = "\n\n".join(_describe_scores(output_dir, place, step))
        card.sections["Licence"] = _describe_licence(identity, settings)
    if own:
        (place / CARD).unlink()
    write_card(place, card)
    return f"written: {place / CARD}"


def in_seconds(sources: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Counts by source, with seconds of video where a checkpoint has milliseconds."""
    return {name: {"seconds_of_video": counts.get("video_ms", 0) / 1000, **counts} for name, counts in sources.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Write a card; returns the exit status, 2 with one line for a user's mistake."""

    def run() -> None:
        args = build_parser().parse_args(argv)
        print(rewrite_card(args.folder, args.license, args.language, args.overwrite))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
