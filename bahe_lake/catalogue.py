"""What the lake holds, and its state: tables, columns, snapshots, rows written since."""

from __future__ import annotations

import duckdb

from bahe_lake.connection import LAKE
from bahe_lake.sql import sql_identifier, sql_literal


def tables(connection: duckdb.DuckDBPyConnection) -> set[str]:
    """Names of the lake's tables."""
    # Without parameters: for the first of a process DuckDB imports pandas, half a second for `bahe status`.
    rows = connection.execute(
        f"SELECT table_name FROM duckdb_tables() WHERE database_name = {sql_literal(LAKE)}"
    ).fetchall()
    return {row[0] for row in rows}


def columns(connection: duckdb.DuckDBPyConnection, relation: str) -> dict[str, str]:
    """Column names of a table or subquery, with their DuckDB types."""
    return {row[0]: row[1] for row in connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()}


def snapshot(connection: duckdb.DuckDBPyConnection) -> int:
    """The number of the snapshot that this connection (or its transaction) sees."""
    return scalar(connection, f"FROM {LAKE}.current_snapshot()")


def written_since(connection: duckdb.DuckDBPyConnection, table: str, earlier: int) -> str | None:
    """Subquery of the rows inserted into a table, or changed, after a snapshot (DuckLake's change feed).

    These are all rows of a table that was created anew since. None when the lake cannot tell: snapshots
    since then have expired, or the lake is older than that snapshot.
    """
    now = snapshot(connection)
    if earlier == now:
        return f"(SELECT * FROM {sql_identifier(table)} WHERE false)"
    if not scalar(connection, f"SELECT count(*) FROM {LAKE}.snapshots() WHERE snapshot_id = {earlier + 1}"):
        return None
    return f"ducklake_table_insertions('{LAKE}', 'main', {sql_literal(table)}, {earlier + 1}, {now})"


def scalar(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    """The single integer that a query returns."""
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])
