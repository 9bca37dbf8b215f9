"""What a connection may do to a service before there is a request, and after: send little, and not wait.

The guard sees a request once its head has arrived. uvicorn waits for a head as long as the client likes and
keeps all of it, and waits as long for a client that does not read its answer; each holds one of the
connections that a service takes.
"""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from pydantic_core import to_json
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.flow_control import service_unavailable

from serving.http.guards import respond
from serving.http.work import RETRY_AFTER

_LOG = logging.getLogger(__name__)

HEAD_BYTES = 2**16
"""Of a request's address and headers. What comes in one read with the end of a head is not counted."""
REST_BYTES = 2**26
"""Of what still comes of a request that was refused unread: to hang up at once would lose the answer."""


class Connection(AutoHTTPProtocol):
    """uvicorn's protocol, with a deadline and a size of each head, and a deadline for reading on."""

    def __init__(self, *, seconds: float, **given: Any) -> None:
        super().__init__(**given)
        self._seconds = seconds
        self._come = 0
        """Bytes since the last request was whole, or answered."""
        self._head_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None
        self._answering: Any = None
        """The request that is worked on; uvicorn knows the latest, which may be one of many sent ahead."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """The first head is due."""
        super().connection_made(transport)
        # Also of an answer that is small enough to be kept for a client it is known whether that reads. Not
        # 0: with that, TLS takes an empty buffer for a full one.
        transport.set_write_buffer_limits(high=1)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Take in a part of a head or of a body."""
        super().data_received(data)
        if self.transport.is_closing() or not (self.cycle is None or self.cycle.response_complete):
            self._expect_no_head()
            return
        self._come += len(data)
        if self._head_due is None:
            self._expect_head()
        if self._come > (REST_BYTES if self._answered_early() else HEAD_BYTES):
            self._end(431, f"the address and headers are larger than {HEAD_BYTES:,} bytes; send less.")

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._expect_no_head()
        self._expect_no_reading()
        if self._answering is not None:
            self._answering.disconnected = True  # or it would write to what is closed
            self._answering.message_event.set()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client has to read before more is written."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._expect_no_reading()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        if app is service_unavailable:  # which says neither why nor when to come again
            app = _too_many_connections
        super()._start_asgi_task(cycle, app)

    def _answered_early(self) -> bool:
        return self.cycle is not None and self.cycle.more_body

    def _expect_head(self) -> None:
        late = f"the request did not arrive within {self._seconds:g} s; send it again."
        self._head_due = self.loop.call_later(self._seconds, self._end, 408, late)

    def _expect_no_head(self) -> None:
        self._come = 0
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _expect_reading(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._reading_due = self.loop.call_later(self._seconds, self._check_reading, unread)

    def _expect_no_reading(self) -> None:
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None

    def _check_reading(self, unread: int) -> None:
        if self.transport.get_write_buffer_size() < unread:
            self._expect_reading()
            return
        _LOG.warning("an answer was not read on for %g s; its connection is closed", self._seconds)
        self.transport.abort()

    def _end(self, status: int, detail: str) -> None:
        """Close the connection; with an answer where a request has begun and has none."""
        if self._come and not self._answered_early():
            request_id = uuid4().hex
            body = to_json({"detail": detail, "request_id": request_id})
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nx-request-id: {request_id}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            _LOG.warning("the head of a request answered %d, request %s", status, request_id)
        self._expect_no_head()
        self.transport.close()


async def _too_many_connections(_: Scope, __: Receive, send: Send) -> None:
    headers = {**RETRY_AFTER, "Connection": "close"}
    await respond(send, 503, "the service has too many connections; try again.", headers, uuid4().hex)
