"""What follows from the log by SQL alone: timelines, their lengths, and point-in-time statistics.

A row of a derived table says what was known *after* the events at its event_timestamp; the
point-in-time join takes only rows strictly before an impression, so nothing of the impression's own
moment is ever seen. Several events at one instant make one row.

There is one mechanism, for the first log as for one more night: *rewind* to the oldest new event and
compute from there. Timelines go back to each changed user's own oldest new behavior. Statistics go back to
the oldest new impression of all, because they are smoothed by the click rate of the whole log; only users
and items shown since then are touched. What was before gives the counts to start from. An event adds rows
and changes later ones but never takes one away (a click that turns out to be at another time has its row
taken out first), so the fresh rows are compared with those of the same key: rows that differ are replaced,
rows that do not stay as they are, created_timestamp included. When no new event is older than what was
known, nothing is there to compare and rows are only appended.

Users and items are taken range by range, in order, which bounds memory and keeps the rows of one of them
together in the tables' files.
"""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from bahe_core.progress import progress
from bahe_lake.catalogue import columns, scalar, tables
from bahe_lake.sql import AT_ONCE, sql_identifier, sql_literal
from feature_repo import behavior_counts
from materialize.config.dataset import CLICKED_AT
from materialize.ingest.rewind import ALWAYS, moment, ranges, replace_changed
from materialize.ingest.statistics import WINDOW_DAYS, derive_statistics

VERSION = 5
"""Raise when a derived table changes its meaning, so that existing lakes are derived again."""


RECENT_ATOMS = 20
"""How many of the latest atoms `timeline_length` carries inline, for services that want them."""


def prepare(connection: duckdb.DuckDBPyConnection) -> None:
    """Empty temporary tables in which `derive` is told what is new.

    `changed_users` (user_id, since): each user with new behaviors, and the oldest one's time;
    `changed_impressions` (since): the oldest new impression's time, if there is any.
    """
    user = columns(connection, "behaviors")["user_id"]
    connection.execute(f"CREATE OR REPLACE TEMP TABLE changed_users (user_id {user}, since TIMESTAMPTZ)")
    connection.execute("CREATE OR REPLACE TEMP TABLE changed_impressions (since TIMESTAMPTZ)")


def derive(
    connection: duckdb.DuckDBPyConnection,
    channels: Sequence[str],
    *,
    anew: bool,
    label_time: str = AT_ONCE,
    end: str | None = None,
) -> None:
    """Bring every derived table up to what the lake's behaviors and impressions say.

    Runs inside the caller's transaction. `anew` makes the tables from the whole log, whatever is new.
    `label_time` is SQL of the instant at which an impression's click is known; unless that is at once,
    `end` is that of `log_end`.
    """
    if anew:
        _create(connection, channels)
        prepare(connection)
        connection.execute(
            f"INSERT INTO changed_users SELECT user_id, {ALWAYS} FROM behaviors GROUP BY user_id"
        )
        connection.execute(f"INSERT INTO changed_impressions SELECT {ALWAYS} FROM impressions LIMIT 1")
    if scalar(connection, "SELECT count(*) FROM changed_users"):
        _timelines(connection, channels)
    if scalar(connection, "SELECT count(*) FROM changed_impressions"):
        derive_statistics(connection, label_time, end)


def log_end(connection: duckdb.DuckDBPyConnection, label_time: str) -> str:
    """SQL of the log's last instant, up to which anything is known."""
    clicks = f"UNION ALL SELECT {CLICKED_AT} FROM impressions" if CLICKED_AT in label_time else ""
    return moment(
        connection,
        f"""
        SELECT max(event_timestamp)
        FROM (
            SELECT event_timestamp FROM impressions
            UNION ALL
            SELECT event_timestamp FROM behaviors
            {clicks}
        )
        """,
    )


def forget_clicks(connection: duckdb.DuckDBPyConnection, clicks: str) -> None:
    """Take out the rows of statistics at the times (`moment`) of these clicks, which turn out to be others.

    A row that something else happened at comes again when statistics are derived from an earlier moment on.
    `clicks` is SQL of user_id, item_id and moment.
    """
    connection.execute(f"CREATE OR REPLACE TEMP TABLE forgotten AS {clicks}")
    there = tables(connection)
    for entity in ("user", "item"):
        for days in (None, *WINDOW_DAYS):
            table = f"{entity}_stats" + (f"_{days}d" if days else "")
            if table not in there:
                continue
            left = (
                f"UNION SELECT {entity}_id, moment + INTERVAL '{days} days' FROM forgotten" if days else ""
            )
            connection.execute(
                f"""
                DELETE FROM {table}
                WHERE ({entity}_id, event_timestamp) IN (SELECT {entity}_id, moment FROM forgotten {left})
                """
            )
    connection.execute("DROP TABLE temp.forgotten")


