"""Users and atomic behaviors that are alike, and what is like a text: of one version, and as published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fastapi.testclient import TestClient

import bahe
from bahe_core.errors import BadInput, Busy, NotReady, Unreachable
from bahe_core.home import Home
from bahe_lake.connection import lake
from feature_repo.store import open_store
from serving.http.api import create_app
from serving.lookup import kept_vectors
from serving.lookup.kept_vectors import Kept, KeptVectors
from serving.lookup.online_lookup import OnlineLookup
from tests.support.cli import attempt, call
from tests.support.home_contents import copy_of
from tests.support.logs import LONG, small_log, write_dataset

USERS = [*(f"u{number}" for number in range(11)), LONG]


@pytest.fixture(scope="module")
def client(served: Home, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    return TestClient(create_app(copy_of(served, tmp_path_factory.mktemp("similar")), live=True))


def cosines(vectors: np.ndarray, row: int) -> np.ndarray:
    """Of all to one of them, standardised."""
    standard = (vectors - vectors.mean(axis=0)) / vectors.std(axis=0).clip(1e-9)
    unit = standard / np.linalg.norm(standard, axis=1, keepdims=True)
    result: np.ndarray = unit @ unit[row]
    return result


def atoms_of(home: Home, *channels: str) -> dict[int, tuple[str, str]]:
    with lake(home) as connection:
        rows = connection.execute("SELECT atom_id, channel, text FROM atoms").fetchall()
    return {atom: (channel, text) for atom, channel, text in rows if channel in channels}


def test_similar_users_are_the_nearest_of_those_who_did_something(served: Home, client: TestClient) -> None:
    version = OnlineLookup(served).live_version()
    stored = open_store(served).get_online_features(
        ["user_embedding:embedding"], [{"user_id": user, "model_version": version} for user in USERS]
    )
    cosine = cosines(np.array(stored.to_dict()["embedding"]), USERS.index("u3"))
    answer = client.get("/v1/similar/users/u3", params={"k": 1000}).json()
    assert (answer["user_id"], answer["model_version"]) == ("u3", version)
    found = {one["user_id"]: one["cosine"] for one in answer["users"]}
    assert set(found) == {*USERS} - {"u3"}, "neither themselves nor u_cold"
    assert list(found.values()) == sorted(found.values(), reverse=True)
    for user, its in found.items():
        assert its == pytest.approx(cosine[USERS.index(user)], abs=2e-3)
    few = client.get("/v1/similar/users/u3", params={"k": 3}).json()
    assert few["users"] == answer["users"][:3]
    by_command = json.loads(call("similar", "--user", "u3", "-k", "3", "--json", home=served).stdout)
    assert [one["user_id"] for one in by_command["users"]] == list(found)[:3]


def test_a_user_is_compared_with_what_was_pushed(served: Home, tmp_path: Path) -> None:
    home = copy_of(served, tmp_path)
    client = TestClient(create_app(home, live=True))
    before = client.get("/v1/similar/users/u_cold").json()["users"]
    pushed = {"user_id": "u_cold", "channel": "liked", "event_timestamp": "2024-06-01T12:00:00Z"}
    assert client.post("/v1/behaviors", json={**pushed, "text": "liked word1 word3"}).status_code == 200
    assert client.get("/v1/similar/users/u_cold").json()["users"] != before


def test_similar_atoms_are_the_nearest_texts_of_behaviors(served: Home, client: TestClient) -> None:
    texts = atoms_of(served, "liked", "disliked")
    encoded = bahe.open(served.root).atoms()
    ids = sorted(texts)
    vectors = encoded.vectors[np.searchsorted(encoded.ids, ids)]
    for row in (0, len(ids) - 1):  # a negative id, and a positive one
        cosine = cosines(vectors, row)
        answer = client.get(f"/v1/similar/atoms/{ids[row]}", params={"k": 1000}).json()
        found = {one["atom_id"]: one for one in answer["atoms"]}
        assert answer["atom_id"] == ids[row]
        assert set(found) == {*ids} - {ids[row]}
        for atom, one in found.items():
            assert (one["channel"], one["text"]) == texts[atom]
            assert one["cosine"] == pytest.approx(cosine[ids.index(atom)], abs=2e-3)
        best = [one["cosine"] for one in answer["atoms"]]
        assert best == sorted(best, reverse=True)


def test_a_known_text_finds_itself_among_items_and_behaviors(served: Home, client: TestClient) -> None:
    texts = OnlineLookup(served).catalogue()
    answer = client.post("/v1/similar/text", json={"text": f"  {texts[7]} ", "k": 3}).json()
    assert answer["model_version"] == OnlineLookup(served).live_version()
    assert (answer["items"][0]["item_id"], answer["items"][0]["text"]) == (7, texts[7])
    assert answer["items"][0]["cosine"] == pytest.approx(1, abs=1e-2)
    assert (len(answer["items"]), len(answer["atoms"])) == (3, 3)
    atom, (channel, text) = next(iter(atoms_of(served, "liked").items()))
    best = client.post("/v1/similar/text", json={"text": text, "k": 1}).json()["atoms"][0]
    assert (best["atom_id"], best["channel"], best["text"]) == (atom, channel, text)
    assert best["cosine"] == pytest.approx(1, abs=1e-2)
    shown = call("similar", "--text", texts[7], "-k", "1", home=served).stdout
    assert texts[7].split()[0] in shown


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/v1/similar/users/nobody", 404, "user nobody is not in the online store"),
        ("/v1/similar/users/u1?k=0", 422, "k: "),
        ("/v1/similar/users/u1?k=1001", 422, "k: "),
        ("/v1/similar/users/", 422, "user_id"),
        ("/v1/similar/atoms/12", 404, "atom '12' is not among the behaviors"),
        ("/v1/similar/atoms/012", 404, "atom '012' is not among the behaviors"),
        ("/v1/similar/atoms/liked%20it", 404, "atom 'liked it' is not among the behaviors"),
        ("/v1/similar/atoms/99999999999999999999", 404, "is not among the behaviors"),
        ("/v1/similar/atoms/12?k=0", 422, "k: "),
    ],
)
def test_what_is_alike_to_nothing_is_refused(
    client: TestClient, path: str, status: int, reason: str
) -> None:
    answer = client.get(path)
    assert (answer.status_code, reason in answer.json()["detail"]) == (status, True), answer.text


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"text": ""}, 422, "text: "),
        ({"text": " \n\t "}, 400, "the text is empty"),
        ({"text": "a" * 1001}, 422, "text: "),
        ({"text": "word1", "k": 0}, 422, "k: "),
        ({"text": "word1", "k": 1001}, 422, "k: "),
        ({"text": "word1", "channel": "liked"}, 422, "channel: "),
        ({"text": 7}, 422, "text: "),
    ],
)
def test_a_text_that_cannot_be_sought(
    client: TestClient, body: dict[str, Any], status: int, reason: str
) -> None:
    answer = client.post("/v1/similar/text", json=body)
    assert (answer.status_code, reason in answer.json()["detail"]) == (status, True), answer.text


def test_an_item_text_is_no_behavior(served: Home, client: TestClient) -> None:
    atom = next(iter(atoms_of(served, "item")))
    assert client.get(f"/v1/similar/atoms/{atom}").status_code == 404


def test_a_service_that_is_not_live_encodes_no_text(served: Home) -> None:
    answer = TestClient(create_app(served)).post("/v1/similar/text", json={"text": "word1"})
    assert answer.status_code == 404
    assert "start it with `bahe serve --live`" in answer.json()["detail"]


def test_the_command_wants_one_thing(served: Home) -> None:
    for wrong in ([], ["--user", "u1", "--item", "3"]):
        assert "give one of --item" in str(attempt("similar", *wrong, home=served).exception)


class Counted(KeptVectors):
    """Counts reads of the lake."""

    reads = 0

    def _read(self, parameters: Mapping[str, Any]) -> Kept:
        Counted.reads += 1
        return super()._read(parameters)


def test_another_publish_is_another_answer_and_until_then_the_lake_is_read_once(
    tmp_path: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = small_log(users=12, rows=400)
    early = {name: t[t["event_timestamp"] < "2024-03-01"] for name, t in log.items()}
    home = Home.at(tmp_path / "home")
    call("run", write_dataset(tmp_path / "log", early, tiny_backbone), "--tracker", "none", home=home)
    monkeypatch.setattr("serving.lookup.similar.KeptVectors", Counted)
    monkeypatch.setattr(Counted, "reads", 0)
    running = OnlineLookup(home, keep_items=True)
    known = atoms_of(home, "liked", "disliked")
    atom = min(known)

    def alike(lookup: OnlineLookup) -> tuple[Any, Any]:
        return lookup.similar.users("u1", 100), lookup.similar.atoms(atom, 1000)

    first = alike(running)
    assert alike(running) == first
    assert Counted.reads == 2, "users and atoms, once"

    log["behaviors"].loc[log["behaviors"].index[-1], "text"] = "liked what is new"
    dataset = write_dataset(tmp_path / "log", log, tiny_backbone)
    settings = yaml.safe_load(dataset.read_text())
    settings["training"]["seed"] = 7
    dataset.write_text(yaml.safe_dump(settings))
    for job in (("ingest", dataset), ("encode",), ("frame",), ("train", "--tracker", "none"), ("embed",)):
        call(*map(str, job), home=home)
    assert set(atoms_of(home, "liked", "disliked")) > set(known)
    # Neither the service that runs nor one that starts now knows what is not published.
    assert alike(running) == first
    assert alike(OnlineLookup(home)) == first

    call("publish", home=home)
    Counted.reads = 0
    second = alike(running)
    assert Counted.reads == 2
    assert {one.model_version for one in second} == {running.live_version()} != {first[0].model_version}
    assert len(second[1].atoms) > len(first[1].atoms)
    call("publish", "--rollback", home=home)
    assert [one.user_id for one in alike(running)[0].users] == [one.user_id for one in first[0].users]
    assert alike(running)[0].model_version == first[0].model_version


def test_more_than_fits_is_refused(served: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_vectors, "MOST_BYTES", 500)
    answer = TestClient(create_app(served)).get("/v1/similar/users/u1")
    assert answer.status_code == 400
    assert "the vectors of all users take more than" in answer.json()["detail"]


def test_where_the_published_snapshot_is_gone_the_lake_answers_as_it_is(
    served: Home, tmp_path: Path
) -> None:
    home = copy_of(served, tmp_path)
    expected = OnlineLookup(home).similar.users("u1")
    said = json.loads(home.counted.read_text())
    for text in (json.dumps({**said, "snapshot": 10**6}), "{}"):
        home.counted.write_text(text)
        assert OnlineLookup(home).similar.users("u1") == expected


def test_a_lake_that_is_away_is_said_and_left_alone_for_a_moment(
    served: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookup, asked = OnlineLookup(served), []

    def away(*_: object, **__: object) -> None:
        asked.append(1)
        raise Unreachable("the lake is away.")

    monkeypatch.setattr(kept_vectors, "connect", away)
    with pytest.raises(Unreachable, match="away"):
        lookup.similar.users("u1")
    with pytest.raises(NotReady, match="failed a moment ago"):
        lookup.similar.users("u1")
    assert len(asked) == 1


def test_one_request_reads_and_others_do_not_wait_for_long(
    served: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookup = OnlineLookup(served)
    monkeypatch.setattr("serving.lookup.tolerances.PATIENCE", 0.01)
    with lookup.similar._users._reading, pytest.raises(Busy, match="try again"):
        lookup.similar.users("u1")
    assert lookup.similar.users("u1").users
    with pytest.raises(BadInput, match="k is 0"):
        lookup.similar.users("u1", 0)
