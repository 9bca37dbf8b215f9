"""Random logs that are told over several nights: late clicks, late behaviors, ties and edges of windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import pandas as pd

from tests.support.brute_force import (
    DAY_US,
    HOUR_US,
    SECOND_US,
    WINDOWS,
    Behavior,
    Identifier,
    Impression,
)
from tests.support.logs import WORDS

CHANNELS = ("seen", "bought", "searched")
START_US = 1_704_067_200 * SECOND_US
"""2024-01-01."""
NIGHTS = (37, 41, 46)
"""Days after START_US at whose start the log is told; what it tells of began before the longest window."""
DELAYS = {"0s": 0, "6h": 6 * HOUR_US, "2d": 2 * DAY_US}


@dataclass(frozen=True)
class Told:
    """The log as it is told on one night."""

    night: int
    """Microseconds since 1970."""
    impressions: list[Impression]
    behaviors: list[Behavior]


@dataclass(frozen=True)
class RandomLog:
    """One random log. The same seed makes the same log."""

    users: list[Identifier]
    items: list[int]
    delay: str
    """`impressions.label_delay`."""
    nights: list[Told]
    """Each tells all that is known by then."""
    whole_files: bool
    """Whether a night's files repeat what earlier ones said."""

    def tables(self, night: int) -> dict[str, pd.DataFrame]:
        """The files of a night."""
        told, before = self.nights[night], self.nights[night - 1] if night else None
        shown, done = told.impressions, told.behaviors
        if before is not None and not self.whole_files:
            said, did = set(before.impressions), set(before.behaviors)
            shown, done = [i for i in shown if i not in said], [b for b in done if b not in did]
        items = [f"{WORDS[item % len(WORDS)]} item" for item in self.items]
        return {
            "impressions": pd.DataFrame(
                {
                    "impression_id": [i.number for i in shown],
                    "user_id": [i.user for i in shown],
                    "item_id": [i.item for i in shown],
                    "event_timestamp": moments([i.shown for i in shown]),
                    "clicked": [int(i.clicked) for i in shown],
                    "clicked_timestamp": moments([i.clicked_at for i in shown]),
                }
            ),
            "behaviors": pd.DataFrame(
                {
                    "user_id": [b.user for b in done],
                    "channel": [b.channel for b in done],
                    "text": [b.text for b in done],
                    "event_timestamp": moments([b.time for b in done]),
                    "item_id": pd.Series([b.item for b in done], dtype="Int64"),
                }
            ),
            "items": pd.DataFrame(
                {
                    "item_id": self.items,
                    "text": items,
                    "event_timestamp": moments([START_US] * len(self.items)),
                }
            ),
        }


def moments(times: Sequence[int | None]) -> pd.Series:
    """Times in microseconds since 1970 as a column."""
    known: pd.Series = pd.Series(list(times), dtype="Int64").astype("datetime64[us]").dt.tz_localize("UTC")
    return known


def random_log(
    seed: int, users: int = 120, items: int = 60, impressions: int = 900, behaviors: int = 900
) -> RandomLog:
    """A log of some 46 days, told on the starts of three of them."""
    rng = Random(seed)
    delay = list(DELAYS)[seed % len(DELAYS)]
    starts = [START_US + day * DAY_US for day in NIGHTS]
    ids: list[Identifier] = [f"u{n}" if seed % 2 else n for n in range(users)]
    times = _Times(rng, starts, DELAYS[delay])
    shown = [_shown(rng, times, n, ids, items) for n in range(impressions)]
    done = [_done(rng, times, ids, items) for _ in range(behaviors)]
    told_from = {b: _heard(rng, starts, b.time) for b in done}
    nights = [
        Told(
            start,
            [one for versions in shown if (one := _as_told(versions, starts, night)) is not None],
            [b for b in dict.fromkeys(done) if told_from[b] <= night],
        )
        for night, start in enumerate(starts)
    ]
    return RandomLog(ids, list(range(items)), delay, nights, whole_files=rng.random() < 0.5)


