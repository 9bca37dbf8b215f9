"""Behaviors by channel, so far and over the last days, of users, of items and of pairs of both, as views of
the lake.

A view is computed when it is asked for: it follows the log without being derived, takes no room, and is of
whatever snapshot is read. Of all time, a user's counts are the timeline lengths. Pairs are those that
occurred: what a user did with an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bahe_lake.sql import sql_identifier, sql_literal

PAIR_DAYS = (7, 30, 90)
"""Lengths of the windows of pairs: people come back to a thing more slowly than to a shop."""

PAIR_FIRST, PAIR_LAST = "pair_first_us", "pair_last_us"
"""Columns: when the user first and last did something with the item."""


@dataclass(frozen=True)
class _Counted:
    """Whose behaviors are counted."""

    keys: tuple[str, ...]
    prefix: str
    """Of the columns' names."""
    view: str
    events: str
    """SQL of the keys, channel and event_timestamp of each behavior."""
    by_channel: bool = True
    """Whether each channel is counted by itself, or all together."""


_OF_PAIRS = """
    SELECT user_id, item_id, channel, event_timestamp
    FROM behaviors
    SEMI JOIN items USING (item_id)
    UNION ALL
    SELECT b.user_id, i.item_id, b.channel, greatest(b.event_timestamp, i.since)
    FROM behaviors b
    JOIN atoms a USING (atom_id)
    JOIN (
        SELECT item_id, text, min(event_timestamp) AS since FROM items GROUP BY item_id, text
    ) i ON i.text = a.text
    WHERE b.item_id IS NULL"""
"""A behavior is with the item that it names, or, where it names none, with every item of its very text,
from when the item has it on.

What is no item is shown to nobody."""

_USER, _ITEM = (
    _Counted(
        (f"{entity}_id",),
        f"{entity}_behaviors",
        f"{entity}_behaviors",
        f"SELECT {entity}_id, channel, event_timestamp FROM behaviors WHERE {entity}_id IS NOT NULL",
    )
    for entity in ("user", "item")
)
# Two views, so that who does without channels keeps few numbers of each pair online.
_PAIR = _Counted(
    ("user_id", "item_id"), "pair_behaviors", "user_item_behaviors", _OF_PAIRS, by_channel=False
)
_PAIR_BY_CHANNEL = _Counted(("user_id", "item_id"), "pair_behaviors", "user_item_channels", _OF_PAIRS)


def statements(channels: Sequence[str], days: Sequence[int]) -> list[str]:
    """SQL that makes the views `user_behaviors_7d`, `item_behaviors_7d`, `user_item_behaviors_7d`, ….

    `item_behaviors`, `user_item_behaviors` and `user_item_channels` are of all time. Columns are
    `user_behaviors_<channel>_7d`, …; of pairs `pair_behaviors_7d` and `pair_behaviors_<channel>_7d`.
    """
    windows = [_window(counted, channels, length) for counted in (_USER, _ITEM) for length in days]
    pairs = (_PAIR, _PAIR_BY_CHANNEL)
    windows += [_window(counted, channels, length) for counted in pairs for length in PAIR_DAYS]
    return [*windows, *(_so_far(counted, channels) for counted in (_ITEM, *pairs))]


def pair_counts(channels: Sequence[str]) -> dict[str, str | None]:
    """The columns of the views of pairs that count, each with its channel; None: behaviors of all."""
    spans = ["", *(f"_{days}d" for days in PAIR_DAYS)]
    endings: dict[str, str | None] = {"": None, **{f"_{channel}": channel for channel in channels}}
    return {f"pair_behaviors{ending}{span}": one for ending, one in endings.items() for span in spans}


def _so_far(counted: _Counted, channels: Sequence[str]) -> str:
    columns = [
        f"(sum({_of_instant(where)}) OVER past)::BIGINT AS {sql_identifier(counted.prefix + ending)}"
        for ending, where in _counts(counted, channels).items()
    ]
    if not counted.by_channel:  # the row of an instant is of its own behaviors too
        columns += [
            f"min(epoch_us(event_timestamp)) OVER past AS {PAIR_FIRST}",
            f"epoch_us(event_timestamp) AS {PAIR_LAST}",
        ]
    return _view(counted, counted.view, columns, f"SELECT *, 1 AS change FROM ({counted.events})")


def _window(counted: _Counted, channels: Sequence[str], days: int) -> str:
    """A count changes when a behavior comes and, so many days later, when it leaves; each has its row, so
    that the row before a moment is right for that moment: it counts from exactly so many days before the
    moment, up to but without it."""
    columns = [
        f"(sum({_of_instant(where)}) OVER past)::BIGINT"
        f" AS {sql_identifier(f'{counted.prefix}{ending}_{days}d')}"
        for ending, where in _counts(counted, channels).items()
    ]
    left = f"event_timestamp + INTERVAL '{days} days' AS event_timestamp"
    changes = f"""
            SELECT *, 1 AS change FROM ({counted.events})
            UNION ALL
            SELECT * REPLACE ({left}), -1 FROM ({counted.events})"""
    return _view(counted, f"{counted.view}_{days}d", columns, changes)


def _view(counted: _Counted, name: str, columns: Sequence[str], changes: str) -> str:
    """Of the keys, event_timestamp and columns after each instant at which something changes."""
    keys = ", ".join(counted.keys)
    return f"""
        CREATE OR REPLACE VIEW {name} AS
        SELECT {keys}, event_timestamp, {", ".join(columns)}
        FROM ({changes})
        GROUP BY {keys}, event_timestamp
        WINDOW past AS (PARTITION BY {keys} ORDER BY event_timestamp)
    """


def _of_instant(where: str | None) -> str:
    """SQL of how much one instant changes a count."""
    return "sum(change)" if where is None else f"coalesce(sum(change) FILTER ({where}), 0)"


def _counts(counted: _Counted, channels: Sequence[str]) -> dict[str, str | None]:
    """Endings of the columns' names, each with what it counts; None: everything."""
    if not counted.by_channel:
        return {"": None}
    return {f"_{channel}": f"channel = {sql_literal(channel)}" for channel in channels}
