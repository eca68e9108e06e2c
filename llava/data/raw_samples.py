"""The raw samples of data files, one by one: no file is ever in memory as a whole.

A raw sample is what JSON, JSON lines, Parquet or Arrow say of it, or a line of a text file, with the words that tell
where it stands.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from llava.data.json_text import BOM, LONG_NUMBER, RepeatedKeyError, decode_value, parse_json
from llava.io import is_file, is_there
from llava.storage import naming

TEXT_SUFFIXES = (".txt", ".train", ".dev", ".test")
"""Of files with a text a line; the last three are BabyLM's. They may be compressed: .txt.gz."""
TABLE_SUFFIXES = (".parquet", ".arrow")
KNOWN_SUFFIXES = (".json", ".jsonl", *TABLE_SUFFIXES, *TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES))
LONGEST_SAMPLE = 1 << 26
"""Bytes that the text of one sample may have: a file without line ends is no reason to read all of it."""

_BYTES_AT_ONCE = 1 << 22
_LONG_FILE = 1 << 26
"""Bytes from which on reading a file is shown with a progress bar."""
_BLOCK_BYTES, _MOST_PIECES = 1 << 20, 4096
_ROWS_AT_ONCE = 64
"""Of a table, whose rows may hold pictures."""
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER_GOES_ON = re.compile(r"(?:\.|[eE][+-]?)?")
"""What may be left of a window behind a number that the window ends in: "1." is read as 1 and a point."""


@dataclass(frozen=True)
class PlainText:
    """A sample that is a text and nothing else."""

    text: str


def suffix_of(path: str | Path) -> str:
    """The end of a file's name that tells its kind, such as .json or .txt.gz."""
    suffixes = Path(path).suffixes
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def check_data_file(path: str, name: str) -> None:
    """A ValueError, beginning with ``name``, if a path is no data file that can be read."""
    file = Path(path)
    if not is_file(file):
        raise ValueError(f"{name}: {'not a file' if is_there(file) else 'no such file'}")
    if suffix_of(file) not in KNOWN_SUFFIXES:
        known = f"{', '.join(KNOWN_SUFFIXES)}, and .yaml for a mixture"
        raise ValueError(f"{name}: unknown kind of file {suffix_of(file)!r}; known: {known}")
    if not os.access(file, os.R_OK):
        raise ValueError(f"{name}: may not be read by this user")


def read_samples(path: str, keep_errors: bool = False) -> Iterator[tuple[Any, str]]:
    """The raw samples of a file, each with the words that say where it stands.

    Raises:
        ValueError: the file or a line of it is not what it should be; names it. With ``keep_errors`` one about a line
            that is no JSON takes the place of its sample instead.
    """
    check_data_file(path, path)
    file = Path(path)
    if file.suffix == ".jsonl":
        for number, line in _read_json_lines(file):
            sample = parse_line(line, f"{path}, line {number}")
            if isinstance(sample, ValueError) and not keep_errors:
                raise sample
            yield sample, f"{file.name}, line {number}"
    elif file.suffix == ".json":
        for number, sample in enumerate(iterate_list(file), start=1):
            if isinstance(sample, ValueError) and not keep_errors:
                raise sample
            yield sample, f"{file.name}, sample {number}"
    elif suffix_of(file).removesuffix(".gz") in TEXT_SUFFIXES:
        for number, text in read_texts(file):
            if isinstance(text, ValueError) and not keep_errors:
                raise text
            yield text, f"{file.name}, line {number}"
    else:
        for number, sample in enumerate(_read_table(file), start=1):
            yield sample, f"{file.name}, row {number}"


