"""Routes under /v1, and what no route may do whatever is sent to it."""

from __future__ import annotations

import json
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from feast import Field, RequestSource
from feast.infra.online_stores import remote
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Int64
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from bahe.cli import app as commands
from bahe_core.errors import BadInput
from bahe_core.home import Home
from feature_repo.store import open_store
from serving.http.api import create_app, scope_of
from serving.http.arrow_stream import ARROW, table_of
from serving.http.guards import NOWHERE
from serving.http.keys import SCOPES, new_key
from serving.lookup.online_lookup import OnlineLookup
from tests.support.cli import call
from tests.support.home_contents import copy_of
from tests.support.logs import LONG, small_log
from tests.support.stopped_redis import own_redis

NOON = "2024-06-01T12:00:00Z"
SURROGATE = b'"\\ud800"'
PROBES = {"/healthz", "/readyz", "/docs", "/openapi.json"}


@on_demand_feature_view(
    sources=[RequestSource(name="asked", schema=[Field(name="budget", dtype=Int64)])],
    schema=[Field(name="twice", dtype=Int64)],
)
def twice_the_budget(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"twice": inputs["budget"] * 2})


@pytest.fixture(scope="module")
def home(served: Home) -> Home:
    return served


@pytest.fixture(scope="module")
def client(home: Home) -> TestClient:
    return TestClient(create_app(home))


def score(client: TestClient, **changes: Any) -> Any:
    return client.post("/v1/score", json={"user_id": "u1", "item_ids": [3, 4], "at": NOON, **changes})


def test_scores_come_by_item_in_the_order_asked_for(client: TestClient) -> None:
    older = client.post("/score", json={"user_id": "u1", "item_ids": [3, 4, 5], "at": NOON}).json()
    wanted = {one["item_id"]: one["probability"] for one in older["scores"]}
    answer = score(client, item_ids=[5, 99, 3, "4", 5, "three", "x" * 200]).json()
    assert [one["item_id"] for one in answer["items"]] == [5, 99, 3, 4, 5, "three", "x" * 99 + "…"]
    assert [one["status"] == "ok" for one in answer["items"]] == [
        True,
        False,
        True,
        True,
        True,
        False,
        False,
    ]
    for one in answer["items"]:
        expected = wanted.get(one["item_id"])
        assert one["probability"] == (None if expected is None else pytest.approx(expected, abs=1e-6))
    assert not answer["cold"]


def test_an_unknown_user_is_one_without_history_and_refused_on_request(client: TestClient) -> None:
    """`u_cold` is in the log and did nothing: the same features, so the same scores."""
    new, cold = (score(client, user_id=user).json() for user in ("never seen", "u_cold"))
    assert (new["user_id"], new["cold"], cold["cold"]) == ("never seen", True, True)
    for of_new, of_cold in zip(new["items"], cold["items"], strict=True):
        assert of_new["probability"] == pytest.approx(of_cold["probability"], abs=1e-4)
    best = client.post("/v1/recommend", json={"user_id": "never seen", "k": 3}).json()
    assert best["cold"]
    assert len(best["scores"]) == 3
    for answer in (
        score(client, user_id="never seen", unknown_user="refuse"),
        client.post("/v1/recommend", json={"user_id": "never seen", "unknown_user": "refuse"}),
        client.get("/v1/users/never seen"),
    ):
        assert answer.status_code == 404
        assert "user never seen is not in the online store" in answer.json()["detail"]


def test_an_id_that_is_known_is_answered_whole(client: TestClient) -> None:
    for user_id, answered in ((LONG, LONG), ("x" * 150, "x" * 99 + "…")):
        best = client.post("/v1/recommend", json={"user_id": user_id, "k": 3})
        for answer in (score(client, user_id=user_id), best):
            assert answer.json()["user_id"] == answered
    assert client.get("/recommend", params={"user_id": LONG, "k": 3}).json()["user_id"] == LONG


def test_recommendations_are_those_older(client: TestClient) -> None:
    asked = {"user_id": "u1", "k": 5, "at": NOON}
    context = {"context": {"device": "phone"}}
    assert (
        client.post("/v1/recommend", json={**asked, **context}).json()
        == client.get("/recommend", params={**asked, "context": "device=phone"}).json()
    )