def _create(connection: duckdb.DuckDBPyConnection, channels: Sequence[str]) -> None:
    user = columns(connection, "behaviors")["user_id"]
    lengths = ", ".join(f"{sql_identifier('length_' + channel)} BIGINT" for channel in channels)
    layouts = {
        "user_timeline": f"""
            user_id {user},
            channel VARCHAR,
            position BIGINT,
            atom_id BIGINT,
            event_timestamp TIMESTAMPTZ
        """,
        "timeline_length": f"""
            user_id {user},
            event_timestamp TIMESTAMPTZ,
            {lengths},
            recent_atoms BIGINT[],
            created_timestamp TIMESTAMPTZ
        """,
    }
    for entity in ("user", "item"):
        kind = columns(connection, "impressions")[f"{entity}_id"]
        for suffix in ("", *(f"_{days}d" for days in WINDOW_DAYS)):
            last_impression = "" if suffix else f"{entity}_last_impression_us BIGINT,"
            layouts[f"{entity}_stats{suffix}"] = f"""
                {entity}_id {kind},
                event_timestamp TIMESTAMPTZ,
                {entity}_impressions{suffix} BIGINT,
                {entity}_clicks{suffix} BIGINT,
                {entity}_click_rate{suffix} DOUBLE,
                {last_impression}
                created_timestamp TIMESTAMPTZ
            """
    for table, layout in layouts.items():
        connection.execute(f"CREATE OR REPLACE TABLE {table} ({layout})")
    for view in behavior_counts.statements(channels, WINDOW_DAYS):
        connection.execute(view)


def _timelines(connection: duckdb.DuckDBPyConnection, channels: Sequence[str]) -> None:
    """`user_timeline` and `timeline_length` from each changed user's oldest new behavior on."""
    oldest = moment(connection, "SELECT min(since) FROM changed_users")
    events = f"""
        SELECT b.*
        FROM behaviors b
        JOIN changed_users c USING (user_id)
        WHERE b.event_timestamp >= {oldest} AND b.event_timestamp >= c.since
    """
    parts = ranges(connection, f"({events})", "user_id")
    with progress("timelines", len(parts)) as advance:
        for part in parts:
            _part_of_timelines(connection, channels, part, events, oldest)
            advance()
    connection.execute("DROP TABLE IF EXISTS temp.events")


def _part_of_timelines(
    connection: duckdb.DuckDBPyConnection, channels: Sequence[str], part: str, events: str, oldest: str
) -> None:
    lengths = {c: sql_identifier(f"length_{c}") for c in channels}
    listed_lengths = ", ".join(lengths.values())
    so_far = ", ".join(f"max({length}) AS {length}" for length in lengths.values())
    running = ",".join(
        f"""
                coalesce(base.{length}, 0)
                    + count(*) FILTER (fresh AND channel = {sql_literal(c)})
                        OVER (past ROWS UNBOUNDED PRECEDING) AS {length}"""
        for c, length in lengths.items()
    )
    # What a user did just before is needed by the recent atoms of the first new instant. Events of one
    # instant have no order of their own; channel and atom id make it reproducible.
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE events AS
        WITH just_before AS (
            SELECT user_id, b.channel, b.atom_id, b.event_timestamp
            FROM user_timeline b
            JOIN changed_users c USING (user_id)
            WHERE b.event_timestamp < c.since AND {part}
            QUALIFY row_number() OVER (
                PARTITION BY user_id ORDER BY b.event_timestamp DESC, b.channel DESC, b.atom_id DESC
            ) < {RECENT_ATOMS}
        ),
        base AS (
            SELECT user_id, {so_far}
            FROM timeline_length b
            JOIN changed_users c USING (user_id)
            WHERE b.event_timestamp < c.since AND {part}
            GROUP BY user_id
        )
        SELECT * EXCLUDE (fresh)
        FROM (
            SELECT
                e.user_id,
                channel,
                atom_id,
                event_timestamp,
                fresh,{running},
                list(atom_id) OVER (past ROWS {RECENT_ATOMS - 1} PRECEDING) AS recent_atoms,
                lead(event_timestamp) OVER past IS DISTINCT FROM event_timestamp AS last_of_instant
            FROM (
                SELECT user_id, channel, atom_id, event_timestamp, true AS fresh
                FROM ({events})
                WHERE {part}
                UNION ALL
                SELECT *, false FROM just_before
            ) e
            LEFT JOIN base ON e.user_id = base.user_id
            WINDOW past AS (PARTITION BY e.user_id ORDER BY event_timestamp, channel, atom_id)
        )
        WHERE fresh
        """
    )
    length_then = " ".join(f"WHEN {sql_literal(c)} THEN {length}" for c, length in lengths.items())
    replace_changed(
        connection,
        "user_timeline",
        f"""(
            SELECT
                user_id,
                channel,
                (CASE channel {length_then} END - 1)::BIGINT AS position,
                atom_id,
                event_timestamp
            FROM events
        )""",
        ("user_id", "channel", "position"),
        oldest,
    )
    replace_changed(
        connection,
        "timeline_length",
        f"""(
            SELECT user_id, event_timestamp, {listed_lengths}, recent_atoms
            FROM events
            WHERE last_of_instant
        )""",
        ("user_id", "event_timestamp"),
        oldest,
    )
