"""`bahe serve` as a process of its own: starts, answers over a socket, refuses what is too much, ends."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from bahe_core.home import Home
from tests.deploy.test_image import health_check
from tests.support import REPOSITORY
from tests.support.home_contents import copy_of
from tests.support.service_process import Running, free_port, running

UNTIL_LOGGED = Retrying(
    retry=retry_if_exception_type(AssertionError),
    stop=stop_after_delay(60),
    wait=wait_fixed(0.2),
    reraise=True,
)


def log_has(service: Running, line: str) -> None:
    assert line in service.log.read_text()


def said(client: socket.socket) -> tuple[bytes, bytes]:
    """All that a service says until it closes the connection: the first line, and what follows a head."""
    answer = b"".join(iter(lambda: client.recv(2**16), b""))
    return answer.partition(b"\r\n")[0], answer.partition(b"\r\n\r\n")[2]


@pytest.fixture(scope="module")
def service(served: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("process")
    with running(copy_of(served, folder), folder / "log.txt", "--timeout", "3") as service:
        yield service
    assert "POST no route answered 413" in service.log.read_text()


def test_it_scores(service: Running) -> None:
    status, body = service.ask("POST", "/v1/score", b'{"user_id": "u1", "item_ids": [3, 999]}')
    assert status == 200
    assert [one["status"] for one in json.loads(body)["items"]] == ["ok", "unknown"]


def test_the_example_ranks_and_goes_without(service: Running) -> None:
    def rank(address: str, user: str) -> tuple[list[str], str]:
        command = [sys.executable, "examples/serving/rank.py", address, user, "999", "3", "4"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout.split(), done.stderr

    body = service.ask("POST", "/v1/score", b'{"user_id": "u1", "item_ids": [3, 4]}')[1]
    best = sorted(json.loads(body)["items"], key=lambda one: -one["probability"])
    assert rank(f"http://127.0.0.1:{service.port}", "u1")[0] == [
        *(str(one["item_id"]) for one in best),
        "999",
    ]
    for address, user in ((f"http://127.0.0.1:{service.port}", "u" * 300), ("http://127.0.0.1:1", "u1")):
        order, said = rank(address, user)
        assert order == ["999", "3", "4"]
        assert said.startswith("unranked: ")


def test_a_million_ids_are_refused_before_they_are_read(service: Running) -> None:
    body = json.dumps({"user_id": "u1", "item_ids": list(range(10**6))}).encode()
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as client:
        head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode())  # and not the body
        assert client.recv(12) == b"HTTP/1.1 413"


def test_a_request_that_comes_byte_by_byte_is_not_waited_for(service: Running) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as client:
        client.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert client.recv(12) == b"HTTP/1.1 408"
    assert service.ask("GET", "/healthz")[0] == 200


@pytest.mark.parametrize("begun", [b"", b"POST /v1/score HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_does_not_come_is_not_waited_for(service: Running, begun: bytes) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as client:
        client.sendall(begun)
        status, answer = said(client)
    if not begun:
        assert not status
        return
    assert status == b"HTTP/1.1 408 Request Timeout"
    assert json.loads(answer)["detail"] == "the request did not arrive within 3 s; send it again."


def test_the_head_of_a_further_request_is_not_waited_for_either(service: Running) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 200"
        client.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert b"HTTP/1.1 408 Request Timeout" in b"".join(said(client))


def test_a_head_without_end_is_refused(service: Running) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X-Y: 1\r\n" * 9_400)
        status, answer = said(client)
    assert status == b"HTTP/1.1 431 Request Header Fields Too Large"
    assert set(json.loads(answer)) == {"detail", "request_id"}


def test_who_sends_all_of_what_is_too_large_reads_why(service: Running) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as client:
        client.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n")
        client.sendall(b" " * 9_000_000)
        assert client.recv(12) == b"HTTP/1.1 413"
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"HTTP/1.1 200 OK" in b"".join(said(client))


def test_a_client_that_does_not_read_is_not_waited_for(service: Running) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", service.port))
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 1_000)
        UNTIL_LOGGED(lambda: log_has(service, "an answer was not read on for 3 s"))
    assert service.ask("GET", "/healthz")[0] == 200


def test_the_images_health_check_passes_while_a_service_lives_and_only_then(service: Running) -> None:
    for port, passes in ((service.port, True), (free_port(), False)):
        done = subprocess.run(health_check(port), capture_output=True, check=False)
        assert (done.returncode == 0) == passes


def test_an_answer_does_not_name_the_server(service: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request("GET", "/healthz")
    answer = connection.getresponse()
    assert answer.getheader("server") is None
    assert answer.getheader("x-content-type-options") == "nosniff"
    connection.close()
