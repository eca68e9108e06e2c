"""The scores of a model on a task, item by item: in a file that a run which was interrupted goes on with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, TypedDict

from llava.eval.babylm.tasks import Item
from llava.eval.choices import Choice, Scorer
from llava.io import append_json_lines, cut_unfinished_line, hash_json, lock_file, read_json_lines

ITEM_SCORES = "item_scores.jsonl"
"""Beside the official files: its first line has the settings, each other one the scores of an item's candidates."""
_AT_ONCE = 1024
"""Items that are scored before they are written down: what an interruption costs."""


class Settings(TypedDict):
    """What scores depend on: a run with other settings does not go on with them.

    Attributes:
        model, model_files: its path, and a hash of the names, sizes and times of its files.
        items: a hash of all ids and texts, and of the paths of their pictures.
        dtype: of the weights while they score.
        shown: ``own`` pictures, or those of ``other`` items.
    """

    model: str
    model_files: str
    items: str
    dtype: str
    shown: str


def hash_items(choices: Sequence[Choice], labels: Sequence[bool | float] = ()) -> str:
    """A hash of what is scored, and of what is written down beside scores.

    Args:
        choices: of all items, whose names are told beside their texts.
        labels: of single sentences, or the shares of people who chose the first candidate.
    """
    told: list[object] = [
        [choice.id, [[one.text, one.start] for one in choice.candidates], [media.path for media in choice.media]]
        for choice in choices
    ]
    # Without labels the hash is that of files that were written before there were any.
    return hash_json([told, list(labels)] if labels else told, 16)


def hash_pictures(choice: Choice) -> str | None:
    """A hash of the sizes and times of a choice's pictures; None without any."""
    stats = [Path(media.path).stat() for media in choice.media]
    return hash_json([[one.st_size, one.st_mtime_ns] for one in stats], 16) if stats else None


def read_item_scores(folder: Path, name: str = ITEM_SCORES) -> tuple[Settings, dict[str, tuple[float, ...]]] | None:
    """The settings and the scores by item that a folder has; None where it has none.

    Raises:
        ValueError: the file is not one of scores.
    """
    path = folder / name
    if not path.is_file():
        return None
    rows = read_json_lines(path)
    try:
        settings: Settings = rows[0]["settings"]
        # The last score of an item counts.
        return settings, {row["id"]: tuple(row["scores"]) for row in rows[1:]}
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no file of scores ({error!r}); remove it, or give another --out") from error


def read_ratios(folder: Path) -> dict[str, float]:
    """Of a task that is a correlation, the share of people by item, as the scores were written with; else nothing."""
    return {row["id"]: row["ratio"] for row in read_json_lines(folder / ITEM_SCORES)[1:] if "ratio" in row}


def read_labels(folder: Path) -> dict[str, bool]:
    """Of sentences with a label, whether each is acceptable, as the scores were written with; else nothing."""
    rows = read_json_lines(folder / ITEM_SCORES)[1:]
    return {row["id"]: row["acceptable"] for row in rows if "acceptable" in row}


def _take_up(file: BinaryIO, path: Path, settings: Settings, overwrite: bool) -> dict[str, tuple[float, ...]]:
    """The scores by item that an open file has; where it has none, or others that may go, it gets the settings."""
    try:
        lock_file(file, wait=False)
    except BlockingIOError:
        raise ValueError(f"{path}: another process writes its scores there; wait, or give another --out") from None
    # A run that was killed may have left half a line, which the next one would be written behind.
    cut_unfinished_line(path)
    # An empty file is what a run leaves that ended before its settings were on the disk.
    found = read_item_scores(path.parent, path.name) if path.stat().st_size else None
    changed = [key for key, value in settings.items() if found is not None and found[0].get(key) != value]
    if changed and not overwrite:
        raise ValueError(
            f"{path}: was made with another {', '.join(sorted(changed))}; give another --out, or --overwrite to "
            "replace it"
        )
    if found is not None and not changed:
        return found[1]
    file.truncate(0)
    append_json_lines(file, [{"settings": settings}])
    return {}


def _find_replaced(path: Path, items: Sequence[Item], pictures: Sequence[str | None]) -> set[str]:
    """Items whose pictures are others than those they were scored with; versions before tell nothing of them."""
    before = {row["id"]: row["pictures"] for row in read_json_lines(path)[1:] if "pictures" in row}
    return {item.id for item, now in zip(items, pictures, strict=True) if before.get(item.id, now) != now}


def _row(item: Item, scores: Sequence[float], pictures: str | None) -> dict[str, object]:
    row: dict[str, object] = {"id": item.id, "scores": list(scores)}
    more = {"ratio": item.ratio, "acceptable": item.acceptable, "pictures": pictures}
    return row | {name: value for name, value in more.items() if value is not None}


def score_items(
    folder: Path,
    settings: Settings,
    items: Sequence[Item],
    choices: Sequence[Choice],
    get_scorer: Callable[[], Scorer],
    on_scored: Callable[[int], None],
    overwrite: bool = False,
    name: str = ITEM_SCORES,
) -> list[tuple[float, ...]]:
    """Score what is not scored yet, or with pictures that were replaced since, and write it down.

    Args:
        folder: of the task's results.
        settings: of this run.
        items: that are scored.
        choices: of the items, with their own pictures or others'.
        get_scorer: gives what scores them; not called where nothing is left to score.
        on_scored: is called with the number of items that were scored, those found in the file included.
        overwrite: whether scores with other settings are replaced.
        name: of the file.

    Returns:
        The scores of all items, in order.

    Raises:
        ValueError: the folder has scores with other settings, another process scores into it, or an item cannot be
            scored.
    """
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        done = _take_up(file, path, settings, overwrite)
        pictures = [hash_pictures(choice) for choice in choices]
        replaced = _find_replaced(path, items, pictures)
        done = {name: told for name, told in done.items() if name not in replaced}
        on_scored(sum(item.id in done for item in items))
        todo = [index for index, item in enumerate(items) if item.id not in done]
        for start in range(0, len(todo), _AT_ONCE):
            part = todo[start : start + _AT_ONCE]
            told = get_scorer().score([choices[index] for index in part], on_scored)
            scored = list(zip(part, told, strict=True))
            append_json_lines(file, (_row(items[index], one, pictures[index]) for index, one in scored))
            done |= {items[index].id: one for index, one in scored}
    return [done[item.id] for item in items]
