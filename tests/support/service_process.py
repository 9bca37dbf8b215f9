"""`bahe serve` as a process of its own."""

from __future__ import annotations

import http.client
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from bahe_core.home import Home
from tests.support import REPOSITORY


@dataclass(frozen=True)
class Running:
    """A service that answers."""

    port: int
    pid: int
    log: Path
    """Its standard error."""
    trusting: ssl.SSLContext | None = None
    """Where it is asked over TLS: whose certificates are trusted."""

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Status and body of the answer, over a connection of its own."""
        connection: http.client.HTTPConnection
        if self.trusting is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        else:
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=60, context=self.trusting
            )
        try:
            connection.request(method, path, body or None, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def serve_command(home: Home, port: int, *options: str) -> list[str]:
    """The command that serves a home."""
    return [sys.executable, "-m", "bahe", "serve", "--home", str(home.root), "--port", str(port), *options]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_until_ready(service: Running) -> None:
    """Until it answers that it is ready."""
    retrying = Retrying(
        retry=retry_if_exception_type(OSError), stop=stop_after_delay(120), wait=wait_fixed(0.2)
    )
    assert retrying(service.ask, "GET", "/readyz")[0] == 200


@contextmanager
def running(
    home: Home, log: Path, *options: str, trusting: ssl.SSLContext | None = None
) -> Iterator[Running]:
    """A service of the home, from its first answer on; it has to end in peace, without a traceback."""
    port = free_port()
    with log.open("w") as file:
        process = subprocess.Popen(serve_command(home, port, *options), cwd=REPOSITORY, stderr=file)
    try:
        service = Running(port, process.pid, log, trusting)
        wait_until_ready(service)
        yield service
    finally:
        process.terminate()
        assert process.wait(timeout=60) in (0, -15)
    assert "Traceback" not in log.read_text()
