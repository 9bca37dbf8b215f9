"""`bahe serve` as a process of its own: starts, answers over a socket, refuses what is too much, ends."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from bahe_core.home import Home
from tests.support.home_contents import copy_of

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def port(served: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("process")
    home = copy_of(served, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "bahe", "serve", "--home", str(home.root), "--port", str(port)]
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--timeout", "3"], cwd=REPOSITORY, stderr=file)
    try:
        retrying = Retrying(
            retry=retry_if_exception_type(OSError), stop=stop_after_delay(120), wait=wait_fixed(0.2)
        )
        assert retrying(ask, port, "GET", "/readyz")[0] == 200
        yield port
    finally:
        process.terminate()
        assert process.wait(timeout=60) in (0, -15)
    said = log.read_text()
    assert "POST no route answered 413" in said
    assert "Traceback" not in said


def ask(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body or None, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_it_scores(port: int) -> None:
    status, body = ask(port, "POST", "/v1/score", b'{"user_id": "u1", "item_ids": [3, 999]}')
    assert status == 200
    assert [one["status"] for one in json.loads(body)["items"]] == ["ok", "unknown"]


def test_the_example_ranks_and_goes_without(port: int) -> None:
    def rank(service: str, user: str) -> tuple[list[str], str]:
        command = [sys.executable, "examples/serving/rank.py", service, user, "999", "3", "4"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout.split(), done.stderr

    body = ask(port, "POST", "/v1/score", b'{"user_id": "u1", "item_ids": [3, 4]}')[1]
    best = sorted(json.loads(body)["items"], key=lambda one: -one["probability"])
    assert rank(f"http://127.0.0.1:{port}", "u1")[0] == [*(str(one["item_id"]) for one in best), "999"]
    for service, user in ((f"http://127.0.0.1:{port}", "u" * 300), ("http://127.0.0.1:1", "u1")):
        order, said = rank(service, user)
        assert order == ["999", "3", "4"]
        assert said.startswith("unranked: ")


def test_a_million_ids_are_refused_before_they_are_read(port: int) -> None:
    body = json.dumps({"user_id": "u1", "item_ids": list(range(10**6))}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode())  # and not the body
        assert client.recv(12) == b"HTTP/1.1 413"


def test_a_request_that_comes_byte_by_byte_is_not_waited_for(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert client.recv(12) == b"HTTP/1.1 408"
    assert ask(port, "GET", "/healthz")[0] == 200


def test_an_answer_does_not_name_the_server(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/healthz")
    answer = connection.getresponse()
    assert answer.getheader("server") is None
    assert answer.getheader("x-content-type-options") == "nosniff"
    connection.close()
