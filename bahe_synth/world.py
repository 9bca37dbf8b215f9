"""The planted world of a synthetic log: who likes what, when, and how likely a click is.

Every fact about a user, an item or an atom is a hash of the seed and its number, computed on demand:
nothing is kept per user, and a day can be drawn without the days before it.

Shape letters: N rows, S sessions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bahe_synth.words import STYLES, TOPICS

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DAY_US = 86_400_000_000

SLOT_WEIGHTS = (0.5, 0.25, 0.15)
"""Share of a user's activity on each of three favourite topics; the rest is on any topic."""

SLOT_DAYS = (None, 28, 7)
"""After how many days a favourite topic is replaced by another; the first one stays."""

KNOWN_AT_START = 0.8
"""Share of users and items that are known before the first day; the others arrive day by day."""

INTERCEPT, TOPIC_EFFECT, STYLE_EFFECT = -2.2, 4.0, 1.0
APPEAL_SPREAD, TENDENCY_SPREAD = 0.5, 0.5
"""Logits of a click: intercept, a topic that is all of a user's interest, the user's style; standard
deviations of an item's appeal to everyone and of a user's tendency to click."""

_USER, _ITEM = 1, 2
_HOURLY = np.array([2, 1, 1, 1, 1, 2, 4, 6, 7, 6, 6, 7, 9, 8, 6, 6, 6, 7, 9, 11, 12, 11, 8, 4], dtype=float)


