"""Behaviors that live services took in, on disk before their senders are answered.

Ids and texts are those of the log itself.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from bahe_core.home import Home
from serving.live.journal import Journal


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """A behavior as it was taken in."""

    user_id: str | int
    channel: str
    text: str
    """As ingest keeps it."""
    atom_id: int
    time_us: int
    item_id: str | int | None
    event_id: str | None

    @property
    def key(self) -> tuple[str, int, int]:
        """Channel, atom and time: what the lake knows a user's behavior by."""
        return self.channel, self.atom_id, self.time_us

    @property
    def names(self) -> tuple[Hashable, ...]:
        """What another one is the same behavior by: the sender's name for it, and the content."""
        content = (*self.key, self.item_id)
        return (content,) if self.event_id is None else (content, self.event_id)


@dataclass
class _OfUser:
    behaviors: tuple[Pushed, ...] = ()
    names: set[Hashable] = field(default_factory=set)


class PushLog:
    """Safe to use from several threads and processes."""

    def __init__(self, home: Home) -> None:
        self._journal = Journal(home.pushed)
        self._lock = threading.RLock()
        self._of_user: dict[str | int, _OfUser] = {}

    def of_user(self, user_id: str | int) -> tuple[Pushed, ...]:
        """What was pushed of a user, by any worker, and not yet dropped; as it came, each once."""
        with self._lock:
            self._read_on()
            kept = self._of_user.get(user_id)
            return kept.behaviors if kept else ()

    def has(self, behavior: Pushed) -> bool:
        """Whether this is one of those, sent again."""
        with self._lock:
            self._read_on()
            return self._has(behavior)

    def _has(self, behavior: Pushed) -> bool:
        kept = self._of_user.get(behavior.user_id)
        return kept is not None and not kept.names.isdisjoint(behavior.names)

    def drop(self, user_id: str | int, behaviors: Sequence[Pushed]) -> None:
        """Forget some of a user's, which the log has by now."""
        with self._lock:
            kept = self._of_user.pop(user_id, _OfUser())
            dropped = set(behaviors)
            self._take([one for one in kept.behaviors if one not in dropped])

    def _take(self, behaviors: Iterable[Pushed]) -> None:
        """Those that are not here yet: what a kill left of a line may be whole, and is then sent again."""
        new: dict[str | int, list[Pushed]] = {}
        for one in behaviors:
            if not self._has(one):
                self._of_user.setdefault(one.user_id, _OfUser()).names.update(one.names)
                new.setdefault(one.user_id, []).append(one)
        for user_id, those in new.items():
            self._of_user[user_id].behaviors += tuple(those)

    def exclusive(self) -> AbstractContextManager[None]:
        """No other thread or worker appends meanwhile. Raises Busy when one of them does not let go."""
        return self._journal.exclusive()

    def append(self, behavior: Pushed) -> None:
        """Write a behavior to the disk; call it within `exclusive`."""
        self._journal.append([asdict(behavior)])

    def _read_on(self) -> None:
        anew, lines = self._journal.read_on()
        if anew:
            self._of_user.clear()
        self._take(filter(None, map(_behavior, lines)))


def _behavior(line: dict[str, Any]) -> Pushed | None:
    """None for a line of something else."""
    try:
        return Pushed(**line)
    except TypeError:
        return None
