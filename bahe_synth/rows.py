"""Rows of a synthetic log, a day and a chunk at a time, drawn from the planted world.

Shape letters: N rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
import pyarrow as pa

from bahe_synth.errands import KINDS, Errands
from bahe_synth.words import ITEM_SENTENCE, SENTENCES, STYLES, TOPICS, behavior_texts, compose
from bahe_synth.world import DAY_US, Indices, World, time_of_day

CHUNK = 500_000
"""Rows in memory at once."""

PAGE = 4
"""Behaviors of a session, and impressions of one visit, on average."""

CHANNEL_WEIGHTS = (0.3, 0.22, 0.18, 0.13, 0.1, 0.07)
"""Share of the behaviors in each channel, repeated when there are more."""

STAYS_ON_TOPIC = 0.7
"""Share of a session's behaviors that are about its topic."""

TARGETED = 0.4
"""Share of the impressions about a topic that the user is interested in; the others are of any topic."""

ERRAND_SHOWN = 0.3
"""Share of the impressions about the topic of a user's last errand, where errands are planted."""

LIKED_STYLE = 0.6
"""Share of a user's behaviors that are drawn in the style that the user likes; the others in any."""

_BEHAVIORS, _IMPRESSIONS = 1, 2
_TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a synthetic log is made of; kept in synth.json."""

    users: int = 1_000
    items: int = 500
    behaviors: int = 100_000
    """Over the first `days`; later days have as many each."""
    impressions: int = 50_000
    """Over the first `days`; later days have as many each."""
    channels: tuple[str, ...] = tuple(SENTENCES)
    atoms: int = 10_000
    """Distinct texts that behaviors can have; rare ones may never be drawn in a short log."""
    days: int = 30
    recency: float = 0.0
    order: float = 0.0
    combination: float = 0.0
    """Logits that errands of these kinds are worth (`bahe_synth.errands`); 0 plants none."""
    seed: int = 0
    start: str = "2024-01-01"
    format: str = "parquet"

    def world(self) -> World:
        """The planted world."""
        return World(
            seed=self.seed,
            users=self.users,
            items=self.items,
            atoms=self.atoms,
            channels=len(self.channels),
            days=self.days,
        )

    def errands(self) -> list[Errands]:
        """Those that are planted."""
        world = self.world()
        strengths = {kind: getattr(self, kind.name) for kind in KINDS}
        return [Errands(world, kind, logits) for kind, logits in strengths.items() if logits]

    def date(self, day: int) -> date:
        """The date of a day, counted from 0."""
        return date.fromisoformat(self.start) + timedelta(days=day)

    def midnight_us(self, day: int) -> int:
        """The first instant of a day, in microseconds since 1970."""
        return (self.date(day) - date(1970, 1, 1)).days * DAY_US

    def rows(self, total: int, day: int) -> range:
        """Row numbers of a day, in a table that has `total` rows over the first `days`, errands aside."""
        return range(total * day // self.days, total * (day + 1) // self.days)

    def chunks(self, total: int, day: int) -> int:
        """In how many parts a day is drawn."""
        return max(1, -(-len(self.rows(total, day)) // CHUNK))

    def errand_rows(self, day: int) -> int:
        """Behaviors of errands on a day, which come to those of `behaviors`."""
        return sum(len(errand.starters(day)) * errand.kind.length for errand in self.errands())


def behaviors(settings: Settings, day: int) -> Iterator[pa.Table]:
    """Chunks of a day's behaviors."""
    world, names = settings.world(), pa.array(settings.channels)
    weights = np.resize(CHANNEL_WEIGHTS, len(settings.channels))
    cumulative = np.cumsum(weights) / weights.sum()
    errands, chunks = settings.errands(), settings.chunks(settings.behaviors, day)
    for chunk, (rng, user_N, session_N, time_N) in enumerate(_sessions(settings, _BEHAVIORS, day)):
        first = np.unique(session_N, return_index=True)[1]
        topic_N = world.wanted_topics(rng, user_N[first], day)[session_N]
        off_topic = np.flatnonzero(rng.random(len(user_N)) >= STAYS_ON_TOPIC)
        topic_N[off_topic] = world.wanted_topics(rng, user_N[off_topic], day)
        style_N = _styles(rng, world, user_N)
        channel_N = np.searchsorted(cumulative[:-1], rng.random(len(user_N)), side="right")
        atom_N = world.atoms_of(rng, channel_N, topic_N, style_N)
        for errand in errands:
            theirs_N, in_channel_N, about_N, moment_N = errand.behaviors(day, chunk, chunks)
            atoms = world.atoms_of(rng, in_channel_N, about_N, _styles(rng, world, theirs_N))
            user_N, atom_N = np.concatenate((user_N, theirs_N)), np.concatenate((atom_N, atoms))
            channel_N = np.concatenate((channel_N, in_channel_N))
            time_N = np.concatenate((time_N, moment_N + settings.midnight_us(day)))
        order = np.argsort(time_N, kind="stable")
        distinct, place = np.unique(atom_N[order], return_inverse=True)
        texts = behavior_texts(settings.channels, *world.atom_kind(distinct))
        yield pa.table(
            {
                "user_id": world.user_ids(user_N[order]),
                "channel": names.take(pa.array(channel_N[order])),
                "text": texts.take(pa.array(place)),
                "event_timestamp": pa.array(time_N[order]).cast(_TIME),
            }
        )