def hashed(seed: int, *parts: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """64 random bits that are a function of the parts (integers, broadcast); splitmix64 for each part."""
    with np.errstate(over="ignore"):
        state = np.asarray(seed % 2**64, dtype=np.uint64)
        for part in parts:
            state = state ^ np.asarray(part, dtype=np.int64).astype(np.uint64)
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(seed: int, *parts: npt.ArrayLike) -> Floats:
    """A number in [0, 1) that is a function of the parts."""
    return (hashed(seed, *parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _picked(count: int, seed: int, *parts: npt.ArrayLike) -> Indices:
    """One of 0..count-1 that is a function of the parts."""
    return (hashed(seed, *parts) % np.uint64(count)).astype(np.int64)


def zipf_rank(uniform_N: Floats, size_N: npt.ArrayLike) -> Indices:
    """Ranks below `size`, rank k with probability log((k+2)/(k+1)) / log(size+1): Zipf's law."""
    size = np.asarray(size_N, dtype=np.float64)
    rank_N: Floats = np.minimum((size + 1.0) ** uniform_N - 1.0, size - 1.0)
    return rank_N.astype(np.int64)


def time_of_day(quantile_N: Floats) -> Indices:
    """Microseconds after midnight, UTC: quiet at night, busiest in the evening."""
    cumulative = np.concatenate(([0.0], np.cumsum(_HOURLY) / _HOURLY.sum()))
    hour_N: Floats = np.interp(quantile_N, cumulative, np.arange(25.0))
    return (hour_N / 24 * (DAY_US - 1)).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class World:
    """Users, items and atoms of a seed. Users and items are numbered by popularity, from 0."""

    seed: int
    users: int
    items: int
    atoms: int
    channels: int
    days: int
    """Days over which users and items arrive."""

    # -- users

    def user_ids(self, user_N: Indices) -> Indices:
        """Ids from 1; the order of popularity does not show in them."""
        return _scattered(user_N, self.users)

    def user_known_day(self, user_N: Indices) -> Indices:
        """The first day whose events may name the user."""
        return self._known_day(_USER, user_N, always=1)

    def active_users(self, rng: np.random.Generator, count: int, day: int) -> Indices:
        """The users of `count` sessions of a day [S]: some are far more active than others."""
        users = np.empty(0, dtype=np.int64)
        while len(users) < count:
            # Density falls with rank to the power of -1/3: the most active of a million has 1 in 10,000.
            drawn = (self.users * rng.random(count + count // 3 + 8) ** 1.5).astype(np.int64)
            users = np.concatenate((users, drawn[self.user_known_day(drawn) <= day]))
        return users[:count]

    def favourites(self, user_N: Indices, day: int) -> list[Indices]:
        """Each slot's favourite topic [N] of users on a day; they drift."""
        topics = []
        for slot, period in enumerate(SLOT_DAYS):
            epoch: npt.ArrayLike = 0
            if period is not None:
                epoch = (
                    day + (hashed(self.seed, _USER, 1, slot, user_N) % period).astype(np.int64)
                ) // period
            pick = hashed(self.seed, _USER, 2, slot, user_N, epoch) % len(TOPICS)
            topics.append(pick.astype(np.int64))
        return topics

    def wanted_topics(self, rng: np.random.Generator, user_N: Indices, day: int) -> Indices:
        """A topic for each user [N], drawn from the user's interests on that day."""
        drawn = rng.random(len(user_N))
        topic_N = (rng.random(len(user_N)) * len(TOPICS)).astype(np.int64)
        upper = 0.0
        for weight, favourite_N in zip(SLOT_WEIGHTS, self.favourites(user_N, day), strict=True):
            in_slot = (drawn >= upper) & (drawn < upper + weight)
            topic_N[in_slot] = favourite_N[in_slot]
            upper += weight
        return topic_N

    def user_style(self, user_N: Indices) -> Indices:
        """The style that a user likes."""
        return _picked(len(STYLES), self.seed, _USER, 3, user_N)

    # -- items

    def item_ids(self, item_N: Indices) -> Indices:
        """Ids from 1; the order of popularity does not show in them."""
        return _scattered(item_N, self.items)

    def item_topic(self, item_N: Indices) -> Indices:
        """Items of neighbouring popularity have different topics."""
        return item_N % len(TOPICS)

    def item_style(self, item_N: Indices) -> Indices:
        """The style that an item is made in."""
        return _picked(len(STYLES), self.seed, _ITEM, 3, item_N)

    def item_known_day(self, item_N: Indices) -> Indices:
        """The first day whose impressions may show the item; each topic has one that is always known."""
        return self._known_day(_ITEM, item_N, always=len(TOPICS))

    def item_appeal(self, item_N: Indices) -> Floats:
        """An item's appeal to everyone, in logits: the more often it is shown, the higher."""
        # Items are shown by Zipf's law, under which the logarithm of the rank is uniform.
        quantile_N = np.log1p(item_N / len(TOPICS)) / math.log1p(self.items / len(TOPICS))
        return APPEAL_SPREAD * math.sqrt(12) * (0.5 - quantile_N)

    def shown_items(self, rng: np.random.Generator, topic_N: Indices, day: int) -> Indices:
        """Items [N] of these topics that are known on a day, by Zipf's law within the topic."""
        size_N = (self.items - topic_N + len(TOPICS) - 1) // len(TOPICS)
        item_N = zipf_rank(rng.random(len(topic_N)), size_N) * len(TOPICS) + topic_N
        unknown = np.flatnonzero(self.item_known_day(item_N) > day)
        while len(unknown):
            again = zipf_rank(rng.random(len(unknown)), size_N[unknown])
            item_N[unknown] = again * len(TOPICS) + topic_N[unknown]
            unknown = unknown[self.item_known_day(item_N[unknown]) > day]
        return item_N

    def click_probability(
        self, user_N: Indices, item_N: Indices, day: int, further: Floats | float = 0.0
    ) -> Floats:
        """Click probabilities [N] for an observer who knows everything about user, item and day.

        `further` are logits [N] that something else adds.
        """
        topic_N = self.item_topic(item_N)
        logit = INTERCEPT + self.item_appeal(item_N) + further
        for weight, favourite_N in zip(SLOT_WEIGHTS, self.favourites(user_N, day), strict=True):
            logit += TOPIC_EFFECT * weight * (favourite_N == topic_N)
        logit += STYLE_EFFECT * (self.user_style(user_N) == self.item_style(item_N))
        # Uniform, with standard deviation `TENDENCY_SPREAD`.
        logit += TENDENCY_SPREAD * math.sqrt(12) * (uniform(self.seed, _USER, 4, user_N) - 0.5)
        return 1.0 / (1.0 + np.exp(-logit))

    # -- atoms

    @property
    def blocks(self) -> int:
        """Kinds of atoms: channel, topic and style."""
        return self.channels * len(TOPICS) * len(STYLES)

    def atoms_of(
        self, rng: np.random.Generator, channel_N: Indices, topic_N: Indices, style_N: Indices
    ) -> Indices:
        """Atoms [N] of these kinds, by Zipf's law within the kind."""
        block_N = channel_N + self.channels * (topic_N + len(TOPICS) * style_N)
        size_N = (self.atoms - block_N + self.blocks - 1) // self.blocks
        return block_N + self.blocks * zipf_rank(rng.random(len(block_N)), size_N)

    def atom_kind(self, atom_N: Indices) -> tuple[Indices, Indices, Indices, Indices]:
        """Channel, topic, style and rank among its kind of each atom."""
        rank_N, rest = np.divmod(atom_N, self.blocks)
        rest, channel_N = np.divmod(rest, self.channels)
        style_N, topic_N = np.divmod(rest, len(TOPICS))
        return channel_N, topic_N, style_N, rank_N

    def _known_day(self, kind: int, number_N: Indices, *, always: int) -> Indices:
        late = (uniform(self.seed, kind, 5, number_N) - KNOWN_AT_START) / (1 - KNOWN_AT_START)
        from_start = (late < 0) | (number_N < always)
        return np.where(from_start, 0, 1 + np.floor(late * (self.days - 1))).astype(np.int64)


def _scattered(number_N: Indices, size: int) -> Indices:
    """A permutation of 0..size-1, plus one."""
    step = int(size * 0.6180339887) or 1
    while math.gcd(step, size) != 1:
        step += 1
    return number_N * step % size + 1
