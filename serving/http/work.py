"""Threads for what requests ask of stores and models: few, with a short queue and a deadline."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from serving.http.guards import Refused

T = TypeVar("T")
RETRY_AFTER = {"Retry-After": "1"}


class Work:
    """A pool that refuses rather than lets requests pile up."""

    def __init__(self, name: str, *, threads: int, waiting: int, seconds: float) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._most, self._seconds = threads + waiting, seconds
        self._lock, self._admitted = threading.Lock(), 0

    @property
    def admitted(self) -> int:
        """Requests that are worked on or wait."""
        return self._admitted

    async def run(self, function: Callable[[], T]) -> T:
        """What the function returns or raises. Raises Refused (503) at once when there is no room for it,
        and at its deadline.

        A call that is cancelled, or past its deadline, before a thread took it is never made. One that runs
        is not interrupted, and keeps its room until it ends.
        """
        with self._lock:
            if self._admitted >= self._most:
                raise Refused(503, "the service has as much to do as it can; try again.", RETRY_AFTER)
            self._admitted += 1
        try:
            future = self._pool.submit(function)
        except BaseException:
            self._leave()
            raise
        future.add_done_callback(self._leave)
        try:
            async with asyncio.timeout(self._seconds) as deadline:
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise Refused(
                503, f"there was no answer within {self._seconds:g} s; try again.", RETRY_AFTER
            ) from None

    def _leave(self, _: Future[T] | None = None) -> None:
        with self._lock:
            self._admitted -= 1

    def close(self) -> None:
        """Let go of the threads; what runs is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
