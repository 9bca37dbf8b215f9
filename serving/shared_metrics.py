"""Metrics of several workers as one: whichever Prometheus asks tells what all of them counted.

Each worker writes its counts to a file of its own about once a second; that of a worker that died stays,
since what it counted happened.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from serving.metrics import Counts, Metrics

EVERY = 1.0
"""Seconds between two writes."""


class SharedMetrics:
    """The counts of this worker, for the others, and those of the others."""

    def __init__(self, metrics: Metrics, folder: Path) -> None:
        """The folder is the workers' alone, and empty when the first of them starts."""
        self._metrics, self._folder = metrics, folder
        self._own, self._written = folder / f"{os.getpid()}.json", ""

    async def keep_writing(self) -> None:
        """Until it is cancelled."""
        while True:
            self.write()
            await asyncio.sleep(EVERY)

    def write(self) -> None:
        """Write the counts where they are not what was written last, whole or not at all."""
        text = self._metrics.counts().to_json()
        if text != self._written:
            part = self._own.with_suffix(".part")
            part.write_text(text)
            part.replace(self._own)
            self._written = text

    def others(self) -> Iterator[Counts]:
        """What the other workers wrote last."""
        for path in sorted(self._folder.glob("*.json")):
            if path != self._own:
                counts = Counts.from_json(path.read_text())
                yield counts if _lives(int(path.stem)) else replace(counts, in_work=0)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
