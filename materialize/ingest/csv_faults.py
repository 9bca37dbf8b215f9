"""What is wrong with a CSV file, as one sentence: the file, the line, the column, and what to do."""

from __future__ import annotations

import codecs
import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import duckdb

from bahe_core.errors import one_line
from materialize.config.dataset import CsvFormat

_CHUNK = 2**20


def csv_fault(path: str, error: duckdb.Error, form: CsvFormat) -> str:
    """The sentence for a file that DuckDB refused; a local file is looked at again where that says more."""
    message = str(error)
    line = re.search(r"CSV Error on Line: (\d+)", message)
    place = f"{path}, line {line.group(1)}" if line else path
    counted = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", message)
    if "encoded" in message or "nicode" in message or "encoding" in message.split("Possible")[0]:
        return _encoding_fault(path, place, form)
    if counted:
        wanted, there = counted.groups()
        return (
            f"{place} has {there} values where the first line names {wanted} columns; quote values that"
            f" hold the delimiter, or set `csv: {{delimiter: …, quote: …}}`."
        )
    if "unterminated quote" in message:
        return (
            f"{place} has a quote {form.quote} that does not end, or text after its end; double it inside"
            " a value, or set `csv: {quote: …}`."
        )
    if "Maximum line size" in message:
        return f"{place} is longer than a row may be; a quote {form.quote} may not end, correct it."
    if "invalid state" in message:
        return (
            f"{place} mixes line ends, or has a line end in a value without quotes; write all lines with"
            " the same end and quote such values."
        )
    return f"{place} cannot be read: {one_line(error)}."


def _encoding_fault(path: str, place: str, form: CsvFormat) -> str:
    head = next(_chunks(path), b"")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and form.encoding != "utf-16":
        return f"{path} is UTF-16, not {form.encoding}; set `csv: {{encoding: utf-16}}`."
    at = _first_undecodable(path, form.encoding)
    if at is not None:
        place = f"{path}, line {at[0]}, character {at[1]}"
    others = {"utf-8": "latin-1", "utf-16": "utf-8", "latin-1": "utf-8"}
    return (
        f"{place} is not {form.encoding}; set `csv: {{encoding: {others[form.encoding]}}}` if it is that,"
        " or write the file again as UTF-8."
    )


def _first_undecodable(path: str, encoding: str) -> tuple[int, int] | None:
    """Line and character, from 1, of the first bytes that are not of the encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, character = 1, 1
    for chunk in _chunks(path):
        try:
            text = decoder.decode(chunk)
        except UnicodeDecodeError as error:
            text = error.object[: error.start].decode(encoding, errors="replace")
            line, last = line + text.count("\n"), text.rpartition("\n")[2]
            return line, len(last) + (1 if "\n" in text else character)
        line += text.count("\n")
        character = len(text.rpartition("\n")[2]) + (1 if "\n" in text else character)
    return None


def _chunks(path: str) -> Iterator[bytes]:
    """A local file's bytes; nothing of one that lies elsewhere."""
    if not Path(path).is_file():
        return
    with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