def _styles(rng: np.random.Generator, world: World, user_N: Indices) -> Indices:
    """Styles [N] of what these users do, mostly those that they like."""
    style_N = (rng.random(len(user_N)) * len(STYLES)).astype(np.int64)
    return np.where(rng.random(len(user_N)) < LIKED_STYLE, world.user_style(user_N), style_N)


def impressions(settings: Settings, day: int) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Chunks of a day's impressions, each with the truth about its rows."""
    world = settings.world()
    number, errands = settings.rows(settings.impressions, day).start, settings.errands()
    for rng, user_N, _, time_N in _sessions(settings, _IMPRESSIONS, day):
        order = np.argsort(time_N, kind="stable")
        user_N, time_N = user_N[order], time_N[order]
        topic_N = (rng.random(len(user_N)) * len(TOPICS)).astype(np.int64)
        targeted = np.flatnonzero(rng.random(len(user_N)) < TARGETED)
        topic_N[targeted] = world.wanted_topics(rng, user_N[targeted], day)
        for errand in errands:
            about_N = errand.topics(user_N, day)
            meant_N = (rng.random(len(user_N)) < ERRAND_SHOWN / len(errands)) & (about_N >= 0)
            topic_N = np.where(meant_N, about_N, topic_N)
        item_N = world.shown_items(rng, topic_N, day)
        further_N = sum((errand.logit(user_N, topic_N, day) for errand in errands), np.zeros(len(user_N)))
        probability_N = world.click_probability(user_N, item_N, day, further_N)
        clicked = pa.array((rng.random(len(user_N)) < probability_N).astype(np.int8))
        ids = pa.array(np.arange(number, number + len(user_N)))
        number += len(user_N)
        log_columns = {
            "impression_id": ids,
            "user_id": world.user_ids(user_N),
            "item_id": world.item_ids(item_N),
            "event_timestamp": pa.array(time_N).cast(_TIME),
            "clicked": clicked,
        }
        truth_columns = {
            "impression_id": ids,
            "click_probability": probability_N,
            "item_appeal": world.item_appeal(item_N),
            "clicked": clicked,
        }
        yield pa.table(log_columns), pa.table(truth_columns)


def _sessions(
    settings: Settings, kind: int, day: int
) -> Iterator[tuple[np.random.Generator, Indices, Indices, Indices]]:
    """A day's rows, chunk by chunk (a share of the day each): generator; each row's user, session, time."""
    world = settings.world()
    total = settings.behaviors if kind == _BEHAVIORS else settings.impressions
    count, midnight = len(settings.rows(total, day)), settings.midnight_us(day)
    chunks = settings.chunks(total, day)
    for chunk in range(chunks):
        rng = np.random.Generator(np.random.PCG64([settings.seed, kind, day, chunk]))
        rows = count * (chunk + 1) // chunks - count * chunk // chunks
        # Session sizes are geometric and at least 1, so `rows` sessions are always enough.
        sizes = 1 + np.floor(np.log1p(-rng.random(rows)) / np.log1p(-1 / PAGE)).astype(np.int64)
        ends = np.minimum(np.cumsum(sizes), rows)
        sessions = int(np.searchsorted(ends, rows)) + 1
        begins = np.concatenate(([0], ends[: sessions - 1]))
        session_N = np.repeat(np.arange(sessions), ends[:sessions] - begins)
        user_N = world.active_users(rng, sessions, day)[session_N]
        session_start_N = time_of_day((chunk + rng.random(sessions)) / chunks)[session_N]
        # Half a minute between two events of a session, on average.
        elapsed_N = np.cumsum(-np.log1p(-rng.random(rows)) * 30e6)
        time_N = session_start_N + (elapsed_N - elapsed_N[begins][session_N]).astype(np.int64)
        late = time_N >= DAY_US
        time_N[late] = DAY_US - 1 - (rng.random(int(late.sum())) * 60e6).astype(np.int64)
        yield rng, user_N, session_N, time_N + midnight


def users(settings: Settings, day: int) -> Iterator[pa.Table]:
    """Users who become known on this day."""
    world = settings.world()
    for user_N, time_N in _newcomers(settings, day, settings.users, world.user_known_day):
        yield pa.table({"user_id": world.user_ids(user_N), "event_timestamp": pa.array(time_N).cast(_TIME)})


def items(settings: Settings, day: int) -> Iterator[pa.Table]:
    """Items that become known on this day."""
    world = settings.world()
    for item_N, time_N in _newcomers(settings, day, settings.items, world.item_known_day):
        topic_N, style_N = world.item_topic(item_N), world.item_style(item_N)
        yield pa.table(
            {
                "item_id": world.item_ids(item_N),
                "text": compose(ITEM_SENTENCE, topic_N, style_N, item_N // len(TOPICS)),
                "event_timestamp": pa.array(time_N).cast(_TIME),
            }
        )


def _newcomers(
    settings: Settings, day: int, total: int, known_day: Callable[[Indices], Indices]
) -> Iterator[tuple[Indices, Indices]]:
    """Who becomes known on this day, usable from the next, and when; day 0 has those known before, too."""
    for start in range(0, total, CHUNK):
        number_N = np.arange(start, min(start + CHUNK, total))
        known_N = known_day(number_N)
        is_new = np.maximum(known_N - 1, 0) == day
        number_N, known_N = number_N[is_new], known_N[is_new]
        if len(number_N):
            rng = np.random.Generator(np.random.PCG64([settings.seed, 3, day, start, total]))
            lead_us = 1 + (rng.random(len(number_N)) * (DAY_US - 1)).astype(np.int64)
            yield number_N, known_N * DAY_US - lead_us + settings.midnight_us(0)
