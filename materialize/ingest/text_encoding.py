"""CSV files in other encodings than UTF-8, and the sentence for a file that is not of its encoding.

DuckDB refuses a UTF-16 file with one emoji, and knows few encodings; so Python's codecs write such files as
UTF-8 first.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import duckdb

from bahe_core.errors import BadInput, one_line
from bahe_core.files import replace_atomically
from bahe_core.progress import say
from materialize.ingest.sources import File

_CHUNK = 2**20
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@contextmanager
def utf8_copies(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """A block in which files are read; their copies are gone after it, those of a killed run as well."""
    try:
        yield
    finally:
        shutil.rmtree(_folder(connection), ignore_errors=True)


def _folder(connection: duckdb.DuckDBPyConnection) -> Path:
    row = connection.execute("SELECT current_setting('temp_directory')").fetchone()
    assert row is not None
    return Path(row[0]) / "utf8"


def readable_path(connection: duckdb.DuckDBPyConnection, file: File, encoding: str) -> str:
    """The path under which DuckDB reads a file right: its own, or that of a copy in UTF-8.

    A copy is made once for each state of a file. Raises BadInput where the file is not of the encoding, or
    is a damaged archive.
    """
    if encoding == "utf-8":
        for _ in _local_chunks(file.path) if file.path.endswith(".gz") else ():
            pass  # DuckDB reads an archive that was cut off as if it ended there
        return file.path
    facts = f"{encoding}\n{file.path}\n{file.size}\n{file.modified_us}"
    copy = _folder(connection) / f"{hashlib.sha256(facts.encode()).hexdigest()}.csv"
    if not copy.is_file():
        say(f"  writing {file.path.rsplit('/', 1)[-1]} as UTF-8, from {encoding}")
        copy.parent.mkdir(parents=True, exist_ok=True)
        decoder = _decoder(next(_chunks(connection, file.path), b""), encoding)
        with replace_atomically(copy) as candidate, candidate.open("wb") as output:
            try:
                for chunk in _chunks(connection, file.path):
                    output.write(decoder.decode(chunk).encode())
                output.write(decoder.decode(b"", final=True).encode())
            except UnicodeError:
                raise BadInput(encoding_fault(file.path, file.path, encoding)) from None
    return str(copy)


@contextmanager
def text_lines(path: str) -> Iterator[Iterator[str]]:
    """The lines of a local UTF-8 file, as Python's csv wants them. Raises BadInput where it is no text."""
    try:
        with _opened(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as lines:
            yield lines
    except UnicodeError:
        raise BadInput(encoding_fault(path, path, "utf-8")) from None


def _decoder(head: bytes, encoding: str) -> codecs.IncrementalDecoder:
    """For a file that begins so."""
    if codecs.lookup(encoding).name == "utf-16" and not head.startswith(_UTF16_MARKS):
        encoding = "utf-16-le"  # as most programs write it without a mark
    return codecs.getincrementaldecoder(encoding)()


def encoding_fault(path: str, place: str, encoding: str) -> str:
    """The sentence for a file that is not of the encoding; a local one is looked at for the exact place."""
    head = next(_local_chunks(path), b"")
    if head.startswith(_UTF16_MARKS) and encoding != "utf-16":
        return f"{path} is UTF-16, not {encoding}; set `csv: {{encoding: utf-16}}`."
    at = _first_undecodable(path, head, encoding)
    if at is not None:
        place = f"{path}, line {at[0]}, character {at[1]}"
    other = "latin-1" if encoding == "utf-8" else "utf-8"
    return (
        f"{place} is not {encoding}; set `csv: {{encoding: {other}}}` if it is that, or write the file"
        " again as UTF-8."
    )


def _first_undecodable(path: str, head: bytes, encoding: str) -> tuple[int, int] | None:
    """Line and character, from 1, of the first bytes that are not of the encoding."""
    decoder = _decoder(head, encoding)
    line, character = 1, 1
    for chunk in _local_chunks(path):
        try:
            text = decoder.decode(chunk)
        except UnicodeDecodeError as error:
            text = error.object[: error.start].decode(encoding, errors="replace")
            line, last = line + text.count("\n"), text.rpartition("\n")[2]
            return line, len(last) + (1 if "\n" in text else character)
        line += text.count("\n")
        character = len(text.rpartition("\n")[2]) + (1 if "\n" in text else character)
    return None


def _chunks(connection: duckdb.DuckDBPyConnection, path: str) -> Iterator[bytes]:
    """The file's bytes, unpacked; one that lies elsewhere is fetched whole."""
    if "://" not in path:
        yield from _local_chunks(path)
        return
    row = connection.execute("SELECT content FROM read_blob(?)", [path]).fetchone()
    assert row is not None
    yield gzip.decompress(row[0]) if path.endswith(".gz") else row[0]


def _local_chunks(path: str) -> Iterator[bytes]:
    """A local file's bytes; nothing of one that lies elsewhere."""
    if not Path(path).is_file():
        return
    with _opened(path) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """A local file's bytes, unpacked. Raises BadInput where they cannot be read."""
    try:
        with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
            yield cast(BinaryIO, file)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read: {one_line(error)}.") from None
