"""What the OpenAPI says beside the routes: keys and their scopes, and what the guard refuses."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from fastapi import FastAPI

from serving.http.messages import Refusal

_RETRY = {
    "headers": {
        "Retry-After": {"description": "Seconds to wait.", "required": True, "schema": {"type": "integer"}}
    }
}
_ASKS_FOR_KEY = {
    "headers": {"WWW-Authenticate": {"required": True, "schema": {"type": "string", "const": "Bearer"}}}
}
_REASONS: dict[int, dict[str, Any]] = {
    400: {"description": "What was asked for does not fit the model or its store."},
    401: {"description": "No API key of the service.", **_ASKS_FOR_KEY},
    403: {"description": "The API key is not for this scope."},
    404: {"description": "Not known."},
    408: {"description": "The request did not arrive in time."},
    413: {"description": "The body is too large."},
    414: {"description": "The address is too long."},
    422: {"description": "The request is not as it should be."},
    431: {"description": "The address and headers are too large."},
    503: {"description": "Too much to do, or the store or a model is away.", **_RETRY},
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal, **reason} for status, reason in _REASONS.items()
}
"""What any route may answer instead of what was asked for."""

_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key of `bahe api-key`."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same."},
}


def describe_keys(
    app: FastAPI, scope_of: Callable[[str], str | None], required: Callable[[], bool]
) -> None:
    """Let the application's OpenAPI say which scope of an API key each route asks for, and whether one is
    `required` by now."""
    of_routes = app.openapi

    def openapi() -> dict[str, Any]:
        document = deepcopy(of_routes())  # which keeps it
        document["components"]["securitySchemes"] = _SCHEMES
        without: list[dict[str, Any]] = [] if required() else [{}]
        for path, methods in document["paths"].items():
            scope = scope_of(path)
            for operation in methods.values():
                if scope is None:
                    operation["responses"].pop("401", None)
                    operation["responses"].pop("403", None)
                else:
                    operation["security"] = [*without, *({name: [scope]} for name in _SCHEMES)]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
