"""Features of a team's own views that are sent to a service, as Feast's feature server takes them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fastapi.testclient import TestClient
from feast import FeatureStore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bahe
from bahe_core.home import Home
from feature_repo.store import open_store
from serving.audit.audit import audit
from serving.http.api import create_app
from serving.http.guards import Limits
from serving.http.keys import new_key
from serving.lookup.online_lookup import OnlineLookup
from tests.support.cli import call
from tests.support.home_contents import copy_of
from tests.support.pushable import pushable_dataset
from tests.support.service_process import running
from tests.support.stopped_redis import own_redis

NOON = "2026-01-01T12:00:00Z"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Home:
    folder = tmp_path_factory.mktemp("pushed")
    dataset = pushable_dataset(folder / "log", tiny_backbone)
    home = Home.at(folder / "home")
    call("run", dataset, "--tracker", "none", home=home)
    return home


@pytest.fixture(params=["sqlite", "redis"])
def home(published: Home, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Home]:
    """A copy whose online values lie in SQLite, or in a Redis of the test's own."""
    copy = copy_of(published, tmp_path)
    if request.param == "sqlite":
        yield copy
        return
    with own_redis(tmp_path) as server:
        target = tmp_path / "target.yaml"
        online = {"type": "feast_ducklake.GuardedRedisOnlineStore", "url": server.url}
        target.write_text(json.dumps({"online_store": online}))
        bahe.open(copy.root).apply(str(target))
        call("publish", home=copy)
        yield copy


def basket(value: float = 500.0, at: str = NOON, **changes: Any) -> dict[str, Any]:
    row = {
        "user_id": "u1",
        "basket_value": value,
        "tier": "gold",
        "basket_items": 3,
        "opened": 1_700_000_000,
        "at": at,
    }
    return {"push_source_name": "basket_pushed", "df": {k: [v] for k, v in (row | changes).items()}}


def stored(client: TestClient, feature: str = "basket:basket_value", **entity: Any) -> Any:
    """What /v1/features says, which has to be what Feast's route says."""
    entities = {key: [value] for key, value in (entity or {"user_id": "u1"}).items()}
    asked = {"features": [feature], "entities": entities}
    ours = client.post("/v1/features", json=asked).json()["columns"][feature.partition(":")[2]]
    theirs = client.post("/get-online-features", json=asked).json()
    place = theirs["metadata"]["feature_names"].index(feature.partition(":")[2])
    assert theirs["results"][place]["values"] == ours
    return ours[0]


def probabilities(client: TestClient, user: str = "u1", *items: int) -> list[float]:
    asked = {"user_id": user, "item_ids": items or [3, 4], "at": "2026-06-01T00:00:00Z"}
    return [one["probability"] for one in client.post("/v1/score", json=asked).json()["items"]]


def test_what_is_pushed_is_what_is_read_and_scored_with(home: Home) -> None:
    client = TestClient(create_app(home))
    before = probabilities(client), probabilities(client, "u2")
    answer = client.post("/push", json=basket())
    assert (answer.status_code, answer.content) == (200, b"")
    assert stored(client) == 500.0
    assert stored(client, "basket:tier") == "gold"
    assert stored(client, "basket_size:basket_items") == 3, "the other view of the source"
    statistics = client.get("/v1/users/u1").json()["statistics"]
    assert (statistics["basket_value"], statistics["twice"]) == (500.0, 1000.0)
    after = probabilities(client), probabilities(client, "u2")
    assert after[0] != before[0]
    assert after[1] == before[1], "of another user"
    assert after[0] == probabilities(TestClient(create_app(home))), "of another worker"
    assert "bahe_features_pushed_total 1\n" in client.get("/metrics").text

    rows = {"item_id": [3, 4], "in_stock": [900, None], "event_timestamp": [NOON, "2026-01-01 14:00+02:00"]}
    assert client.post("/push", json={"push_source_name": "stock_pushed", "df": rows}).status_code == 200
    assert [stored(client, "stock:in_stock", item_id=item) for item in (3, 4)] == [900, None]
    third = probabilities(client, "u1", 3, 4, 5)
    assert third[:2] != after[0]
    assert third == pytest.approx(probabilities(TestClient(create_app(home)), "u1", 3, 4, 5), abs=1e-6)

    rows = {"user_id": ["u1"], "taste_vector": [[9, -9.5, 9]], "event_timestamp": [NOON], "created": [None]}
    answer = client.post("/write-to-online-store", json={"feature_view_name": "taste", "df": rows})
    assert (answer.status_code, answer.json()) == (200, None)
    assert stored(client, "taste:taste_vector") == [9, -9.5, 9]
    assert client.get("/v1/users/u1").json()["vectors"]["taste:taste_vector"] == [9, -9.5, 9]
    assert probabilities(client, "u1", 3, 4, 5) != third


