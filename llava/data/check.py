"""``python -m llava.data.check``: read data files and decode all their media before a long run; list what is bad."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, TextIO, cast

from llava.command import CommandParser, check_at_least, run_command
from llava.data.media_files import DEFAULT_LIMITS, MediaError, MediaLimits
from llava.data.records import describe_notes, read_records
from llava.io import num_cores
from llava.messages import escape_controls
from llava.types import SKIP, BadSample, Record

if TYPE_CHECKING:
    from torch.utils.data import Dataset


@dataclass(frozen=True)
class MediaCheck:
    """A data set that decodes the media of records as training would, and keeps nothing but what is wrong.

    Attributes:
        records: whose media to decode.
        num_frames, video_fps, frames_upbound: which frames of videos, as the flags of training.
        decode_timeout: seconds that decoding a video may take; 0 sets no limit.
        limits: how large an image or a video may be.
    """

    records: Sequence[Record]
    num_frames: int
    video_fps: float
    frames_upbound: int
    decode_timeout: float
    limits: MediaLimits = DEFAULT_LIMITS

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> BadSample | None:
        record = self.records[index]
        try:
            if record.fault is not None:
                raise ValueError(record.fault)
            self.decode(record)
        except ValueError as error:
            return BadSample.from_error(record, error)
        return None

    def decode(self, record: Record) -> None:
        """A ValueError over the first of a record's media that cannot be decoded."""
        from llava.data.media import decode_media

        sampling = (self.num_frames, self.video_fps, self.frames_upbound)
        for media in record.media:
            try:
                decode_media(media, *sampling, record.split, self.decode_timeout, self.limits)
            except MediaError as error:
                raise MediaError(str(error), media.path) from error


def find_bad(check: MediaCheck, num_workers: int, indices: Sequence[int] | None = None) -> Iterator[BadSample]:
    """The bad samples, as they are found, with a progress bar where somebody watches.

    Args:
        check: what to decode.
        num_workers: processes that decode; 0 decodes here.
        indices: of the samples to look at; by default all.
    """
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    chosen = range(len(check)) if indices is None else indices
    # Out of order: a file that hangs holds up nobody but its worker.
    data = cast("Dataset[BadSample | None]", check)
    loader = DataLoader(data, batch_size=None, sampler=chosen, num_workers=num_workers, in_order=False)
    yield from filter(None, tqdm(loader, total=len(chosen), unit="sample", disable=None))


@dataclass
class Report:
    """What a check has found.

    Attributes:
        samples: how many were checked.
        media: how many files of each kind they name.
        workers: processes that decoded.
        bad: how many samples are bad for each reason, a path in quotes being ``FILE`` and numbers ``N``.
        seconds: how long it took.
    """

    samples: int
    media: dict[str, int]
    workers: int
    bad: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def __str__(self) -> str:
        media = ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in self.media.items())
        lines = [
            f"{self.samples} samples ({media or 'no media'}) in {self.seconds:.1f} s, workers: {self.workers}",
            f"{sum(self.bad.values())} bad",
        ]
        return "\n".join([*lines, *(f"{count:>8}  {reason}" for reason, count in self.bad.most_common())])


def check_data(check: MediaCheck, num_workers: int, file: TextIO | None = None) -> Report:
    """Decode everything.

    Args:
        check: what to decode.
        num_workers: processes that decode; 0 decodes here.
        file: where bad samples are written as they are found, as lines of JSON, and at the end the report; without
            it they are printed.
    """
    from llava.data.dataset_stats import count_media

    # Counted from the index, before anything is opened.
    images, videos = count_media(check.records).sum(axis=1).tolist()
    media = {kind: count for kind, count in (("image", images), ("video", videos)) if count}
    report = Report(len(check), media, num_workers)
    start = time.perf_counter()
    for bad in find_bad(check, num_workers):
        report.bad[_generalize(bad.reason)] += 1
        if file is None:
            print(escape_controls(str(bad)))
        else:
            # At once: a check of hours that is stopped has told what it found.
            print(json.dumps(bad.to_json(), ensure_ascii=False), file=file, flush=True)
    report.seconds = round(time.perf_counter() - start, 3)
    if file is not None:
        print(json.dumps({"summary": vars(report)}, ensure_ascii=False), file=file)
    return report


