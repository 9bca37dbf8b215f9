"""Impressions, clicks and smoothed click rates of users and items: so far, and over windows."""

from __future__ import annotations

import duckdb

from bahe_core.progress import progress
from bahe_lake.sql import AT_ONCE
from materialize.ingest.rewind import ALWAYS, moment, ranges, replace_changed

PRIOR_STRENGTH = 10
"""How many average impressions a smoothed click rate starts with."""

WINDOW_DAYS = (7, 30)
"""Lengths of the windows that statistics are also kept over."""


def log_rate(clicks: int, impressions: int) -> float:
    """Click rate of the log so far, which a smoothed rate starts from."""
    return (clicks + 1) / (impressions + 2)


def smoothed_rate(clicks: int, impressions: int, rate: float) -> float:
    """Click rate of a user or item, as far as it can be told; `rate` is the log's at its latest event.

    The arithmetic of the SQL below, for what comes one by one.
    """
    return (clicks + PRIOR_STRENGTH * rate) / (impressions + PRIOR_STRENGTH)


def rate_before(smoothed: float, clicks: int, impressions: int) -> float:
    """The log's rate that a smoothed one was made with."""
    return (smoothed * (impressions + PRIOR_STRENGTH) - clicks) / PRIOR_STRENGTH


def derive_statistics(connection: duckdb.DuckDBPyConnection, label_time: str, end: str | None) -> None:
    """Every statistic from the oldest new impression on."""
    since = moment(connection, "SELECT min(since) FROM changed_impressions")
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
    replace_changed(connection, table, "fresh", (key, "event_timestamp"), since)


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
    if since != ALWAYS:
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
    replace_changed(connection, f"{entity}_stats_{days}d", "fresh", (key, "event_timestamp"), since)
