"""Rows that break the contract: set aside with the reason and where they stand, or too many to go on.

The table `quarantine` holds what is kept out now: when a file is read again, its rows there are those that
break a rule this time. What was there before is in the lake's earlier snapshots.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import duckdb

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_core.results import Result
from bahe_lake.catalogue import tables
from bahe_lake.connection import lake
from bahe_lake.sql import sql_identifier, sql_literal
from materialize.ingest.contract import FUTURE, UNKNOWN_ITEM, Projection, Rule, broken
from materialize.ingest.layouts import Layout
from materialize.ingest.sources import FILE, File, Source

_COLUMNS = """(
    table_name VARCHAR,
    source VARCHAR,
    row_number BIGINT,
    rule VARCHAR,
    reason VARCHAR,
    value VARCHAR,
    row VARCHAR,
    quarantined_at TIMESTAMPTZ,
    run VARCHAR
)"""
CREATE = f"CREATE TABLE IF NOT EXISTS quarantine {_COLUMNS}"
_KEY = "table_name, source, row_number, rule, row"


def prepare(connection: duckdb.DuckDBPyConnection) -> None:
    """An empty temporary table `held`, which `hold` fills and `statements` writes."""
    connection.execute(f"CREATE OR REPLACE TEMP TABLE held {_COLUMNS}")


def hold(
    connection: duckdb.DuckDBPyConnection,
    parts: Sequence[tuple[Layout, Projection]],
    rules_of_many: Sequence[Rule],
    *,
    count: int,
    read: int,
    max_share: float,
) -> None:
    """Put the rows that break a rule into `held`.

    Raises BadInput with the first of them when the `count` that count are more than `max_share` of what was
    `read`.
    """
    refused = count > max_share * read
    for layout, projection in parts:
        rules = [rule for rule in (*projection.rules, *rules_of_many) if rule.counts or not refused]
        for file in _files_with(connection, layout, projection, broken(rules)):
            selected = _reasons(layout, projection, rules, file)
            if refused:
                first = connection.execute(f"{selected} ORDER BY _number LIMIT 1").fetchone()
                assert first is not None
                files = sum(len(other.files) for other, _ in parts)
                raise BadInput(_refusal(first, file, files, count, read, max_share))
            connection.execute(f"INSERT INTO held {selected}")


def _files_with(
    connection: duckdb.DuckDBPyConnection, layout: Layout, projection: Projection, bad: str
) -> list[File]:
    """The layout's files that have rows of which the predicate is true."""
    column = sql_identifier(FILE) if len(layout.files) > 1 else "1"
    rows = projection.query(layout.relation, f", {column} AS _file")
    found = connection.execute(f"SELECT DISTINCT _file FROM {rows} AS _row WHERE {bad}").fetchall()
    paths = {path for (path,) in found}
    return [file for file in layout.files if file.path in paths or (paths and len(layout.files) == 1)]


def _reasons(layout: Layout, projection: Projection, rules: Sequence[Rule], file: File) -> str:
    """SQL of the file's rows that break a rule, as rows of the quarantine."""
    rows = projection.query(
        layout.rows_of(file), ", row_number() OVER () AS _number, _row_of_source AS _whole"
    )

    def of_first_broken(sql: Callable[[Rule], str]) -> str:
        cases = " ".join(f"WHEN {rule.breaks} THEN {sql(rule)}" for rule in rules)
        return f"CASE {cases} END"

    return f"""
        SELECT
            {sql_literal(projection.table)},
            {sql_literal(file.path)},
            _number,
            {of_first_broken(lambda rule: sql_literal(rule.name))},
            {of_first_broken(lambda rule: rule.sentence)},
            {of_first_broken(lambda rule: f"({rule.value})::VARCHAR")},
            to_json(_whole)::VARCHAR,
            NULL,
            NULL
        FROM {rows} AS _row
        WHERE {broken(rules)}
    """


def _refusal(row: tuple[Any, ...], file: File, files: int, count: int, read: int, max_share: float) -> str:
    where = f" of {file.path}" if files > 1 else ""
    return (
        f"{row[0]}, row {row[2]}{where}: {row[4]}; {count:,} of {read:,} rows break the contract, more than"
        f" the share {max_share:g} that `quarantine.max_share` lets be set aside."
    )


def statements(read: Sequence[tuple[Source, Sequence[File]]], run: str) -> list[str]:
    """SQL that makes `quarantine` hold what is held of these files, and nothing else of them."""
    made = []
    for source, files in read:
        paths = ", ".join(sql_literal(file.path) for file in files)
        made.append(
            f"""
            DELETE FROM quarantine
            WHERE table_name = {sql_literal(source.table)}
                AND source IN ({paths})
                AND ({_KEY}) NOT IN (SELECT ({_KEY}) FROM held)
            """
        )
    made.append(
        f"""
        INSERT INTO quarantine
        SELECT * REPLACE (now() AS quarantined_at, {sql_literal(run)} AS run)
        FROM held ANTI JOIN quarantine USING ({_KEY})
        """
    )
    return made


def released(
    connection: duckdb.DuckDBPyConnection, table: str, latest: datetime, *, new_items: bool
) -> set[str]:
    """Files with rows that were kept out and now may enter, though the files have not changed.

    Their time has come, or with `new_items` their item is now in `raw_items`.
    """
    if "quarantine" not in tables(connection):
        return set()
    item_has_come = ""
    if new_items and table == "impressions":
        item_has_come = f"""
            OR rule = {sql_literal(UNKNOWN_ITEM)}
            AND value IN (SELECT item_id::VARCHAR FROM raw_items)"""
    rows = connection.execute(
        f"""
        SELECT DISTINCT source
        FROM quarantine
        WHERE table_name = {sql_literal(table)} AND (
            rule = {sql_literal(FUTURE)}
            AND TRY_CAST(value AS TIMESTAMPTZ) <= {sql_literal(latest)}{item_has_come}
        )
        """
    ).fetchall()
    return {source for (source,) in rows}


@dataclass(frozen=True)
class Held(Result):
    """Rows of one table that were set aside for one reason."""

    table: str
    rule: str
    rows: int
    since: datetime
    examples: list[dict[str, Any]]
    """Some of them: source, row_number, reason, row."""


def quarantined(home: Home, *, table: str | None = None, examples: int = 1) -> list[Held]:
    """What is in the quarantine, by table and reason. Raises NotReady before the first ingest."""
    with lake(home) as connection:
        if "quarantine" not in tables(connection):
            return []
        where = f"WHERE table_name = {sql_literal(table)}" if table is not None else ""
        groups = connection.execute(
            f"""
            SELECT table_name, rule, count(*), min(quarantined_at)
            FROM quarantine
            {where}
            GROUP BY ALL
            ORDER BY table_name, count(*) DESC, rule
            """
        ).fetchall()
        found = []
        for of, rule, rows, since in groups:
            shown = connection.execute(
                """
                SELECT source, row_number, reason, row
                FROM quarantine
                WHERE table_name = ? AND rule = ?
                ORDER BY source, row_number
                LIMIT ?
                """,
                [of, rule, examples],
            ).fetchall()
            as_facts = [
                {"source": s, "row_number": n, "reason": reason, "row": json.loads(row)}
                for s, n, reason, row in shown
            ]
            found.append(Held(of, rule, rows, since, as_facts))
    return found
