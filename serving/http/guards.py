"""What every request passes before and after its route: keys, limits, deadlines, request ids, headers, log.

Nothing here looks at a store. A request that is refused here costs as little as can be.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json
from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bahe_core.errors import BadInput, BaheError
from serving.http.metrics import Metrics

if TYPE_CHECKING:
    from serving.http.keys import ApiKeys

_LOG = logging.getLogger(__name__)

DEPRECATED_SINCE = "@1795824000"
"""Value of the header `Deprecation` (RFC 9745): 2026-11-28, in seconds since 1970."""
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    # The page of routes has its style inline and loads nothing.
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none';"
        b" form-action 'none'",
    ),
)
_ONLY_TLS = (b"strict-transport-security", b"max-age=31536000")
"""Of an answer over TLS: for a year browsers ask this host in no other way."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
NOWHERE = "nowhere"
"""The scope of a path without a route, which no key has."""
NOTHING_HERE = "there is nothing at this address; /docs tells of every route."
_GONE = 499
"""In log and metrics only, as others have it: the client went away before its answer."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one service takes on."""

    body_bytes: int = 2**20
    """Of a request; more is refused before it is read."""
    query_bytes: int = 2**13
    """Of a request's address."""
    seconds: float = 10.0
    """For the request to arrive, and again for the answer to be made."""
    threads: int = 4
    """Requests that are worked on at once."""
    waiting: int = 32
    """Requests that wait for a thread; more are refused at once."""

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.threads < 1 or self.waiting < 0:
            raise BadInput("a service needs a timeout above 0, at least 1 thread and 0 or more waiting.")


class Refused(BaheError):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.headers = status, dict(headers or {})


class _ClientGone(Exception):
    pass


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        metrics: Metrics,
        scope_of: Callable[[str], str | None],
        keys: ApiKeys | None,
    ) -> None:
        """`scope_of` gives the scope that a route's path asks of a key, None for one that is open to all,
        NOWHERE where there is no route. Without `keys` every path is open.
        """
        self._app, self._limits, self._metrics = app, limits, metrics
        self._scope_of, self._keys = scope_of, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        given = _header(scope, b"x-request-id")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def answering(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_answer_headers(scope, request_id)]}
            await send(message)

        try:
            self._check(scope)
            await self._answer(scope, await self._body(scope, receive), receive, answering)
        except _ClientGone:
            status = _GONE
        except Refused as refused:
            scope["state"]["reason"] = str(refused)
            await respond(answering, refused.status, str(refused), refused.headers, request_id)
        except Exception:
            # The traceback is for the log; the answer says where to look for it.
            _LOG.exception("a fault of the service, request %s", request_id)
            if status == 0:
                detail = "this is a fault of the service; its log tells more under the request's id."
                await respond(answering, 500, detail, {}, request_id)
        finally:
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "no route")
            self._metrics.answered(route, status, seconds)
            if status >= 400:
                _log(scope, route, status, seconds, request_id)

    def _check(self, scope: Scope) -> None:
        """Raises Refused on what the head of a request tells already."""
        if self._keys is not None:
            # As the router has it: without what the application is mounted under.
            needed = self._scope_of(get_route_path(scope))
            if needed is not None:
                self._keys.check(_token(scope), needed)
        limits = self._limits
        if len(scope["raw_path"] or b"") + len(scope["query_string"]) > limits.query_bytes:
            raise Refused(414, f"the address is longer than {limits.query_bytes:,} bytes; use POST.")
        length = _header(scope, b"content-length")
        if length.isdigit() and (len(length) > 18 or int(length) > limits.body_bytes):
            raise _too_large(limits)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises Refused when it is too large or takes too long to arrive."""
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self._limits.seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGone
                    parts.append(message.get("body", b""))
                    more = message.get("more_body", False)
                    size += len(parts[-1])
                    if size > self._limits.body_bytes:
                        raise _too_large(self._limits)
        except TimeoutError:
            raise Refused(
                408, f"the request did not arrive within {self._limits.seconds:g} s; send it again."
            ) from None
        return b"".join(parts)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application, unless the client goes away: work that nobody waits for is not begun."""
        read = False

        async def replayed() -> Message:
            nonlocal read
            if read:
                await asyncio.Event().wait()  # this task is cancelled when the client goes away
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        answer: asyncio.Future[Any] = asyncio.ensure_future(self._app(scope, replayed, send))
        gone: asyncio.Future[Any] = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise _ClientGone
            await answer
        finally:
            gone.cancel()
            if not answer.done():
                answer.cancel()
                with suppress(asyncio.CancelledError):
                    await answer


def _too_large(limits: Limits) -> Refused:
    return Refused(413, f"the request is larger than {limits.body_bytes:,} bytes; send less at once.")


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _token(scope: Scope) -> str:
    scheme, _, token = _header(scope, b"authorization").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else _header(scope, b"x-api-key")


def _answer_headers(scope: Scope, request_id: str) -> list[tuple[bytes, bytes]]:
    headers = [(b"x-request-id", request_id.encode()), *_HEADERS]
    if scope["scheme"] == "https":
        headers.append(_ONLY_TLS)
    if getattr(scope.get("route"), "deprecated", None):
        headers.append((b"deprecation", DEPRECATED_SINCE.encode()))
    return headers


async def respond(
    send: Send, status: int, detail: str, headers: Mapping[str, str], request_id: str
) -> None:
    """Refuse a request without the application."""
    body = to_json({"detail": detail, "request_id": request_id})
    lines: list[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in headers.items()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


def _log(scope: Scope, route: str, status: int, seconds: float, request_id: str) -> None:
    """One line, without what the client sent: ids and texts are personal."""
    state: dict[str, Any] = scope["state"]
    reason = f": {state['reason']}" if status >= 500 and "reason" in state else ""
    _LOG.warning(
        "%s %s answered %d in %.0f ms, request %s%s",
        scope["method"],
        route,
        status,
        seconds * 1000,
        request_id,
        reason,
    )
