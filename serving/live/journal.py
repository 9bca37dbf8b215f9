"""JSON lines on disk that the workers of a home share: what one of them took in, all of them answer with.

Files are one a day. Each worker appends under a lock and reads what the others appended, so that a kill
loses nothing that was acknowledged. A line that a kill cut off was not, and is passed over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bahe_core.errors import Busy
from bahe_core.files import flush
from serving.lookup.tolerances import PATIENCE

_LOOK = 0.002
"""Seconds between two looks at the lock."""


class Journal:
    """One folder of lines. Reading is for one thread at a time; appending for one within `exclusive`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        flush(folder.parent)
        self._read: dict[str, tuple[int, int]] = {}
        """Inode of each file, and the bytes read of it."""

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

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write lines to the disk; call it within `exclusive`. A kill may leave the first of them."""
        path = self._folder / f"{datetime.now(UTC):%Y-%m-%d}.jsonl"
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        made = not path.exists()
        with path.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a kill cut the last line off
                    content = b"\n" + content
            try:
                while content:
                    content = content[file.write(content) :]
                os.fsync(file.fileno())
                if made:
                    flush(self._folder)
            except OSError:
                # It may not be on the disk: left here, it would be acknowledged when it is sent again.
                with suppress(OSError):
                    file.truncate(size)
                raise

    def tidy(self, keep: timedelta) -> None:
        """Remove the files of days longer ago than that, to which nobody appends any more."""
        oldest = f"{datetime.now(UTC) - keep:%Y-%m-%d}.jsonl"
        for path in self._folder.glob("*.jsonl"):
            if path.name < oldest:
                path.unlink(missing_ok=True)

    def read_on(self) -> tuple[bool, list[dict[str, Any]]]:
        """What came since the last call; and whether it is everything, what was read before being void.

        It is where a file is another one, or was cut back to what is on the disk: what was read of it need
        not be there.
        """
        lines = self._read_further()
        if lines is not None:
            return False, lines
        self._read.clear()
        return True, self._read_further() or []

    def _read_further(self) -> list[dict[str, Any]] | None:
        """None when what was read before is void."""
        found: list[dict[str, Any]] = []
        for path in sorted(self._folder.glob("*.jsonl")):
            try:
                now = path.stat()
                inode, start = self._read.get(path.name, (now.st_ino, 0))
                if inode != now.st_ino or now.st_size < start:
                    return None
                if now.st_size == start:
                    continue
                with path.open("rb") as file:
                    file.seek(max(0, start - 1))
                    if start and file.read(1) != b"\n":
                        return None
                    content = file.read()
            except FileNotFoundError:  # tidied away
                continue
            whole = content[: content.rfind(b"\n") + 1]
            self._read[path.name] = inode, start + len(whole)
            found += filter(None, map(_parsed, whole.splitlines()))
        return found


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None for a line that is not whole."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None
