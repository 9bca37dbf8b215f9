"""Metrics of several workers as one: whichever Prometheus asks tells what all of them counted.

Each worker writes its counts to a file of its own about once a second; that of a worker that died stays,
since what it counted happened.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import parent_process
from pathlib import Path

import psutil

from bahe_core.errors import one_line
from serving.http.metrics import Counts, Metrics

_log = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds between two writes."""


class SharedMetrics:
    """The counts of this worker, for the others, and those of the others."""

    def __init__(self, metrics: Metrics, folder: Path) -> None:
        """The folder is the workers' alone, and empty when the first of them starts."""
        self._metrics, self._folder = metrics, folder
        # Not the process's number alone, which another one may get that comes later.
        self._own, self._written = folder / f"{os.getpid()}-{secrets.token_hex(4)}.json", ""
        self._failed = False

    async def keep_writing(self) -> None:
        """Until it is cancelled."""
        while True:
            self.write()
            await asyncio.sleep(EVERY)

    def write(self) -> None:
        """Write the counts where they are not what was written last, whole or not at all.

        What was told once has to be on the disk: a sum that falls is a restart to Prometheus.
        """
        text = self._metrics.counts().to_json()
        if text == self._written:
            return
        part = self._own.with_suffix(".part")
        try:
            self._folder.mkdir(exist_ok=True)  # temporary folders are tidied away on some machines
            part.write_text(text)
            part.replace(self._own)
        except OSError as error:  # an answer counts more than its count
            if not self._failed:
                _log.warning("metrics are not shared with the other workers: %s", one_line(error))
            self._failed = True
        else:
            self._written = text

    def close(self) -> None:
        """Write for the last time.

        Where the workers' parent was killed, which would have removed the folder, each of them does: none
        writes after it has, so the last one to end leaves nothing.
        """
        self.write()
        if (parent := parent_process()) is not None and not parent.is_alive():
            shutil.rmtree(self._folder, ignore_errors=True)

    def others(self) -> Iterator[Counts]:
        """What the other workers wrote last."""
        for path in sorted(self._folder.glob("*.json")):
            if path != self._own:
                counts = Counts.from_json(path.read_text())
                lives = psutil.pid_exists(int(path.stem.partition("-")[0]))
                yield counts if lives else replace(counts, in_work=0)
