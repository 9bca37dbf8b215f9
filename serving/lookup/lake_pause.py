"""How long a service leaves the lake alone after it failed, so that not every request waits for that."""

from __future__ import annotations

import time

from bahe_core.errors import NotReady
from bahe_core.home import Home

PAUSE = 5.0
"""Seconds, at least."""


class LakePause:
    """One reader's. It is on for a while after a failure."""

    def __init__(self) -> None:
        self._until = 0.0
        """By the monotonic clock."""

    @property
    def on(self) -> bool:
        """Whether the lake is to be left alone."""
        return time.monotonic() < self._until

    def require_off(self, home: Home) -> None:
        """Raises NotReady while the home's lake is to be left alone."""
        if self.on:
            raise NotReady(f"the lake of {home.root} failed a moment ago; try again in {PAUSE:g} s.")

    def begin(self, waited: float = 0.0) -> None:
        """The lake failed, after so many seconds: what fails slowly is tried seldom.

        A server that is away takes long to say so, and must not keep more than one thread of many.
        """
        self._until = max(self._until, time.monotonic() + max(PAUSE, 10 * waited))
