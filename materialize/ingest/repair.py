"""The way out for a lake that holds what the contract no longer lets in, or that its gate refused.

Rows that show nothing where they must show something are moved to the quarantine, with what depends on
them, and everything derived is made anew.
"""

from __future__ import annotations

import duckdb

from bahe_lake import runs
from bahe_lake.blank import blank
from bahe_lake.catalogue import columns, scalar, tables
from bahe_lake.sql import sql_literal
from materialize.ingest import quarantine
from materialize.ingest.column_types import KEYS
from materialize.ingest.contract import REQUIRED

VERSION = 1
"""Raise when the contract becomes stricter, so that existing lakes are looked at once."""

SOURCE = "the lake"
"""What the quarantine calls the source of rows that were in the lake."""


def due(connection: duckdb.DuckDBPyConnection, last: runs.Run | None, verdict: runs.Run | None) -> bool:
    """Whether the lake needs repair: its gate refused it, or it is an older one and holds blank rows."""
    if last is None:
        return False
    if verdict is not None and not verdict.facts["passed"] and verdict.started >= last.finished:
        return True
    return last.facts.get("contract") != VERSION and any(
        scalar(connection, f"SELECT count(*) FROM {table} WHERE {broken}")
        for table, (_, broken) in _blank_rows(connection).items()
    )


def repair(connection: duckdb.DuckDBPyConnection, run: str) -> None:
    """Move the rows, inside the caller's transaction; what is derived has to be made anew afterwards."""
    quarantine.prepare(connection)
    connection.execute(quarantine.CREATE)
    for table, (reason, broken) in _blank_rows(connection).items():
        if table != "atoms":
            _set_aside(connection, table, reason, broken, run)
    _set_aside(connection, "impressions", "unknown item", "item_id NOT IN (SELECT item_id FROM items)", run)
    connection.execute(f"DELETE FROM atoms WHERE {_BLANK_TEXT}")


_BLANK_TEXT = f"(text IS NULL OR {blank('text')})"


def _blank_rows(connection: duckdb.DuckDBPyConnection) -> dict[str, tuple[str, str]]:
    """Of each table that is there, the rule that blank rows break and the predicate that finds them."""
    of_text = {
        "behaviors": f"atom_id IN (SELECT atom_id FROM atoms WHERE {_BLANK_TEXT})",
        "items": _BLANK_TEXT,
        "atoms": _BLANK_TEXT,
    }
    there = tables(connection)
    rows: dict[str, tuple[str, str]] = {}
    for table in ("behaviors", "items", "users", "impressions", "atoms"):
        if table in there:
            kinds = columns(connection, table)
            required = [key for key in KEYS if key in REQUIRED.get(table, ()) and kinds[key] == "VARCHAR"]
            of_ids = [f"coalesce({blank(key)}, false)" for key in required]
            predicate = " OR ".join([of_text.get(table, "false"), *of_ids])
            rows[table] = ("no text" if table in of_text else "no id", predicate)
    return rows


def _set_aside(
    connection: duckdb.DuckDBPyConnection, table: str, reason: str, broken: str, run: str
) -> None:
    connection.execute(
        f"""INSERT INTO quarantine
            SELECT {sql_literal(table)}, {sql_literal(SOURCE)}, row_number() OVER (), {sql_literal(reason)},
                {sql_literal(f"{reason}: an earlier ingest let it in")}, NULL, to_json(t)::VARCHAR, now(),
                {sql_literal(run)}
            FROM {table} AS t WHERE {broken}"""
    )
    connection.execute(f"DELETE FROM {table} WHERE {broken}")
