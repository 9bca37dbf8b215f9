"""Whatever is sent to whatever route: an answer, or a refusal in one short sentence, and never a 500."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bahe_core.home import Home
from serving.http.api import create_app
from tests.support.home_contents import copy_of

BEHAVIOR = {
    "user_id": "u1",
    "channel": "liked",
    "text": "liked that",
    "event_timestamp": "2024-06-01T12:00:00Z",
    "item_id": 3,
    "event_id": "a",
}
VALID: dict[str, dict[str, Any]] = {
    "/v1/score": {"user_id": "u1", "item_ids": [3, 4], "at": "2024-06-01T12:00:00Z"},
    "/v1/score/batch": {
        "requests": [{"user_id": "u1", "item_ids": [3]}, {"user_id": "u2", "item_ids": [4]}]
    },
    "/score": {"user_id": "u1", "item_ids": [3, 4], "context": {}},
    "/v1/recommend": {"user_id": "u1", "k": 3, "include_seen": True, "unknown_user": "refuse"},
    "/v1/features": {
        "features": ["item_stats:item_clicks", "user_embedding:embedding"],
        "entities": {"item_id": [3], "user_id": ["u1"]},
    },
    "/get-online-features": {"feature_service": "ctr_online", "entities": {"item_id": [3]}},
    "/v1/similar/text": {"text": "liked word1", "k": 3},
    "/push": {"push_source_name": "basket_pushed", "df": {"user_id": ["u1"]}, "to": "online"},
    "/write-to-online-store": {"feature_view_name": "user_stats", "df": {"user_id": ["u1"]}},
    "/v1/behaviors": BEHAVIOR,
    "/behaviors": BEHAVIOR,
    "/v1/impressions": {
        "impressions": [
            {
                "impression_id": 7_000_001,
                "user_id": "u1",
                "item_id": 3,
                "event_timestamp": "2024-06-01T12:00:00Z",
            }
        ]
    },
    "/v1/clicks": {"clicks": [{"impression_id": 7_000_001, "event_timestamp": "2024-06-01T12:00:01Z"}]},
}
TIMES = {"at", "event_timestamp"}
"""Fields that are times wherever they stand."""
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            "",
            "\ud800",
            "\0",
            "u1",
            "3",
            "item_stats:x",
            ":",
            "x" * 300,
            "2024-06-01",
            "0001-01-01T00:00+23:59",
        ]
    ),
)
NUMBERS = st.one_of(
    st.integers(), st.sampled_from([0, -1, 2**63, -(2**63), 2**64, 10**400, 253402300800, -62135596801])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def client(served: Home, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    return TestClient(create_app(copy_of(served, tmp_path_factory.mktemp("any")), live=True))


@pytest.fixture(scope="module")
def documented(client: TestClient) -> Any:
    """Routes of the OpenAPI."""
    return client.get("/openapi.json").json()["paths"]


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A valid request with some fields changed, left out, or more of them, at any depth."""
    route = draw(st.sampled_from(sorted(VALID)))
    body = json.loads(json.dumps(VALID[route]))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = body
        while isinstance(place, dict) and place:
            key = draw(st.sampled_from(sorted(place)))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.integers(0, 4)) == 0:
                del place[key]
            else:
                place[key] = draw(VALUES)
            break
        else:
            if isinstance(place, list):
                place.append(draw(VALUES))
            else:
                body[draw(TEXTS)] = draw(VALUES)
    return route, body


def numbers_as_times(place: Any) -> bool:
    """Whether a number stands for a time anywhere that a request has times."""
    if isinstance(place, list):
        return any(map(numbers_as_times, place))
    return isinstance(place, dict) and any(
        isinstance(value, int | float) if name in TIMES else numbers_as_times(value)
        for name, value in place.items()
        if name not in {"df", "context", "entities"}
    )


def check_answer(answer: Any, documented: Any) -> None:
    """An answer is as the OpenAPI says, and one clear sentence where it is a refusal."""
    assert str(answer.status_code) in documented, answer.text
    if answer.status_code == 200:
        content = documented["200"].get("content", {})
        assert answer.headers.get("content-type", "none") in content or not content
        return
    assert answer.json().keys() == {"detail", "request_id"}
    detail = answer.json()["detail"]
    assert detail.endswith(".")
    assert len(answer.text) < 500
    for inner in ("/tmp", "Value error", "constrained", "Traceback"):
        assert inner not in detail


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request=requests())
def test_a_request_with_anything_in_it(
    client: TestClient, documented: Any, request: tuple[str, dict[str, Any]]
) -> None:
    route, body = request
    answer = client.post(route, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404, 422), answer.text
    check_answer(answer, documented[route]["post"]["responses"])
    if numbers_as_times(body):
        assert answer.status_code != 200


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request=requests(), data=st.data())
def test_a_body_that_is_no_request(
    client: TestClient, documented: Any, request: tuple[str, dict[str, Any]], data: st.DataObject
) -> None:
    """Cut off, with bytes of anything in it, or called what it is not."""
    route, body = request[0], json.dumps(request[1]).encode()
    where = data.draw(st.integers(0, len(body)))
    inserted = data.draw(
        st.binary(max_size=8) | st.sampled_from([b"[" * 10_000, b"9" * 5_000, b"\xff\xfe"])
    )
    body = body[:where] + inserted + (body[where:] if data.draw(st.booleans()) else b"")
    kind = data.draw(
        st.sampled_from(["application/json", "text/plain", "application/x-www-form-urlencoded", ";"])
    )
    answer = client.post(route, content=body, headers={"Content-Type": kind})
    assert answer.status_code in (200, 400, 404, 422), answer.text
    check_answer(answer, documented[route]["post"]["responses"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    route=st.sampled_from(
        [
            "/features",
            "/recommend",
            "/v1/users/",
            "/v1/similar/items/",
            "/v1/similar/users/",
            "/v1/similar/atoms/",
            "/v1/similar/text",
            "/docs",
            "/openapi.json",
            "/metrics",
            "/x",
        ]
    ),
    query=st.dictionaries(
        st.sampled_from(["user_id", "k", "at", "context", "include_seen", "x"]),
        TEXTS.filter(lambda text: text.isprintable() and "\ud800" not in text) | NUMBERS,
    ),
)
def test_an_address_with_anything_in_it(client: TestClient, route: str, query: dict[str, Any]) -> None:
    if route.endswith("/"):
        route += str(query.get("user_id", "")).replace("?", "").replace("#", "")
    answer = client.get(route, params=query)
    assert answer.status_code in (200, 307, 400, 404, 405, 422), answer.text
    if answer.status_code >= 400:
        assert len(answer.text) < 500


@pytest.mark.parametrize(
    "path",
    ["/v1/users/%ff%fe", "/v1/similar/items/%ff", "/v1/users/%ed%a0%80", "/features?user_id=%ff", "/%00"],
)
def test_an_address_that_is_no_text(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (400, 404, 422)
