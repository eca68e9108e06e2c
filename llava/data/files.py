"""What ``--data_path`` names, and the raw samples in it, one by one: no file is ever in memory as a whole.

Entries: data files, folders of ``datasets``, patterns such as ``prefix{a,b}.json``, YAML mixtures of these.
Raw samples: what JSON, JSON lines, Parquet or Arrow say of a sample, with the words that tell where it stands.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
import math
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llava.io import read_yaml

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = range | NDArray[np.int64]

MIXTURE_SUFFIXES = (".yaml", ".yml")
KNOWN_SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow")
LONGEST_SAMPLE = 1 << 26
"""Bytes that the text of one sample may have: a file without line ends is no reason to read all of it."""

_GROUP = re.compile(r"\{([^{}]*)\}")
_SAMPLING = re.compile(r"(all|(?:first|end|random):(\d+|\d+(?:\.\d+)?%))")
_ENTRY_KEYS = ("json_path", "sampling_strategy", "source", "data_folder")
_BYTES_AT_ONCE = 1 << 22
_LONG_FILE = 1 << 26
"""Bytes from which on reading a file is shown with a progress bar."""
_ROWS_AT_ONCE = 64
"""Of a table, whose rows may hold pictures."""
_LONG_NUMBER = "has a whole number of thousands of digits; put it in quotes if it is a name"
_SPACE = re.compile(r"[ \t\n\r]*")


# What --data_path names: entries of data files.


@dataclass(frozen=True)
class DataEntry:
    """Data files that are read and sampled together.

    Attributes:
        files: paths, in order.
        sampling: which samples of all of them are taken: "all", or "first:", "end:" or "random:" and a number or a
            share, such as "random:10%".
        source: the sub-folder of the media folder that stands in for the samples' own ``source``; "" is none.
        data_folder: what relative media paths start from, before any flag.
        name: what the entry is called in errors.
    """

    files: tuple[str, ...]
    sampling: str = "all"
    source: str | None = None
    data_folder: str | None = None
    name: str = "--data_path"


def find_entries(paths: Sequence[str], flag: str = "--data_path") -> list[DataEntry]:
    """The entries that the words behind a flag stand for.

    Raises:
        ValueError: a file is missing or of an unknown kind, or a mixture is not as ``docs/data.md`` describes.
    """
    entries: list[DataEntry] = []
    for path in map(os.path.expanduser, paths):
        if Path(path).suffix in MIXTURE_SUFFIXES:
            entries += _read_mixture(path, flag)
        else:
            entries += [DataEntry((file,), name=f"{flag} {path}") for file in _find_files(path, f"{flag} {path}")]
    return entries


def expand_braces(pattern: str, name: str) -> list[str]:
    """The paths of a pattern, its last group varying fastest; a path without braces, or that exists, is itself.

    Raises:
        ValueError: braces that do not match, or an alternative that is empty; begins with ``name``.
    """
    if not ("{" in pattern or "}" in pattern) or Path(pattern).exists():
        return [pattern]
    pieces = _GROUP.split(pattern)  # text, group, text, group, text
    if any("{" in piece or "}" in piece for piece in pieces):
        raise ValueError(f"{name}: braces that do not match, or stand within braces; write prefix{{a,b}}.json")
    groups = [[part.strip() for part in group.split(",")] for group in pieces[1::2]]
    for group, written in zip(groups, pieces[1::2], strict=True):
        if "" in group:
            empty = f"alternative {group.index('') + 1} of {{{written}}}"
            raise ValueError(f"{name}: {empty} is empty; write prefix{{a,b}}.json")
    return ["{}".join(pieces[::2]).format(*choice) for choice in product(*groups)]


def _find_files(pattern: str, name: str) -> list[str]:
    """The data files of a path, a folder of ``datasets`` or a brace pattern; each must be there."""
    files = [file for path in expand_braces(pattern, name) for file in _open_folder(path, name)]
    for file in files:  # All are checked before the first is read.
        _check_data_file(file, name if file == pattern else f"{name}: {file}")
    return files


def _open_folder(path: str, name: str) -> list[str]:
    """The Arrow files of a folder that ``Dataset.save_to_disk`` wrote; any other path is itself."""
    state = Path(path, "state.json")
    if Path(path, "dataset_dict.json").is_file():
        splits = sorted(file.parent.name for file in Path(path).glob("*/state.json"))
        raise ValueError(f"{name}: holds several splits; give one of them: {', '.join(f'{path}/{s}' for s in splits)}")
    if not state.is_file():
        return [path]
    try:
        files = [str(Path(path, entry["filename"])) for entry in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: its state.json is not one of datasets' save_to_disk: {error!r}") from error
    if outside := [file for file in files if Path(file).parent != Path(path)]:
        raise ValueError(f"{name}: its state.json names {outside[0]}, which lies outside of it")
    return files


def _read_mixture(path: str, flag: str) -> Iterator[DataEntry]:
    """The entries of a YAML mixture."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{flag} {path}: {'not a file' if file.exists() else 'no such file'}")
    content = read_yaml(file, path)
    if not isinstance(content, dict) or not isinstance(content.get("datasets"), list) or not content["datasets"]:
        raise ValueError(f"{path}: expected datasets, a list of entries with a json_path each, found {content!r:.80}")
    _check_keys(content, ("datasets",), path)
    for number, entry in enumerate(content["datasets"], start=1):
        yield _parse_entry(entry, file.absolute().parent, f"{path}, entry {number}")


