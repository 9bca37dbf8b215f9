"""Rules that a row breaks because of other rows: of one key and different, in this read or in the lake.

Items and users are versions in time: their key is the id and the moment from which the row holds. Rows that
are the same in every column are one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from bahe_lake.catalogue import columns, tables
from bahe_lake.sql import sql_identifier, sql_literal
from materialize.ingest.contract import UNKNOWN_ITEM, Rule

ROW_KEY = {
    "items": ("item_id", "event_timestamp"),
    "users": ("user_id", "event_timestamp"),
    "impressions": ("impression_id",),
    "behaviors": ("user_id", "channel", "atom_id", "event_timestamp"),
}


def rules_of_many(
    connection: duckdb.DuckDBPyConnection, table: str, fillable: Sequence[str], *, new_items: bool
) -> list[Rule]:
    """The rules for the rows in `raw_<table>`; makes the temporary tables that they look into.

    A null of the lake in a `fillable` column contradicts nothing.
    """
    if table == "behaviors":
        return []  # all of a behavior is its key
    rules = [_twice(connection, table)]
    if table in tables(connection):
        rules.append(_changed(connection, table, fillable))
    if table == "impressions":
        rules.append(_unknown_item(connection, new_items=new_items))
    return rules


def _twice(connection: duckdb.DuckDBPyConnection, table: str) -> Rule:
    key, identity = ", ".join(ROW_KEY[table]), ROW_KEY[table][0]
    compared = ", ".join(sql_identifier(c) for c in columns(connection, f"raw_{table}") if c != "_bad")
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE repeated_{table} AS
            SELECT {key}, min(hash({compared})) <> max(hash({compared})) AS clashes
            FROM raw_{table} WHERE NOT _bad GROUP BY ALL HAVING count(*) > 1"""
    )
    moment = " of one time" if len(ROW_KEY[table]) > 1 else ""
    return Rule(
        name=f"{identity} twice",
        breaks=f"({key}) IN (SELECT ({key}) FROM repeated_{table} WHERE clashes)",
        value=identity,
        reason=f"{identity} {{}} stands for two different rows{moment}",
    )


def _changed(connection: duckdb.DuckDBPyConnection, table: str, fillable: Sequence[str]) -> Rule:
    key, identity = ROW_KEY[table], ROW_KEY[table][0]
    lake = columns(connection, table)
    differences = [
        f"n.{name} IS DISTINCT FROM o.{name}" + (f" AND o.{name} IS NOT NULL" if column in fillable else "")
        for column in columns(connection, f"raw_{table}")
        if column in lake and column not in key and (name := sql_identifier(column))
    ]
    changed, joined = f"changed_{table}", ", ".join(key)
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE {changed} AS
            SELECT {", ".join(f"o.{column}" for column in key)}, any_value(to_json(o)::VARCHAR) AS lake_row
            FROM (SELECT * FROM raw_{table} WHERE NOT _bad) n JOIN {table} o USING ({joined})
            WHERE {" OR ".join(f"({difference})" for difference in differences) or "false"}
            GROUP BY ALL"""
    )
    same_key = " AND ".join(f"c.{column} = _row.{column}" for column in key)
    said = sql_literal(" is in the lake already with other values: ")
    return Rule(
        name=f"{identity} changed",
        breaks=f"({joined}) IN (SELECT ({joined}) FROM {changed})",
        value=identity,
        reason=f"{identity} {{}}",
        shown=f"""{identity}::VARCHAR || {said}
                  || (SELECT any_value(lake_row) FROM {changed} c WHERE {same_key})""",
        counts=False,
    )


def _unknown_item(connection: duckdb.DuckDBPyConnection, *, new_items: bool) -> Rule:
    parts = ["SELECT item_id FROM raw_items"] if new_items else []
    parts += ["SELECT item_id FROM items"] if "items" in tables(connection) else []
    connection.execute(f"CREATE OR REPLACE TEMP TABLE known_items AS {' UNION '.join(parts)}")
    return Rule(
        name=UNKNOWN_ITEM,
        breaks="item_id NOT IN (SELECT item_id FROM known_items)",
        value="item_id",
        reason="item_id {} is not in items; add it there with a text",
    )
