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
from datetime import datetime

import duckdb

from bahe_core.progress import progress
from bahe_lake.catalogue import columns, scalar, tables
from bahe_lake.sql import AT_ONCE, sql_identifier, sql_literal
from materialize.config.dataset import CLICKED_AT
from materialize.ingest import channel_windows

VERSION = 4
"""Raise when a derived table changes its meaning, so that existing lakes are derived again."""

PRIOR_STRENGTH = 10
"""How many average impressions a smoothed click rate starts with."""

WINDOW_DAYS = (7, 30)
"""Lengths of the windows that statistics are also kept over."""

RECENT_ATOMS = 20
"""How many of the latest atoms `timeline_length` carries inline, for services that want them."""

PART_ROWS = 2_000_000
"""Events that are derived from at once, about; 2 million take about 1 GB."""

_ALWAYS = "TIMESTAMPTZ '-infinity'"


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
            f"INSERT INTO changed_users SELECT user_id, {_ALWAYS} FROM behaviors GROUP BY user_id"
        )
        connection.execute(f"INSERT INTO changed_impressions SELECT {_ALWAYS} FROM impressions LIMIT 1")
    if scalar(connection, "SELECT count(*) FROM changed_users"):
        _timelines(connection, channels)
    if scalar(connection, "SELECT count(*) FROM changed_impressions"):
        _all_statistics(connection, label_time, end)