def test_an_older_value_does_not_replace_a_newer_one(home: Home) -> None:
    client = TestClient(create_app(home))
    for value, changes, expected in (
        (500.0, {}, 500.0),
        (400.0, {"at": "2026-01-01T11:59:59.999999Z"}, 500.0),
        (300.0, {"at": "2026-01-01T13:00:00+01:00"}, 300.0),  # of the same time, and made later
        (200.0, {"made": "2026-01-01T00:00:00Z"}, 300.0),  # made earlier
        (100.0, {"at": "2026-01-01T12:00:00.000001"}, 100.0),
    ):
        assert client.post("/push", json=basket(value, **changes)).status_code == 200
        assert stored(client) == expected
    call("publish", home=home)
    assert stored(client) == 100.0, "the source has an older one"
    assert stored(client, user_id="u2") is not None


def test_feasts_remote_client_pushes_and_writes_here(published: Home, tmp_path: Path) -> None:
    """A Feast store of another project's, whose online store is this service."""
    home = copy_of(published, tmp_path)
    with running(home, tmp_path / "log.txt") as service:
        store = open_store(home)
        config = store.config.model_copy()
        config.online_config = {"type": "remote", "path": f"http://127.0.0.1:{service.port}"}
        config._online_store = None
        config.provider = "local"
        remote = FeatureStore(config=config)
        at = pd.Timestamp("2026-01-01T12:00:00Z")
        row = {"user_id": "u1", "basket_value": 321.5, "tier": "gold", "at": at, "made": at}
        row |= {"basket_items": 7, "opened": pd.Timestamp("2025-01-01", tz="UTC")}
        remote.push("basket_pushed", pd.DataFrame([row]))
        vector = pd.DataFrame(
            {"user_id": ["u1"], "event_timestamp": [at], "taste_vector": [[1.0, 2.0, 3.0]]}
        )
        remote.write_to_online_store("taste", vector)
        features = [
            "basket:basket_value",
            "basket:tier",
            "basket_size:basket_items",
            "basket_size:opened",
            "taste:taste_vector",
        ]
        answers = [
            one.get_online_features(features, entity_rows=[{"user_id": "u1"}]).to_dict()
            for one in (remote, store)
        ]
        assert answers[1]["basket_value"] == [321.5]
        assert answers[1]["basket_items"] == [7]
        assert answers[1]["opened"] == [datetime(2025, 1, 1, tzinfo=UTC)]
        assert answers[1]["taste_vector"] == [[1.0, 2.0, 3.0]]
        assert answers[0]["basket_value"] == [321.5]
        assert answers[0]["taste_vector"] == [[1.0, 2.0, 3.0]]
        counts = {"item_id": 3, "item_impressions": 1, "item_clicks": 1, "item_click_rate": 1.0}
        counts |= {"item_last_impression_us": 0, "event_timestamp": at, "created_timestamp": at}
        with pytest.raises(RuntimeError, match="is bahe's own"):
            remote.write_to_online_store("item_stats", pd.DataFrame([counts]))


