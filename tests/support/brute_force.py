"""What is known of users and items just before a moment, counted in plain Python from the log's own rows.

Written from the definitions, not from the SQL: an event counts for a moment when it is strictly before it,
and for a window of days when it is also not more than so many days before. A click counts from when it is
known: its time, else the impression's time and the label delay, unless that is after the log's end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SECOND_US = 1_000_000
HOUR_US = 3600 * SECOND_US
DAY_US = 24 * HOUR_US
WINDOWS = (7, 30)
AVERAGE_IMPRESSIONS = 10
"""How many average impressions a smoothed click rate starts with."""
LAST_ATOMS = 20

Values = dict[str, Any]
Identifier = str | int


@dataclass(frozen=True)
class Impression:
    """An impression as the log tells it at some time, in microseconds since 1970."""

    number: int
    user: Identifier
    item: Identifier
    shown: int
    clicked: bool = False
    clicked_at: int | None = None


@dataclass(frozen=True)
class Behavior:
    """A behavior; two that are equal are one."""

    user: Identifier
    channel: str
    text: str
    time: int
    item: Identifier | None


def cut_of(freshness: str, time: int) -> int:
    """The moment before which everything is known to an impression of this time."""
    unit = {"live": 1, "hourly": HOUR_US, "nightly": DAY_US}[freshness]
    return time - time % unit


class BruteForce:
    """Features of users and items, by name as Feast calls them, from a log as it is told at some time."""

    def __init__(
        self,
        impressions: Sequence[Impression],
        behaviors: Sequence[Behavior],
        channels: Sequence[str],
        label_delay: int,
        atom_ids: Mapping[tuple[str, str], int],
    ) -> None:
        """`atom_ids` names the atom of a channel and a text."""
        self._channels, self._atom_ids = channels, atom_ids
        times = [i.shown for i in impressions] + [b.time for b in behaviors]
        self._end = max(times + [i.clicked_at for i in impressions if i.clicked_at is not None])
        self._shown: dict[tuple[str, Identifier], list[int]] = defaultdict(list)
        self._known: dict[tuple[str, Identifier], list[int]] = defaultdict(list)
        self._done: dict[tuple[str, Identifier], list[Behavior]] = defaultdict(list)
        self._all_shown = sorted(i.shown for i in impressions)
        all_known = []
        for one in impressions:
            keys = (("user", one.user), ("item", one.item))
            for key in keys:
                self._shown[key].append(one.shown)
            if one.clicked:
                known = one.shown + label_delay if one.clicked_at is None else one.clicked_at
                if known <= self._end:
                    all_known.append(known)
                    for key in keys:
                        self._known[key].append(known)
        self._all_known = sorted(all_known)
        for behavior in set(behaviors):
            self._done["user", behavior.user].append(behavior)
            if behavior.item is not None:
                self._done["item", behavior.item].append(behavior)

    def user(self, user: Identifier, cut: int) -> Values:
        """Everything about a user before the cut."""
        past = [b for b in self._done["user", user] if b.time < cut]
        values = {**self._statistics("user", user, cut), **self._windows("user", user, cut)}
        for channel in self._channels:
            values[f"length_{channel}"] = sum(b.channel == channel for b in past) if past else None
        # Behaviors of one instant are in the order of their channels and atoms.
        order = sorted((b.time, b.channel, self._atom_ids[b.channel, b.text]) for b in past)
        values["recent_atoms"] = [atom for *_, atom in order[-LAST_ATOMS:]] if past else None
        return values

    def item(self, item: Identifier, cut: int) -> Values:
        """Everything about an item before the cut."""
        past = [b for b in self._done["item", item] if b.time < cut]
        values = {**self._statistics("item", item, cut), **self._windows("item", item, cut)}
        for channel in self._channels:
            values[f"item_behaviors_{channel}"] = sum(b.channel == channel for b in past) if past else None
        return values

    def _statistics(self, entity: str, key: Identifier, cut: int) -> Values:
        shown = [t for t in self._shown[entity, key] if t < cut]
        known = [t for t in self._known[entity, key] if t < cut]
        values: Values = {f"{entity}_last_impression_us": max(shown) if shown else None}
        # What all impressions have been clicked at, when this one's was last heard of.
        average = 0.0
        if shown:
            heard = max(shown + known)
            clicks, impressions = bisect_right(self._all_known, heard), bisect_right(self._all_shown, heard)
            average = (clicks + 1) / (impressions + 2)
        for days in (None, *WINDOWS):
            since = 0 if days is None else cut - days * DAY_US
            suffix = "" if days is None else f"_{days}d"
            impressions, clicks = sum(t >= since for t in shown), sum(t >= since for t in known)
            rate = (clicks + AVERAGE_IMPRESSIONS * average) / (impressions + AVERAGE_IMPRESSIONS)
            counted = {"impressions": impressions, "clicks": clicks, "click_rate": rate}
            for name, value in counted.items():
                values[f"{entity}_{name}{suffix}"] = value if shown else None
        return values

    def _windows(self, entity: str, key: Identifier, cut: int) -> Values:
        past = [b for b in self._done[entity, key] if b.time < cut]
        return {
            f"{entity}_behaviors_{channel}_{days}d": sum(
                b.channel == channel and b.time >= cut - days * DAY_US for b in past
            )
            if past
            else None
            for channel in self._channels
            for days in WINDOWS
        }
