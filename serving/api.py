"""The HTTP API: the application of its routes, what each asks of a key, and how errors become answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from bahe_core.errors import (
    BaheError,
    Busy,
    Damaged,
    NotReady,
    NotWritable,
    UnknownEntity,
    Unreachable,
    clipped,
    one_line,
    storage_problem,
)
from bahe_core.home import Home
from serving.deprecated_routes import deprecated
from serving.guards import NOWHERE, Guard, Limits, Refused
from serving.keys import ApiKeys
from serving.live import LiveLookup
from serving.lookup import OnlineLookup
from serving.messages import Refusal
from serving.page import page
from serving.request_log import RequestLog
from serving.routes import feast, probes, version_1
from serving.service import Service
from serving.work import RETRY_AFTER

_STATUS = {
    UnknownEntity: 404,
    NotReady: 503,
    Damaged: 503,
    Unreachable: 503,
    NotWritable: 503,
    Busy: 503,
}
"""HTTP status by error; any other error of bahe's is the request's fault (400)."""

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

_PATH = re.compile(r"(?<![\w:/.])/(?:[^\s/:;,()'\"]+/)+([^\s/:;,()'\"]*)")
"""An absolute path of files, of which an answer shows the last part."""

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal} for status in (400, 401, 403, 404, 413, 422, 503)
}


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
        responses=_REFUSALS,
    )
    app.add_middleware(
        Guard,
        limits=limits,
        metrics=service.metrics,
        scope_of=scope_of,
        keys=ApiKeys(home, required=require_keys),
    )
    _add_errors(app, home)
    app.include_router(probes(service))
    app.include_router(version_1(service))
    app.include_router(feast(service))
    app.include_router(deprecated(service))

    @app.get("/docs", include_in_schema=False)
    def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(page(app.openapi(), clipped(str(request.base_url).rstrip("/"))))

    return app


def _add_errors(app: FastAPI, home: Home) -> None:
    def refusal(
        request: Request, status: int, detail: str, headers: dict[str, str] | None = None
    ) -> Response:
        detail = _PATH.sub(r"\1", detail.replace(str(home.root), "the home"))
        request.state.reason = detail
        answer = Refusal(detail=detail, request_id=request.state.request_id)
        return JSONResponse(answer.model_dump(), status_code=status, headers=headers)

    @app.exception_handler(BaheError)
    async def of_ours(request: Request, error: BaheError) -> Response:
        if isinstance(error, Refused):
            return refusal(request, error.status, str(error), error.headers)
        status = _STATUS.get(type(error), 400)
        return refusal(request, status, str(error), RETRY_AFTER if status == 503 else None)

    @app.exception_handler(RequestValidationError)
    async def not_as_it_should_be(request: Request, error: RequestValidationError) -> Response:
        # The first one, and without the input, which may be anything.
        first = error.errors()[0]
        where = clipped(".".join(str(part) for part in first["loc"] if part != "body") or "the body")
        return refusal(request, 422, f"{where}: {first['msg']}; correct it.")

    @app.exception_handler(HTTPException)
    async def of_the_framework(request: Request, error: HTTPException) -> Response:
        return refusal(request, error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(OSError)
    async def of_the_system(request: Request, error: OSError) -> Response:
        problem = storage_problem(error)
        if problem is None:
            raise error
        return refusal(request, 503, one_line(problem), RETRY_AFTER)
