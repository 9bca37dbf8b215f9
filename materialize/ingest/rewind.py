"""The parts of deriving again from a moment on: the moment, ranges of keys, and rows that differ."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import duckdb

from bahe_lake.catalogue import columns, scalar
from bahe_lake.sql import sql_identifier, sql_literal

PART_ROWS = 2_000_000
"""Events that are derived from at once, about; 2 million take about 1 GB."""

ALWAYS = "TIMESTAMPTZ '-infinity'"


def ranges(connection: duckdb.DuckDBPyConnection, relation: str, key: str) -> list[str]:
    """Predicates that split the relation by ranges of the key into parts of about PART_ROWS rows."""
    count = scalar(connection, f"SELECT count(*) FROM {relation}")
    parts = -(-count // PART_ROWS)
    bounds: list[object] = []
    if parts > 1:
        shares = ", ".join(str(i / parts) for i in range(1, parts))
        for sample in (f"hash({key}) % 64 = 0", "true"):  # a sample of the keys, unless that leaves none
            found = connection.execute(
                f"""
                SELECT DISTINCT unnest(quantile_disc({key}, [{shares}])) AS bound
                FROM {relation}
                WHERE {sample}
                ORDER BY bound
                """
            ).fetchall()
            bounds = [bound for (bound,) in found if bound is not None]
            if bounds:
                break
    shown = [sql_literal(bound if isinstance(bound, int) else str(bound)) for bound in bounds]
    predicates = []
    for low, high in zip([None, *shown], [*shown, None], strict=True):
        sides = [
            f"{key} >= {low}" if low is not None else "",
            f"{key} < {high}" if high is not None else "",
        ]
        predicates.append(" AND ".join(side for side in sides if side) or "true")
    return predicates


def replace_changed(
    connection: duckdb.DuckDBPyConnection, table: str, fresh: str, key: Sequence[str], since: str
) -> None:
    """Make the table's rows of the fresh rows' keys, none of them before `since`, equal to these."""
    keys = [sql_identifier(c) for c in key]
    values = [sql_identifier(c) for c in columns(connection, fresh) if c not in key]
    listed_key = ", ".join(keys)
    old = f"SELECT * FROM {table} WHERE event_timestamp >= {since}"
    added = fresh
    if scalar(connection, f"SELECT count(*) FROM ({old} LIMIT 1)"):
        same_key = " AND ".join(f"t.{name} = f.{name}" for name in keys)
        differ = " OR ".join(f"t.{name} IS DISTINCT FROM f.{name}" for name in values)
        different = scalar(
            connection,
            f"""
            SELECT count(*)
            FROM ({old}) t
            JOIN {fresh} f ON {same_key}
            WHERE {differ}
            """,
        )
        if different:
            connection.execute(
                f"""
                DELETE FROM {table} AS t
                USING {fresh} AS f
                WHERE t.event_timestamp >= {since} AND {same_key} AND ({differ})
                """
            )
        added = f"{fresh} ANTI JOIN ({old}) USING ({listed_key})"
    created = ", now() AS created_timestamp" if "created_timestamp" in columns(connection, table) else ""
    connection.execute(
        f"""
        INSERT INTO {table} BY NAME
        SELECT *{created}
        FROM {added}
        ORDER BY {listed_key}
        """
    )


def moment(connection: duckdb.DuckDBPyConnection, query: str) -> str:
    """SQL of the moment that a query returns."""
    row = connection.execute(f"SELECT x, isinf(x) FROM ({query}) q(x)").fetchone()
    assert row is not None
    if row[1]:
        return ALWAYS
    assert isinstance(row[0], datetime)
    return sql_literal(row[0])
