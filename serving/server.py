"""The HTTP API under uvicorn: who can reach it, how many connections it takes, in how many processes."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from bahe_core.errors import BadInput, BaheError, NotReady
from bahe_core.home import Home
from bahe_core.machine import configure_threads, threads
from serving.keys import has_keys

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serving.guards import Limits

PATIENCE = 15
"""Seconds in which a worker has to show that it lives: while it imports on a busy machine it is slow to.
One that was killed is missed for so long at most."""
_REFUSED = "refused"
"""The file in which a worker says why it cannot start."""


@dataclass(frozen=True)
class Address:
    """Where a service listens, and in how many processes."""

    host: str
    port: int
    workers: int = 1


def serve(home: Home, where: Address, *, live: bool, log_requests: float, limits: Limits) -> None:
    """Serve until interrupted; `live` and `log_requests` are those of `create_app`, `limits` each worker's.

    Several workers share the port; one that dies is replaced. Raises BadInput when other machines could ask
    (`host` is not this one) and the home has no API key, or on less than one worker; NotReady when several
    cannot start.
    """
    host, workers = where.host, where.workers
    if workers < 1:
        raise BadInput(f"{workers} workers cannot serve; give at least 1.")
    local = host in ("127.0.0.1", "::1", "localhost")
    with_keys = has_keys(home)
    if not local and not with_keys:
        raise BadInput(
            f"a service on {host} can be asked by other machines, and needs API keys; make one with"
            " `bahe api-key NAME`, or leave out --host."
        )
    options: dict[str, Any] = {
        "live": live,
        "log_requests": log_requests,
        "limits": limits,
        "require_keys": with_keys,
    }
    settings: dict[str, Any] = {
        "host": host,
        "port": where.port,
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        # Connections beyond it get 503 before they are read.
        "limit_concurrency": 1000,
    }
    if workers == 1:
        from serving.api import create_app

        uvicorn.run(create_app(home, **options), **settings)
        return
    with tempfile.TemporaryDirectory(prefix="bahe-workers-") as folder:
        config = uvicorn.Config(
            partial(_worker, home, options, Path(folder), max(1, threads() // workers)),
            factory=True,
            workers=workers,
            timeout_worker_healthcheck=PATIENCE,
            **settings,
        )
        socket = config.bind_socket()
        try:
            Multiprocess(config, [socket]).run()
        finally:
            socket.close()
        with suppress(FileNotFoundError):
            raise NotReady((Path(folder) / _REFUSED).read_text())


def _worker(home: Home, options: dict[str, Any], folder: Path, threads_each: int) -> FastAPI:
    """The application of one of several processes."""
    os.environ["BAHE_THREADS"] = str(threads_each)
    configure_threads()
    # Here, since the process that only watches the workers does without models and Feast.
    from serving.api import create_app

    try:
        return create_app(home, **options, workers=folder)
    except BaheError as error:
        (folder / _REFUSED).write_text(str(error))
        sys.exit(STARTUP_FAILURE)  # so that it is not tried again for ever
