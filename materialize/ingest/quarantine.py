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
from materialize.ingest.sources import FILE, File, Source

CREATE = (
    "CREATE TABLE IF NOT EXISTS quarantine (table_name VARCHAR, source VARCHAR, row_number BIGINT,"
    " rule VARCHAR, reason VARCHAR, value VARCHAR, row VARCHAR, quarantined_at TIMESTAMPTZ, run VARCHAR)"
)
_KEY = "table_name, source, row_number, rule, row"

Reader = Callable[[File | None], str]
"""SQL of a source's rows: of one file, or of all of them with the column FILE."""


def prepare(connection: duckdb.DuckDBPyConnection) -> None:
    """An empty temporary table `held`, which `hold` fills and `statements` writes."""
    connection.execute(CREATE.replace("TABLE IF NOT EXISTS quarantine", "OR REPLACE TEMP TABLE held"))


def hold(
    connection: duckdb.DuckDBPyConnection,
    source: Source,
    files: Sequence[File],
    projection: Projection,
    rules: Sequence[Rule],
    rows_of: Reader,
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
    if refused:
        rules = [rule for rule in rules if rule.counts]
    bad = broken(rules)
    broken_files = list(files)
    if len(files) > 1:
        query = projection.query(rows_of(None), f", {sql_identifier(FILE)} AS _file")
        found = connection.execute(f"SELECT DISTINCT _file FROM {query} WHERE {bad}").fetchall()
        paths = {path for (path,) in found}
        broken_files = [file for file in files if file.path in paths]
    for file in broken_files:
        query = projection.query(rows_of(file), ", row_number() OVER () AS _row, _row_of_source AS _whole")
        cases = {
            what: "CASE " + " ".join(f"WHEN {rule.breaks} THEN {sql(rule)}" for rule in rules) + " END"
            for what, sql in (
                ("rule", lambda rule: sql_literal(rule.name)),
                ("reason", lambda rule: rule.sentence),
                ("value", lambda rule: f"({rule.value})::VARCHAR"),
            )
        }
        selected = (
            f"SELECT {sql_literal(projection.table)}, {sql_literal(file.path)}, _row, {cases['rule']},"
            f" {cases['reason']}, {cases['value']}, to_json(_whole)::VARCHAR, NULL, NULL"
            f" FROM {query} WHERE {bad}"
        )
        if refused:
            first = connection.execute(f"{selected} ORDER BY _row LIMIT 1").fetchone()
            assert first is not None
            raise BadInput(_refusal(first, file, len(files), count, read, max_share))
        connection.execute(f"INSERT INTO held {selected}")


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
            f"DELETE FROM quarantine WHERE table_name = {sql_literal(source.table)} AND source IN ({paths})"
            f" AND ({_KEY}) NOT IN (SELECT ({_KEY}) FROM held)"
        )
    made.append(
        "INSERT INTO quarantine SELECT * REPLACE (now() AS quarantined_at,"
        f" {sql_literal(run)} AS run) FROM held ANTI JOIN quarantine USING ({_KEY})"
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
    conditions = [
        f"rule = {sql_literal(FUTURE)} AND TRY_CAST(value AS TIMESTAMPTZ) <="
        f" TIMESTAMPTZ {sql_literal(latest.isoformat())}"
    ]
    if new_items and table == "impressions":
        conditions.append(
            f"rule = {sql_literal(UNKNOWN_ITEM)} AND value IN (SELECT item_id::VARCHAR FROM raw_items)"
        )
    rows = connection.execute(
        f"SELECT DISTINCT source FROM quarantine WHERE table_name = ? AND ({' OR '.join(conditions)})",
        [table],
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
            "SELECT table_name, rule, count(*), min(quarantined_at) FROM quarantine"
            f" {where} GROUP BY ALL ORDER BY table_name, count(*) DESC, rule"
        ).fetchall()
        found = []
        for of, rule, rows, since in groups:
            shown = connection.execute(
                "SELECT source, row_number, reason, row FROM quarantine WHERE table_name = ? AND rule = ?"
                f" ORDER BY source, row_number LIMIT {int(examples)}",
                [of, rule],
            ).fetchall()
            as_facts = [
                {"source": s, "row_number": n, "reason": reason, "row": json.loads(row)}
                for s, n, reason, row in shown
            ]
            found.append(Held(of, rule, rows, since, as_facts))
    return found