Versions = list[tuple[int, Impression]]
"""From which night on the log tells it like that."""


class _Times:
    """Random times: starts of days and hours, windows apart from one another, and any."""

    def __init__(self, rng: Random, nights: Sequence[int], delay: int) -> None:
        self._rng, self.nights, self._delay = rng, nights, delay
        self._drawn = [START_US]

    def __call__(self) -> int:
        rng, last = self._rng, self.nights[-1]
        kind = rng.random()
        if kind < 0.3:
            time = START_US + rng.randrange(NIGHTS[-1]) * DAY_US + rng.choice([0, 0, 1, 13]) * HOUR_US
        elif kind < 0.5:
            time = rng.choice(self._drawn) + rng.choice([0, *WINDOWS]) * DAY_US
        else:
            time = rng.randrange(START_US, last)
        if kind < 0.5:
            time += rng.choice([-1, 0, 0, 1])
        time = self.off_the_edge(max(START_US, min(time, last - HOUR_US)))
        self._drawn.append(time)
        return time

    def off_the_edge(self, time: int) -> int:
        """The time, or a little later where it would leave a window in the second of a publish.

        What is published is as of a second after the moment of publishing; `bahe audit` is not.
        """
        edges = [night - days * DAY_US for night in self.nights for days in WINDOWS]
        while any(edge <= at <= edge + SECOND_US for edge in edges for at in (time, time + self._delay)):
            time += 2 * SECOND_US
        return time


def _shown(rng: Random, times: _Times, number: int, users: Sequence[Identifier], items: int) -> Versions:
    """An impression, not clicked, or clicked: told at once or late, with its time, without, or both."""
    starts = times.nights
    one = Impression(number, _often(rng, users), rng.randrange(items), times())
    # On the last night none is late: what late clicks change is not hidden by what late impressions do.
    on_time, first = _on_time(starts, one.shown), _heard(rng, starts, one.shown)
    first = on_time if first >= len(starts) - 1 else first
    if rng.random() < 0.55:
        return [(first, one)]
    later = rng.choice(
        [0, 1, 40 * SECOND_US, rng.randrange(12 * HOUR_US), rng.randrange(9 * DAY_US), DAY_US]
    )
    at = times.off_the_edge(one.shown + later)
    clicked = replace(one, clicked=True, clicked_at=at)
    told = max(first, _heard(rng, starts, at))
    if rng.random() < 0.3:  # its time is told later, or never
        versions = [(first, replace(one, clicked=True))]
        return [*versions, (max(told, first + 1), clicked)] if rng.random() < 0.5 else versions
    return [(told, clicked)] if told == first else [(first, one), (told, clicked)]


def _done(rng: Random, times: _Times, users: Sequence[Identifier], items: int) -> Behavior:
    text = rng.randrange(len(WORDS))  # says which item it is of, if any
    item = text % items if text % 3 else None
    channel = CHANNELS[0] if rng.random() < 0.6 else rng.choice(CHANNELS)
    return Behavior(_often(rng, users), channel, f"{WORDS[text]} {WORDS[text % 7]}", times(), item)


def _often(rng: Random, users: Sequence[Identifier]) -> Identifier:
    """Some users often, so that they have more than the last atoms hold; some hardly ever.

    What the log said last of one who hardly ever came may be all that it says, until it is corrected.
    """
    return users[int(len(users) * rng.random() ** 3)] if rng.random() < 0.8 else rng.choice(users)


def _heard(rng: Random, starts: Sequence[int], time: int) -> int:
    """The first night on which an event of this time is told: the next one, or late."""
    on_time = _on_time(starts, time)
    return on_time if rng.random() < 0.75 else on_time + rng.randrange(1, len(starts) + 1)


def _on_time(starts: Sequence[int], time: int) -> int:
    return sum(start <= time for start in starts)


def _as_told(versions: Versions, starts: Sequence[int], night: int) -> Impression | None:
    told = [one for since, one in versions if since <= night]
    return told[-1] if told else None
