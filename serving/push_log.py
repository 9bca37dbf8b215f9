"""Behaviors that live services took in: one JSON line each, on disk before its sender is answered.

The workers of a home share the files, one a day: each appends under a lock and reads what the others
appended, so that all of them answer alike and a kill loses nothing that was acknowledged. A line that a
kill cut off was not, and is passed over. Ids and texts are those of the log itself.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from filelock import FileLock, Timeout

from bahe_core.errors import Busy
from bahe_core.files import flush
from bahe_core.home import Home

PATIENCE = 2.0
"""Seconds that a request waits for another one, of whatever worker; one that was stopped never ends."""
_LOOK = 0.002
"""Seconds between two looks at the lock."""


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
    def names(self) -> tuple[Hashable, ...]:
        """What another one is the same behavior by: the sender's name for it, and the content."""
        content = (self.channel, self.atom_id, self.time_us, self.item_id)
        return (content,) if self.event_id is None else (content, self.event_id)


@dataclass
class _OfUser:
    behaviors: tuple[Pushed, ...] = ()
    names: set[Hashable] = field(default_factory=set)


class PushLog:
    """Safe to use from several threads and processes."""

    def __init__(self, home: Home) -> None:
        self._folder = home.pushed
        self._folder.mkdir(parents=True, exist_ok=True)
        flush(home.root)
        self._lock = threading.RLock()
        self._read: dict[str, tuple[int, int]] = {}
        """Inode of each file, and the bytes read of it."""
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

    def _take(self, behaviors: Sequence[Pushed]) -> None:
        """Those that are not here yet: what a kill left of a line may be whole, and is then sent again."""
        new: dict[str | int, list[Pushed]] = {}
        for one in behaviors:
            if not self._has(one):
                self._of_user.setdefault(one.user_id, _OfUser()).names.update(one.names)
                new.setdefault(one.user_id, []).append(one)
        for user_id, those in new.items():
            self._of_user[user_id].behaviors += tuple(those)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """No other thread or worker appends meanwhile. Raises Busy when one of them does not let go."""
        lock = FileLock(self._folder / ".lock")
        try:
            lock.acquire(timeout=PATIENCE, poll_interval=_LOOK)
        except Timeout:
            raise Busy(
                f"another worker has kept {self._folder} to itself for {PATIENCE:g} s; send it again."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def append(self, behavior: Pushed) -> None:
        """Write a behavior to the disk; call it within `exclusive`."""
        path = self._folder / f"{datetime.now(UTC):%Y-%m-%d}.jsonl"
        line = (json.dumps(asdict(behavior)) + "\n").encode()
        made = not path.exists()
        with path.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a kill cut the last line off
                    line = b"\n" + line
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
                if made:
                    flush(self._folder)
            except OSError:
                # It may not be on the disk: left here, it would be acknowledged when it is sent again.
                with suppress(OSError):
                    file.truncate(size)
                raise

    def _read_on(self) -> None:
        if not self._read_further():
            self._read.clear()
            self._of_user.clear()
            self._read_further()

    def _read_further(self) -> bool:
        """Reads what came since; False when a file is another one, or was cut back to what is on the disk:
        what was read of it need not be there."""
        for path in sorted(self._folder.glob("*.jsonl")):
            try:
                now = path.stat()
                inode, start = self._read.get(path.name, (now.st_ino, 0))
                if inode != now.st_ino or now.st_size < start:
                    return False
                if now.st_size == start:
                    continue
                with path.open("rb") as file:
                    file.seek(max(0, start - 1))
                    if start and file.read(1) != b"\n":
                        return False
                    content = file.read()
            except FileNotFoundError:  # tidied away
                continue
            whole = content[: content.rfind(b"\n") + 1]
            self._read[path.name] = inode, start + len(whole)
            parsed = map(_parsed, whole.splitlines())
            self._take([one for one in parsed if one is not None])
        return True


def _parsed(line: bytes) -> Pushed | None:
    """None for a line that is not whole."""
    try:
        return Pushed(**json.loads(line))
    except (ValueError, TypeError):
        return None