def test_features_are_what_feast_says(home: Home, client: TestClient) -> None:
    store = open_store(home)
    entities = {"item_id": [3, 99, 4, 3]}
    references = ["item_stats:item_click_rate", "item_stats:item_clicks"]
    answer = client.post("/v1/features", json={"features": references, "entities": entities})
    assert answer.json()["columns"] == without_keys(store.get_online_features(references, entities))
    # The live version is put in where it is needed.
    version = answer.json()["model_version"]
    vectors = client.post(
        "/v1/features", json={"features": ["item_embedding:embedding"], "entities": entities}
    )
    wanted = store.get_online_features(
        ["item_embedding:embedding"], {**entities, "model_version": [version] * 4}
    )
    assert vectors.json()["columns"] == without_keys(wanted)
    pairs = {"user_id": ["u1", "u2"], "item_id": [3, 4]}
    service = {"feature_service": "ctr_online", "entities": pairs, "full_feature_names": True}
    columns = client.post("/v1/features", json=service).json()["columns"]
    wanted = store.get_online_features(
        store.get_feature_service("ctr_online"), {**pairs, "model_version": [version] * 2}, True
    )
    assert columns == without_keys(wanted)


def test_features_as_an_arrow_table_are_the_same_in_the_registered_types(client: TestClient) -> None:
    asked: list[dict[str, Any]] = [
        {
            "features": [
                "item_stats:item_clicks",
                "item_stats:item_click_rate",
                "item_embedding:embedding",
            ],
            "entities": {"item_id": [3, 99, 4, 3]},
        },
        {
            "feature_service": "ctr_online",
            "entities": {"user_id": ["u1", "u2"], "item_id": [3, 4]},
            "full_feature_names": True,
        },
    ]
    for body in asked:
        answer = client.post("/v1/features", json=body, headers={"Accept": ARROW})
        assert answer.headers["content-type"] == ARROW
        table, plain = table_of(answer.content), client.post("/v1/features", json=body).json()
        assert table.to_pydict() == plain["columns"]
        assert table.schema.metadata == {b"model_version": plain["model_version"].encode()}
    first = table_of(client.post("/v1/features", json=asked[0], headers={"Accept": ARROW}).content)
    assert first.schema.field("item_clicks").type == pa.int64()
    assert first.schema.field("item_click_rate").type == pa.float64()
    assert first.schema.field("embedding").type == pa.list_(pa.float32())
    nothing = {"features": ["item_stats:item_clicks"], "entities": {"item_id": [99]}}
    empty = table_of(client.post("/v1/features", json=nothing, headers={"Accept": ARROW}).content)
    assert empty.schema.types == [pa.int64()]  # also where there is no value to tell it by
    refused = client.post("/v1/features", json={**nothing, "features": ["x:y"]}, headers={"Accept": ARROW})
    assert (refused.status_code, refused.headers["content-type"]) == (400, "application/json")


def without_keys(response: Any) -> dict[str, list[Any]]:
    keys = {"user_id", "item_id", "model_version"}
    return {name: column for name, column in response.to_dict().items() if name not in keys}


def test_feasts_remote_online_store_reads_here(
    home: Home, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        remote,
        "get_remote_online_features",
        lambda config, req_body: client.post("/get-online-features", json=req_body),
    )
    store = open_store(home)
    config = store.config.model_copy()
    config._online_store = remote.RemoteOnlineStoreConfig(type="remote", path="http://elsewhere")
    asked = ["item_stats:item_clicks", "item_stats:item_click_rate"], {"item_id": [3, 99, 4]}
    theirs = remote.RemoteOnlineStore().get_online_features(config, *asked, store.registry, store.project)
    ours = store.get_online_features(*asked)
    assert theirs.to_dict() == ours.to_dict()
    statuses = [[list(column.statuses) for column in answer.proto.results] for answer in (theirs, ours)]
    assert statuses[0] == statuses[1]


