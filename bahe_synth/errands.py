"""Wishes that only the order of a user's behaviors tells: planted on request, at a known strength.

Every few days a user has an errand of each planted kind: a few behaviors on one topic, in the midst of all
others. What they say about the user's next clicks on that topic depends on the kind; what they add to the
counts of a user's behaviors is the same whether they say yes or no (order, combination), or is lost among
what the user did before (recency). Like everything in the world, an errand is a hash of seed, user and day.

Shape letters: N rows, U users, B behaviors of an errand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bahe_synth.words import TOPICS
from bahe_synth.world import DAY_US, Floats, Indices, World, hashed, time_of_day, uniform

Answers = npt.NDArray[np.bool_]

ERRAND_DAYS = 3
"""Days from one errand of a kind to a user's next."""

SPAN_US = 240_000_000
"""An errand's behaviors lie within four minutes."""

_SALT = 4


@dataclass(frozen=True)
class Kind:
    """A kind of errand."""

    name: str
    channels: int
    """How many channels a log needs for it."""
    length: int
    """How many behaviors an errand has (B)."""
    behaviors: Callable[[Indices, Indices, Answers, int], tuple[Indices, Indices]]
    """Channels and topics [U, B] from topics and other topics [U], whether yes or no [U], and the number of
    channels of the log; in the order in which they happen."""
    both_ways: bool
    """Whether every other errand says no: as many logits less as a yes says more."""


def _recency(topic_U: Indices, other_U: Indices, yes_U: Answers, channels: int) -> tuple[Indices, Indices]:
    channel_B = np.minimum([1, 2, 0], channels - 1)
    return np.tile(channel_B, (len(topic_U), 1)), np.repeat(topic_U[:, None], 3, axis=1)


def _order(topic_U: Indices, other_U: Indices, yes_U: Answers, channels: int) -> tuple[Indices, Indices]:
    # Paid, then searched again: still wants it. Searched, then paid: has it.
    channel_UB = np.where(yes_U[:, None], [0, 1], [1, 0]).astype(np.int64)
    return channel_UB, np.repeat(topic_U[:, None], 2, axis=1)


def _combination(
    topic_U: Indices, other_U: Indices, yes_U: Answers, channels: int
) -> tuple[Indices, Indices]:
    channel_B = np.array([channels - 2, channels - 1])
    return np.tile(channel_B, (len(topic_U), 1)), np.stack([np.where(yes_U, topic_U, other_U), topic_U], 1)


KINDS = (
    Kind("recency", 1, 3, _recency, False),
    Kind("order", 2, 2, _order, True),
    Kind("combination", 2, 2, _combination, True),
)
"""Each is an option of `bahe synth`, and a field of `Settings`: logits that a click gains, or 0."""


class Errands:
    """The errands of one kind."""

    def __init__(self, world: World, kind: Kind, logits: float) -> None:
        self.kind, self.logits = kind, logits
        self._world, self._code = world, KINDS.index(kind)

    def starters(self, day: int) -> Indices:
        """Users who do their errand's behaviors on this day."""
        user_U: Indices = np.arange(self._world.users)
        user_U = user_U[(day - self._phase(user_U)) % ERRAND_DAYS == 0]
        return user_U[self._world.user_known_day(user_U) <= day]

    def behaviors(self, day: int, chunk: int, chunks: int) -> tuple[Indices, Indices, Indices, Indices]:
        """Users, channels, topics and times (microseconds after midnight) [N] in a chunk of a day."""
        user_U = self.starters(day)
        quantile_U = self._uniform(4, user_U, day)
        here = (quantile_U * chunks).astype(np.int64) == chunk
        user_U, quantile_U = user_U[here], quantile_U[here]
        channel_UB, topic_UB = self.kind.behaviors(*self._facts(user_U, day), self._world.channels)
        first_U = np.minimum(time_of_day(quantile_U), DAY_US - SPAN_US)
        steps_B = SPAN_US // (self.kind.length + 1) * np.arange(self.kind.length)
        time_UB = first_U[:, None] + steps_B
        user_UB = np.repeat(user_U[:, None], self.kind.length, axis=1)
        return user_UB.ravel(), channel_UB.ravel(), topic_UB.ravel(), time_UB.ravel()

    def topics(self, user_N: Indices, day: int) -> Indices:
        """The topic [N] of the errand that the users did last, before this day; -1 for none."""
        topic_N, _ = self._last(user_N, day)
        return topic_N

    def logit(self, user_N: Indices, topic_N: Indices, day: int) -> Floats:
        """What the users' last errands before this day add to the logits of clicks on these topics [N]."""
        last_N, yes_N = self._last(user_N, day)
        sign_N = np.where(yes_N, 1.0, -1.0) if self.kind.both_ways else 1.0
        return np.asarray(self.logits * sign_N * (last_N == topic_N), dtype=np.float64)

    def _last(self, user_N: Indices, day: int) -> tuple[Indices, Answers]:
        """Topic (-1 for none), and yes or no [N], of the last errand that began before `day`."""
        began_N = day - 1 - (day - 1 - self._phase(user_N)) % ERRAND_DAYS
        topic_N, _, yes_N = self._facts(user_N, began_N)
        had_N = (began_N >= 0) & (began_N >= self._world.user_known_day(user_N))
        return np.where(had_N, topic_N, -1), yes_N

    def _phase(self, user_N: Indices) -> Indices:
        return (self._hash(0, user_N) % np.uint64(ERRAND_DAYS)).astype(np.int64)

    def _facts(self, user_U: Indices, began: npt.ArrayLike) -> tuple[Indices, Indices, Answers]:
        """Topic, another topic, and yes or no [U] of the errands that begin on a day."""
        topics = len(TOPICS)
        topic_U = (self._hash(1, user_U, began) % np.uint64(topics)).astype(np.int64)
        further_U = 1 + (self._hash(2, user_U, began) % np.uint64(topics - 1)).astype(np.int64)
        return topic_U, (topic_U + further_U) % topics, self._uniform(3, user_U, began) < 0.5

    def _hash(self, fact: int, user_U: Indices, began: npt.ArrayLike = 0) -> npt.NDArray[np.uint64]:
        return hashed(self._world.seed, _SALT, self._code, fact, user_U, began)

    def _uniform(self, fact: int, user_U: Indices, began: npt.ArrayLike) -> Floats:
        return uniform(self._world.seed, _SALT, self._code, fact, user_U, began)
