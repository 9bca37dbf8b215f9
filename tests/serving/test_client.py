"""The client of a service: against a live one over a socket, and against one that is too busy."""

from __future__ import annotations

import asyncio
import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import uvicorn

from bahe_core.errors import BadInput, UnknownEntity, Unreachable
from bahe_core.home import Home
from serving import client as client_module
from serving.client import AsyncClient, Client
from serving.http.api import create_app
from serving.http.keys import new_key
from tests.support.home_contents import copy_of


@contextmanager
def running(home: Home) -> Iterator[str]:
    """A live service of the home on a socket, and its address."""
    config = uvicorn.Config(create_app(home, live=True), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def home(served: Home, tmp_path_factory: pytest.TempPathFactory) -> Home:
    return copy_of(served, tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module")
def url(home: Home) -> Iterator[str]:
    with running(home) as address:
        yield address


def test_every_method_answers(url: str) -> None:
    now = datetime.now(UTC)
    with Client(url, seconds=20) as service:
        scores = service.score("u1", [3, 999], context={"device": "phone"}, at=now)
        assert [(one.item_id, one.status) for one in scores.items] == [(3, "ok"), (999, "unknown")]
        best = service.recommend("u1", 3, include_seen=True)
        assert len(best.scores) == 3
        assert service.recommend("nobody at all").cold
        assert 3 not in {one.item_id for one in service.similar_items(3, 24).items}
        assert "u1" not in {one.user_id for one in service.similar_users("u1", 20).users}
        atom = service.similar_to_text("liked word1", 3).atoms[0]
        assert atom.atom_id not in {one.atom_id for one in service.similar_atoms(atom.atom_id, 5).atoms}
        columns = service.features(["item_stats:item_impressions"], {"item_id": [1, 2]}).columns
        assert len(columns["item_impressions"]) == 2
        full = service.features(
            ["item_stats:item_impressions"], {"item_id": [1]}, full_feature_names=True
        ).columns
        assert list(full) == ["item_stats__item_impressions"]
        both = {"user_id": ["u1"], "item_id": [1]}
        by_service = service.features("ctr_online", both, full_feature_names=True).columns
        assert "item_stats__item_click_rate" in by_service
        table = service.features_table("ctr_online", both, full_feature_names=True)
        assert table.to_pydict() == by_service
        before = service.user("u1")
        after = service.behavior("u1", "liked", "liked something new", item_id=4, event_id="one")
        assert after.behaviors == before.behaviors + 1
        row = {"impression_id": 70_000, "user_id": "u1", "item_id": 5, "event_timestamp": now}
        assert service.impressions([row]).new == 1
        assert service.impressions([row | {"user_id": "u2"}]).known == 1
        assert service.clicks([{"impression_id": 70_000, "event_timestamp": now}]).new == 1
        assert "5" in service.user("u1").seen_items


def test_the_awaited_one_says_the_same(url: str) -> None:
    async def ask() -> None:
        async with AsyncClient(url, seconds=20) as service:
            many = await asyncio.gather(*(service.score("u1", [item]) for item in range(8)))
            with Client(url, seconds=20) as same:
                assert [one.items[0].probability for one in many] == pytest.approx(
                    [one.probability for one in same.score("u1", list(range(8))).items], rel=1e-4
                )
                assert (await service.user("u1")).behaviors == same.user("u1").behaviors
            assert (await service.recommend("u1", 2)).scores
            alike = await service.similar_items(3, 4)
            with Client(url, seconds=20) as same:
                assert alike == same.similar_items(3, 4)
                assert await service.similar_users("u3", 4) == same.similar_users("u3", 4)
                found = await service.similar_to_text("word1 word2", 4)
                assert found == same.similar_to_text("word1 word2", 4)
                atom = found.atoms[0].atom_id
                assert await service.similar_atoms(atom, 4) == same.similar_atoms(atom, 4)
            asked = {"item_id": [1]}
            assert (await service.features(["item_stats:item_clicks"], asked)).columns["item_clicks"]
            table = await service.features_table(["item_stats:item_clicks"], asked)
            assert table.column_names == ["item_clicks"]
            now = datetime.now(UTC)
            sent = await service.behavior("u2", "liked", "liked that too")
            assert (await service.user("u2")).behaviors == sent.behaviors
            row = {"impression_id": 70_001, "user_id": "u2", "item_id": 5, "event_timestamp": now}
            assert (await service.impressions([row])).new == 1
            assert (await service.clicks([{"impression_id": 70_001, "event_timestamp": now}])).new == 1
            with pytest.raises(UnknownEntity, match="nobody"):
                await service.user("nobody")

    asyncio.run(ask())


def test_what_is_refused_is_said_in_the_services_words(url: str, home: Home) -> None:
    with Client(url, seconds=20) as service:
        with pytest.raises(UnknownEntity, match=r"nobody/at all is not in the online store.*\[request "):
            service.user("nobody/at all")
        with pytest.raises(BadInput, match="choose from liked, disliked"):
            service.behavior("u1", "bought", "a hat")
        for wrong in (
            lambda: service.score("u1", []),
            lambda: service.score("", [1]),
            lambda: service.recommend("u1", 0),
            lambda: service.similar_to_text(""),
            lambda: service.similar_to_text("a" * 1001),
            lambda: service.clicks([{"impression_id": 1}]),
            lambda: service.impressions([{"impression_id": 1, "color": "red"}]),
        ):
            with pytest.raises(BadInput, match="correct it"):
                wrong()
        good = {"impression_id": 1, "event_timestamp": datetime.now(UTC)}
        with pytest.raises(BadInput, match=r"clicks\.1\.event_timestamp"):
            service.clicks([good, {"impression_id": 2}])
        with pytest.raises(BadInput, match=r"clicks\.0\.kind"):
            service.clicks([{**good, "kind": "a name of ours"}])


def test_a_key_is_sent(served: Home, tmp_path: Path) -> None:
    home = copy_of(served, tmp_path)
    key = new_key(home, "ranking", ["score"])
    with running(home) as address:
        with Client(address, seconds=20) as without, pytest.raises(BadInput, match="key"):
            without.score("u1", [1])
        with Client(address, api_key=key, seconds=20) as service:
            assert service.score("u1", [1]).items[0].status == "ok"
            with pytest.raises(BadInput, match="write"):
                service.behavior("u1", "liked", "liked it")


class _Busy(http.server.BaseHTTPRequestHandler):
    """Answers 503 until it was asked often enough."""

    asked = 0
    answers_from = 3

    def do_POST(self) -> None:
        _Busy.asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        ready = _Busy.asked >= _Busy.answers_from
        body = {"new": 1, "known": 0, "refused": []} if ready else {"detail": "busy", "request_id": "r"}
        content = json.dumps(body).encode()
        self.send_response(200 if ready else 503)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def busy() -> Iterator[str]:
    _Busy.asked, _Busy.answers_from = 0, 3
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Busy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


CLICK = [{"impression_id": 1, "event_timestamp": datetime.now(UTC)}]


@pytest.mark.parametrize("awaited", [False, True])
def test_a_busy_service_is_asked_again_while_there_is_time(busy: str, awaited: bool) -> None:
    async def ask(seconds: float) -> int:
        async with AsyncClient(busy, seconds=seconds) as service:
            return (await service.clicks(CLICK)).new

    def clicks(seconds: float) -> int:
        if awaited:
            return asyncio.run(ask(seconds))
        with Client(busy, seconds=seconds) as service:
            return service.clicks(CLICK).new

    assert clicks(10) == 1
    assert _Busy.asked == 3
    _Busy.answers_from = 10**9
    start = time.monotonic()
    with pytest.raises(Unreachable, match=r"did not answer within 0.5 s \(busy \[request r\]\)"):
        clicks(0.5)
    assert time.monotonic() - start < 5
    assert 4 < _Busy.asked < 30, "pauses grow"


def test_nobody_there_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.01)
    with (
        Client("http://127.0.0.1:9", seconds=0.3) as service,
        pytest.raises(Unreachable, match="ConnectError"),
    ):
        service.score(1, [1])


def test_a_ranking_service_imports_the_client_alone() -> None:
    heavy = {"feast", "duckdb", "pyarrow", "torch"}
    code = f"import sys, serving.client; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
