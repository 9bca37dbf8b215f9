"""How errors become answers: their status, and one sentence without paths or what was sent."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
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
from serving.http.guards import NOTHING_HERE, Refused
from serving.http.messages import Refusal
from serving.http.work import RETRY_AFTER

_STATUS = {
    UnknownEntity: 404,
    NotReady: 503,
    Damaged: 503,
    Unreachable: 503,
    NotWritable: 503,
    Busy: 503,
}
"""HTTP status by error; any other error of bahe's is the request's fault (400)."""

_PATH = re.compile(r"(?<![\w:/.])/(?:[^\s/:;,()'\"]+/)+([^\s/:;,()'\"]*)")
"""An absolute path of files, of which an answer shows the last part."""

_SENTENCES = {
    400: "the body cannot be read as JSON: it is not in UTF-8, nested too deep, or has a number of too many"
    " digits; correct it.",
    404: NOTHING_HERE,
    405: "this address is not for this method; /docs tells of every route.",
}
"""What the framework has few words for; it refuses with 400 only a body that its parser fails on."""


def add_refusals(app: FastAPI, home: Home) -> None:
    """Let the application answer every error that is not a fault of its own."""

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
        return refusal(request, 422, _sentence(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def of_the_framework(request: Request, error: HTTPException) -> Response:
        detail = _SENTENCES.get(error.status_code, str(error.detail))
        return refusal(request, error.status_code, detail, dict(error.headers or {}))

    @app.exception_handler(OSError)
    async def of_the_system(request: Request, error: OSError) -> Response:
        problem = storage_problem(error)
        if problem is None:
            raise error
        return refusal(request, 503, one_line(problem), RETRY_AFTER)


def _sentence(first: dict[str, Any]) -> str:
    """The first thing that is wrong with a request, without the input, which may be anything."""
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return f"the body is no JSON from character {clipped(where[0])} on; correct it."
    if not where and first["type"] in ("missing", "model_attributes_type"):
        return "the body is no object of JSON; send one, with Content-Type: application/json."
    what = first["msg"].removeprefix("Value error, ")
    return f"{clipped('.'.join(where) or 'the body')}: {what}; correct it."
