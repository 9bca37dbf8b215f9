"""Leaks in a training frame: what it says of the past is counted again from the log."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from bahe_lake.sql import known_until, sql_identifier, sql_literal
from validation.checks import (
    Check,
)

LEAK_SAMPLE = 2_000
"""Frame rows whose history lengths are counted again from the timelines."""


def history_leaks(channels: Sequence[str], freshness: str) -> list[Check]:
    """Count lengths again from the timelines: a behavior at or after the impression must not count."""
    lengths = [sql_identifier(f"length_{channel}") for channel in channels]
    counted = [sql_identifier(f"counted_{channel}") for channel in channels]
    counts = [
        f"count(t.user_id) FILTER (WHERE t.channel = {sql_literal(channel)}) AS {name}"
        for channel, name in zip(channels, counted, strict=True)
    ]
    columns = ["impression_id", "user_id", "event_timestamp", *lengths]
    sampled = ", ".join(f"s.{column}" for column in columns)
    source = f"""(
        SELECT {sampled}, {", ".join(counts)}
        FROM (
            SELECT {", ".join(columns)}
            FROM $frame
            ORDER BY hash(impression_id), impression_id
            LIMIT {LEAK_SAMPLE}
        ) s
        LEFT JOIN $user_timeline t
            ON t.user_id = s.user_id AND t.event_timestamp < {known_until(freshness, "s.event_timestamp")}
        GROUP BY {sampled}
    )"""
    return [
        Check(
            table="frame",
            column=f"length_{channel}",
            rule="must count the behaviors strictly before the impression "
            f"(sample of up to {LEAK_SAMPLE:,} rows)",
            source=source,
            counted=f"coalesce({length}, 0) <> {name}",
            example=("impression_id", "user_id", length, name),
            why="A longer history holds an event the model could not know; a shorter one loses it.",
        )
        for channel, length, name in zip(channels, lengths, counted, strict=True)
    ]


def label_leaks(columns: AbstractSet[str], freshness: str, label_time: str) -> list[Check]:
    """Count every row's statistics again, from what was shown and clicked strictly before its instant.

    `label_time` is SQL of the instant at which an impression's click is known.
    """
    windows, stored = [], []
    for entity in ("user", "item"):
        for kind in ("impressions", "clicks"):
            if f"{entity}_{kind}" in columns:
                stored.append(f"{entity}_{kind}")
                windows.append(
                    f"""
                    coalesce(sum({kind}) OVER (
                        PARTITION BY {entity}_id ORDER BY known
                        RANGE BETWEEN UNBOUNDED PRECEDING AND INTERVAL 1 MICROSECOND PRECEDING
                    ), 0) AS true_{entity}_{kind}"""
                )
    # Impressions stand at the instant whose past they see, clicks at that at which they are known. For the
    # start of an hour that counts right: what was shown before it stands at the start of an earlier one.
    same = ("user_id", "item_id", "event_timestamp", "clicked")
    both = ", ".join(("impression_id", *same))
    events = f"""
        SELECT {both}, 1 AS impressions, 0 AS clicks, {known_until(freshness, "event_timestamp")} AS known
        FROM $impressions
        UNION ALL
        SELECT {both}, 0 AS impressions, 1 AS clicks, {label_time} AS known
        FROM $impressions
        WHERE clicked = 1"""
    in_frame = ", ".join(f"f.{name}" for name in (*same, *stored))
    in_log = ", ".join(f"i.{name} AS log_{name}" for name in same)
    counted_again = ", ".join(f"i.true_{name}" for name in stored)
    source = f"""(
        SELECT f.impression_id, {in_frame}, {in_log}, {counted_again}
        FROM $frame f
        LEFT JOIN (
            SELECT * FROM (SELECT *, {", ".join(windows)} FROM ({events})) WHERE impressions = 1
        ) i USING (impression_id)
    )"""
    differs = " OR ".join(f"{name} IS DISTINCT FROM log_{name}" for name in same)
    checks = [
        Check(
            table="frame",
            column="impression_id",
            rule="must have the user, item, time and click of that row in impressions",
            source=source,
            counted=differs,
            example=("impression_id", *(f"log_{name}" for name in same)),
            why="A label beside the wrong features teaches the model noise.",
        )
    ]
    for name in stored:
        what = "clicks" if name.endswith("clicks") else "impressions"
        checks.append(
            Check(
                table="frame",
                column=name,
                rule=f"must count the {what} strictly before the impression",
                source=source,
                counted=f"coalesce({name}, 0) <> true_{name}",
                example=("impression_id", name, f"true_{name}"),
                why="A count that includes its own impression tells the model the answer.",
            )
        )
    return checks
