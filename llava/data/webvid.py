"""``python -m llava.data.webvid``: rows of WebVid with captions -> data files of text, and of the same with its clips.

Written to ``--out``, with the language behind each name:

``webvid_t_it.json``   captions alone
``webvid_vi_it.json``  the same samples, ids and captions with their clips
``left_out.jsonl``     what was left out: id, file, reason and, where the row has it, contentUrl
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from llava.command import CommandParser, check_output_folder, run_command
from llava.data.json_text import parse_json
from llava.io import append_json_lines, is_file, write_beside, write_json

ID, FOLDER, URL = "videoid", "page_dir", "contentUrl"

Row = Mapping[str, object]
"""A row by the names of its columns: of a CSV file all values are texts."""


class _TextSample(TypedDict):
    id: str
    conversations: list[dict[str, str]]


class Sample(_TextSample, total=False):
    """An entry of a data file, see docs/data.md."""

    video: str


@dataclass
class Outcome:
    """Samples of both files, in step, and the rows of ``left_out.jsonl``."""

    text: list[Sample] = field(default_factory=list)
    video: list[Sample] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    @property
    def num_clips(self) -> int:
        return sum("video" in sample for sample in self.video)


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.data.webvid",
        description="Turn rows of WebVid with captions into webvid_t_it.json (text alone) and webvid_vi_it.json (the "
        "same samples with their clips). Clips that are missing or unreadable are listed in left_out.jsonl. The same "
        "rows and clips give the same bytes.",
    )
    parser.add_argument(
        "--rows",
        required=True,
        metavar="FILE",
        help=f"CSV (with a header) or JSONL with {ID} and captions; {FOLDER} and {URL} are used where present",
    )
    parser.add_argument(
        "--video_folder",
        required=True,
        metavar="DIR",
        help=f"folder of the clips, as <{ID}>.mp4 or <{FOLDER}>/<{ID}>.mp4; paths in webvid_vi_it.json start here",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to; made if it is not there")
    parser.add_argument(
        "--caption_column", metavar="NAME", default="name_it", help="column of the captions (default name_it)"
    )
    parser.add_argument(
        "--language", metavar="NAME", default="it", help="what the names of the files end with (default it)"
    )
    parser.add_argument(
        "--max_samples", type=int, metavar="N", help="stop after the first N samples (default: take all rows)"
    )
    parser.add_argument(
        "--require_video",
        action="store_true",
        help="leave samples without a readable clip out of both files (default: keep them in both, as text)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; returns the exit status, 2 with one line on standard error for a user's mistake."""
    return run_command(lambda: convert(build_parser().parse_args(argv)))


def convert(args: argparse.Namespace) -> None:
    """Write what a command line asks for, and print a summary."""
    if args.max_samples is not None and args.max_samples < 1:
        raise ValueError(f"--max_samples is {args.max_samples}; it must be at least 1")
    if not os.path.isdir(args.video_folder):
        raise ValueError(f"--video_folder {args.video_folder}: no such folder")
    if Path(args.language).name != args.language:
        raise ValueError(f"--language is {args.language!r}; it must be the end of a file's name")
    rows = read_rows(args.rows, args.caption_column)
    check_output_folder(args.out, "--out")
    outcome = build_samples(rows, args)
    if not outcome.text:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in count_reasons(outcome.left_out))
        raise ValueError(f"no sample is left of the {len(rows)} rows in {args.rows} ({reasons})")
    write_files(outcome, args.out, args.language)
    print(summarise(outcome, len(rows), args))