def _read_json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, each with its number, from 1."""
    # Lines end with a newline only: JSON strings may hold the other characters that split text.
    with _open(path) as (lines, advance):
        for number, line in enumerate(read_lines(lines), start=1):
            advance(len(line))
            if line.strip():
                yield number, line


# Blocks: stretches of a file for another process, which does there what ``read_samples`` does here.


def can_be_cut(path: str) -> bool:
    """Whether a file can be read as blocks; rows of a table, which may hold pictures, are read where it is open."""
    return suffix_of(path) not in TABLE_SUFFIXES


def read_blocks(path: str) -> Iterator[bytes]:
    """A file as blocks of about ``_BLOCK_BYTES``, which ``read_block`` takes.

    Raises:
        ValueError: as ``read_samples``, behind the samples that come before what is wrong.
    """
    check_data_file(path, path)
    file = Path(path)
    places, lengths, pieces, size = array("q"), array("q"), list[bytes](), 0
    try:
        for place, piece in _read_pieces(file):
            places.append(place)
            lengths.append(len(piece))
            pieces.append(piece)
            size += len(piece)
            if size >= _BLOCK_BYTES or len(pieces) == _MOST_PIECES:
                yield _join(places, lengths, pieces)
                places, lengths, pieces, size = array("q"), array("q"), [], 0
    except ValueError:
        if pieces:
            yield _join(places, lengths, pieces)
        raise
    if pieces:
        yield _join(places, lengths, pieces)


def _read_pieces(path: Path) -> Iterator[tuple[int, bytes]]:
    """What each sample of a file is read from, with its number there; negative for the words of an error."""
    if path.suffix == ".jsonl":
        yield from _read_json_lines(path)
    elif path.suffix == ".json":
        for number, (_, text) in enumerate(_iterate_elements(path), start=1):
            yield number, text.encode()
    else:
        for number, found in read_texts(path):
            if isinstance(found, ValueError):
                yield -number, str(found).encode("utf-8", "surrogateescape")
            else:
                yield number, found.text.encode()


def _join(places: array[int], lengths: array[int], pieces: list[bytes]) -> bytes:
    return b"".join([len(places).to_bytes(8, "little"), places.tobytes(), lengths.tobytes(), *pieces])


def read_block(path: str, block: bytes) -> Iterator[tuple[Any, str]]:
    """The samples of a block of ``read_blocks``, as ``read_samples(path, keep_errors=True)`` has them."""
    count, name, suffix = int.from_bytes(block[:8], "little"), Path(path).name, Path(path).suffix
    start = 8 + 16 * count
    places, lengths = array("q", block[8 : 8 + 8 * count]), array("q", block[8 + 8 * count : start])
    for place, length in zip(places, lengths, strict=True):
        piece = block[start : start + length]
        start += length
        if suffix == ".jsonl":
            yield parse_line(piece, f"{path}, line {place}"), f"{name}, line {place}"
        elif suffix == ".json":
            yield _parse(piece, f"{path}, sample {place}"), f"{name}, sample {place}"
        elif place < 0:
            yield ValueError(piece.decode("utf-8", "surrogateescape")), f"{name}, line {-place}"
        else:
            yield PlainText(piece.decode()), f"{name}, line {place}"


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
    except (pa.ArrowException, OSError, ValueError, ArithmeticError, LookupError) as error:
        # The last three are what Python makes of damaged texts, dates and names.
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]}: {' '.join(str(error).split())}") from error


def read_texts(path: Path) -> Iterator[tuple[int, PlainText | ValueError]]:
    """The lines of a text file that are not blank, without the space around them, each with its number, from 1.

    A line that is not UTF-8 is the ValueError that says so.

    Raises:
        ValueError: the file has no text, is none, or is no whole gzip file; names it.
    """
    number = found = 0
    try:
        with _open(path) as (file, advance):
            is_compressed = path.suffix == ".gz"
            lines = cast("BinaryIO", gzip.GzipFile(fileobj=file)) if is_compressed else file
            behind = 0
            for number, line in enumerate(read_lines(lines), start=1):
                # Of a compressed file, by the place that was read up to: how much it holds is not known.
                place = file.tell() if is_compressed else behind + len(line)
                advance(place - behind)
                behind = place
                if b"\0" in line:
                    raise ValueError(f"{path}, line {number}: has a byte that no text has (NUL); is it a text file?")
                text = _decode_line(line, f"{path}, line {number}")
                if isinstance(text, ValueError) or text.text:
                    found += 1
                    yield number, text
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}, behind line {number}: not a whole gzip file: {error}") from error
    if not found:
        raise ValueError(f"{path}: the file has no text" + (", only blank lines" if number else "; it is empty"))


def _decode_line(line: bytes, where: str) -> PlainText | ValueError:
    if len(line) > LONGEST_SAMPLE:
        return ValueError(f"{where}: longer than {LONGEST_SAMPLE} bytes; break it into lines, one text in each")
    try:
        return PlainText(line.decode().removeprefix(BOM).strip())
    except UnicodeDecodeError as error:
        return ValueError(f"{where}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8")


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
    return _parse(data, where)


def _parse(data: bytes, where: str) -> Any:
    try:
        return parse_json(data, where)
    except ValueError as error:
        return error


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, Callable[[int], Any]]]:
    """A file, and what to call with the number of bytes that were read of it."""
    from tqdm import tqdm

    with naming(path), path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        # None: shown on a terminal, not in a log.
        disable = None if size >= _LONG_FILE else True
        with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=disable) as bar:
            yield file, bar.update


def iterate_list(path: Path) -> Iterator[Any]:
    """The elements of the list that a UTF-8 file holds; in the place of one that has a key twice, a ValueError.

    Raises:
        ValueError: the file is empty, not UTF-8, not JSON or not a list; names the file and the line.
    """
    for number, (value, _) in enumerate(_iterate_elements(path), start=1):
        yield ValueError(f"{path}, sample {number}: {value}") if isinstance(value, RepeatedKeyError) else value


def _iterate_elements(path: Path) -> Iterator[tuple[Any, str]]:
    """As ``iterate_list``, each with its text."""
    text = _Text(path)
    if not text.skip_space():
        raise ValueError(f"{path}: the file is empty; expected a list of samples")
    if text.peek() != "[":  # One object, or lines of them.
        found, _ = text.decode_value()
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

    def decode_value(self) -> tuple[Any, str]:
        """Step over the JSON value that comes next, and return it and its text."""
        if not self.skip_space():
            raise self.error("the file ends where a sample should stand")
        while True:
            start = self._position
            try:
                value, end = decode_value(self._buffer, start)
            except json.JSONDecodeError as error:
                # Perhaps only the window ends here.
                if len(self._buffer) - start > LONGEST_SAMPLE or not self._read_on():
                    raise self.error(error.msg, error.pos - start) from error
            except ValueError as error:
                # As JSONDecodeError is one too, this stands behind it. Nothing else is wrong with a file of JSON.
                raise ValueError(f"{self._path}: line {self._line()}: {LONG_NUMBER}") from error
            except RecursionError as error:
                raise ValueError(f"{self._path}: not a sample: brackets within brackets without end") from error
            else:
                # A number that ends with the window, or with a point there, may go on behind it.
                if not _NUMBER_GOES_ON.fullmatch(self._buffer, end) or not self._read_on():
                    found = self._buffer[self._position : self._position + end - start]
                    self._position += end - start
                    return value, found

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
    # Not utf-8-sig, which counts the bytes of an error without the mark, and reads over half a mark.
    decoder = codecs.getincrementaldecoder("utf-8")()
    start, is_first = 0, True
    with _open(path) as (file, advance):
        while True:
            chunk = file.read(_BYTES_AT_ONCE)
            advance(len(chunk))
            held_back = len(decoder.getstate()[0])  # Bytes of a character that the last chunk cut in two.
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                position = start - held_back + error.start
                raise ValueError(f"{path}: not UTF-8 (byte {position}); save it as UTF-8") from error
            yield text.removeprefix(BOM) if is_first else text
            is_first = is_first and not text
            if not chunk:
                return
            start += len(chunk)
