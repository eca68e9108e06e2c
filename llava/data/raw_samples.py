"""The raw samples of data files, one by one: no file is ever in memory as a whole."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

KNOWN_SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow")

_BYTES_AT_ONCE = 1 << 22
_LONG_FILE = 1 << 26
"""Bytes from which on reading a file is shown with a progress bar."""
LONGEST_SAMPLE = 1 << 26
"""Bytes that the text of one sample may have: a file without line ends is no reason to read all of it."""
_ROWS_AT_ONCE = 64
"""Of a table, whose rows may hold pictures."""
_LONG_NUMBER = "has a whole number of thousands of digits; put it in quotes if it is a name"
_SPACE = re.compile(r"[ \t\n\r]*")


def check_data_file(path: str, name: str) -> None:
    """A ValueError, beginning with ``name``, if a path is no data file that can be read."""
    file = Path(path)
    if not file.exists():
        raise ValueError(f"{name}: no such file")
    if not file.is_file():
        raise ValueError(f"{name}: not a file")
    if file.suffix not in KNOWN_SUFFIXES:
        raise ValueError(
            f"{name}: unknown kind of file {file.suffix!r}; known: {', '.join(KNOWN_SUFFIXES)}, and .yaml for a mixture"
        )
    if not os.access(file, os.R_OK):
        raise ValueError(f"{name}: may not be read by this user")


def read_samples(path: str) -> Iterator[tuple[Any, str]]:
    """The raw samples of a file, each with the words that say where it stands.

    Raises:
        ValueError: the file or a line of it is not what it should be; names it.
    """
    for sample, source in read_values(path):
        if isinstance(sample, ValueError):
            raise sample
        yield sample, source


def read_values(path: str) -> Iterator[tuple[Any, str]]:
    """``read_samples`` that goes on behind a line that is no JSON: the error stands in its place."""
    check_data_file(path, path)
    file = Path(path)
    if file.suffix == ".jsonl":
        # Lines end with a newline only: JSON strings may hold the other characters that split text.
        with _open(file) as (lines, advance):
            for number, line in enumerate(read_lines(lines), start=1):
                advance(len(line))
                if line.strip():
                    yield parse_line(line, f"{path}, line {number}"), f"{file.name}, line {number}"
    elif file.suffix == ".json":
        for number, sample in enumerate(iterate_list(file), start=1):
            yield sample, f"{file.name}, sample {number}"
    else:
        for number, sample in enumerate(_read_table(file), start=1):
            yield sample, f"{file.name}, row {number}"


def _read_table(path: Path) -> Iterator[Any]:
    """The rows of a Parquet or Arrow file; pictures and clips are what is stored of them, bytes or paths."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            batches: Any = pq.ParquetFile(path, memory_map=True).iter_batches(batch_size=_ROWS_AT_ONCE)
        else:
            batches = _arrow_batches(pa.memory_map(str(path)))
        for batch in batches:
            for start in range(0, len(batch), _ROWS_AT_ONCE):
                yield from batch.slice(start, _ROWS_AT_ONCE).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]}: {' '.join(str(error).split())}") from error


def _arrow_batches(file: Any) -> Iterator[Any]:
    """The batches of an Arrow file, in the form that ``datasets`` writes (a stream) or the one with an index."""
    import pyarrow as pa

    try:
        yield from pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long, ``LONGEST_SAMPLE`` bytes and one more."""
    while line := file.readline(LONGEST_SAMPLE + 1):
        yield line
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
    if text.peek() != "[":
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
        self._buffer, self._position = "", 0
        self._lines = 0
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
        while chunk := file.read(_BYTES_AT_ONCE):
            advance(len(chunk))
            held_back = len(decoder.getstate()[0])
            try:
                yield decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, start - held_back + error.start) from error
            start += len(chunk)
        try:
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, start - len(decoder.getstate()[0])) from error


def _not_utf8(path: Path, position: int) -> ValueError:
    return ValueError(f"{path}: not UTF-8 (byte {position}); save it as UTF-8")