def test_a_users_state(client: TestClient) -> None:
    older = client.get("/features", params={"user_id": "u1"}).json()
    state = client.get("/v1/users/u1").json()
    log = small_log(users=12, rows=400)["behaviors"]
    assert {key: state[key] for key in older} == older
    assert set(state["seen_items"]) >= {str(i) for i in set(log[log["user_id"] == "u1"]["item_id"])}


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"item_ids": []}, 422, "item_ids: List should have at least 1 item"),
        ({"item_ids": [1] * 10_001}, 422, "at most 10000"),
        ({"item_ids": [2**63]}, 422, "item_ids"),
        ({"item_ids": [True]}, 422, "item_ids.0"),
        ({"item_ids": [3.0]}, 422, "item_ids.0"),
        ({"user_id": True}, 422, "user_id"),
        ({"user_id": "x" * 257}, 422, "of 1 to 256 characters"),
        ({"user_id": ""}, 422, "of 1 to 256 characters"),
        ({"at": "soon"}, 422, "at"),
        ({"context": {"colour": "red"}}, 400, "colour is not a context column"),
        ({"context": {"c" * 256: "red"}}, 400, "c…"),
        ({"context": {"device": ["phone"]}}, 422, "context.device"),
        ({"unknown_user": "guess"}, 422, "unknown_user"),
        ({"userid": "u1"}, 422, "userid: Extra inputs are not permitted"),
    ],
)
def test_a_score_that_cannot_be_given(
    client: TestClient, change: dict[str, Any], status: int, said: str
) -> None:
    answer = score(client, **change)
    assert answer.status_code == status
    assert said in answer.json()["detail"]
    assert len(answer.text) < 400


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"features": ["item_stats:nothing"]}, 400, "item_stats:nothing is no feature"),
        ({"features": ["x" * 256]}, 400, "xx… is no feature"),
        ({"features": ["item_stats:item_clicks"] * 2}, 400, "have the same name; give each once"),
        ({"features": ["item_stats:item_clicks"] * 2, "full_feature_names": True}, 400, "give each once"),
        (
            {
                "features": ["user_embedding:embedding", "item_embedding:embedding"],
                "entities": {"item_id": [3], "user_id": ["u1"], "model_version": ["m"]},
            },
            400,
            "have the same name",
        ),
        (
            {
                "features": None,
                "feature_service": "ctr_online",
                "entities": {"item_id": [3], "user_id": ["u1"], "model_version": ["m"]},
            },
            400,
            "`full_feature_names` where views share a name",
        ),
        ({"features": None}, 422, "either `features` or `feature_service`"),
        ({"features": None, "feature_service": "none"}, 400, "no feature service is named none"),
        ({"entities": {"thing": [3]}}, 400, "item_stats is looked up by item_id"),
        ({"entities": {"item_id": [3], "user_id": ["a", "b"]}}, 422, "differ in length"),
        ({"entities": {"item_id": ["three"]}}, 400, "a whole number of 64 bits"),
        ({"entities": {"item_id": [3] * 1001}}, 422, "at most 1000"),
    ],
)
def test_features_that_cannot_be_given(
    client: TestClient, change: dict[str, Any], status: int, said: str
) -> None:
    asked = {"features": ["item_stats:item_clicks"], "entities": {"item_id": [3]}, **change}
    for route in ("/v1/features", "/get-online-features"):
        answer = client.post(route, json=asked)
        assert answer.status_code == status, answer.text
        assert said in answer.json()["detail"]
        assert len(answer.text) < 400


def test_a_feature_on_demand_needs_what_it_is_computed_of(home: Home, tmp_path: Path) -> None:
    served = copy_of(home, tmp_path)
    open_store(served).apply([twice_the_budget])
    client = TestClient(create_app(served))
    asked = {"features": ["twice_the_budget:twice"], "entities": {"item_id": [3]}}
    for route in ("/v1/features", "/get-online-features"):
        answer = client.post(route, json=asked)
        assert answer.status_code == 400, answer.text
        assert "budget" in answer.json()["detail"]
        assert "give it among `entities`" in answer.json()["detail"]
        for budget, status in ((4, 200), ("4", 200), ("much", 400)):
            given = {**asked, "entities": {"item_id": [3], "budget": [budget]}}
            answer = client.post(route, json=given)
            assert answer.status_code == status, answer.text
            assert ("a whole number of 64 bits" in answer.text) == (status == 400)


@pytest.mark.parametrize("identifier", ["1_0", " 10 ", "\u0661\u0660", "010", "+10", "1" * 30, "-0"])
def test_an_id_is_exactly_what_it_is(client: TestClient, home: Home, identifier: str) -> None:
    assert score(client, item_ids=[identifier]).json()["items"][0]["status"] == "unknown"
    refused = client.post("/score", json={"user_id": "u1", "item_ids": [identifier]})
    assert refused.status_code == 404
    assert OnlineLookup(home).score_each("u1", [True]).probabilities == [None]


