"""The HTTP API under uvicorn: who can reach it, how many connections it takes, in how many processes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from socket import AddressFamily, create_server
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from bahe_core.errors import BadInput, BaheError, NotReady, one_line, storage_problem
from bahe_core.home import Home
from bahe_core.machine import configure_threads, threads
from bahe_core.progress import json_log, use_log_format
from serving.http.connections import Connection
from serving.http.keys import has_keys
from serving.http.tls import Tls

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serving.http.guards import Limits

_log = logging.getLogger(__name__)

PATIENCE = 15
"""Seconds in which a worker has to show that it lives: while it imports on a busy machine it is slow to.
One that was killed is missed for so long at most."""
AGAIN = 5
"""Seconds until a worker that could not start beside others is tried again."""
_REFUSED = "refused"
"""The file in which a worker says why it cannot start."""


@dataclass(frozen=True)
class Address:
    """Where a service listens, in how many processes, and with which certificate."""

    host: str
    port: int
    workers: int = 1
    tls: Tls | None = None


def serve(home: Home, where: Address, *, live: bool, log_requests: float, limits: Limits) -> None:
    """Serve until interrupted; `live` and `log_requests` are those of `create_app`, `limits` each worker's.

    Several workers share the port; one that dies is replaced, and all end with this process, however it
    ends. Raises BadInput when other machines could ask (`host` is not this one) and the home has no API
    key, on less than one worker, and where somebody else listens; NotReady when several workers cannot
    start.
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
    _refuse_taken(host, where.port)
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
        "http": partial(Connection, seconds=limits.seconds),
        "ws": "none",
    }
    if where.tls is not None:
        settings |= {"ssl_certfile": where.tls.certificate, "ssl_keyfile": where.tls.key}
    if workers == 1:
        from serving.http.api import create_app

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
            supervisor = Multiprocess(config, [socket])
            supervisor.run()
        finally:
            socket.close()
        with suppress(FileNotFoundError):
            raise NotReady((Path(folder) / _REFUSED).read_text())
        if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
            raise NotReady("no worker could start; what they said above tells why.")


def _refuse_taken(host: str, port: int) -> None:
    """Raises BadInput where somebody else listens."""
    family = AddressFamily.AF_INET6 if ":" in host else AddressFamily.AF_INET
    try:
        create_server((host, port), family=family).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise BadInput(
            f"port {port} of {host} cannot be listened on ({reason}); choose another --port, or end what"
            " listens there."
        ) from None


def _worker(home: Home, options: dict[str, Any], folder: Path, threads_each: int) -> FastAPI:
    """The application of one of several processes.

    One that cannot start ends the service where no other has been ready. Later it is tried again: the
    others answer, and what it needs may be away for a while.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use_log_format("json" if json_log() else "text")  # a new process has no handler of that form yet
    os.environ["BAHE_THREADS"] = str(threads_each)
    configure_threads()
    # Here, since the process that only watches the workers does without models and Feast.
    from serving.http.api import create_app

    try:
        return create_app(home, **options, workers=folder)
    except Exception as error:
        known = error if isinstance(error, BaheError) else storage_problem(error)
        if any(folder.glob("*.json")):
            _log.warning("a worker cannot start: %s", known or one_line(error))
            time.sleep(AGAIN)
            sys.exit(1)
        if known is None:
            traceback.print_exception(error)  # a process that exits on purpose shows none
        else:
            (folder / _REFUSED).write_text(str(known))
        sys.exit(STARTUP_FAILURE)


def _end_with_parent() -> None:
    """Stop this worker in order when the process that watches it was killed: nobody else would stop it, and
    it would keep the port.

    The parent's end of a pipe closes when it dies, however that came.
    """
    if (parent := parent_process()) is not None:
        parent.join()
        _log.warning("the parent of this worker was killed; the worker ends, too")
        os.kill(os.getpid(), signal.SIGTERM)
