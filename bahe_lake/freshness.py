"""How fresh the features are that serving reads, as SQL of the instant up to which they know the past."""

from __future__ import annotations


def moment(freshness: str, time: str) -> str:
    """SQL of the instant whose past is known to an impression at `time` (event, hourly, daily)."""
    unit = {"event": None, "hourly": "hour", "daily": "day"}[freshness]
    return time if unit is None else f"date_trunc('{unit}', {time})"
