"""Scores of many users in one request: each as if it had been asked for alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bahe
from bahe_core.errors import BadInput, UnknownEntity
from bahe_core.home import Home
from feast_ducklake.online.store import GuardedOnlineStore
from serving.client import AsyncClient, Client
from serving.http.api import create_app
from serving.live.live_lookup import LiveLookup
from serving.lookup.candidates import ItemsOfUser
from serving.lookup.online_lookup import OnlineLookup
from serving.lookup.request_log import RequestLog, read_requests
from tests.serving.test_client import running
from tests.support.home_contents import copy_of
from tests.support.logs import LONG

AT = "2024-06-01T12:00:00Z"
USERS = ["u0", "u1", "u2", LONG, "u_cold", "never seen", "\ud800", "x" * 200, 7]
ITEMS = [0, 1, 2, 3, "4", 24, 99, "three", "x" * 200, "03", "\ud800"]
ONE = {"user_id": "u1", "item_ids": [3]}
REQUESTS = st.fixed_dictionaries(
    {
        "user_id": st.sampled_from(USERS),
        "item_ids": st.lists(st.sampled_from(ITEMS), min_size=1, max_size=8),
        "at": st.sampled_from([AT, "2024-03-01T00:00:00+02:00"]),
    },
    optional={"context": st.sampled_from([{}, {"device": "phone"}, {"device": None}])},
)


@pytest.fixture(scope="module")
def live(served: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """Takes in behaviors, impressions and clicks, of known users and of one who is new."""
    home = copy_of(served, tmp_path_factory.mktemp("batch"))
    with TestClient(create_app(home, live=True)) as client:
        now = datetime.now(UTC).isoformat()
        behavior = {"user_id": "u1", "channel": "liked", "text": "liked that", "event_timestamp": now}
        assert client.post("/v1/behaviors", json=behavior).status_code == 200
        shown = [
            {"impression_id": 90_000 + number, "user_id": user, "item_id": 3, "event_timestamp": now}
            for number, user in enumerate(["u2", "never seen"])
        ]
        assert client.post("/v1/impressions", json={"impressions": shown}).json()["new"] == 2
        clicks = [{"impression_id": 90_001, "event_timestamp": now}]
        assert client.post("/v1/clicks", json={"clicks": clicks}).json()["new"] == 1
        yield client


def post(client: TestClient, route: str, body: dict[str, Any]) -> Any:
    """As JSON says it, halves of surrogate pairs too."""
    return client.post(route, content=json.dumps(body), headers={"Content-Type": "application/json"})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests=st.lists(REQUESTS, min_size=1, max_size=6))
def test_a_batch_is_its_single_answers(live: TestClient, requests: list[dict[str, Any]]) -> None:
    batch = post(live, "/v1/score/batch", {"requests": requests})
    singles = [post(live, "/v1/score", one) for one in requests]
    if any(one.status_code == 422 for one in singles):  # what is no text at all
        assert batch.status_code == 422
        return
    assert batch.status_code == 200, batch.text
    assert len(batch.json()["answers"]) == len(requests)
    for answer, single in zip(batch.json()["answers"], singles, strict=True):
        alone = single.json()
        assert alone.pop("model_version") == batch.json()["model_version"]
        assert [one["probability"] for one in answer["items"]] == pytest.approx(
            [one["probability"] for one in alone["items"]], abs=1e-6
        )
        for one in (*answer["items"], *alone["items"]):
            del one["probability"]
        assert answer == alone


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"requests": []}, 422, "requests: List should have at least 1 item"),
        ({"requests": None}, 422, "requests: Input should be a valid list"),
        ({"requests": [ONE], "user_id": "u1"}, 422, "user_id: Extra inputs are not permitted"),
        ({"requests": [ONE] * 1001}, 422, "at most 1000"),
        (
            {"requests": [{"user_id": "u1", "item_ids": [3] * 101}] * 100},
            422,
            "10,100 items are asked for together, and 10,000 are the most",
        ),
        ({"requests": [{"user_id": "u1", "item_ids": []}]}, 422, "requests.0.item_ids"),
        (
            {"requests": [ONE, {"user_id": "u1", "item_ids": [True]}]},
            422,
            "requests.1.item_ids.0",
        ),
        (
            {"requests": [{"user_id": "u1", "item_ids": [3], "context": {"colour": "red"}}]},
            400,
            "colour is not a context column",
        ),
        (
            {
                "requests": [
                    ONE,
                    {"user_id": "nobody", "item_ids": [3], "unknown_user": "refuse"},
                ]
            },
            404,
            "user nobody is not in the online store",
        ),
    ],
)
def test_a_batch_that_cannot_be_given(
    live: TestClient, change: dict[str, Any], status: int, said: str
) -> None:
    answer = live.post("/v1/score/batch", json=change)
    assert answer.status_code == status
    assert said in answer.json()["detail"]
    assert len(answer.text) < 400


def test_the_largest_batch_is_answered(live: TestClient) -> None:
    requests = [
        {"user_id": f"u{i % 12}", "item_ids": [j % 25 for j in range(i, i + 10)]} for i in range(1000)
    ]
    answers = live.post("/v1/score/batch", json={"requests": requests}).json()["answers"]
    assert len(answers) == 1000
    assert all(one["status"] == "ok" for answer in answers for one in answer["items"])


class _Counted:
    """How often the online store was asked."""

    def __init__(self, store: GuardedOnlineStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads, real = 0, store.read_stored

        def counted(*args: Any) -> Any:
            self.reads += 1
            return real(*args)

        monkeypatch.setattr(store, "read_stored", counted)


def test_more_users_are_no_more_reads_of_the_store(served: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = OnlineLookup(served)
    lookup.score_each("u1", [3])  # what is read once
    counted = _Counted(lookup._store.provider.online_store, monkeypatch)
    reads = []
    for users in (["u1"], [*(f"u{i}" for i in range(10)), "never seen"]):
        before = counted.reads
        lookup.score_batch([ItemsOfUser(user_id=user, item_ids=[3, 4, 5]) for user in users])
        reads.append(counted.reads - before)
    assert 0 < reads[0] == reads[1]


def test_a_batch_is_of_one_model_whatever_is_published_meanwhile(
    served: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookup = OnlineLookup(served)
    version, asked = lookup.live_version(), []

    def once() -> str:
        asked.append(version)
        return version if len(asked) == 1 else "another"

    monkeypatch.setattr(lookup, "live_version", once)
    users = ["u1", "u2", "never seen", "\ud800"]
    scores = lookup.score_batch([ItemsOfUser(user_id=user, item_ids=[3]) for user in users])
    assert [one.model_version for one in scores] == [version] * 4


def test_each_user_of_a_batch_is_logged_for_the_audit(served: Home, tmp_path: Path) -> None:
    home = copy_of(served, tmp_path)
    lookup = LiveLookup(home, RequestLog(home))
    lookup.score_batch([ItemsOfUser(user_id=user, item_ids=[3, 99]) for user in ("u1", "u2", "nobody")])
    assert [(one.user_id, one.item_ids) for one in read_requests(home)] == [("u2", [3]), ("u1", [3])]


def test_from_python_and_by_the_client(served: Home, tmp_path: Path) -> None:
    home = copy_of(served, tmp_path)
    at = datetime.fromisoformat(AT)
    asked = [
        bahe.ItemsOfUser(user_id="u1", item_ids=[3, 99], at=at, context={"device": "phone"}),
        bahe.ItemsOfUser(user_id="nobody", item_ids=[3], at=at),
    ]
    project = bahe.open(home.root)
    expected = project.score_batch(asked)
    assert [one.cold for one in expected] == [False, True]
    assert expected[0].probabilities[1] is None
    with pytest.raises(UnknownEntity, match="nobody"):
        project.score_batch([bahe.ItemsOfUser(user_id="nobody", item_ids=[3], unknown_user="refuse")])
    assert project.score_batch([]) == []
    rows: list[dict[str, object]] = [
        {"user_id": "u1", "item_ids": (3, 99), "at": at, "context": {"device": "phone"}},
        {"user_id": "nobody", "item_ids": [3], "at": at},
    ]
    with running(home) as url:
        with Client(url, seconds=20) as service:
            answer = service.score_batch(rows)
            with pytest.raises(BadInput, match="Extra inputs are not permitted"):
                service.score_batch([{"user_id": "u1", "item_ids": [3], "color": "red"}])
            with pytest.raises(BadInput, match="correct it"):
                service.score_batch([])

        async def ask() -> None:
            async with AsyncClient(url, seconds=20) as awaited:
                assert await awaited.score_batch(rows) == answer

        asyncio.run(ask())
    for one, of_python in zip(answer.answers, expected, strict=True):
        assert (one.user_id, one.cold) == (of_python.user_id, of_python.cold)
        found = [item.probability for item in one.items]
        assert found == pytest.approx(of_python.probabilities, abs=1e-6)
