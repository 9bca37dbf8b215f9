"""Servers that some tests need: skipped without them, or failed where they are required."""

from __future__ import annotations

import os
import socket

import pytest

SERVICES = {"redis": 6379, "postgres": 5432}
"""Ports on this machine."""


def require_service(name: str) -> None:
    """Skip the test where the service does not answer, and fail where BAHE_REQUIRE_SERVICES names it."""
    port = SERVICES[name]
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            return
    if name in os.environ.get("BAHE_REQUIRE_SERVICES", "").split():
        pytest.fail(f"{name} does not answer on port {port}, and BAHE_REQUIRE_SERVICES wants it: start it")
    pytest.skip(f"{name} does not answer on port {port}")


RAY_WORKERS = 2


POSTGRES = "postgresql://postgres@127.0.0.1/test"
