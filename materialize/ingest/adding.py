"""What an ingest adds to the log's own tables: rows, columns and atoms that the lake does not have yet."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import duckdb

from bahe_core.errors import BadInput
from bahe_core.progress import progress
from bahe_lake.catalogue import columns, scalar, tables
from bahe_lake.sql import sql_identifier, sql_literal
from materialize.config.dataset import CLICKED_AT
from materialize.ingest import derive, quarantine, rewind, sources
from materialize.ingest.conflicts import ROW_KEY, own_columns
from materialize.ingest.reading import Read


def add(connection: duckdb.DuckDBPyConnection, reads: Mapping[str, Read], label_time: str) -> bool:
    """Add what the lake does not have, and note for `derive` what that is. True when anything was."""
    connection.execute(quarantine.CREATE)
    connection.execute(sources.CREATE)
    reads = {table: read for table, read in reads.items() if read.rows}
    changed = False
    oldest_late_click = None
    for table in ("items", "users", "impressions"):
        if table in reads:
            _new_rows(connection, table)
            changed |= _make_room(connection, table)
            connection.execute(
                f"""
                INSERT INTO {table} BY NAME
                SELECT *
                FROM new_{table}
                ORDER BY event_timestamp, {ROW_KEY[table][0]}
                """
            )
            changed |= scalar(connection, f"SELECT count(*) FROM new_{table}") > 0
            if table == "impressions":
                oldest_late_click = _late_clicks(connection, label_time)
            changed |= _fill(connection, table)
    item_type = columns(connection, "items")["item_id"]
    connection.execute("CREATE OR REPLACE TEMP TABLE seen_atoms (atom_id BIGINT, first_seen TIMESTAMPTZ)")
    _create_others(connection)
    derive.prepare(connection)
    if oldest_late_click is not None:
        connection.execute(f"INSERT INTO changed_impressions VALUES ({sql_literal(oldest_late_click)})")
    if "impressions" in reads:
        connection.execute(
            """
            INSERT INTO changed_impressions
            SELECT min(event_timestamp) FROM new_impressions HAVING count(*) > 0
            """
        )
    if "behaviors" in reads:
        changed |= _add_behaviors(connection, item_type)
    _add_atoms(connection, reads)
    return changed


def _new_rows(connection: duckdb.DuckDBPyConnection, table: str) -> None:
    """`new_<table>`: one row of each key that the lake does not have."""
    _merge_repeated(connection, table)
    key = ", ".join(ROW_KEY[table])
    lacks = f"ANTI JOIN {table} USING ({key})" if table in tables(connection) else ""
    connection.execute(f"CREATE OR REPLACE TEMP TABLE new_{table} AS SELECT * FROM raw_{table} {lacks}")


def _merge_repeated(connection: duckdb.DuckDBPyConnection, table: str) -> None:
    """Leave one row of each key in `raw_<table>`, with all that its rows have."""
    key = ", ".join(ROW_KEY[table])
    connection.execute(f"ALTER TABLE raw_{table} DROP COLUMN _bad")
    if not scalar(connection, f"SELECT count(*) FROM repeated_{table}"):
        return
    rest = [column for column in columns(connection, f"raw_{table}") if column not in ROW_KEY[table]]
    merged = "".join(
        # Of two values of `clicked` one was written before the click.
        f", {'max' if column == 'clicked' else 'any_value'}({name}) AS {name}"
        for column, name in zip(rest, map(sql_identifier, rest), strict=True)
    )
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE merged_{table} AS
        SELECT {key}{merged}
        FROM raw_{table} SEMI JOIN repeated_{table} USING ({key})
        GROUP BY {key}
        """
    )
    connection.execute(f"DELETE FROM raw_{table} WHERE ({key}) IN (SELECT ({key}) FROM repeated_{table})")
    connection.execute(f"INSERT INTO raw_{table} BY NAME SELECT * FROM merged_{table}")


def _make_room(connection: duckdb.DuckDBPyConnection, table: str) -> bool:
    """Make the table, or the columns that it lacks. True when there were any."""
    kinds = columns(connection, f"new_{table}")
    if table not in tables(connection):
        connection.execute(f"CREATE TABLE {table} AS SELECT * FROM new_{table} LIMIT 0")
        return True
    there = columns(connection, table)
    new = {column: kind for column, kind in kinds.items() if column not in there}
    names = {column.lower(): column for column in there}
    for column in new:
        if column.lower() in names:
            raise BadInput(
                f"{table}: the column {column} is {names[column.lower()]} in the lake, and names must"
                f" differ by more than case; map it: `columns: {{{names[column.lower()]}: {column}}}`."
            )
    for column, kind in new.items():
        connection.execute(f"ALTER TABLE {table} ADD COLUMN {sql_identifier(column)} {kind}")
    return bool(new)


