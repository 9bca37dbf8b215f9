"""What every request passes: keys, limits, deadlines, overload, ids, headers, the log and the metrics.

Most of it is shown on a small application of the test's own, since no store is involved.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

from bahe_core.errors import BadInput
from bahe_core.home import Home
from serving.http.guards import NOWHERE, Guard, Limits, Refused
from serving.http.keys import ApiKeys, new_key, revoke_key
from serving.http.metrics import Metrics
from serving.http.work import Work


def guarded(
    keys: ApiKeys | None = None,
    scope_of: Callable[[str], str | None] = lambda path: {"/open": None, "/push": "write"}.get(
        path, "read"
    ),
    **limits: Any,
) -> tuple[FastAPI, Metrics]:
    app, metrics = FastAPI(), Metrics()
    app.add_middleware(Guard, limits=Limits(**limits), metrics=metrics, scope_of=scope_of, keys=keys)

    @app.post("/push")
    async def push(request: Request) -> int:
        return len(await request.body())

    @app.get("/open")
    async def opened() -> str:
        return "open"

    @app.get("/users/{name}")
    async def user(name: str) -> str:
        return name

    @app.get("/broken")
    async def broken() -> str:
        raise RuntimeError("/srv/secret/place is broken")

    return app, metrics


def test_a_large_body_is_refused_whether_or_not_it_says_so() -> None:
    client = TestClient(guarded(body_bytes=1000)[0])
    assert client.post("/push", content=b"x" * 1000).json() == 1000
    for content in (b"x" * 1001, iter([b"x" * 600, b"x" * 600])):
        answer = client.post("/push", content=content)  # type: ignore[arg-type]
        assert answer.status_code == 413
        assert answer.json()["detail"] == "the request is larger than 1,000 bytes; send less at once."
    said = {"Content-Length": "9" * 400}
    assert client.post("/push", content=b"x", headers=said).status_code in (400, 413)


def test_a_long_address_is_refused() -> None:
    client = TestClient(guarded(query_bytes=500)[0])
    answer = client.get("/users/x", params={"q": "x" * 500})
    assert answer.status_code == 414
    assert len(answer.text) < 300


def test_a_body_that_does_not_arrive_is_not_waited_for() -> None:
    app, _ = guarded(seconds=0.05)
    sent: list[dict[str, Any]] = []

    async def slow() -> dict[str, Any]:
        if not sent:
            await asyncio.sleep(0)
            await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope("POST", "/push"), slow, send))
    assert sent[0]["status"] == 408


def scope(method: str, path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "app": None,
        "root_path": "",
        "scheme": "http",
        "server": ("test", 80),
    }


def test_work_that_nobody_waits_for_is_not_begun() -> None:
    """One thread is busy; the client of the next request goes away; its work is never made."""
    begun: list[str] = []
    busy, freed = threading.Event(), threading.Event()
    work = Work("test", threads=1, waiting=5, seconds=30)
    app = FastAPI()
    app.add_middleware(Guard, limits=Limits(), metrics=Metrics(), scope_of=lambda _: None, keys=None)

    @app.get("/work/{name}")
    async def route(name: str) -> str:
        def job() -> str:
            begun.append(name)
            busy.set()
            freed.wait(30)
            return name

        return await work.run(job)

    async def scenario() -> int:
        async def nothing(_: Any) -> None:
            pass

        def client(gone: asyncio.Event) -> Callable[[], Any]:
            messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

            async def receive() -> dict[str, Any]:
                for message in messages:
                    return message
                await gone.wait()
                return {"type": "http.disconnect"}

            return receive

        stays, leaves = asyncio.Event(), asyncio.Event()
        first = asyncio.ensure_future(app(scope("GET", "/work/first"), client(stays), nothing))
        await asyncio.to_thread(busy.wait, 30)
        second = asyncio.ensure_future(app(scope("GET", "/work/second"), client(leaves), nothing))
        while work.admitted < 2:
            await asyncio.sleep(0)
        leaves.set()
        await second
        left = work.admitted
        freed.set()
        await first
        return left

    assert asyncio.run(scenario()) == 1
    assert begun == ["first"]


def test_more_than_the_service_can_do_is_refused_at_once_and_room_comes_back() -> None:
    work = Work("test", threads=1, waiting=1, seconds=30)
    freed = threading.Event()

    async def scenario() -> None:
        both = [asyncio.ensure_future(work.run(lambda: freed.wait(30))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="as much to do as it can") as refused:
            await work.run(lambda: True)
        assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "1"})
        freed.set()
        assert await asyncio.gather(*both) == [True, True]
        assert await work.run(lambda: "again") == "again"

    asyncio.run(scenario())


def test_an_answer_that_takes_too_long_is_not_waited_for() -> None:
    work = Work("test", threads=1, waiting=1, seconds=0.05)
    freed = threading.Event()

    async def scenario() -> None:
        with pytest.raises(Refused, match=r"no answer within 0\.05 s") as refused:
            await work.run(lambda: freed.wait(30))
        assert refused.value.status == 503
        assert work.admitted == 1, "what runs keeps its room"
        freed.set()

    asyncio.run(scenario())


def test_a_timeout_of_what_is_asked_is_its_own() -> None:
    work = Work("test", threads=1, waiting=1, seconds=60)

    def raise_timeout() -> None:
        raise TimeoutError("of the store's own")

    with pytest.raises(TimeoutError, match="of the store's own"):
        asyncio.run(work.run(raise_timeout))


def test_request_ids_and_headers() -> None:
    client = TestClient(guarded()[0])
    answer = client.get("/open", headers={"X-Request-ID": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"
    made = [client.get("/open", headers={"X-Request-ID": "a b\tc" * 20}) for _ in range(2)]
    assert len({one.headers["x-request-id"] for one in made} | {"abc-1"}) == 3


def test_browsers_are_told_to_stay_with_tls_where_they_came_by_it() -> None:
    """Whatever the answer is; over plain HTTP it would lock people out of a service without TLS."""
    app = guarded()[0]
    plain, secure = TestClient(app), TestClient(app, base_url="https://service")
    for path in ("/open", "/nowhere", "/broken"):
        assert "strict-transport-security" not in plain.get(path).headers
        assert secure.get(path).headers["strict-transport-security"] == "max-age=31536000"


def test_a_fault_of_the_service_tells_the_log_and_not_the_client(caplog: pytest.LogCaptureFixture) -> None:
    answer = TestClient(guarded()[0]).get("/broken")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    (fault,) = (record for record in caplog.records if record.exc_info)
    assert answer.json()["request_id"] in fault.getMessage()


def test_what_is_refused_leaves_one_line_without_what_was_sent(caplog: pytest.LogCaptureFixture) -> None:
    client = TestClient(guarded(body_bytes=10)[0])
    with caplog.at_level(logging.WARNING):
        client.get("/users/jane")
        assert not caplog.records
        client.post("/users/jane")
        client.post("/push", content=b"jane was here and there")
        client.get("/nowhere/jane")
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" in ")[0] for line in lines] == [
        "POST /users/{name} answered 405",
        "POST no route answered 413",
        "GET no route answered 404",
    ]
    assert not any("jane" in line for line in lines)


def test_metrics_count_answers_by_route_and_status() -> None:
    app, metrics = guarded()
    client = TestClient(app)
    for name in ("a", "b", "c"):
        client.get(f"/users/{name}")
    client.get("/nowhere")
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.text())
        for sample in family.samples
    }
    assert samples["bahe_requests_total", ("route", "/users/{name}"), ("status", "200")] == 3
    assert samples["bahe_requests_total", ("route", "no route"), ("status", "404")] == 1
    assert samples["bahe_request_seconds_count", ("route", "/users/{name}")] == 3


def test_keys_open_what_they_are_for(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home")
    reader, writer = new_key(home, "reader", ["read"]), new_key(home, "writer", ["write"])
    client = TestClient(guarded(ApiKeys(home))[0])

    def statuses(**headers: str) -> list[int]:
        got = [client.get("/open", headers=headers), client.get("/users/x", headers=headers)]
        return [one.status_code for one in [*got, client.post("/push", headers=headers)]]

    assert statuses() == [200, 401, 401]
    assert statuses(Authorization="Bearer bahe_wrong") == [200, 401, 401]
    assert statuses(Authorization=f"Bearer {reader}") == [200, 200, 403]
    assert statuses(**{"X-API-Key": writer}) == [200, 403, 200]
    assert client.get("/nowhere").status_code == 401, "nor does it tell what there is"
    kept = home.api_keys.read_text()
    assert reader not in kept
    assert reader.removeprefix("bahe_") not in kept
    assert home.api_keys.stat().st_mode & 0o077 == 0
    revoke_key(home, "reader")
    assert statuses(Authorization=f"Bearer {reader}") == [200, 401, 401]
    home.api_keys.write_text("no json")
    assert statuses(Authorization=f"Bearer {writer}") == [200, 503, 503]


def test_keys_are_needed_from_when_there_is_one(tmp_path: Path) -> None:
    """A service for this machine only, which was started before."""
    home = Home.at(tmp_path / "home")
    home.create()
    client = TestClient(guarded(ApiKeys(home, required=False))[0])
    assert client.get("/users/x").status_code == 200
    key = {"X-API-Key": new_key(home, "reader", ["read"])}
    assert [client.get("/users/x", headers=one).status_code for one in ({}, key)] == [401, 200]
    revoke_key(home, "reader")
    assert [client.get("/users/x", headers=one).status_code for one in ({}, key)] == [401, 401]


def test_a_path_asks_for_its_scope_wherever_the_application_is_mounted(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home")
    key = {"X-API-Key": new_key(home, "reader", ["read"])}
    scopes = {"/open": None, "/push": "write", "/users/x": "read"}
    app, outer = guarded(ApiKeys(home), lambda path: scopes.get(path, NOWHERE))[0], FastAPI()
    outer.mount("/read/here", app)
    for client, prefix in ((TestClient(app), ""), (TestClient(outer), "/read/here")):
        assert client.get(f"{prefix}/open").status_code == 200
        assert client.post(f"{prefix}/push", headers=key).status_code == 403
        assert client.get(f"{prefix}/users/x", headers=key).status_code == 200
        assert client.get(f"{prefix}/users/x").status_code == 401
        unlisted = client.get(f"{prefix}/broken", headers=key)
        assert unlisted.status_code == 404
        assert "nothing at this address" in unlisted.json()["detail"]


def test_keys_that_are_changed_at_once_are_all_changed(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home")
    for number in range(8):
        new_key(home, f"old {number}")
    together = threading.Barrier(16)

    def change(number: int) -> None:
        together.wait(30)
        if number < 8:
            revoke_key(home, f"old {number}")
        else:
            new_key(home, f"new {number}")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(change, range(16)))
    names = {row["name"] for row in json.loads(home.api_keys.read_text())}
    assert names == {f"new {number}" for number in range(8, 16)}
    assert not list(home.root.glob("*.part"))


def test_a_key_needs_a_name_of_its_own_and_a_scope(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home")
    new_key(home, "a")
    for name, scopes in (("a", ["read"]), ("", ["read"]), ("b", ["all"]), ("b", [])):
        with pytest.raises(BadInput):
            new_key(home, name, scopes)
    with pytest.raises(BadInput, match="no key is named 'c'"):
        revoke_key(home, "c")
