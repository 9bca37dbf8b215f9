"""What stands in a source's files: groups of files with the same columns, and SQL that reads each group.

DuckDB is told all that it could guess: CSV is text, with the columns that the file's first line names, and
Parquet files of different types are not promoted to a common one, which could round.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from bahe_core.errors import BadInput, one_line
from bahe_lake.catalogue import columns, scalar
from bahe_lake.extensions import open_object_storage
from bahe_lake.sql import sql_identifier, sql_literal
from materialize.config.log_files import suffix
from materialize.ingest.csv_faults import csv_fault
from materialize.ingest.sources import FILE, File, Source
from materialize.ingest.text_encoding import readable_path, text_lines

_LONGEST_LINE = 64 * 2**20
_CSV_BUFFER = 2 * _LONGEST_LINE
"""Bytes; DuckDB would take sixteen times the longest line, which a small BAHE_MEMORY does not have."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Files of a source that have the same columns; a query's answer is one such group."""

    source: Source
    files: tuple[File, ...]
    columns: dict[str, str]
    """Their names, with DuckDB's types; CSV has VARCHAR alone."""
    relation: str
    """SQL that reads the files as one table, with their paths in the column FILE."""
    empty: bool
    """Without any row, so that its types say nothing."""

    @property
    def typed(self) -> bool:
        """Whether the types are the source's own."""
        return not self.source.csv

    @property
    def what(self) -> str:
        """The group in the user's words."""
        if len(self.files) == 1 and len(self.source.files) > 1:
            return self.files[0].path.rsplit("/", 1)[-1]
        return self.source.what

    def rows_of(self, file: File) -> str:
        """SQL that reads one of the files."""
        if self.source.section.sql is not None:
            return f"(SELECT * FROM {self.relation})"
        column = sql_identifier(FILE)
        return (
            f"(SELECT * EXCLUDE ({column}) FROM {self.relation} WHERE {column} = {sql_literal(file.path)})"
        )


def layouts(connection: duckdb.DuckDBPyConnection, source: Source, files: Sequence[File]) -> list[Layout]:
    """The groups of these files. Raises BadInput when one cannot be read."""
    if source.section.sql is not None:
        return [_of_query(connection, source, tuple(files))]
    try:
        return _of_csv(connection, source, files) if source.csv else _of_parquet(connection, source, files)
    except duckdb.Error as error:
        raise unreadable(connection, source, files, error) from None


def unreadable(
    connection: duckdb.DuckDBPyConnection, source: Source, files: Iterable[File], error: duckdb.Error
) -> BadInput:
    """The sentence for a source that failed, which names the file that is to blame if one is."""
    if source.section.sql is None:
        for file in files:
            try:
                for layout in (_of_csv if source.csv else _of_parquet)(connection, source, [file]):
                    # Every column, so that a damaged page is found and not only a damaged footer.
                    connection.execute(f"SELECT count(*), max(hash(s)) FROM {layout.relation} s").fetchone()
            except duckdb.Error as of_one:
                if source.csv:
                    return BadInput(f"{source.table}: {csv_fault(file.path, of_one, source.section.csv)}")
                return BadInput(f"{source.table}: {file.path} cannot be read: {one_line(of_one)}.")
    return BadInput(f"{source.table}: {source.what} cannot be read: {one_line(error)}.")


def check_nanoseconds(layout: Layout) -> None:
    """Raises BadInput when a UTC time in a local Parquet file is finer than a microsecond.

    DuckDB cuts such times before anyone sees them, so Arrow reads these columns, and nothing else.
    """
    utc = {name for name, kind in layout.columns.items() if kind == "TIMESTAMP WITH TIME ZONE"}
    if not layout.typed or layout.source.section.sql is not None or not utc:
        return
    for file in layout.files:
        if "://" in file.path:
            continue
        with pq.ParquetFile(file.path) as parquet:
            fine = [
                field.name
                for field in parquet.schema_arrow
                if field.name in utc and pa.types.is_timestamp(field.type) and field.type.unit == "ns"
            ]
            for batch in parquet.iter_batches(columns=fine) if fine else ():
                for name in fine:
                    times = batch.column(name).drop_null().cast(pa.int64()).to_numpy()
                    if (times % 1000).any():
                        raise BadInput(
                            f"{layout.source.table}: {file.path} has times finer than a microsecond in"
                            f" {name}, which the lake cannot keep; round them, for example with `sql:`."
                        )


def _of_query(connection: duckdb.DuckDBPyConnection, source: Source, files: tuple[File, ...]) -> Layout:
    """The query's answer, in the temporary table `query_<table>`, so that it answers only once."""
    query, table = source.section.sql, f"query_{source.table}"
    assert query is not None
    if "://" in query:
        open_object_storage(connection)
    try:
        if len(connection.extract_statements(query)) != 1:
            raise BadInput(f"{source.table}: {source.what} holds several statements; give one query.")
        # Not in brackets: the query may end in a semicolon or a comment.
        connection.execute(f"CREATE OR REPLACE TEMP TABLE {table} AS {query}")
    except duckdb.Error as error:
        raise BadInput(f"{source.table}: {source.what} cannot be read: {one_line(error)}.") from None
    return Layout(
        source=source,
        files=files,
        columns=columns(connection, table),
        relation=table,
        empty=scalar(connection, f"SELECT count(*) FROM {table}") == 0,
    )


