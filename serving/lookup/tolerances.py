"""How long a request waits for another one, and how far a caller's clock may be ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from bahe_core.errors import Busy

PATIENCE = 2.0
"""Seconds that a request waits for another one, of whatever worker; one that was stopped never ends."""
MARGIN = timedelta(minutes=5)
"""What is said to be later has not happened yet."""


@contextmanager
def in_turn(lock: threading.Lock | threading.RLock, what: str) -> Iterator[None]:
    """Hold a lock. Raises Busy when other requests have kept `what` it is of for PATIENCE."""
    if not lock.acquire(timeout=PATIENCE):
        raise Busy(f"other requests have kept {what} for {PATIENCE:g} s; try again.")
    try:
        yield
    finally:
        lock.release()
