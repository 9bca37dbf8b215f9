"""Counts of behaviors, so far and over the last days, as queries over the lake: of users, of items and of
pairs of both, by channel and in all; and of users with the items that share a column (a category).

A query is computed when it is asked for: it follows the log without being derived, takes no room, and is of
whatever snapshot is read. Of all time, a user's counts are the timeline lengths. Pairs are those that
occurred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bahe_lake.sql import sql_identifier, sql_literal

PAIR_DAYS = (7, 30, 90)
"""Lengths of the windows of pairs: people come back to a thing more slowly than to a shop."""
SPANS = ("", *(f"_{days}d" for days in PAIR_DAYS))
"""Endings of the names of what is counted of pairs: so far, and in each window."""
PAIR = "pair"
"""How the columns' names of what is counted of pairs begin."""
_CHANGE = '"change of count"'
"""A name that no column by which is counted has."""


@dataclass(frozen=True)
class _Counted:
    """Whose behaviors are counted."""

    keys: tuple[str, ...]
    of: str
    """Who, or with what, as the columns' names begin."""
    view: str
    events: str
    """SQL of the keys and event_timestamp of each behavior, and its channel where that is counted by."""
    by_channel: bool = True
    """Whether each channel is counted by itself, or all together, with when the first and last was."""

    @property
    def prefix(self) -> str:
        """Of the names of the columns that count."""
        return f"{self.of}_behaviors"


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

_OF_COLUMN = """
    WITH versions AS (
        SELECT
            item_id,
            text,
            {column} AS value,
            event_timestamp AS since,
            lag(event_timestamp) OVER (PARTITION BY item_id ORDER BY event_timestamp) IS NULL AS first
        FROM lake.main.items {at}
    )
    SELECT
        b.user_id,
        v.value AS {column},
        greatest(b.event_timestamp, v.since) AS event_timestamp
    FROM (SELECT * FROM lake.main.behaviors {at}) b
    ASOF JOIN versions v
        ON v.item_id = b.item_id
        AND CASE WHEN v.first THEN '-infinity' ELSE v.since END <= b.event_timestamp
    WHERE v.value IS NOT NULL
    UNION ALL
    SELECT b.user_id, v.value, greatest(b.event_timestamp, v.since)
    FROM (SELECT * FROM lake.main.behaviors {at}) b
    JOIN (SELECT * FROM lake.main.atoms {at}) a USING (atom_id)
    JOIN (
        SELECT text, value, min(since) AS since FROM versions WHERE value IS NOT NULL GROUP BY text, value
    ) v ON v.text = a.text
    WHERE b.item_id IS NULL"""
"""A behavior is with the value that its item had then, or had first, from when that is known. Where it
names no item, with each value that items of its very text have."""

_USER, _ITEM = (
    _Counted(
        (f"{entity}_id",),
        entity,
        f"{entity}_behaviors",
        f"SELECT {entity}_id, channel, event_timestamp FROM behaviors WHERE {entity}_id IS NOT NULL",
    )
    for entity in ("user", "item")
)
# Two views, so that who does without channels keeps few numbers of each pair online.
_PAIR = _Counted(("user_id", "item_id"), PAIR, "user_item_behaviors", _OF_PAIRS, by_channel=False)
_PAIR_BY_CHANNEL = _Counted(("user_id", "item_id"), PAIR, "user_item_channels", _OF_PAIRS)


def statements(channels: Sequence[str], days: Sequence[int]) -> list[str]:
    """SQL that makes the views `user_behaviors_7d`, `item_behaviors_7d`, `user_item_behaviors_7d`, ….

    `item_behaviors`, `user_item_behaviors` and `user_item_channels` are of all time. Columns are
    `user_behaviors_<channel>_7d`, …; of pairs `pair_behaviors_7d` and `pair_behaviors_<channel>_7d`.
    """
    views = {f"{one.view}_{n}d": _window(one, channels, n) for one in (_USER, _ITEM) for n in days}
    pairs = (_PAIR, _PAIR_BY_CHANNEL)
    views |= {f"{one.view}_{n}d": _window(one, channels, n) for one in pairs for n in PAIR_DAYS}
    views |= {one.view: _so_far(one, channels) for one in (_ITEM, *pairs)}
    return [f"CREATE OR REPLACE VIEW {name} AS {query}" for name, query in views.items()]


def with_items_of_a_column(column: str, span: str, as_of: int | None = None) -> str:
    """SQL of what users did with the items that share a column, so far or in a window (one of SPANS).

    By user_id and column: `<column>_behaviors<span>`, and of all time `<column>_first_us` and
    `<column>_last_us`. `as_of` reads the tables of that snapshot of the lake.
    """
    at = "" if as_of is None else f"AT (VERSION => {as_of})"
    events = _OF_COLUMN.format(column=sql_identifier(column), at=at)
    counted = _Counted(("user_id", column), column, "", events, by_channel=False)
    return _window(counted, (), PAIR_DAYS[SPANS.index(span) - 1]) if span else _so_far(counted, ())


def counts_with(of: str, channels: Sequence[str]) -> dict[str, str | None]:
    """The columns that may count what a user did with an item (PAIR) or with those that share a column.

    Each with its channel; None: behaviors of all.
    """
    endings: dict[str, str | None] = {"": None, **{f"_{channel}": channel for channel in channels}}
    return {f"{of}_behaviors{ending}{span}": one for ending, one in endings.items() for span in SPANS}


def first_and_last(of: str) -> tuple[str, str]:
    """The columns of when a user first and last did something with them."""
    return f"{of}_first_us", f"{of}_last_us"


def _so_far(counted: _Counted, channels: Sequence[str]) -> str:
    columns = [
        f"(sum({_of_instant(where)}) OVER past)::BIGINT AS {sql_identifier(counted.prefix + ending)}"
        for ending, where in _counts(counted, channels).items()
    ]
    if not counted.by_channel:  # the row of an instant is of its own behaviors too
        first, last = map(sql_identifier, first_and_last(counted.of))
        columns += [
            f"min(epoch_us(event_timestamp)) OVER past AS {first}",
            f"epoch_us(event_timestamp) AS {last}",
        ]
    return _after_each_change(counted, columns, f"SELECT *, 1 AS {_CHANGE} FROM ({counted.events})")


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
            SELECT *, 1 AS {_CHANGE} FROM ({counted.events})
            UNION ALL
            SELECT * REPLACE ({left}), -1 FROM ({counted.events})"""
    return _after_each_change(counted, columns, changes)


def _after_each_change(counted: _Counted, columns: Sequence[str], changes: str) -> str:
    """SQL of the keys, event_timestamp and columns after each instant at which something changes."""
    keys = ", ".join(map(sql_identifier, counted.keys))
    return f"""
        SELECT {keys}, event_timestamp, {", ".join(columns)}
        FROM ({changes})
        GROUP BY {keys}, event_timestamp
        WINDOW past AS (PARTITION BY {keys} ORDER BY event_timestamp)
    """


def _of_instant(where: str | None) -> str:
    """SQL of how much one instant changes a count."""
    return f"sum({_CHANGE})" if where is None else f"coalesce(sum({_CHANGE}) FILTER ({where}), 0)"


def _counts(counted: _Counted, channels: Sequence[str]) -> dict[str, str | None]:
    """Endings of the columns' names, each with what it counts; None: everything."""
    if not counted.by_channel:
        return {"": None}
    return {f"_{channel}": f"channel = {sql_literal(channel)}" for channel in channels}