def _parse_entry(entry: object, home: Path, name: str) -> DataEntry:
    """An entry of a mixture whose relative paths start from ``home``."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: expected json_path and its settings, found {entry!r:.80}")
    _check_keys(entry, _ENTRY_KEYS, name)
    given = entry.get("json_path")
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise ValueError(f"{name}: json_path must be a path or a list of paths, found {given!r}")
    for key in ("source", "data_folder"):
        if not isinstance(entry.get(key), str | None):
            raise ValueError(f"{name}: {key} must be the name of a folder, found {entry[key]!r}")
    # "first:10%" matches as ("first:10%", "10%"), "all" as ("all", None).
    sampling = entry.get("sampling_strategy", "all")
    match = _SAMPLING.fullmatch(sampling) if isinstance(sampling, str) else None
    amount = (match[2] or "1") if match else "0"
    if not Fraction(amount.rstrip("%")) > 0 or (amount.endswith("%") and Fraction(amount[:-1]) > 100):
        raise ValueError(
            f"{name}: sampling_strategy must be all, first:N, end:N or random:N, where N is at least 1 or up to 100%, "
            f"found {sampling!r}"
        )

    def place(path: str) -> str:
        return os.path.join(home, os.path.expanduser(path))  # noqa: PTH111

    folder = entry.get("data_folder")
    return DataEntry(
        files=tuple(file for p in patterns for file in _find_files(place(p), f"{name}: json_path {p}")),
        sampling=sampling,
        source=entry.get("source"),
        data_folder=os.path.normpath(place(folder)) if folder else None,
        name=name,
    )


def _check_keys(found: Mapping[object, object], known: Collection[str], name: str) -> None:
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{name}: unknown key {key!r}; {hint}")


def count_samples(sampling: str, available: int) -> int:
    """How many of ``available`` samples a sampling takes; shares are rounded up.

    Raises:
        ValueError: more than there are.
    """
    amount = sampling.partition(":")[2] or "100%"
    if amount.endswith("%"):
        return math.ceil(available * Fraction(amount[:-1]) / 100)
    if int(amount) > available:
        raise ValueError(f"sampling_strategy {sampling} asks for more than the {available} samples there are")
    return int(amount)


def choose_rows(sampling: str, counts: Sequence[int], seed: str) -> list[Rows]:
    """The rows that a sampling takes of each of several files with so many samples, ascending.

    A random choice depends on the seed and on nothing else, and of two with one seed the larger holds the
    smaller: each row draws a 64-bit number, and those with the lowest are taken.

    Raises:
        ValueError: it asks for more than there are.
    """
    available = sum(counts)
    count = count_samples(sampling, available)
    rows: Rows = range(available - count, available) if sampling.startswith("end") else range(count)
    if sampling.startswith("random"):
        import numpy as np

        # NumPy keeps the stream of a bit generator forever, but not what its other functions make of it.
        generator = np.random.PCG64(int(hashlib.sha256(seed.encode()).hexdigest(), 16))
        rows = np.sort(np.argsort(generator.random_raw(available), kind="stable")[:count])
    return [cut_rows(rows, end - of_file, end) for end, of_file in zip(accumulate(counts), counts, strict=True)]


def cut_rows(rows: Rows, start: int, stop: int) -> Rows:
    """Those of ascending rows from ``start`` to before ``stop``, counted from ``start``."""
    cut = rows[bisect_left(rows, start) : bisect_left(rows, stop)]
    return range(cut.start - start, cut.stop - start) if isinstance(cut, range) else cut - start


# The raw samples of a data file.


def _check_data_file(path: str, name: str) -> None:
    """A ValueError, beginning with ``name``, if a path is no data file that can be read."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{name}: {'not a file' if file.exists() else 'no such file'}")
    if file.suffix not in KNOWN_SUFFIXES:
        raise ValueError(
            f"{name}: unknown kind of file {file.suffix!r}; known: {', '.join(KNOWN_SUFFIXES)}, and .yaml for a mixture"
        )
    if not os.access(file, os.R_OK):
        raise ValueError(f"{name}: may not be read by this user")


