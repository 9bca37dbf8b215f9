"""Behaviors that live services took in: one JSON line each, on disk before its sender is answered.

The workers of a home share the files, one a day: each appends under a lock and reads what the others
appended, so that all of them answer alike and a kill loses nothing that was acknowledged. A line that a
kill cut off was not, and is passed over. Ids and texts are those of the log itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from bahe_core.home import Home


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

    def repeats(self, other: Pushed) -> bool:
        """Whether this is the other one, sent again: by the sender's name for it, or the same content."""
        if self.event_id is not None and self.event_id == other.event_id:
            return True
        return (self.channel, self.atom_id, self.time_us, self.item_id) == (
            other.channel,
            other.atom_id,
            other.time_us,
            other.item_id,
        )


class PushLog:
    """Safe to use from several threads and processes."""

    def __init__(self, home: Home) -> None:
        self._folder = home.pushed
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._read: dict[str, int] = {}
        """Bytes read of each file."""
        self._of_user: dict[str | int, list[Pushed]] = {}

    def of_user(self, user_id: str | int) -> Sequence[Pushed]:
        """What was pushed of a user, by any worker, and not yet dropped; as it came."""
        with self._lock:
            self._read_on()
            return list(self._of_user.get(user_id, ()))

    def drop(self, user_id: str | int, count: int) -> None:
        """Forget a user's first `count` behaviors, which the log has by now."""
        with self._lock:
            left = self._of_user.get(user_id, [])[count:]
            if left:
                self._of_user[user_id] = left
            else:
                self._of_user.pop(user_id, None)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """No other worker appends meanwhile."""
        with (self._folder / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def append(self, behavior: Pushed) -> None:
        """Write a behavior to the disk; call it within `exclusive`."""
        path = self._folder / f"{datetime.now(UTC):%Y-%m-%d}.jsonl"
        line = (json.dumps(asdict(behavior)) + "\n").encode()
        made = not path.exists()
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a kill cut the last line off
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if made:
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _read_on(self) -> None:
        for path in sorted(self._folder.glob("*.jsonl")):
            start = self._read.get(path.name, 0)
            try:
                if path.stat().st_size <= start:
                    continue
                with path.open("rb") as file:
                    file.seek(start)
                    content = file.read()
            except FileNotFoundError:  # tidied away
                continue
            whole = content[: content.rfind(b"\n") + 1]
            self._read[path.name] = start + len(whole)
            for line in whole.splitlines():
                behavior = _parsed(line)
                if behavior is not None:
                    self._of_user.setdefault(behavior.user_id, []).append(behavior)


def _parsed(line: bytes) -> Pushed | None:
    """None for a line that is not whole."""
    try:
        return Pushed(**json.loads(line))
    except (ValueError, TypeError):
        return None