@pytest.mark.parametrize(
    "body",
    [
        b'{"user_id": %s, "item_ids": [3]}' % SURROGATE,
        b'{"user_id": "u1", "item_ids": [%s]}' % SURROGATE,
        b'{"user_id": "u1", "item_ids": [3], "context": {%s: 1}}' % SURROGATE,
        b'{"user_id": "u1", "item_ids": [3], "context": {"device": %s}}' % SURROGATE,
        b'{"user_id": "u1", "item_ids": [3], "at": NaN}',
        b'{"user_id": "u1", "item_ids": [3], "at": -Infinity}',
        b'{"user_id": "u1", "item_ids": [3], "at": 1e400}',
        b'{"user_id": "u1", "item_ids": [%s]}' % (b"9" * 5000),
        b'{"user_id": %s}' % (b"[" * 100_000),
        b'{"user_id": "u1", ',
        b"\xff\xfe",
        b"null",
        b"",
    ],
)
@pytest.mark.parametrize(
    "route",
    [
        "/v1/score",
        "/v1/score/batch",
        "/score",
        "/v1/recommend",
        "/v1/features",
        "/get-online-features",
        "/push",
        "/write-to-online-store",
    ],
)
def test_no_body_is_a_fault_of_the_service(client: TestClient, route: str, body: bytes) -> None:
    answer = client.post(route, content=body, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    assert len(answer.text) < 400
    assert isinstance(answer.json()["detail"], str)


def test_moments_far_away_are_no_fault_of_the_service(client: TestClient) -> None:
    for at in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "1970-01-01", 1e17, "٢٠٢٤-01-01"):
        assert score(client, at=at).status_code in (200, 422)


@pytest.mark.parametrize("at", [0, 1_700_000_000, 1.5, True, "1700000000", "12:00", "now"])
def test_a_time_is_written_out(client: TestClient, at: Any) -> None:
    """Whether a number is of seconds or of milliseconds would have to be guessed."""
    refused = score(client, at=at)
    assert refused.status_code == 422
    assert refused.json()["detail"] == "at: give a time in ISO 8601, as 2026-05-01T12:00:00Z; correct it."
    assert client.get("/recommend", params={"user_id": "u1", "at": at}).status_code == 422


@pytest.mark.parametrize("identifier", [2**63, -(2**63) - 1, 1.0, True, None, [], "", "x" * 257, "\ud800"])
def test_what_is_no_id_is_told_what_one_is(client: TestClient, identifier: Any) -> None:
    body = json.dumps({"user_id": "u1", "item_ids": [3, identifier]}).encode()
    answer = client.post("/v1/score", content=body, headers={"Content-Type": "application/json"})
    assert answer.json()["detail"] == (
        "item_ids.1: an id is a text of 1 to 256 characters of Unicode, or an integer of 64 bits;"
        " correct it."
    )


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ";"]
)
def test_a_body_that_is_not_called_json_is_told_so(client: TestClient, kind: str) -> None:
    answer = client.post("/v1/score", content=b'{"user_id": "u1"}', headers={"Content-Type": kind})
    assert answer.status_code == 422
    assert "Content-Type: application/json" in answer.json()["detail"]


def test_a_deprecated_route_says_so(client: TestClient) -> None:
    for route in ("/health", "/features?user_id=u1", "/recommend?user_id=u1", "/recommend?user_id=nobody"):
        assert client.get(route).headers["deprecation"].startswith("@")
    assert "deprecation" not in client.get("/readyz").headers


def test_no_path_of_the_server_is_in_an_answer(home: Home, tmp_path: Path) -> None:
    served = copy_of(home, tmp_path)
    client = TestClient(create_app(served))
    other = TestClient(create_app(served))
    served.catalogue_of_items.unlink()
    gone = client.post("/v1/recommend", json={"user_id": "u1"})
    version = client.get("/readyz").json()["model_version"]
    (served.models / version).rename(tmp_path / "elsewhere")
    for answer in (gone, client.get("/v1/users/nobody"), other.get("/v1/users/u1")):
        assert answer.status_code in (404, 503)
        assert str(tmp_path) not in answer.text
        assert str(tmp_path.parent) not in answer.text
    assert gone.headers["retry-after"] == "1"


def test_a_store_that_is_broken_is_503_and_the_process_lives(home: Home, tmp_path: Path) -> None:
    served = copy_of(home, tmp_path)
    with sqlite3.connect(served.online_store) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    client = TestClient(create_app(served))
    assert score(client).status_code == 200
    with served.online_store.open("r+b") as file:
        file.truncate(8192)
    assert score(client).status_code == 503
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200


