"""Behaviors by channel over the last days, of users and of items, as views of the lake.

A view is computed when it is asked for: it follows the log without being derived, takes no room, and is of
whatever snapshot is read. Of all time, a user's counts are the timeline lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

from bahe_lake.sql import sql_identifier, sql_literal

ENTITIES = ("user", "item")


def statements(channels: Sequence[str], days: Sequence[int]) -> list[str]:
    """SQL that makes the views `user_behaviors_7d`, `item_behaviors_7d` and so on; `item_behaviors` is
    of all time. Their columns are `user_behaviors_<channel>_7d` and so on."""
    windows = [_window(entity, channels, length) for entity in ENTITIES for length in days]
    return [*windows, _so_far("item", channels)]


def _so_far(entity: str, channels: Sequence[str]) -> str:
    counts = ",".join(
        f"""
            (sum(count(*) FILTER (channel = {sql_literal(channel)})) OVER past)::BIGINT
                AS {sql_identifier(f"{entity}_behaviors_{channel}")}"""
        for channel in channels
    )
    return f"""
        CREATE OR REPLACE VIEW {entity}_behaviors AS
        SELECT
            {entity}_id,
            event_timestamp,{counts}
        FROM behaviors
        WHERE {entity}_id IS NOT NULL
        GROUP BY {entity}_id, event_timestamp
        WINDOW past AS (PARTITION BY {entity}_id ORDER BY event_timestamp)
    """


def _window(entity: str, channels: Sequence[str], days: int) -> str:
    """A count changes when a behavior comes and, so many days later, when it leaves; each has its row, so
    that the row before a moment is right for that moment: it counts from exactly so many days before the
    moment, up to but without it."""
    length = f"INTERVAL '{days} days'"
    counts = ",".join(
        f"""
            (sum(count(*) FILTER (came AND channel = {sql_literal(channel)})) OVER recent)::BIGINT
                AS {sql_identifier(f"{entity}_behaviors_{channel}_{days}d")}"""
        for channel in channels
    )
    return f"""
        CREATE OR REPLACE VIEW {entity}_behaviors_{days}d AS
        SELECT
            {entity}_id,
            event_timestamp,{counts}
        FROM (
            SELECT {entity}_id, channel, event_timestamp, true AS came
            FROM behaviors
            WHERE {entity}_id IS NOT NULL
            UNION ALL
            SELECT {entity}_id, channel, event_timestamp + {length}, false
            FROM behaviors
            WHERE {entity}_id IS NOT NULL
        )
        GROUP BY {entity}_id, event_timestamp
        WINDOW recent AS (
            PARTITION BY {entity}_id
            ORDER BY event_timestamp
            RANGE BETWEEN {length} - INTERVAL 1 MICROSECOND PRECEDING AND CURRENT ROW
        )
    """
