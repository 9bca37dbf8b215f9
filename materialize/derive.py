"""What follows from the log by SQL alone: timelines, their lengths, and point-in-time statistics.

A row of a derived table says what was known *after* the events at its event_timestamp; the
point-in-time join takes only rows strictly before an impression, so nothing of the impression's own
moment is ever seen. Several events at one instant make one row.
"""

from __future__ import annotations

from materialize.lake import name, quoted

VERSION = 2
"""Raise when a derived table changes its meaning, so that existing lakes are derived again."""

PRIOR_STRENGTH = 10
"""How many average impressions a smoothed click rate starts with."""

WINDOW_DAYS = (7, 30)
"""Lengths of the windows that statistics are also kept over."""

RECENT_ATOMS = 20
"""How many of the latest atoms `timeline_length` carries inline, for services that want them."""


def statements(channels: list[str]) -> list[str]:
    """SQL that rebuilds every derived table from behaviors and impressions."""
    return [
        _timeline(),
        _lengths(channels),
        _click_prior(),
        _statistics("user"),
        _statistics("item"),
        *(_window_statistics(entity, days) for entity in ("user", "item") for days in WINDOW_DAYS),
        "DROP TABLE click_prior",
    ]


def _timeline() -> str:
    # Events of one instant have no order of their own; the atom id makes the order reproducible.
    return (
        "CREATE OR REPLACE TABLE user_timeline AS SELECT user_id, channel,"
        " (row_number() OVER (PARTITION BY user_id, channel ORDER BY event_timestamp, atom_id) - 1)"
        "::BIGINT AS position, atom_id, event_timestamp"
        " FROM behaviors ORDER BY user_id, channel, position"
    )


def _lengths(channels: list[str]) -> str:
    now = [f"count(*) FILTER (channel = {quoted(c)}) AS {name('now_' + c)}" for c in channels]
    so_far = [f"(sum({name('now_' + c)}) OVER past)::BIGINT AS {name('length_' + c)}" for c in channels]
    return (
        f"CREATE OR REPLACE TABLE timeline_length AS SELECT user_id, event_timestamp, {', '.join(so_far)},"
        # Each instant has at least one behavior, so this many instants are enough.
        f" flatten(list(atoms) OVER (past ROWS {RECENT_ATOMS - 1} PRECEDING))[-{RECENT_ATOMS}:]"
        " AS recent_atoms,"
        " now() AS created_timestamp"
        f" FROM (SELECT user_id, event_timestamp, {', '.join(now)},"
        " list(atom_id ORDER BY channel, atom_id) AS atoms"
        " FROM behaviors GROUP BY user_id, event_timestamp)"
        " WINDOW past AS (PARTITION BY user_id ORDER BY event_timestamp)"
        " ORDER BY user_id, event_timestamp"
    )


def _click_prior() -> str:
    """The log's own click rate so far: what a smoothed rate starts from, itself point-in-time."""
    return (
        "CREATE OR REPLACE TABLE click_prior AS SELECT event_timestamp,"
        " (sum(clicks) OVER past + 1) / (sum(impressions) OVER past + 2) AS rate"
        " FROM (SELECT event_timestamp, count(*) AS impressions, sum(clicked) AS clicks"
        " FROM impressions GROUP BY event_timestamp)"
        " WINDOW past AS (ORDER BY event_timestamp)"
    )


def _statistics(entity: str) -> str:
    return (
        f"CREATE OR REPLACE TABLE {entity}_stats AS"
        f" SELECT {entity}_id, event_timestamp,"
        f" impressions AS {entity}_impressions, clicks AS {entity}_clicks,"
        f" (clicks + {PRIOR_STRENGTH} * rate) / (impressions + {PRIOR_STRENGTH})"
        f" AS {entity}_click_rate,"
        f" epoch_us(event_timestamp) AS {entity}_last_impression_us,"
        " now() AS created_timestamp"
        f" FROM (SELECT {entity}_id, event_timestamp,"
        " (sum(count(*)) OVER past)::BIGINT AS impressions,"
        " (sum(sum(clicked)) OVER past)::BIGINT AS clicks"
        f" FROM impressions GROUP BY {entity}_id, event_timestamp"
        f" WINDOW past AS (PARTITION BY {entity}_id ORDER BY event_timestamp))"
        f" JOIN click_prior USING (event_timestamp) ORDER BY {entity}_id, event_timestamp"
    )


def _window_statistics(entity: str, days: int) -> str:
    """Impressions, clicks and click rate of the days before a moment, the moment itself left out.

    A count changes when an impression comes and, so many days later, when it leaves; each has its row, so
    that the row before a moment is right for that moment.
    """
    # An impression that is exactly so old at a row's instant leaves with this row.
    window = f"RANGE BETWEEN INTERVAL '{days} days' - INTERVAL 1 MICROSECOND PRECEDING AND CURRENT ROW"
    return (
        f"CREATE OR REPLACE TABLE {entity}_stats_{days}d AS"
        f" SELECT {entity}_id, s.event_timestamp,"
        f" impressions AS {entity}_impressions_{days}d, clicks AS {entity}_clicks_{days}d,"
        f" (clicks + {PRIOR_STRENGTH} * rate) / (impressions + {PRIOR_STRENGTH})"
        f" AS {entity}_click_rate_{days}d,"
        " now() AS created_timestamp"
        f" FROM (SELECT {entity}_id, event_timestamp,"
        " (sum(sum(shown)) OVER past)::BIGINT AS impressions,"
        " (sum(sum(clicked)) OVER past)::BIGINT AS clicks"
        f" FROM (SELECT {entity}_id, event_timestamp, 1 AS shown, clicked FROM impressions UNION ALL"
        f" SELECT {entity}_id, event_timestamp + INTERVAL '{days} days', 0, 0 FROM impressions)"
        f" GROUP BY {entity}_id, event_timestamp"
        f" WINDOW past AS (PARTITION BY {entity}_id ORDER BY event_timestamp {window})) s"
        f" ASOF JOIN click_prior p ON s.event_timestamp >= p.event_timestamp"
        f" ORDER BY {entity}_id, s.event_timestamp"
    )