SOON = "2999-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"push_source_name": "nothing"},
            "no push source is named nothing; there are basket_pushed, ",
        ),
        (
            {"push_source_name": "user_stats"},
            "user_stats is bahe's own, and `bahe publish`",
        ),
        ({"push_source_name": "items"}, "send what happened to v1/behaviors, v1/impressions and v1/clicks"),
        ({"push_source_name": "basket_rows"}, "no push source is named basket_rows"),
        ({"push_source_name": "notes_pushed"}, "notes:note is Map, which this service does not take"),
        ({"to": "offline"}, "pushes nothing `offline`"),
        ({"to": "online_and_offline"}, "write the rows to the view's source by a job"),
        ({"to": "elsewhere"}, "to: Input should be 'online', 'offline' or 'online_and_offline'"),
        ({"df": {}}, "df: Dictionary should have at least 1 item"),
        ({"df": {"user_id": []}}, "df.user_id: List should have at least 1 item"),
        ({"df": {"user_id": ["u1"], "at": []}}, "df.at"),
        ({"df": {"user_id": ["u1"], "at": [NOON, NOON]}}, "the columns of `df` differ in length"),
        ({"df": {"user_id": ["u1"] * 1001}}, "at most 1000"),
        ({"df": {f"c{i}": [1] for i in range(201)}}, "at most 200"),
        (
            {"df": {"user_id": ["u1"]}},
            "rows for view basket have no basket_value, tier, at; give",
        ),
        ({"df": None}, "df: Input should be a valid dictionary"),
    ],
)
def test_pushes_that_are_refused(
    untouched: tuple[Home, TestClient], changes: dict[str, Any], words: str
) -> None:
    answer = untouched[1].post("/push", json=basket() | changes)
    assert answer.status_code in (400, 422)
    assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"basket_value": "7"}, "column basket_value has string, but a column of double is needed"),
        ({"basket_value": True}, "column basket_value has bool, but a column of double is needed"),
        ({"basket_value": [1.0]}, "basket_value has list<item: double>, but a column of double is needed"),
        ({"basket_value": {"a": 1}}, "column basket_value has values that are not of one type"),
        ({"basket_value": [[1], "me@home"]}, "column basket_value has values that are not of one type"),
        ({"basket_value": 1e400}, "column basket_value has a number that is not finite"),
        ({"basket_items": 3.5}, "basket_items has 3.5, which does not fit a column of int64"),
        ({"basket_items": 2**63}, "basket_items has an integer beyond 64 bits"),
        ({"tier": 7}, "column tier has int64, but a column of string is needed"),
        ({"tier": "\ud800"}, "column tier cannot be read"),
        ({"opened": 253402300800 * 10}, "column opened has seconds since 1970 that are of no time"),
        ({"opened": -(2**63)}, "column opened has seconds since 1970 that are of no time"),
        ({"opened": "2025-01-01"}, "column opened has string, but a column of int64 is needed"),
        ({"user_id": None}, "user_id is null in a row, and is its key"),
        ({"user_id": 1}, "column user_id has int64, but a column of string is needed"),
        ({"at": "yesterday"}, "at of row 0 is no time; give it in ISO 8601"),
        ({"at": 1_700_000_000}, "at of row 0 is no time"),
        ({"at": None}, "at of row 0 is no time"),
        ({"at": "0001-01-01T00:00:00+14:00"}, "at of row 0 is no time"),
        ({"at": SOON}, "at of row 0 has not happened yet"),
        ({"made": SOON}, "made of row 0 has not happened yet"),
        ({"basket_value": None, "tier": None}, "have no value at all"),
    ],
)
def test_rows_that_are_refused(
    untouched: tuple[Home, TestClient], changes: dict[str, Any], words: str
) -> None:
    body = json.dumps(basket(**changes), allow_nan=True)
    answer = untouched[1].post("/push", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert words in answer.json()["detail"]
    assert "me@home" not in answer.text
    assert len(answer.text) < 400


@pytest.mark.parametrize(
    ("name", "columns", "words"),
    [
        ("user_stats", {"user_id": ["u1"]}, "user_stats is bahe's own"),
        ("user_embedding", {"user_id": ["u1"]}, "user_embedding is bahe's own"),
        ("live_model", {"deployment": ["default"]}, "live_model is bahe's own"),
        ("twice_the_basket", {"twice": [1.0]}, "no stored view of your own is named twice_the_basket"),
        ("nothing", {"user_id": ["u1"]}, "there are basket, basket_size, notes, stock, taste"),
        ("taste", {"user_id": ["u1"], "taste_vector": [[1, 2]]}, "another width than the live model reads"),
        ("taste", {"user_id": ["u1"], "taste_vector": [[]]}, "give it 3 numbers, or null as a whole"),
        ("taste", {"user_id": ["u1"], "taste_vector": [[1, None, 2]]}, "a list with a null in it"),
        ("taste", {"user_id": ["u1"], "taste_vector": [[1, 2, 1e39]]}, "does not fit a column of float"),
        ("taste", {"user_id": ["u1"], "taste_vector": [[1, 2, [3]]]}, "values that are not of one type"),
    ],
)
def test_writes_that_are_refused(
    untouched: tuple[Home, TestClient], name: str, columns: dict[str, Any], words: str
) -> None:
    asked = {"feature_view_name": name, "df": columns | {"event_timestamp": [NOON]}}
    answer = untouched[1].post("/write-to-online-store", json=asked)
    assert answer.status_code == 400
    assert words in answer.json()["detail"]


@pytest.fixture(scope="module")
def untouched(
    published: Home, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Home, TestClient]]:
    """A service that refuses all it is sent, and a store that is as before in the end."""
    home = copy_of(published, tmp_path_factory.mktemp("untouched"))

    def content() -> list[Any]:
        with sqlite3.connect(home.online_store) as connection:
            tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            found = [
                connection.execute(f'SELECT * FROM "{name}" ORDER BY 1, 2').fetchall() for (name,) in tables
            ]
        connection.close()
        return found

    before = content()
    yield home, TestClient(create_app(home))
    assert content() == before


