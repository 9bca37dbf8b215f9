"""Rules that a row breaks because of other rows: of one key and different, in this read or in the lake.

Items and users are versions in time: their key is the id and the moment from which the row holds. Rows of
one key are one row when no column has two values; a column of the log's own that has none in one of them,
as in a file that lacks it, contradicts nothing.
"""

from __future__ import annotations

import duckdb

from bahe_lake.catalogue import columns, tables
from bahe_lake.sql import sql_identifier, sql_literal
from materialize.config.dataset import CLICKED_AT
from materialize.ingest.contract import REQUIRED, UNKNOWN_ITEM, Rule

ROW_KEY = {
    "items": ("item_id", "event_timestamp"),
    "users": ("user_id", "event_timestamp"),
    "impressions": ("impression_id",),
    "behaviors": ("user_id", "channel", "atom_id", "event_timestamp"),
}


def own_columns(connection: duckdb.DuckDBPyConnection, table: str) -> list[str]:
    """Columns of `raw_<table>` that are the log's own: attributes and context, which a row may lack."""
    given = {*REQUIRED[table], *ROW_KEY[table], "atom_id", "_bad"}
    return [column for column in columns(connection, f"raw_{table}") if column not in given]


def rules_of_many(
    connection: duckdb.DuckDBPyConnection, table: str, *, new_items: bool, click_times: bool
) -> list[Rule]:
    """The rules for the rows in `raw_<table>`; makes the temporary tables that they look into."""
    if table == "behaviors":
        return []  # all of a behavior is its key
    told = columns(connection, f"raw_{table}")
    click_times = click_times and table == "impressions" and CLICKED_AT in told
    rules = [_twice(connection, table, click_times=click_times)]
    if table in tables(connection):
        rules.append(_changed(connection, table, click_times=click_times))
    if table == "impressions":
        rules.append(_unknown_item(connection, new_items=new_items))
    return rules


def _twice(connection: duckdb.DuckDBPyConnection, table: str, *, click_times: bool) -> Rule:
    key, identity = ", ".join(ROW_KEY[table]), ROW_KEY[table][0]
    compared = [column for column in columns(connection, f"raw_{table}") if column != "_bad"]
    own = own_columns(connection, table)
    differs = []
    if click_times:  # shown, and clicked later
        compared.remove("clicked")
        differs.append(f"min(clicked) <> max(clicked) AND count({CLICKED_AT}) = 0")
    always = ", ".join(sql_identifier(column) for column in compared if column not in own)
    differs.append(f"min(hash({always})) <> max(hash({always}))")
    for name in map(sql_identifier, own):
        there = f"FILTER (WHERE {name} IS NOT NULL)"
        differs.append(f"coalesce(min(hash({name})) {there} <> max(hash({name})) {there}, false)")
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE repeated_{table} AS
            SELECT {key}, {" OR ".join(differs)} AS clashes
            FROM raw_{table} SEMI JOIN (
                SELECT {key} FROM raw_{table} WHERE NOT _bad GROUP BY ALL HAVING count(*) > 1
            ) USING ({key})
            WHERE NOT _bad GROUP BY ALL"""
    )
    moment = " of one time" if len(ROW_KEY[table]) > 1 else ""
    return Rule(
        name=f"{identity} twice",
        breaks=f"({key}) IN (SELECT ({key}) FROM repeated_{table} WHERE clashes)",
        value=identity,
        reason=f"{identity} {{}} stands for two different rows{moment}",
    )


def _changed(connection: duckdb.DuckDBPyConnection, table: str, *, click_times: bool) -> Rule:
    key, identity = ROW_KEY[table], ROW_KEY[table][0]
    lake, own = columns(connection, table), own_columns(connection, table)
    times = [f"{of}.{CLICKED_AT}" for of in ("n", *(["o"] if CLICKED_AT in lake else []))]

    def difference(column: str) -> str:
        name = sql_identifier(column)
        if column in own:
            return f"n.{name} <> o.{name}"
        differs = f"n.{name} IS DISTINCT FROM o.{name}"
        if column == "clicked" and click_times:  # one of them was written before the click
            return f"{differs} AND coalesce({', '.join(times)}) IS NULL"
        return differs

    differences = [
        difference(column)
        for column in columns(connection, f"raw_{table}")
        if column in lake and column not in key
    ]
    changed, joined = f"changed_{table}", ", ".join(key)
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE {changed} AS
            SELECT {", ".join(f"o.{column}" for column in key)}, any_value(to_json(o)::VARCHAR) AS lake_row
            FROM (SELECT * FROM raw_{table} WHERE NOT _bad) n JOIN {table} o USING ({joined})
            WHERE {" OR ".join(f"({differs})" for differs in differences) or "false"}
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