def read_rows(path: str, caption: str) -> list[Row]:
    """The rows of a CSV or JSONL file; ``caption`` is the column of the captions.

    Raises:
        ValueError: no such file, another kind of file, a broken line, a missing column, or no rows.
    """
    file = Path(path)
    if not is_file(file):
        raise ValueError(f"--rows {path}: no such file")
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if file.suffix not in readers:
        raise ValueError(f"--rows {path}: unknown kind of file {file.suffix!r}; known: {', '.join(readers)}")
    try:
        rows = list(readers[file.suffix](file, (ID, caption)))
    except UnicodeDecodeError as error:
        raise ValueError(f"--rows {path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"--rows {path}: not CSV: {error}") from error
    if not rows:
        raise ValueError(f"--rows {path}: has no rows")
    return rows


def _read_csv(file: Path, needed: Collection[str]) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        _check_columns(reader.fieldnames or (), needed, f"--rows {file}")
        for row in reader:
            if None in row or None in row.values():
                expected = len(reader.fieldnames or ())
                raise ValueError(f"--rows {file}, line {reader.line_num}: expected {expected} fields, as in the header")
            yield row


def _read_jsonl(file: Path, needed: Collection[str]) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"--rows {file}, line {number}"
            if not line.strip():
                continue
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
            _check_columns(row, needed, where)
            yield row


def _check_columns(found: Collection[str], needed: Collection[str], where: str) -> None:
    missing = [column for column in needed if column not in found]
    if missing:
        raise ValueError(
            f"{where}: lacks {', '.join(missing)}; found {', '.join(map(str, found)) or 'nothing'}; "
            "--caption_column says where the captions are"
        )


def build_samples(rows: Sequence[Row], args: argparse.Namespace) -> Outcome:
    """Samples of both files, in the order of the rows.

    A row without a caption, with an id that an earlier sample has, or with a caption that cannot be
    trained on is left out. One whose clip cannot be read is left out with ``--require_video``, and
    otherwise stays as text in both files; either way its clip is listed.
    """
    from tqdm import tqdm

    outcome = Outcome()
    used: set[str] = set()
    for row in tqdm(rows, desc="reading clips", unit="clip", disable=None):
        if args.max_samples is not None and len(outcome.text) >= args.max_samples:
            break
        identity = str(row[ID]).strip()
        caption = " ".join(str(row[args.caption_column] or "").split())
        clip, problem = find_clip(row, identity, args.video_folder)
        unusable = _explain_unusable(identity, caption, used)
        if unusable or problem:
            listed = {"id": identity, "file": clip, "reason": unusable or problem}
            outcome.left_out.append(listed | ({URL: str(row[URL])} if row.get(URL) else {}))
        if unusable or (problem and args.require_video):
            continue
        used.add(identity)
        outcome.text.append(_sample(identity, caption, None))
        outcome.video.append(_sample(identity, caption, None if problem else clip))
    return outcome


def find_clip(row: Row, identity: str, video_dir: str) -> tuple[str, str]:
    """The path of a row's clip below the folder, and why it cannot be used ("" if it can)."""
    from llava.data.media import MediaError, sample_video

    names = [f"{identity}.mp4"]
    if row.get(FOLDER):
        names.append(os.path.join(str(row[FOLDER]), names[0]))
    clip = next((name for name in names if Path(video_dir, name).exists()), None)
    if clip is None:
        return names[-1], "no such file"
    path = os.path.join(video_dir, clip)
    try:
        sample_video(path, num_frames=4)
    except MediaError as error:
        return clip, " ".join(str(error).removeprefix(f"{path}: ").split())
    return clip, ""


def _explain_unusable(identity: str, caption: str, used: set[str]) -> str:
    """Why a row can be no sample at all, or ""."""
    from llava.data.records import parse_record

    if not identity:
        return "no id"
    if identity in used:
        return "an earlier row has the same id"
    if not caption:
        return "no caption"
    try:
        parse_record(_sample(identity, caption, None), "caption", "", "")
    except ValueError as error:
        return str(error)
    return ""


def _sample(identity: str, caption: str, clip: str | None) -> Sample:
    turns = [{"from": "human", "value": "<video>" if clip else ""}, {"from": "gpt", "value": caption}]
    if clip is None:
        return {"id": identity, "conversations": turns}
    return {"id": identity, "video": clip, "conversations": turns}


def write_files(outcome: Outcome, folder: str, language: str) -> None:
    """Write the three files, none of which is ever half written."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder, f"webvid_t_{language}.json"), outcome.text)
    write_json(Path(folder, f"webvid_vi_{language}.json"), outcome.video)
    with write_beside(Path(folder, "left_out.jsonl")) as beside, beside.open("wb") as file:
        append_json_lines(file, outcome.left_out)


def count_reasons(left_out: Sequence[dict[str, str]]) -> list[tuple[str, int]]:
    """Reasons and how often each stands in the list, without what is particular to one clip."""
    return Counter(row["reason"].partition(":")[0] for row in left_out).most_common()


def summarise(outcome: Outcome, num_rows: int, args: argparse.Namespace) -> str:
    num_samples = len(outcome.text)
    text, video = (os.path.join(args.out, f"webvid_{kind}_{args.language}.json") for kind in ("t", "vi"))
    lines = [
        f"{num_samples} samples of {num_rows} rows, {outcome.num_clips} of them with a clip, in",
        f"  {text}",
        f"  {video} (train with --video_folder {args.video_folder})",
    ]
    if num_samples > outcome.num_clips:
        lines.append(
            f"{num_samples - outcome.num_clips} samples without a readable clip are text in both; "
            "--require_video leaves them out"
        )
    if outcome.left_out:
        lines.append(f"{len(outcome.left_out)} listed in {os.path.join(args.out, 'left_out.jsonl')}:")
        lines += [f"  {count} x {reason}" for reason, count in count_reasons(outcome.left_out)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