def _late_clicks(connection: duckdb.DuckDBPyConnection, label_time: str) -> datetime | None:
    """Impressions of the lake whose click, or its time, is told only now; from when on that matters.

    `_fill` gives them the time. What statistics said of a click at another time is taken out.
    """
    if CLICKED_AT not in columns(connection, "raw_impressions"):
        return None
    told = f"""
        raw_impressions n
        WHERE o.impression_id = n.impression_id
            AND o.{CLICKED_AT} IS NULL
            AND n.{CLICKED_AT} IS NOT NULL"""
    found = connection.execute(
        f"""
        SELECT
            min(CASE WHEN o.clicked = 1 THEN o.event_timestamp ELSE n.{CLICKED_AT} END),
            count(*) FILTER (o.clicked = 1),
            count(*) FILTER (o.clicked = 0)
        FROM impressions o, {told}
        """
    ).fetchone()
    assert found is not None
    moment: datetime | None = found[0]
    if found[1]:
        moved = f"SELECT o.* FROM impressions o, {told} AND o.clicked = 1"
        derive.forget_clicks(connection, f"SELECT user_id, item_id, {label_time} AS moment FROM ({moved})")
    if found[2]:
        connection.execute(f"UPDATE impressions o SET clicked = 1 FROM {told} AND o.clicked = 0")
    return moment


def _fill(connection: duckdb.DuckDBPyConnection, table: str) -> bool:
    """Rows that the lake already has get what it lacks of them in the log's own columns."""
    names = [sql_identifier(column) for column in own_columns(connection, table)]
    if not names:
        return False
    lacks = " OR ".join(f"(o.{name} IS NULL AND n.{name} IS NOT NULL)" for name in names)
    lacking = f"raw_{table} n WHERE {_same_key(table)} AND ({lacks})"
    count = scalar(connection, f"SELECT count(*) FROM {table} o, {lacking}")
    if count:
        filled = ", ".join(f"{name} = coalesce(o.{name}, n.{name})" for name in names)
        connection.execute(f"UPDATE {table} o SET {filled} FROM {lacking}")
    return count > 0


def _create_others(connection: duckdb.DuckDBPyConnection) -> None:
    """Tables that are there from the start, also those that later jobs fill, for Feast to register."""
    user = columns(connection, "impressions")["user_id"]
    item = columns(connection, "items")["item_id"]
    stamps = "event_timestamp TIMESTAMPTZ, created_timestamp TIMESTAMPTZ"
    layouts = {
        "users": f"user_id {user}, event_timestamp TIMESTAMPTZ",
        "behaviors": f"""
            user_id {user},
            channel VARCHAR,
            atom_id BIGINT,
            event_timestamp TIMESTAMPTZ,
            item_id {item}
        """,
        "atoms": """
            atom_id BIGINT,
            channel VARCHAR,
            text VARCHAR,
            first_seen TIMESTAMPTZ
        """,
        "atomic_behavior_embedding": f"""
            atom_id BIGINT,
            encoder_version VARCHAR,
            embedding FLOAT[],
            {stamps}
        """,
        "user_embedding": f"""
            user_id {user},
            model_version VARCHAR,
            embedding FLOAT[],
            behaviors BIGINT,
            seen_items VARCHAR[],
            {stamps}
        """,
        "item_embedding": f"""
            item_id {item},
            model_version VARCHAR,
            embedding FLOAT[],
            {stamps}
        """,
        "publications": f"""
            deployment VARCHAR,
            live_model_version VARCHAR,
            {stamps}
        """,
    }
    for table, layout in layouts.items():
        connection.execute(f"CREATE TABLE IF NOT EXISTS {table} ({layout})")


def _add_behaviors(connection: duckdb.DuckDBPyConnection, item_type: str) -> bool:
    """Part by part of the users, in the order of time within each, so that memory is bounded."""
    parts = rewind.ranges(connection, "raw_behaviors", "user_id")
    key = ", ".join(ROW_KEY["behaviors"])
    changed = 0
    with progress("adding behaviors", len(parts)) as advance:
        for part in parts:
            _part_behaviors(connection, part, item_type)
            bounds = connection.execute(
                "SELECT min(event_timestamp), max(event_timestamp), count(item_id) FROM part_behaviors"
            ).fetchone()
            assert bounds is not None
            if bounds[0] is not None:
                low, high = map(sql_literal, bounds[:2])  # by which whole files can be left out
                here = f"event_timestamp BETWEEN {low} AND {high} AND {part}"
                if bounds[2]:
                    changed += _fill_items(connection, here)
                connection.execute(
                    f"""
                    CREATE OR REPLACE TEMP TABLE new_behaviors AS
                    SELECT *
                    FROM part_behaviors n
                    WHERE NOT EXISTS (
                        FROM (SELECT {key}, item_id FROM behaviors WHERE {here}) o
                        WHERE {_same_key("behaviors")} AND (n.item_id IS NULL OR n.item_id = o.item_id)
                    )
                    """
                )
                connection.execute(
                    f"""
                    INSERT INTO behaviors BY NAME
                    SELECT * FROM new_behaviors ORDER BY event_timestamp, {key}, item_id
                    """
                )
                connection.execute(
                    """
                    INSERT INTO changed_users
                    SELECT user_id, min(event_timestamp) FROM new_behaviors GROUP BY user_id
                    """
                )
                connection.execute(
                    """
                    INSERT INTO seen_atoms
                    SELECT atom_id, min(event_timestamp) FROM new_behaviors GROUP BY atom_id
                    """
                )
                changed += scalar(connection, "SELECT count(*) FROM new_behaviors")
            advance()
    for table in ("part_behaviors", "new_behaviors"):
        connection.execute(f"DROP TABLE IF EXISTS temp.{table}")
    return changed > 0