def test_a_store_that_says_nothing_is_503_in_time_and_comes_back(home: Home, tmp_path: Path) -> None:
    served = copy_of(home, tmp_path)
    with own_redis(tmp_path) as server:
        target = tmp_path / "target.yaml"
        online = {
            "type": "feast_ducklake.GuardedRedisOnlineStore",
            "url": server.url,
            "read_seconds": 0.3,
        }
        target.write_text(json.dumps({"online_store": online}))
        call("apply", "--target", target, home=served)
        call("publish", home=served)
        client = TestClient(create_app(served))
        assert score(client).status_code == 200
        with server.stopped():
            for answer in (score(client), client.get("/readyz"), client.get("/health")):
                assert answer.status_code == 503
                assert answer.headers["retry-after"] == "1"
                assert "does not answer" in answer.json()["detail"]
            assert client.get("/healthz").status_code == 200
        assert score(client).status_code == 200


def test_every_route_asks_for_a_key_but_those_for_probes(home: Home, tmp_path: Path) -> None:
    home = copy_of(home, tmp_path)
    app = create_app(home, require_keys=True)
    client = TestClient(app)
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    for route in routes:
        path = route.path.replace("{user_id:path}", "u1")
        (method,) = route.methods
        assert (client.request(method, path).status_code == 401) == (path not in PROBES), path
        assert (scope_of(path) is None) == (path in PROBES)
        assert scope_of(path) in (None, *SCOPES)
    key = {"Authorization": f"Bearer {new_key(home, 'of this test', ['score'])}"}
    asked = {"user_id": "u1", "item_ids": [3]}
    assert client.post("/v1/score", json=asked, headers=key).status_code == 200
    assert client.get("/v1/users/u1", headers=key).status_code == 403
    assert client.get("/metrics", headers=key).status_code == 403
    assert client.get("/v1/score/", headers=key).status_code == 404
    assert scope_of("/v1/nothing") == NOWHERE


def test_a_service_that_others_can_reach_needs_a_key(home: Home, tmp_path: Path) -> None:
    served = copy_of(home, tmp_path)
    served.api_keys.unlink(missing_ok=True)
    done = CliRunner().invoke(commands, ["serve", "--home", str(served.root), "--host", "0.0.0.0"])
    assert isinstance(done.exception, BadInput)
    assert "make one with `bahe api-key NAME`" in str(done.exception)
    made = CliRunner().invoke(commands, ["api-key", "ranking", "--home", str(served.root)])
    assert made.output.splitlines()[-1].startswith("bahe_")


def test_the_page_of_routes_needs_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    for text in (
        "/v1/score",
        "/v1/recommend",
        "/healthz",
        "replays nothing",
        "curl http://testserver/v1/score",
    ):
        assert text in page.text
    for text in ("<script", "src=", "@import", "//cdn", "https://"):
        assert text not in page.text
    assert client.get("/redoc").status_code == 404


def test_metrics_are_prometheus_text(client: TestClient) -> None:
    score(client)
    text = client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'bahe_request_seconds_bucket{route="/v1/score",le="0.001"}' in text.text
    assert "bahe_requests_in_work 0" in text.text


def test_metrics_say_how_old_the_features_of_the_live_model_are(served: Home, tmp_path: Path) -> None:
    home = copy_of(served, tmp_path)
    client = TestClient(create_app(home))
    version = OnlineLookup(home).live_version()

    def ages() -> dict[str, float]:
        families = text_string_to_metric_families(client.get("/metrics").text)
        found = {family.name: family.samples for family in families}
        assert [one.labels for one in found["bahe_live_model"]] == [{"model_version": version}]
        return {one.labels["view"]: one.value for one in found["bahe_feature_freshness_seconds"]}

    before = ages()
    read = {"item_embedding", "item_stats", "user_embedding", "user_stats", "user_timeline"}
    assert set(before) == read
    assert min(before.values()) > 0
    store = open_store(home)  # as another process that writes
    view, end = store.get_feature_view("item_stats"), datetime.now(UTC) + timedelta(hours=5)
    store.registry.apply_materialization(view, store.project, datetime(2020, 1, 1, tzinfo=UTC), end)
    after = ages()
    assert after["item_stats"] == 0
    assert after["user_stats"] > before["user_stats"]
    for path in home.root.glob("online.db*"):
        path.write_bytes(b"no database")
    text = client.get("/metrics")
    assert text.status_code == 200
    assert "bahe_requests_total" in text.text
    assert "freshness" not in text.text