def read_samples(path: str, keep_errors: bool = False) -> Iterator[tuple[Any, str]]:
    """The raw samples of a file, each with the words that say where it stands.

    Raises:
        ValueError: the file or a line of it is not what it should be; names it. With ``keep_errors`` one about a line
            that is no JSON takes the place of its sample instead.
    """
    _check_data_file(path, path)
    file = Path(path)
    if file.suffix == ".jsonl":
        # Lines end with a newline only: JSON strings may hold the other characters that split text.
        with _open(file) as (lines, advance):
            for number, line in enumerate(read_lines(lines), start=1):
                advance(len(line))
                if line.strip():
                    sample = parse_line(line, f"{path}, line {number}")
                    if isinstance(sample, ValueError) and not keep_errors:
                        raise sample
                    yield sample, f"{file.name}, line {number}"
    elif file.suffix == ".json":
        for number, sample in enumerate(iterate_list(file), start=1):
            yield sample, f"{file.name}, sample {number}"
    else:
        for number, sample in enumerate(_read_table(file), start=1):
            yield sample, f"{file.name}, row {number}"


def _read_table(path: Path) -> Iterator[object]:
    """The rows of a Parquet or Arrow file; pictures and clips are what is stored of them, bytes or paths.

    ``datasets`` would copy a Parquet file into its own cache first, and reads no Arrow file with an index.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pa.memory_map(str(path))
        if path.suffix == ".parquet":
            batches = pq.ParquetFile(file).iter_batches(batch_size=_ROWS_AT_ONCE)
        else:
            try:
                batches = pa.ipc.open_stream(file)  # What datasets writes.
            except pa.ArrowInvalid:
                file.seek(0)
                indexed = pa.ipc.open_file(file)
                batches = map(indexed.get_batch, range(indexed.num_record_batches))
        for batch in batches:
            for start in range(0, len(batch), _ROWS_AT_ONCE):
                yield from batch.slice(start, _ROWS_AT_ONCE).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]}: {' '.join(str(error).split())}") from error


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long, ``LONGEST_SAMPLE`` bytes and one more."""
    while line := file.readline(LONGEST_SAMPLE + 1):
        yield line
        # The rest of a line that is too long is read over in pieces.
        while len(line) > LONGEST_SAMPLE and not line.endswith(b"\n"):
            line = file.readline(LONGEST_SAMPLE + 1)


def parse_line(data: bytes, where: str) -> Any:
    """The value of a line, or the ValueError that says what is wrong with it."""
    if len(data) > LONGEST_SAMPLE:
        return ValueError(f"{where}: longer than {LONGEST_SAMPLE} bytes; a sample is one line, with its media in files")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return ValueError(f"{where}: not UTF-8 (byte {error.start}); save it as UTF-8")
    except json.JSONDecodeError as error:
        return ValueError(f"{where}: not JSON: {error}")
    except RecursionError:
        return ValueError(f"{where}: not a sample: brackets within brackets without end")
    except ValueError as error:
        return ValueError(f"{where}: {_LONG_NUMBER}") if "integer string" in str(error) else error


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, Callable[[int], Any]]]:
    """A file, and what to call with the number of bytes that were read of it."""
    from tqdm import tqdm

    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        # None: shown on a terminal, not in a log.
        disable = None if size >= _LONG_FILE else True
        with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=disable) as bar:
            yield file, bar.update