def _same_key(table: str) -> str:
    """SQL: the row `o` of the lake and the row `n` that was read have one key."""
    return " AND ".join(f"o.{column} = n.{column}" for column in ROW_KEY[table])


def _part_behaviors(connection: duckdb.DuckDBPyConnection, part: str, item_type: str) -> None:
    """`part_behaviors`: each behavior once; of one text and instant, one for each item that is named.

    A row without an item, as of a file that lacks the column, is the same as one with.
    """
    key = ", ".join(ROW_KEY["behaviors"])
    of_row = ", ".join(f"n.{column}" for column in ROW_KEY["behaviors"])
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE part_behaviors AS
        SELECT
            user_id,
            channel::VARCHAR AS channel,
            atom_id,
            event_timestamp,
            min(item_id)::{item_type} AS item_id,
            max(item_id)::{item_type} AS another
        FROM raw_behaviors
        WHERE {part}
        GROUP BY ALL
        """
    )
    if scalar(connection, "SELECT count(*) FROM part_behaviors WHERE item_id <> another"):
        connection.execute(
            f"""
            INSERT INTO part_behaviors
            SELECT DISTINCT {of_row}, n.item_id, n.item_id
            FROM (SELECT {key}, item_id FROM raw_behaviors WHERE {part}) n
            JOIN (FROM part_behaviors WHERE item_id <> another) o ON {_same_key("behaviors")}
            WHERE n.item_id <> o.item_id
            """
        )
    connection.execute("ALTER TABLE part_behaviors DROP COLUMN another")


def _fill_items(connection: duckdb.DuckDBPyConnection, here: str) -> int:
    """Behaviors of the lake without an item get the one that is named now; how many."""
    key = ", ".join(ROW_KEY["behaviors"])
    named = f"""
        (SELECT {key}, min(item_id) AS item_id FROM part_behaviors GROUP BY ALL) n
        WHERE {_same_key("behaviors")} AND o.item_id IS NULL AND n.item_id IS NOT NULL"""
    filled = scalar(connection, f"SELECT count(*) FROM (FROM behaviors WHERE {here}) o, {named}")
    if filled:
        connection.execute(f"UPDATE behaviors o SET item_id = n.item_id FROM {named}")
    return filled


def _add_atoms(connection: duckdb.DuckDBPyConnection, reads: Mapping[str, Read]) -> None:
    """Atoms that are new, and an earlier first time of those that are not."""
    parts = []
    if "behaviors" in reads:
        parts.append(
            """
            SELECT atom_id, channel, any_value(normal) AS text, any_value(first_seen) AS first_seen
            FROM raw_texts
            JOIN (
                SELECT atom_id, min(first_seen) AS first_seen FROM seen_atoms GROUP BY atom_id
            ) USING (atom_id)
            GROUP BY ALL
            """
        )
    if "items" in reads:
        parts.append(
            """
            SELECT
                atom_id,
                'item' AS channel,
                any_value(text) AS text,
                min(event_timestamp) AS first_seen
            FROM new_items
            GROUP BY atom_id
            """
        )
    if not parts:
        return
    connection.execute(f"CREATE OR REPLACE TEMP TABLE new_atoms AS {' UNION ALL '.join(parts)}")
    earlier = "new_atoms n WHERE n.atom_id = a.atom_id AND n.first_seen < a.first_seen"
    if scalar(connection, f"SELECT count(*) FROM atoms a, {earlier}"):
        connection.execute(f"UPDATE atoms a SET first_seen = n.first_seen FROM {earlier}")
    connection.execute(
        """
        INSERT INTO atoms
        SELECT * FROM new_atoms ANTI JOIN atoms USING (atom_id) ORDER BY atom_id
        """
    )
