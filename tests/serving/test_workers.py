"""`bahe serve --workers`: one truth, whichever process answers; one that dies is missed by nobody."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

import bahe
from bahe_core.errors import BadInput
from bahe_core.home import Home
from serving.http.metrics import Metrics
from serving.http.shared_metrics import SharedMetrics
from tests.support import REPOSITORY
from tests.support.home_contents import copy_of
from tests.support.service_process import Running, free_port, running, serve_command, wait_until_ready

SOON = Retrying(
    retry=retry_if_exception_type((AssertionError, psutil.Error)),
    stop=stop_after_delay(90),
    wait=wait_fixed(0.3),
)


@pytest.fixture(scope="module")
def service(served: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("workers")
    with running(copy_of(served, folder), folder / "log.txt", "--workers", "2", "--live") as service:
        yield service


def check(truth: bool) -> None:
    assert truth


def workers(service: Running) -> set[int]:
    """The processes that answer; one that was killed and is not replaced yet is none."""
    children = psutil.Process(service.pid).children()
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return {child.pid for child in alive if "spawn_main" in " ".join(child.cmdline())}


def behaviors(service: Running) -> set[int]:
    """What ten requests, each over a connection of its own, say of a user's history."""
    answers = [service.ask("GET", "/v1/users/u1") for _ in range(10)]
    assert {status for status, _ in answers} == {200}
    return {json.loads(body)["behaviors"] for _, body in answers}


def answered(metrics: str) -> dict[str, float]:
    """Answers of 200 by route."""
    return {
        sample.labels["route"]: sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == "bahe_requests_total" and sample.labels["status"] == "200"
    }


@pytest.mark.slow
def test_what_one_was_told_all_answer_with_also_those_that_come_later(service: Running) -> None:
    (before,) = behaviors(service)
    at = datetime.now(UTC).isoformat()
    behavior = {"user_id": "u1", "channel": "liked", "text": "a film of the sea", "event_timestamp": at}
    status, body = service.ask("POST", "/v1/behaviors", json.dumps(behavior).encode())
    assert status == 200, body
    assert behaviors(service) == {before + 1}
    SOON(lambda: check(len(workers(service)) == 2))
    for first in sorted(workers(service)):
        os.kill(first, signal.SIGKILL)
        SOON(lambda: check(len(workers(service)) == 2))
        assert first not in workers(service)
        assert behaviors(service) == {before + 1}


@pytest.mark.slow
def test_metrics_are_of_all_workers_whichever_is_asked(service: Running) -> None:
    def of_users() -> float:
        return answered(service.ask("GET", "/metrics")[1].decode())["/v1/users/{user_id:path}"]

    def settled() -> None:
        counts = {of_users() for _ in range(8)}
        assert counts == {max(counts)}

    behaviors(service)
    SOON(settled)
    before = of_users()
    behaviors(service)
    SOON(lambda: check({of_users() for _ in range(8)} == {before + 10}))


@pytest.mark.slow
def test_workers_that_cannot_start_are_one_sentence_and_exit_code_2(served: Home, tmp_path: Path) -> None:
    home = copy_of(served, tmp_path)
    shutil.rmtree(home.models)
    command = serve_command(home, free_port(), "--workers", "2")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "bahe: the live model cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_workers_answer_what_they_have_and_end_when_their_parent_is_killed(
    served: Home, tmp_path: Path
) -> None:
    """No process and no folder is left, the port is free, and the request under way has its answer."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    port, log = free_port(), tmp_path / "log.txt"
    command = serve_command(copy_of(served, tmp_path), port, "--workers", "2", "--timeout", "60")
    with log.open("w") as file:
        environment = {**os.environ, "TMPDIR": str(temporary), "BAHE_LOG": "json"}
        parent = subprocess.Popen(command, cwd=REPOSITORY, stderr=file, env=environment)
    service = Running(port, parent.pid, log)
    orphans: list[psutil.Process] = []
    try:
        wait_until_ready(service)
        SOON(lambda: check(len(list(temporary.glob("bahe-workers-*/*.json"))) == 2))
        orphans = [psutil.Process(one) for one in workers(service)]
        assert len(orphans) == 2
        body = b'{"user_id": "u1", "item_ids": [3]}'
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            head = "POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:5])
            # Once another connection is answered, the head of this one has been read.
            assert behaviors(service)
            parent.kill()
            parent.wait(timeout=60)
            SOON(lambda: check(log.read_text().count("the parent of this worker was killed") == 2))
            client.sendall(body[5:])
            assert client.recv(12) == b"HTTP/1.1 200"
        assert psutil.wait_procs(orphans, timeout=60)[1] == []
    finally:
        parent.kill()
        for orphan in orphans:
            orphan.kill() if orphan.is_running() else None
    for line in filter(lambda one: "the parent" in one, log.read_text().splitlines()):
        assert json.loads(line)["logger"] == "serving.http.server"
    assert list(temporary.glob("bahe-workers-*")) == []
    socket.create_server(("127.0.0.1", port)).close()
    assert "Traceback" not in log.read_text()


def test_less_than_one_worker_and_a_port_that_is_taken_are_refused(served: Home) -> None:
    with pytest.raises(BadInput, match="at least 1"):
        bahe.open(served.root).serve(workers=0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for workers in (1, 2):
            with pytest.raises(BadInput, match=rf"port {port} of 127.0.0.1 .*already in use.*--port"):
                bahe.open(served.root).serve(port=port, workers=workers)


def test_counts_of_others_are_added_and_the_dead_do_no_work(tmp_path: Path) -> None:
    own, other = Metrics(), Metrics()
    other.watch(lambda: 3)
    own.answered("/a", 200, 0.003)
    for seconds in (0.003, 4.0):
        other.answered("/a", 200, seconds)
    other.pushed("clicks", 2)
    mine, its = SharedMetrics(own, tmp_path), SharedMetrics(other, tmp_path)
    mine.write()
    its._own = tmp_path / "1-a.json"  # a process that lives as long as the machine
    its.write()
    text = own.text(None, mine.others())
    assert answered(text) == {"/a": 3}
    assert "bahe_requests_in_work 3" in text
    assert "bahe_clicks_pushed_total 2" in text
    assert 'bahe_request_seconds_bucket{route="/a",le="0.004"} 2' in text
    assert 'bahe_request_seconds_count{route="/a"} 3' in text
    (tmp_path / "1-a.json").rename(tmp_path / f"{2**22 + 1}-a.json")  # beyond the largest process id
    assert "bahe_requests_in_work 0" in own.text(None, mine.others())
    assert answered(own.text(None, mine.others())) == {"/a": 3}
