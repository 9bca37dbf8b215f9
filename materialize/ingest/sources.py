"""Which files a log's tables name, and which of them the lake has not read yet.

Files are paths or globs beside dataset.yaml, or URLs (`s3://`, with globs; `http://`, `https://`). The
table `sources` remembers of each file what it was when it was read: a file is read again, whole, when its
size, its time or its description in dataset.yaml is another. A query is read whole whenever something
that it may read has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import duckdb

from bahe_core.errors import BadInput, one_line
from bahe_lake.catalogue import tables
from bahe_lake.extensions import open_object_storage
from bahe_lake.sql import sql_literal
from materialize.config.dataset import ImpressionTable, Table
from materialize.config.log_files import suffix

FILE = "_bahe_file"
"""The column that says which file a row of several comes from."""

_READ_FILES = frozenset(
    {
        *(f"read_{kind}" for kind in ("csv", "csv_auto", "json", "json_auto", "ndjson", "ndjson_auto")),
        *(f"read_{kind}" for kind in ("json_objects", "ndjson_objects", "parquet", "blob", "text", "xlsx")),
        *("parquet_scan", "arrow_scan", "sqlite_scan"),
    }
)
"""Table functions of files that lie here; of a database (`postgres_scan`) no file tells anything."""

_CHANGES_BY_ITSELF = re.compile(
    r"\b(now|today|random|\w*uuid\w*|(get_)?current_\w+|transaction_timestamp|getenv|getvariable)\s*\("
    r"|\b(current_(date|time|timestamp)|localtime|localtimestamp)\b",
    re.IGNORECASE,
)

_NEWER = ("timestamp_format", "csv", "types")

CREATE = """
    CREATE TABLE IF NOT EXISTS sources (
        table_name VARCHAR,
        path VARCHAR,
        size BIGINT,
        modified_us BIGINT,
        spec VARCHAR,
        ingested_at TIMESTAMPTZ
    )
"""


@dataclass(frozen=True)
class File:
    """One file, as it is now; a query counts as one file."""

    path: str
    size: int
    modified_us: int


@dataclass(frozen=True)
class Source:
    """Where one input table comes from."""

    table: str
    section: Table
    spec: str
    """Of what dataset.yaml says about it (and, of a query, of what it may read)."""
    files: tuple[File, ...]
    """All files that it names."""
    unread: tuple[File, ...]
    """Those that the lake does not have, or has otherwise."""

    @property
    def what(self) -> str:
        """The source in the user's words."""
        return self.section.files or f"{self.table}.sql"

    @property
    def csv(self) -> bool:
        """Whether every value is text."""
        return self.section.files is not None and suffix(self.files[0].path) != "parquet"


def find_sources(
    connection: duckdb.DuckDBPyConnection, sections: Mapping[str, Table], folder: Path
) -> dict[str, Source]:
    """The source of each table. Raises BadInput when there is nothing to read, or no way to read it."""
    remembered: set[tuple[object, ...]] = set()
    if "sources" in tables(connection):
        rows = connection.execute(
            "SELECT table_name, path, size, modified_us, spec FROM sources"
        ).fetchall()
        remembered = set(rows)
    found = {}
    for table, section in sections.items():
        left_out = {"context", "label_delay", *_unset(section)}
        spec: list[object] = [section.model_dump(mode="json", exclude=left_out)]
        if isinstance(section, ImpressionTable):
            spec.append(sorted(section.context))
        if section.files is None:
            assert section.sql is not None
            spec += _may_read(section.sql, folder)
            files: tuple[File, ...] = (File(f"{table}.sql", 0, 0),)
        else:
            files = _listed(connection, table, section.files, folder)
        stamp = hashlib.sha256(json.dumps(spec).encode()).hexdigest()
        unread = tuple(f for f in files if (table, f.path, f.size, f.modified_us, stamp) not in remembered)
        found[table] = Source(table, section, stamp, files, unread)
    return found


def remember(source: Source, files: Sequence[File]) -> list[str]:
    """SQL that remembers these files as read."""
    if not files:
        return []
    table, spec = sql_literal(source.table), sql_literal(source.spec)
    paths = ", ".join(sql_literal(file.path) for file in files)
    rows = ", ".join(
        f"({table}, {sql_literal(file.path)}, {file.size}, {file.modified_us}, {spec}, now())"
        for file in files
    )
    return [
        f"DELETE FROM sources WHERE table_name = {table} AND path IN ({paths})",
        f"INSERT INTO sources VALUES {rows}",
    ]


