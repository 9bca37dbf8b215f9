"""Appending to the lake through Feast: pushed rows, and logs of served features."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa

from bahe_core.errors import BadInput, one_line
from bahe_lake.catalogue import tables
from bahe_lake.sql import sql_identifier, sql_literal
from bahe_lake.transactions import commit
from feast_ducklake.conversion import converted_table


def append(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    """Add rows to a table of the lake, by column name, in one transaction.

    Raises BadInput when the columns are not the table's, or a value does not fit its column.
    """
    what = f"rows for table {table}"
    schema = connection.execute(f"SELECT * FROM {sql_identifier(table)} LIMIT 0").to_arrow_table().schema
    missing, unknown = (
        set(schema.names) - set(rows.column_names),
        set(rows.column_names) - set(schema.names),
    )
    if missing or unknown:
        raise BadInput(
            f"{what} have other columns than it: missing {', '.join(sorted(missing)) or 'nothing'}, unknown"
            f" {', '.join(sorted(unknown)) or 'nothing'}."
        )
    rows = converted_table(rows, {field.name: field.type for field in schema}, what)
    connection.register("pushed", rows)
    try:
        commit(connection, [f"INSERT INTO {sql_identifier(table)} BY NAME FROM pushed"])
    except duckdb.ConversionException as error:
        raise BadInput(f"{what} do not fit its types ({one_line(error)}).") from None
    finally:
        connection.unregister("pushed")


def append_logs(
    connection: duckdb.DuckDBPyConnection, table: str, logs: pa.Table | Path, schema: pa.Schema
) -> None:
    """Add logs (a table, or a folder of Parquet files) to a table, created at first with this schema."""
    if isinstance(logs, Path):
        logs = connection.execute(
            f"FROM read_parquet({sql_literal(f'{logs}/**/*.parquet')})"
        ).to_arrow_table()
    if table not in tables(connection):
        connection.register("empty", schema.empty_table())
        commit(connection, [f"CREATE TABLE IF NOT EXISTS {sql_identifier(table)} AS FROM empty"])
        connection.unregister("empty")
    append(connection, table, logs)


def replace_table(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.RecordBatchReader) -> None:
    """Make these rows the table's content. The stream is read once, so a retried commit reads a copy."""
    connection.register("streamed", rows)
    connection.execute("CREATE OR REPLACE TEMP TABLE kept AS FROM streamed")
    connection.unregister("streamed")
    commit(connection, [f"CREATE OR REPLACE TABLE {sql_identifier(table)} AS FROM temp.kept"])
    connection.execute("DROP TABLE temp.kept")
