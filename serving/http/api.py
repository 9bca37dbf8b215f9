"""The HTTP API: the application of its routes, and what each asks of a key."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

from bahe_core.errors import clipped
from bahe_core.home import Home
from serving.http.deprecated_routes import deprecated
from serving.http.guards import NOWHERE, Guard, Limits
from serving.http.keys import ApiKeys
from serving.http.openapi import REFUSALS, describe_keys
from serving.http.page import page
from serving.http.refusals import add_refusals
from serving.http.routes import feast, probes, version_1
from serving.http.service import Service
from serving.live.live_lookup import LiveLookup
from serving.lookup.online_lookup import OnlineLookup
from serving.lookup.request_log import RequestLog

_OPEN = {"/healthz", "/readyz", "/docs", "/openapi.json"}
"""Probes, and what is the same for every service of this version."""
_SCOPES = {
    "/v1/score": "score",
    "/v1/score/batch": "score",
    "/v1/recommend": "score",
    "/v1/features": "read",
    "/v1/similar/text": "read",
    "/v1/behaviors": "write",
    "/v1/impressions": "write",
    "/v1/clicks": "write",
    "/get-online-features": "read",
    "/push": "write",
    "/write-to-online-store": "write",
    "/metrics": "read",
    "/health": "read",
    "/features": "read",
    "/score": "score",
    "/recommend": "score",
    "/behaviors": "write",
}
"""Scope that a path asks of an API key."""
_SCOPES_BY_PREFIX = {
    "/v1/users/": "read",
    "/v1/similar/items/": "score",
    "/v1/similar/users/": "read",
    "/v1/similar/atoms/": "read",
}
"""Of routes whose path ends with an id."""


def scope_of(path: str) -> str | None:
    """The scope that a route's path asks of an API key; None where it asks for no key, NOWHERE where there
    is no such route."""
    if path in _OPEN:
        return None
    by_prefix = (scope for prefix, scope in _SCOPES_BY_PREFIX.items() if path.startswith(prefix))
    return _SCOPES.get(path) or next(by_prefix, NOWHERE)


def create_app(
    home: Home,
    *,
    live: bool = False,
    log_requests: float = 0,
    limits: Limits | None = None,
    require_keys: bool = False,
    workers: Path | None = None,
) -> FastAPI:
    """The application for one home; `live` adds /v1/behaviors, /v1/impressions and /v1/clicks, and answers
    /v1/similar/text: these need the shallow layers in memory.

    `log_requests` is the share of users whose requests are kept for `bahe audit`. Once the home has an API
    key every request needs one; with `require_keys` also before. `workers` is a folder in which several
    applications of one service share their metrics. Raises NotReady before the first publish.
    """
    limits = limits or Limits()
    log = RequestLog(home, log_requests) if log_requests else None
    lookup = (LiveLookup if live else OnlineLookup)(home, log, keep_items=True)
    lookup.artifact(lookup.live_version())
    service = Service(lookup, limits, workers)
    app = FastAPI(
        title="bahe",
        summary="Click predictions from long logs of what people do, in words.",
        docs_url=None,
        redoc_url=None,
        lifespan=service.lifespan,
        responses=REFUSALS,
    )
    keys = ApiKeys(home, required=require_keys)
    app.add_middleware(Guard, limits=limits, metrics=service.metrics, scope_of=scope_of, keys=keys)
    describe_keys(app, scope_of, lambda: keys.required)
    add_refusals(app, home)
    app.include_router(probes(service))
    app.include_router(version_1(service))
    app.include_router(feast(service))
    app.include_router(deprecated(service))

    @app.get("/docs", include_in_schema=False)
    def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(page(app.openapi(), clipped(str(request.base_url).rstrip("/"))))

    return app