def log_end(connection: duckdb.DuckDBPyConnection, label_time: str) -> str:
    """SQL of the log's last instant, up to which anything is known."""
    clicks = f"UNION ALL SELECT {CLICKED_AT} FROM impressions" if CLICKED_AT in label_time else ""
    return _moment(
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
    for view in channel_windows.statements(channels, WINDOW_DAYS):
        connection.execute(view)


def _replace(
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


def _timelines(connection: duckdb.DuckDBPyConnection, channels: Sequence[str]) -> None:
    """`user_timeline` and `timeline_length` from each changed user's oldest new behavior on."""
    oldest = _moment(connection, "SELECT min(since) FROM changed_users")
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
    _replace(
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
    _replace(
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


def _all_statistics(connection: duckdb.DuckDBPyConnection, label_time: str, end: str | None) -> None:
    """Every statistic from the oldest new impression on."""
    since = _moment(connection, "SELECT min(since) FROM changed_impressions")
    connection.execute(f"CREATE OR REPLACE TEMP VIEW events AS {_events(label_time, end)}")
    before = connection.execute(
        f"""
        SELECT coalesce(sum(shown), 0), coalesce(sum(clicks), 0)
        FROM events
        WHERE event_timestamp < {since}
        """
    ).fetchone()
    assert before is not None
    impressions, clicks = before
    # Beside each event the log's own click rate so far: what a smoothed rate starts from, itself
    # point-in-time.
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE shown AS
        SELECT
            *,
            ({clicks} + sum(clicks) OVER past + 1) / ({impressions} + sum(shown) OVER past + 2) AS rate
        FROM events
        WHERE event_timestamp >= {since}
        WINDOW past AS (ORDER BY event_timestamp)
        """
    )
    for entity in ("user", "item"):
        parts = ranges(connection, "shown", f"{entity}_id")
        with progress(f"statistics of {entity}s", len(parts)) as advance:
            for part in parts:
                _statistics(connection, entity, part, since)
                for days in WINDOW_DAYS:
                    _window_statistics(connection, entity, part, since, days)
                advance()
    connection.execute("DROP TABLE temp.shown")
    connection.execute("DROP VIEW temp.events")
    connection.execute("DROP TABLE IF EXISTS temp.instants")


def _events(label_time: str, end: str | None) -> str:
    """SQL of what statistics count: impressions as they are shown, clicks as they are known.

    What is known only after the log's end waits for the ingest that brings later events.
    """
    if label_time == AT_ONCE:
        return """
            SELECT user_id, item_id, event_timestamp, 1 AS shown, clicked AS clicks
            FROM impressions"""
    return f"""
        SELECT user_id, item_id, event_timestamp, 1 AS shown, 0 AS clicks FROM impressions
        UNION ALL
        SELECT user_id, item_id, {label_time} AS event_timestamp, 0 AS shown, 1 AS clicks
        FROM impressions
        WHERE clicked = 1 AND {label_time} <= {end}"""


def _statistics(connection: duckdb.DuckDBPyConnection, entity: str, part: str, since: str) -> None:
    key, table = f"{entity}_id", f"{entity}_stats"
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE instants AS
        SELECT
            {key},
            event_timestamp,
            sum(shown)::BIGINT AS shown,
            sum(clicks)::BIGINT AS clicks,
            any_value(rate) AS rate
        FROM shown
        WHERE {part}
        GROUP BY {key}, event_timestamp
        """
    )
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE fresh AS
        WITH before AS (
            SELECT
                {key},
                max({entity}_impressions) AS shown,
                max({entity}_clicks) AS clicks,
                max({entity}_last_impression_us) AS shown_us
            FROM {table}
            WHERE event_timestamp < {since} AND {part}
            GROUP BY {key}
        )
        SELECT
            {key},
            event_timestamp,
            impressions AS {entity}_impressions,
            clicks AS {entity}_clicks,
            (clicks + {PRIOR_STRENGTH} * rate) / (impressions + {PRIOR_STRENGTH}) AS {entity}_click_rate,
            shown_us AS {entity}_last_impression_us
        FROM (
            SELECT
                i.{key},
                event_timestamp,
                rate,
                greatest(
                    b.shown_us,
                    max(epoch_us(event_timestamp)) FILTER (WHERE i.shown > 0) OVER past
                ) AS shown_us,
                (coalesce(b.shown, 0) + sum(i.shown) OVER past)::BIGINT AS impressions,
                (coalesce(b.clicks, 0) + sum(i.clicks) OVER past)::BIGINT AS clicks
            FROM instants i
            LEFT JOIN before b ON i.{key} = b.{key}
            WINDOW past AS (PARTITION BY i.{key} ORDER BY event_timestamp)
        )
        """
    )
    _replace(connection, table, "fresh", (key, "event_timestamp"), since)


def _window_statistics(
    connection: duckdb.DuckDBPyConnection, entity: str, part: str, since: str, days: int
) -> None:
    """Impressions, clicks and click rate of the days before a moment, the moment itself left out.

    A count changes when an impression comes and, so many days later, when it leaves; each has its row, so
    that the row before a moment is right for that moment. The rate starts from the log's click rate at the
    latest impression, so that a row depends on nothing that comes between.
    """
    key = f"{entity}_id"
    length = f"INTERVAL '{days} days'"
    came_before = ""
    if since != _ALWAYS:
        came_before = f"""
            UNION ALL
            SELECT {key}, event_timestamp, sum(shown), sum(clicks), NULL
            FROM events SEMI JOIN instants USING ({key})
            WHERE event_timestamp < {since} AND {part} AND event_timestamp >= {since} - {length}
            GROUP BY ALL"""
    # Without a rate there was no impression since then, and the row is what it was.
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE fresh AS
        WITH came AS (
            SELECT {key}, event_timestamp, shown, clicks, rate FROM instants{came_before}
        )
        SELECT
            {key},
            event_timestamp,
            impressions AS {entity}_impressions_{days}d,
            clicks AS {entity}_clicks_{days}d,
            (clicks + {PRIOR_STRENGTH} * rate) / (impressions + {PRIOR_STRENGTH})
                AS {entity}_click_rate_{days}d
        FROM (
            SELECT
                {key},
                event_timestamp,
                (sum(sum(shown)) OVER past)::BIGINT AS impressions,
                (sum(sum(clicks)) OVER past)::BIGINT AS clicks,
                last_value(max(rate) IGNORE NULLS) OVER past AS rate
            FROM (
                SELECT * FROM came
                UNION ALL
                SELECT {key}, event_timestamp + {length}, -shown, -clicks, NULL FROM came
            )
            GROUP BY {key}, event_timestamp
            WINDOW past AS (
                PARTITION BY {key} ORDER BY event_timestamp ROWS UNBOUNDED PRECEDING
            )
        )
        WHERE event_timestamp >= {since} AND rate IS NOT NULL
        """
    )
    _replace(connection, f"{entity}_stats_{days}d", "fresh", (key, "event_timestamp"), since)


def _moment(connection: duckdb.DuckDBPyConnection, query: str) -> str:
    """SQL of the moment that a query returns."""
    row = connection.execute(f"SELECT x, isinf(x) FROM ({query}) q(x)").fetchone()
    assert row is not None
    if row[1]:
        return _ALWAYS
    assert isinstance(row[0], datetime)
    return sql_literal(row[0])
