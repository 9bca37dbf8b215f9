"""The service by itself: what its routes answer of a published home, and with which status they refuse."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from bahe_core.errors import BadInput, Damaged, NotReady, UnknownEntity
from bahe_core.home import Home
from feature_repo.store import open_store
from serving.http.api import create_app
from serving.lookup.context import parsed_context
from serving.lookup.online_lookup import OnlineLookup
from tests.support.cli import call
from tests.support.home_contents import copy_of
from tests.support.logs import small_log

NOON = "2024-06-01T12:00:00Z"
EVERY_ITEM = set(range(25))


@pytest.fixture(scope="module")
def home(served: Home) -> Home:
    return served


@pytest.fixture(scope="module")
def client(home: Home) -> TestClient:
    return TestClient(create_app(home))


def test_health_names_the_live_model(home: Home, client: TestClient) -> None:
    answer = client.get("/health")
    version = OnlineLookup(home).live_version()
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ok",
        "model_version": version,
        "encoder_version": OnlineLookup(home).artifact(version).encoder_version,
    }


def test_features_are_those_of_the_online_store(home: Home, client: TestClient) -> None:
    answer = client.get("/features", params={"user_id": "u1"}).json()
    stored = OnlineLookup(home).user("u1")
    behaviors = int((small_log(users=12, rows=400)["behaviors"]["user_id"] == "u1").sum())
    assert (answer["behaviors"], answer["cold"]) == (behaviors, False)
    assert answer["statistics"]["user_impressions"] == behaviors
    np.testing.assert_array_equal(np.float32(answer["embedding"]), stored.vector)


def test_scores_are_probabilities_best_first_and_do_not_depend_on_company(client: TestClient) -> None:
    def scores(*items: int) -> dict[int, float]:
        answer = client.post("/score", json={"user_id": "u1", "item_ids": items, "at": NOON}).json()
        found = [(score["item_id"], score["probability"]) for score in answer["scores"]]
        assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)
        return dict(found)

    together = scores(3, 4, 5, 6)
    assert set(together) == {3, 4, 5, 6}
    assert all(0 < probability < 1 for probability in together.values())
    assert scores(5)[5] == pytest.approx(together[5], abs=1e-6)


def test_the_context_of_a_request_moves_its_scores(client: TestClient) -> None:
    request = {"user_id": "u1", "item_ids": [3], "at": NOON}
    probability = {
        device: client.post("/score", json={**request, "context": {"device": device}}).json()["scores"][0]
        for device in ("phone", "desk")
    }
    assert probability["phone"] != probability["desk"]
    asked = client.get("/recommend", params={"user_id": "u1", "at": NOON, "context": "device=phone"}).json()
    plain = client.get("/recommend", params={"user_id": "u1", "at": NOON}).json()
    assert asked["scores"] != plain["scores"]


def test_recommendations_are_the_best_scores_among_unseen_items(client: TestClient) -> None:
    log = small_log(users=12, rows=400)["behaviors"]
    seen = set(log[log["user_id"] == "u1"]["item_id"])
    asked = {"user_id": "u1", "at": NOON}
    unseen = client.get("/recommend", params={**asked, "k": 1000}).json()["scores"]
    every = client.get("/recommend", params={**asked, "k": 1000, "include_seen": True}).json()["scores"]
    assert {score["item_id"] for score in unseen} == EVERY_ITEM - seen
    assert {score["item_id"] for score in every} == EVERY_ITEM
    assert client.get("/recommend", params={**asked, "k": 2}).json()["scores"] == unseen[:2]
    request = {"user_id": "u1", "item_ids": sorted(EVERY_ITEM), "at": NOON}
    scored = client.post("/score", json=request).json()["scores"]
    assert [score["item_id"] for score in scored] == [score["item_id"] for score in every]
    assert all(score["text"] for score in every)


def test_similar_items_are_the_nearest_by_the_stored_vectors(home: Home, client: TestClient) -> None:
    version = OnlineLookup(home).live_version()
    stored = open_store(home).get_online_features(
        ["item_embedding:embedding"],
        [{"item_id": item, "model_version": version} for item in sorted(EVERY_ITEM)],
    )
    vectors = np.array(stored.to_dict()["embedding"])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit[7]
    expected = [item for item in np.argsort(-cosine).tolist() if item != 7]
    answer = client.get("/v1/similar/items/7", params={"k": 1000}).json()
    assert [one["item_id"] for one in answer["items"]] == expected
    assert [one["cosine"] for one in answer["items"]] == pytest.approx(cosine[expected], abs=1e-5)
    assert all(one["text"] for one in answer["items"])
    few = client.get("/v1/similar/items/7", params={"k": 3}).json()
    assert (few["item_id"], few["model_version"]) == (7, version)
    assert few["items"] == answer["items"][:3]
    by_command = json.loads(call("similar", "--item", "7", "-k", "3", "--json", home=home).stdout)
    assert [one["item_id"] for one in by_command["items"]] == expected[:3]
    assert f"{cosine[expected[0]]:.4f}" in call("similar", "--item", "7", home=home).stdout


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/v1/similar/items/999", 404, "item 999 is not in the online store"),
        ("/v1/similar/items/07", 404, "item 07 is not an integer"),
        ("/v1/similar/items/7?k=0", 422, "k: "),
        ("/v1/similar/items/7?k=1001", 422, "k: "),
    ],
)
def test_similar_items_that_cannot_be_given(
    client: TestClient, path: str, status: int, reason: str
) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert reason in answer.json()["detail"]


def test_a_user_without_history_is_cold_and_still_gets_an_answer(client: TestClient) -> None:
    features = client.get("/features", params={"user_id": "u_cold"}).json()
    assert (features["cold"], features["behaviors"]) == (True, 0)
    assert features["statistics"]["user_impressions"] is None
    answer = client.get("/recommend", params={"user_id": "u_cold", "k": 1000}).json()
    assert answer["cold"]
    assert {score["item_id"] for score in answer["scores"]} == EVERY_ITEM


@pytest.mark.parametrize(
    ("route", "params", "status", "said"),
    [
        ("/features", {"user_id": "nobody"}, 404, "user nobody is not in the online store"),
        ("/recommend", {"user_id": "nobody"}, 404, "user nobody is not in the online store"),
        ("/recommend", {"user_id": "u1", "context": "colour=red"}, 400, "colour"),
        ("/recommend", {"user_id": "u1", "context": "phone"}, 400, "context phone is refused"),
        ("/recommend", {"user_id": "u1", "k": 0}, 422, "greater than or equal to 1"),
        ("/features", {}, 422, "user_id"),
    ],
)
def test_a_question_that_cannot_be_answered(
    client: TestClient, route: str, params: dict[str, object], status: int, said: str
) -> None:
    answer = client.get(route, params=params)
    assert answer.status_code == status
    assert said in str(answer.json()["detail"])


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"user_id": "nobody"}, 404, "user nobody is not in the online store"),
        ({"item_ids": [3, 98, 99]}, 404, "item 98 (and 1 more) is not in the online store"),
        ({"item_ids": ["three"]}, 404, "item three is not an integer"),
        ({"context": {"colour": "red"}}, 400, "colour"),
        ({"item_ids": []}, 422, "at least 1"),
        ({"at": "soon"}, 422, "at"),
    ],
)
def test_a_score_that_cannot_be_given(
    client: TestClient, change: dict[str, object], status: int, said: str
) -> None:
    answer = client.post("/score", json={"user_id": "u1", "item_ids": [3], **change})
    assert answer.status_code == status
    assert said in str(answer.json()["detail"])


def test_behaviors_are_taken_only_by_a_live_service(client: TestClient) -> None:
    assert client.post("/behaviors", json={"user_id": "u1"}).status_code == 404


def test_a_service_does_not_start_before_the_first_publish(home: Home, tmp_path: Path) -> None:
    unpublished = copy_of(home, tmp_path)
    unpublished.online_store.unlink()
    with pytest.raises(NotReady, match="nothing published"):
        create_app(unpublished)


def test_what_is_missing_on_the_server_is_the_servers_fault(home: Home, tmp_path: Path) -> None:
    served = copy_of(home, tmp_path)
    client = TestClient(create_app(served))
    served.catalogue_of_items.unlink()
    answer = client.get("/recommend", params={"user_id": "u1"})
    assert answer.status_code == 503
    assert "nothing published" in answer.json()["detail"]


def test_a_model_that_is_not_there_yet_is_the_servers_fault(home: Home, tmp_path: Path) -> None:
    served = copy_of(home, tmp_path)
    client = TestClient(create_app(served))
    version = OnlineLookup(served).live_version()
    (served.models / version).rename(served.models / "elsewhere")
    with pytest.raises(Damaged, match="the live model cannot be read"):
        OnlineLookup(served).artifact(version)
    answer = client.get("/features", params={"user_id": "u1"})
    assert answer.status_code == 503
    assert answer.json()["detail"].startswith("the live model cannot be read: ")


def test_models_of_before_are_dropped(home: Home, tmp_path: Path) -> None:
    served = copy_of(home, tmp_path)
    lookup = OnlineLookup(served)
    version = lookup.live_version()
    kept = []
    for number in range(4):
        shutil.copytree(served.models / version, served.models / f"again-{number}")
        kept.append(weakref.ref(lookup.artifact(f"again-{number}")))
    gc.collect()
    assert [one() is not None for one in kept] == [False, False, True, True]


def test_lookup_from_python_raises_what_the_routes_refuse_with(home: Home) -> None:
    lookup = OnlineLookup(home)
    with pytest.raises(UnknownEntity, match="user nobody is not in the online store"):
        lookup.user("nobody")
    with pytest.raises(BadInput, match="k is 0; it must be at least 1"):
        lookup.recommend("u1", 0)
    naive, aware = datetime(2024, 6, 1, 12), datetime(2024, 6, 1, 12, tzinfo=UTC)
    assert lookup.score("u1", [3, 4], naive) == lookup.score("u1", [3, 4], aware)
    assert lookup.score("u1", ["3"], aware) == lookup.score("u1", [3], aware)


def test_context_is_written_as_column_and_value() -> None:
    assert parsed_context(["device=phone", "page=a=b"]) == {"device": "phone", "page": "a=b"}
    for refused in (["phone"], ["device=phone", "device=desk"]):
        with pytest.raises(BadInput, match="give each column once"):
            parsed_context(refused)