def _of_parquet(
    connection: duckdb.DuckDBPyConnection, source: Source, files: Sequence[File]
) -> list[Layout]:
    listed = _list(file.path for file in files)
    # Both read the files' footers alone.
    schemas = connection.execute(
        f"""SELECT file_name, list((name, type, num_children, logical_type) ORDER BY column_id)::VARCHAR
            FROM parquet_schema({listed}) GROUP BY file_name"""
    ).fetchall()
    counts = connection.execute(
        f"SELECT file_name, sum(num_rows) FROM parquet_file_metadata({listed}) GROUP BY file_name"
    ).fetchall()
    schema_of, rows_of = dict(schemas), dict(counts)
    groups: dict[tuple[str, bool], list[File]] = {}
    for file in files:
        groups.setdefault((schema_of[file.path], rows_of[file.path] == 0), []).append(file)
    made = []
    for (_, empty), members in groups.items():
        paths = _list(file.path for file in members)
        relation = f"read_parquet({paths}, filename = '{FILE}', hive_types_autocast = false)"
        names = columns(connection, relation)
        names.pop(FILE)
        made.append(
            Layout(source=source, files=tuple(members), columns=names, relation=relation, empty=empty)
        )
    return made


def _of_csv(connection: duckdb.DuckDBPyConnection, source: Source, files: Sequence[File]) -> list[Layout]:
    groups: dict[tuple[str, tuple[str, ...]], dict[str, File]] = {}
    for file in files:
        delimiter = source.section.csv.delimiter or ("\t" if suffix(file.path) == "tsv" else ",")
        path = readable_path(connection, file, source.section.csv.encoding)
        header = _header(connection, source, file, path, delimiter)
        groups.setdefault((delimiter, header), {})[path] = file
    made = []
    for (delimiter, header), members in groups.items():
        quote = source.section.csv.quote
        texts = ", ".join(f"{sql_literal(column)}: 'VARCHAR'" for column in header)
        relation = f"""read_csv({_list(members)}, auto_detect = false, header = true, columns = {{{texts}}},
            delim = {sql_literal(delimiter)}, quote = {sql_literal(quote)}, escape = {sql_literal(quote)},
            strict_mode = true, filename = '{FILE}', hive_types_autocast = false,
            max_line_size = {_LONGEST_LINE}, buffer_size = {_CSV_BUFFER})"""
        if any(path != file.path for path, file in members.items()):
            origins = ", ".join(f"{sql_literal(p)}: {sql_literal(f.path)}" for p, f in members.items())
            column = sql_identifier(FILE)
            relation = f"(SELECT * REPLACE (MAP {{{origins}}}[{column}] AS {column}) FROM {relation})"
        names = columns(connection, relation)
        names.pop(FILE)
        made.append(
            Layout(
                source=source, files=tuple(members.values()), columns=names, relation=relation, empty=False
            )
        )
    return made


def _header(
    connection: duckdb.DuckDBPyConnection, source: Source, file: File, path: str, delimiter: str
) -> tuple[str, ...]:
    """Names of a CSV file's columns. Raises BadInput when it has none, or one twice.

    `path` is where the file is read.
    """
    quote = source.section.csv.quote
    if "://" in path:
        row = connection.execute(
            f"""SELECT line FROM read_csv({sql_literal(path)}, auto_detect = false, header = false,
                columns = {{line: 'VARCHAR'}}, delim = '\x1f', quote = '', escape = '',
                strict_mode = false, ignore_errors = true,
                max_line_size = {_LONGEST_LINE}, buffer_size = {_CSV_BUFFER}) LIMIT 1"""
        ).fetchone()
        first: Iterable[str] = [row[0] or ""] if row is not None else []
        names = next(csv.reader(first, delimiter=delimiter, quotechar=quote), [])
    else:
        with text_lines(path) as lines:
            names = next(csv.reader(lines, delimiter=delimiter, quotechar=quote), [])
    if not names:
        raise BadInput(f"{source.table}: {file.path} is empty; its first line must name the columns.")
    seen = set[str]()
    for name in filter(None, names):
        if name.lower() in seen:
            raise BadInput(
                f"{source.table}: {file.path} names the column {name} twice; rename one of them."
            )
        seen.add(name.lower())
    # pandas writes its index under no name.
    return tuple(name or f"column{position}" for position, name in enumerate(names))


def _list(paths: Iterable[str]) -> str:
    return "[" + ", ".join(map(sql_literal, paths)) + "]"
