"""Users whose ids are integers: one who is not known is nobody else, and is scored all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from bahe_core.home import Home
from serving.http.api import create_app
from tests.support.cli import call
from tests.support.logs import small_log, write_dataset


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> TestClient:
    """The model reads what the user did with the item."""
    folder = tmp_path_factory.mktemp("integers")
    log = small_log(users=12, rows=400)
    for table in ("impressions", "behaviors", "users"):
        log[table]["user_id"] = (
            log[table]["user_id"].str.removeprefix("u").replace("_cold", "77").astype(int)
        )
    features = {"numeric": ["user_item_behaviors"]}
    home = Home.at(folder / "home")
    dataset = write_dataset(folder / "log", log, tiny_backbone, features=features)
    call("run", dataset, "--tracker", "none", home=home)
    return TestClient(create_app(home, live=True))


@pytest.mark.parametrize("user_id", ["010", "abc", "1_0", " 10", "9" * 30, "10.0", "é"])
def test_an_id_that_is_none_is_one_without_history(client: TestClient, user_id: str) -> None:
    asked = {"item_ids": list(range(25)), "at": "2024-06-01T12:00:00Z"}
    scores = {
        one: client.post("/v1/score", json={**asked, "user_id": one}) for one in (user_id, 10**12, 77, 10)
    }
    assert all(answer.status_code == 200 for answer in scores.values()), scores[user_id].text
    answers = {one: answer.json() for one, answer in scores.items()}
    assert (answers[user_id]["user_id"], answers[user_id]["cold"]) == (user_id, True)
    assert answers[user_id]["items"] == answers[10**12]["items"]
    assert answers[user_id]["items"] != answers[10]["items"]
    best = client.post("/v1/recommend", json={"user_id": user_id, "k": 3})
    assert best.status_code == 200, best.text
    assert len(best.json()["scores"]) == 3
    refused = client.post("/v1/score", json={**asked, "user_id": user_id, "unknown_user": "refuse"})
    assert refused.status_code == 404


def test_an_integer_is_one_written_either_way(client: TestClient) -> None:
    asked = {"item_ids": [3, 4], "at": "2024-06-01T12:00:00Z"}
    for known in (10, 10**12):
        one, other = (
            client.post("/v1/score", json={**asked, "user_id": user}).json() for user in (known, str(known))
        )
        assert one == other