def _unset(section: Table) -> set[str]:
    """Options that older lakes do not know; left at their default, they do not change a file's description,
    for which all files would be read again."""
    defaults = {name: Table.model_fields[name].get_default(call_default_factory=True) for name in _NEWER}
    return {name for name, default in defaults.items() if getattr(section, name) == default}


def _listed(
    connection: duckdb.DuckDBPyConnection, table: str, pattern: str, folder: Path
) -> tuple[File, ...]:
    if "://" in pattern:
        files = _remote(connection, table, pattern)
    else:
        files = [_local(path) for path in _expand(folder, pattern) if path.is_file()]
    if not files:
        where = "" if "://" in pattern else f" in {folder}"
        raise BadInput(f"{table}.files: nothing matches {pattern}{where}; correct it.")
    kinds = {suffix(file.path): file.path for file in files}
    for ending, path in kinds.items():
        if ending not in ("parquet", "csv", "tsv", "txt"):
            raise BadInput(
                f"{table}.files: {path.rsplit('/', 1)[-1]} is neither CSV nor Parquet; convert it."
            )
    if "parquet" in kinds and len(kinds) > 1:
        raise BadInput(f"{table}.files: {pattern} matches CSV and Parquet; take one of them.")
    return tuple(files)


def _local(path: Path) -> File:
    stat = path.stat()
    return File(str(path), stat.st_size, stat.st_mtime_ns // 1000)


def _remote(connection: duckdb.DuckDBPyConnection, table: str, pattern: str) -> list[File]:
    scheme = pattern.split("://", 1)[0]
    if scheme not in ("s3", "http", "https"):
        raise BadInput(f"{table}.files: {scheme}:// is not read; use s3://, http:// or https://.")
    if scheme != "s3" and any(c in pattern for c in "*["):
        raise BadInput(f"{table}.files: {scheme}:// cannot be searched by a pattern; name one file.")
    open_object_storage(connection)
    try:
        # Only what the store says about the files; their contents are not asked for.
        rows = connection.execute(
            """
            SELECT filename, size, epoch_us(last_modified)
            FROM read_blob(?)
            ORDER BY filename
            """,
            [pattern],
        ).fetchall()
    except duckdb.Error as error:
        if "No files found" in str(error):
            return []
        raise BadInput(f"{table}.files: {pattern} cannot be read: {one_line(error)}.") from None
    return [File(path, size, modified or 0) for path, size, modified in rows]


def _expand(folder: Path, pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_absolute():
        return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    return sorted(folder.glob(pattern))


def _reads_elsewhere(query: str) -> bool:
    """Whether the answer may change though no file does: a database, the clock, chance."""
    text = re.sub(r"'[^']*'|--[^\n]*|/\*.*?\*/", "''", query, flags=re.DOTALL)
    functions = re.findall(r"(?:\bfrom|\bjoin|,)\s*(?:lateral\s+)?([a-z_]\w*)\s*\(", text, re.IGNORECASE)
    tables = {
        name.lower() for name in functions if re.search(r"scan|query|read|table", name, re.IGNORECASE)
    }
    return bool(tables - _READ_FILES) or _CHANGES_BY_ITSELF.search(text) is not None


def _may_read(query: str, folder: Path) -> list[object]:
    """What a query may read: the files beside dataset.yaml, and those that its literals name."""
    if "://" in query or _reads_elsewhere(query):
        return [uuid4().hex]  # there is no telling, so it is read every time
    paths = {path for path in folder.glob("*") if path.suffix not in (".yaml", ".yml")}
    for in_single, in_double in re.findall(r"'([^']+)'|\"([^\"]+)\"", query):
        literal = in_single or in_double  # DuckDB reads a file by either
        if "/" in literal and re.search(r"\w", literal.rsplit("/", 1)[-1]):
            with contextlib.suppress(ValueError, NotImplementedError):  # text that is no path
                paths.update(_expand(folder, literal))
    facts: list[object] = []
    for path in sorted(paths):
        if path.is_file():
            stat = path.stat()
            facts.append([path.name, stat.st_size, stat.st_mtime_ns])
    return facts
