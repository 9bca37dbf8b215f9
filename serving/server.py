"""The HTTP API under uvicorn: who can reach it, and how many connections it takes."""

from __future__ import annotations

import uvicorn

from bahe_core.errors import BadInput
from bahe_core.home import Home
from serving.api import create_app
from serving.guards import Limits
from serving.keys import has_keys


def serve(home: Home, *, host: str, port: int, live: bool, log_requests: float, limits: Limits) -> None:
    """Serve until interrupted; `live` and `log_requests` are those of `create_app`.

    Raises BadInput when other machines could ask (`host` is not this one) and the home has no API key.
    """
    local = host in ("127.0.0.1", "::1", "localhost")
    with_keys = has_keys(home)
    if not local and not with_keys:
        raise BadInput(
            f"a service on {host} can be asked by other machines, and needs API keys; make one with"
            " `bahe api-key NAME`, or leave out --host."
        )
    uvicorn.run(
        create_app(home, live=live, log_requests=log_requests, limits=limits, require_keys=with_keys),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        # Connections beyond it get 503 before they are read.
        limit_concurrency=1000,
    )
