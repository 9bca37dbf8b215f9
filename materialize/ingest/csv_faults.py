"""What is wrong with a CSV file, as one sentence: the file, the line, the column, and what to do."""

from __future__ import annotations

import re

import duckdb

from bahe_core.errors import one_line
from materialize.config.dataset import CsvFormat
from materialize.ingest.text_encoding import encoding_fault


def csv_fault(path: str, error: duckdb.Error, form: CsvFormat) -> str:
    """The sentence for a file that DuckDB refused; a local file is looked at again where that says more."""
    message = str(error)
    line = re.search(r"CSV Error on Line: (\d+)", message)
    place = f"{path}, line {line.group(1)}" if line else path
    counted = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", message)
    if "encoded" in message or "nicode" in message or "encoding" in message.split("Possible")[0]:
        return encoding_fault(path, place, form.encoding)
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