COLUMNS = ["user_id", "basket_value", "tier", "basket_items", "opened", "at", "made"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.datetimes().map(str),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(column=st.sampled_from(COLUMNS), value=VALUES)
def test_a_row_with_anything_in_it(own: TestClient, column: str, value: Any) -> None:
    body = json.dumps(basket(**{column: value}))
    answer = own.post("/push", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 422), answer.text
    assert len(answer.text) < 500
    if answer.status_code == 200:
        user = value if column == "user_id" and value else "u1"
        asked = {"features": ["basket:tier", "basket_size:opened"], "entities": {"user_id": [user]}}
        assert own.post("/get-online-features", json=asked).status_code == 200
        assert None not in probabilities(own, user)


@pytest.fixture(scope="module")
def own(published: Home, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    return TestClient(create_app(copy_of(published, tmp_path_factory.mktemp("own"))))


def test_a_key_needs_the_scope_to_write(published: Home, tmp_path: Path) -> None:
    home = copy_of(published, tmp_path)
    client = TestClient(create_app(home, require_keys=True))
    reader, writer = (new_key(home, scope, [scope]) for scope in ("read", "write"))
    for key, status in ((reader, 403), (writer, 200)):
        answer = client.post("/push", json=basket(), headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == status


def test_a_store_that_others_write_to_holds_up_pushes_alone(published: Home, tmp_path: Path) -> None:
    home = copy_of(published, tmp_path)
    client = TestClient(create_app(home, limits=Limits(seconds=5, threads=1, waiting=0)))
    assert None not in probabilities(client)
    brief = TestClient(create_app(home, limits=Limits(seconds=0.3, threads=1)))
    other = sqlite3.connect(home.online_store, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        answer = brief.post("/push", json=basket())
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert None not in probabilities(client)
    finally:
        other.execute("ROLLBACK")
        other.close()


@pytest.mark.parametrize("allow_cache", [True, False])
def test_a_view_that_was_registered_since_is_written(
    published: Home, tmp_path: Path, allow_cache: bool
) -> None:
    home = copy_of(published, tmp_path)
    client = TestClient(create_app(home))
    rows = {"item_id": [3], "in_stock": [5], "event_timestamp": [NOON]}
    asked = {"feature_view_name": "stock_of_today", "df": rows, "allow_registry_cache": allow_cache}
    assert client.post("/write-to-online-store", json=asked).status_code == 400
    store = open_store(home)
    view = store.get_feature_view("stock")
    view.name = "stock_of_today"
    store.registry.apply_feature_view(view, store.project)
    assert client.post("/write-to-online-store", json=asked).status_code == 200


def test_the_audit_says_what_the_source_has_not_got(published: Home, tmp_path: Path) -> None:
    home = copy_of(published, tmp_path)
    assert audit(home, last=400).consistent
    TestClient(create_app(home)).post("/push", json=basket(tier="platinum"))
    differing = {one.feature for one in audit(home, last=400).features if one.differing}
    assert differing == {"basket:basket_value", "basket:tier", "twice_the_basket:twice"}


def test_from_python_the_next_lookup_has_it(published: Home, tmp_path: Path) -> None:
    """What the service wrote is in the store, for whoever reads it."""
    home = copy_of(published, tmp_path)
    TestClient(create_app(home)).post("/push", json=basket(77.0))
    assert OnlineLookup(home).user("u1").statistics["basket_value"] == 77.0
