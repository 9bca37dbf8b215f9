"""What the routes of the HTTP API share: the lookup, the threads that ask it, and the metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI

from bahe_core.errors import BaheError
from serving.http.guards import Limits
from serving.http.metrics import Metrics
from serving.http.shared_metrics import SharedMetrics
from serving.http.work import Work
from serving.lookup.online_lookup import OnlineLookup

T = TypeVar("T")


class Service:
    """What the routes share: the lookup, and the threads that ask it."""

    def __init__(self, lookup: OnlineLookup, limits: Limits, workers: Path | None = None) -> None:
        """`workers` is the folder in which the workers of one service share their metrics."""
        self.lookup, self.metrics = lookup, Metrics()
        self._shared = None if workers is None else SharedMetrics(self.metrics, workers)
        self._work = Work("work", threads=limits.threads, waiting=limits.waiting, seconds=limits.seconds)
        # One, since writers of a store wait for each other anyway; nobody who asks waits for it.
        self._push = Work("push", threads=1, waiting=limits.waiting, seconds=limits.seconds)
        # Of its own, so that a service with much to do is still seen to be ready.
        self._probe = Work("probe", threads=1, waiting=8, seconds=min(3.0, limits.seconds))
        self.metrics.watch(lambda: self._work.admitted + self._push.admitted)

    async def ask(self, function: Callable[[], T]) -> T:
        """What the lookup says, from a thread."""
        return await self._work.run(function)

    async def write(self, function: Callable[[], T]) -> T:
        """`ask` of what is not given up because its sender went away."""
        return await asyncio.shield(asyncio.ensure_future(self.ask(function)))

    async def write_features(self, function: Callable[[], T]) -> T:
        """`write` of features to the online store, which another process may be writing to."""
        return await asyncio.shield(asyncio.ensure_future(self._push.run(function)))

    async def health(self) -> dict[str, Any]:
        """Whether the store answers, and which model is live."""

        def look() -> dict[str, Any]:
            version = self.lookup.live_version()
            encoder = self.lookup.artifact(version).encoder_version
            return {"status": "ok", "model_version": version, "encoder_version": encoder}

        return await self._probe.run(look)

    async def freshness(self) -> tuple[str, dict[str, float]]:
        """The live model, and the age in seconds of the views that it reads."""

        def look() -> tuple[str, dict[str, float]]:
            version = self.lookup.live_version()
            return version, self.lookup.models.freshness(version)

        return await self._probe.run(look)

    async def measured(self) -> str:
        """What Prometheus is told, of all workers; without a model where the store does not answer."""
        live = None
        with suppress(BaheError, OSError):
            live = await self.freshness()
        if self._shared is not None:
            self._shared.write()
        return self.metrics.text(live, self._shared.others() if self._shared else ())

    def _warm(self) -> None:
        self.lookup.items(list(self.lookup.catalogue())[:1], self.lookup.live_version())

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Reads the items, so that no request waits for it; lets go of the threads in the end."""
        with suppress(BaheError):  # then requests say so
            await self.ask(self._warm)
        writing = None if self._shared is None else asyncio.ensure_future(self._shared.keep_writing())
        yield
        if writing is not None:
            writing.cancel()
        if self._shared is not None:
            self._shared.close()
        self._work.close()
        self._push.close()
        self._probe.close()
