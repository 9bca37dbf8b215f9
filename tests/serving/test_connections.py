"""A service with as many connections as it takes."""

from __future__ import annotations

import asyncio
import json
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from serving.http.connections import Connection


def test_one_connection_too_many_is_told_to_come_again() -> None:
    config = uvicorn.Config(FastAPI(), limit_concurrency=1)
    config.load()

    async def asked() -> HTTPError:
        state = ServerState()
        server = await asyncio.get_running_loop().create_server(
            lambda: Connection(seconds=5, config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(HTTPError) as refused:
                await asyncio.to_thread(urlopen, f"http://127.0.0.1:{port}/")
        return refused.value

    with asyncio.run(asked()) as refused:
        assert refused.status == 503
        assert refused.headers["retry-after"] == "1"
        assert json.loads(refused.read())["detail"] == "the service has too many connections; try again."