def _generalize(reason: str) -> str:
    """A reason without what differs from sample to sample: so that a thousand of one kind are one line."""
    reason = re.sub(r"'[^']*/[^']*'", "FILE", reason)  # Before the numbers: names of files hold some.
    return re.sub(r"\d+(\.\d+)?", "N", reason)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a ValueError for flags that are wrong."""
    parser = CommandParser(
        prog="python -m llava.data.check",
        description="Decode the images and videos of data files and list the bad ones.",
        epilog="Exit status: 0 where all is well, 1 where samples are bad, 2 for a wrong command line or data file.",
    )
    parser.add_argument("data", nargs="+", metavar="DATA", help="data files, as for --data_path of training")
    parser.add_argument("--image_folder", metavar="DIR", help="what relative image paths start from")
    parser.add_argument("--video_folder", metavar="DIR", help="what relative video paths start from")
    parser.add_argument(
        "--num_frames", metavar="N", type=int, default=4, help="frames sampled from a video (default 4)"
    )
    parser.add_argument(
        "--video_fps", metavar="X", type=float, default=0.0, help="so many a second instead (default 0: not)"
    )
    parser.add_argument(
        "--frames_upbound", metavar="N", type=int, default=32, help="most frames of --video_fps (default 32; 0: all)"
    )
    parser.add_argument(
        "--decode_timeout", metavar="X", type=float, default=60.0, help="seconds a video may take (default 60)"
    )
    parser.add_argument("--allow_duplicate_ids", action="store_true", help="samples of a file may share an id")
    parser.add_argument("--allow_outside_paths", action="store_true", help="let paths lead out of these folders")
    parser.add_argument("--ignore_keys", nargs="+", default=(), metavar="KEY", help="keys that hold no media, as there")
    for limit in fields(MediaLimits):
        parser.add_argument(
            f"--{limit.name}",
            metavar="N",
            type=int,
            default=limit.default,
            help=f"as for training (default {limit.default})",
        )
    parser.add_argument("--workers", metavar="N", type=int, default=num_cores(), help="processes (default: one a core)")
    parser.add_argument("--report", metavar="FILE", help="write bad samples there, one a line, and the summary last")
    args = parser.parse_args(argv)
    check_at_least(args, {"num_frames": 1, "frames_upbound": 0, "workers": 0, "video_fps": 0, "decode_timeout": 0})
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Check data files and print a summary; the exit status is 0, 1 or 2, as ``--help`` says."""
    return run_command(lambda: check_files(parse_arguments(argv)))


def check_files(args: argparse.Namespace) -> int:
    """Check the data files of a command line and print a summary.

    Returns:
        0 where all is well, 1 where samples are bad.

    Raises:
        ValueError, OSError: a data file cannot be used, or the report not be written.
    """
    # Bad samples do not stop a check: they are what it looks for.
    records = read_records(
        args.data,
        args.image_folder,
        args.video_folder,
        on_bad_sample=SKIP,
        allow_duplicate_ids=args.allow_duplicate_ids,
        allow_outside_paths=args.allow_outside_paths,
        ignore_keys=args.ignore_keys,
        flag="DATA",
    )
    for line in describe_notes(records):
        print(escape_controls(line), file=sys.stderr)
    limits = MediaLimits(**{limit.name: getattr(args, limit.name) for limit in fields(MediaLimits)})
    check = MediaCheck(records, args.num_frames, args.video_fps, args.frames_upbound, args.decode_timeout, limits)
    file = None
    if args.report:
        try:
            file = open(args.report, "w", encoding="utf-8", errors="backslashreplace")  # noqa: PTH123, SIM115
        except OSError as error:
            raise ValueError(f"--report {args.report}: cannot be written: {error.strerror}") from error
    with file or nullcontext():
        report = check_data(check, args.workers, file)
    print(escape_controls(str(report)))
    return 1 if report.bad else 0


if __name__ == "__main__":
    sys.exit(main())
