"""Rows of one data source in a time range: all of them, or the latest of each key, for materialization."""

from __future__ import annotations

from datetime import datetime

import duckdb
from feast.data_source import DataSource
from feast.repo_config import RepoConfig

from bahe_lake.catalogue import snapshot, tables, written_since
from bahe_lake.sql import sql_identifier, sql_literal
from feast_ducklake.offline.lakes import open_lake
from feast_ducklake.offline.retrieval import DuckLakeRetrievalJob
from feast_ducklake.offline.source import relation_of
from feast_ducklake.offline.views import source_columns


def pull(
    config: RepoConfig,
    source: DataSource,
    columns: list[str],
    timestamp_field: str,
    created_timestamp_column: str | None,
    start: datetime | None,
    end: datetime | None,
    latest_of: list[str] | None = None,
) -> DuckLakeRetrievalJob:
    """Rows with an event time in [start, end]; of each key in `latest_of` only the latest one.

    Of rows of one instant the one computed last counts, and of those the one written last. Raises BadInput
    when the source has no such columns.
    """
    created = created_timestamp_column or None
    columns = list(dict.fromkeys([*columns, timestamp_field, *([created] if created else [])]))
    relation = relation_of(source, config)
    bounds = [
        f"{sql_identifier(timestamp_field)} {sign} {sql_literal(moment)}"
        for sign, moment in ((">=", start), ("<=", end))
        if moment is not None
    ]
    with open_lake(config) as connection:
        number = snapshot(connection)
        source_columns(connection, source.name or relation, relation, columns)
        since = config.offline_store.changed_since
        if latest_of and since is not None:
            bounds += _changed(connection, relation, latest_of, since)
        rows_are_numbered = getattr(source, "table", None) in tables(connection)
    listed = ", ".join(map(sql_identifier, columns))
    where = f"WHERE {' AND '.join(bounds)}" if bounds else ""
    query = f"SELECT {listed} FROM {relation} {where}"
    if latest_of is not None:
        latest = _latest(latest_of, timestamp_field, created, rows_are_numbered)
        if rows_are_numbered:  # keys, times and numbers are sorted, but not the features
            query = f"""
                SELECT {listed}
                FROM {relation}
                {where} {"AND" if where else "WHERE"} rowid IN (
                    SELECT rowid FROM {relation} {where} {latest}
                )
            """
        else:
            query = f"{query} {latest}"
    return DuckLakeRetrievalJob(config=config, query=query, snapshot=number)


def _latest(keys: list[str], time: str, created: str | None, rows_are_numbered: bool) -> str:
    """The clause that keeps the latest row of each key."""
    order = [f"{sql_identifier(time)} DESC"]
    if created is not None:
        order.append(f"{sql_identifier(created)} DESC NULLS LAST")
    if rows_are_numbered:
        order.append("rowid DESC")
    partition = ", ".join(map(sql_identifier, keys)) or "1"
    return f"QUALIFY row_number() OVER (PARTITION BY {partition} ORDER BY {', '.join(order)}) = 1"


def _changed(
    connection: duckdb.DuckDBPyConnection, relation: str, keys: list[str], since: int
) -> list[str]:
    """The condition that a key got rows after the snapshot; none when that cannot be told."""
    read = connection.get_table_names(f"SELECT * FROM {relation}")
    written = written_since(connection, next(iter(read)), since) if len(read) == 1 else None
    if written is None:
        return []
    listed = ", ".join(map(sql_identifier, keys))
    return [f"({listed}) IN (SELECT ({listed}) FROM {written})"]
