"""SQL as text: quoting, and the instant whose past an impression sees. Imports nothing heavy."""

from __future__ import annotations

from datetime import UTC, datetime


def sql_literal(value: str | int | float | datetime) -> str:
    """The SQL literal of a string, a number or a time (UTC where it names no zone)."""
    if isinstance(value, datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        return f"TIMESTAMPTZ '{aware.isoformat()}'"
    if isinstance(value, (int, float)):
        return str(value)
    return "'" + value.replace("'", "''") + "'"


def sql_identifier(identifier: str) -> str:
    """A SQL identifier."""
    return '"' + identifier.replace('"', '""') + '"'


AT_ONCE = "event_timestamp"
"""The label time of a log whose clicks are known as soon as an impression is shown.

A label time is SQL, over impressions, of the instant at which an impression's click is known.
"""


def old_enough(label_delay_us: int, impressions: str = "impressions") -> str:
    """SQL of the impressions that are older than the label delay at the log's last impression."""
    if not label_delay_us:
        return impressions
    return f"""(
        SELECT *
        FROM {impressions}
        WHERE event_timestamp <= (SELECT max(event_timestamp) FROM {impressions})
            - to_microseconds({label_delay_us})
    )"""


def known_until(freshness: str, time: str) -> str:
    """SQL of the instant whose past is known to an impression at `time` (a SQL expression).

    `freshness` says how often what serving reads is renewed: live, hourly, nightly, or nightly at a time of
    day (UTC) as `nightly 02:30`; frames of version 0.1 say event and daily.
    """
    how_often, _, at = freshness.partition(" ")
    unit = {"live": None, "event": None, "hourly": "hour", "nightly": "day", "daily": "day"}[how_often]
    if not at:
        return time if unit is None else f"date_trunc('{unit}', {time})"
    return f"date_trunc('day', {time} - INTERVAL '{at}') + INTERVAL '{at}'"