def iterate_list(path: Path) -> Iterator[Any]:
    """The elements of the list that a UTF-8 file holds.

    Raises:
        ValueError: the file is empty, not UTF-8, not JSON or not a list; names the file and the line.
    """
    text = _Text(path)
    if not text.skip_space():
        raise ValueError(f"{path}: the file is empty; expected a list of samples")
    if text.peek() != "[":  # One object, or lines of them.
        found = text.decode_value()
        raise ValueError(f"{path}: expected a list of samples, found {type(found).__name__}; use .jsonl for one a line")
    text.take("[")
    if not (text.skip_space() and text.peek() == "]"):
        yield text.decode_value()
        while text.skip_space() and text.peek() == ",":
            text.take(",")
            yield text.decode_value()
    text.take("]")
    if text.skip_space():
        raise text.error("something stands behind the end of the list")


class _Text:
    """A window on the text of a file that moves forward over it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks = _decode_chunks(path)
        # The text before the position has been read; so many line ends came before the buffer.
        self._buffer, self._position, self._lines = "", 0, 0
        self._decoder = json.JSONDecoder()

    def skip_space(self) -> bool:
        """Go to the next character that is no white space; False at the end of the file."""
        while True:
            match = _SPACE.match(self._buffer, self._position)
            assert match is not None
            self._position = match.end()
            if self._position < len(self._buffer):
                return True
            if not self._read_on():
                return False

    def peek(self) -> str:
        return self._buffer[self._position]

    def take(self, character: str) -> None:
        """Step over a character that must come next."""
        if not self.skip_space() or self.peek() != character:
            raise self.error(f"expected {character!r}" + (" or ','" if character == "]" else ""))
        self._position += 1

    def decode_value(self) -> Any:
        """Step over the JSON value that comes next, and return it."""
        if not self.skip_space():
            raise self.error("the file ends where a sample should stand")
        while True:
            start = self._position
            try:
                value, end = self._decoder.raw_decode(self._buffer, start)
            except json.JSONDecodeError as error:
                # Perhaps only the window ends here.
                if len(self._buffer) - start > LONGEST_SAMPLE or not self._read_on():
                    raise self.error(error.msg, error.pos - start) from error
            except ValueError as error:
                # As JSONDecodeError is one too, this stands behind it. Nothing else is wrong with a file of JSON.
                raise ValueError(f"{self._path}: line {self._line()}: {_LONG_NUMBER}") from error
            except RecursionError as error:
                raise ValueError(f"{self._path}: not a sample: brackets within brackets without end") from error
            else:
                # A number that ends with the window may go on behind it.
                if end < len(self._buffer) or not self._read_on():
                    self._position += end - start
                    return value

    def error(self, message: str, ahead: int = 0) -> ValueError:
        """An error of the character that is so far ahead."""
        return ValueError(f"{self._path}: not JSON: line {self._line(ahead)}: {message}")

    def _line(self, ahead: int = 0) -> int:
        return self._lines + self._buffer.count("\n", 0, self._position + ahead) + 1

    def _read_on(self) -> bool:
        """Let go of what is behind, add at least as much as is left; False at the end of the file."""
        self._lines += self._buffer.count("\n", 0, self._position)
        pieces = [self._buffer[self._position :]]
        self._position, size = 0, 0
        # Twice the window each time: a value that is longer than many windows is not tried for each of them.
        for chunk in self._chunks:
            pieces.append(chunk)
            size += len(chunk)
            if size and size >= len(pieces[0]):
                break
        self._buffer = "".join(pieces)
        return size > 0


def _decode_chunks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    start = 0
    with _open(path) as (file, advance):
        while True:
            chunk = file.read(_BYTES_AT_ONCE)
            advance(len(chunk))
            held_back = len(decoder.getstate()[0])  # Bytes of a character that the last chunk cut in two.
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                position = start - held_back + error.start
                raise ValueError(f"{path}: not UTF-8 (byte {position}); save it as UTF-8") from error
            if not chunk:
                return
            start += len(chunk)
