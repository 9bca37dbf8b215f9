"""A service that takes behaviors in: answers know them at once, and until the log does."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient

from bahe_core.errors import BaheError, Busy, Damaged, NotReady, NotWritable, Unreachable
from bahe_core.home import Home
from bahe_models import Artifact
from serving.http.api import create_app
from serving.live.live_lookup import LiveLookup
from serving.lookup.online_lookup import OnlineLookup
from tests.support.cli import call
from tests.support.home_contents import copy_of
from tests.support.logs import small_log, write_dataset

JSON = {"Content-Type": "application/json"}
LATER = "2024-06-01T12:00:00Z"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> tuple[Home, Path]:
    """A home whose model reads merged channels, time gaps and what a user did, and its dataset.yaml."""
    folder = tmp_path_factory.mktemp("live")
    model = {
        "deep_width": 8,
        "profile_width": 8,
        "head_width": 16,
        "channels": "merged",
        "time_gaps": True,
        "recent": [3],
    }
    counted = ["item_behaviors", "item_channels", "genre_behaviors", "text_behaviors"]
    features = {"numeric": [f"user_{name}" for name in counted]}
    log = small_log()
    # Items 2, 7, 12, 17 and 22 are of no genre.
    log["items"]["genre"] = np.array(["a", "b", None, "c", "d"])[log["items"]["item_id"] % 5]
    dataset = write_dataset(folder / "log", log, tiny_backbone, model=model, features=features)
    home = Home.at(folder / "home")
    call("run", dataset, "--tracker", "none", home=home)
    return home, dataset


def behavior(**changes: object) -> dict[str, Any]:
    text = small_log()["items"]["text"][3]
    return {
        "user_id": "u1",
        "channel": "liked",
        "text": f"liked {text}",
        "event_timestamp": LATER,
        **changes,
    }


def test_a_behavior_is_in_the_next_answer_and_equals_what_the_log_gives_later(
    filled: tuple[Home, Path], tmp_path: Path
) -> None:
    home = copy_of(filled[0], tmp_path)
    client = TestClient(create_app(home, live=True))
    request = {"user_id": "u1", "item_ids": [1, 2, 3], "at": "2024-06-02T00:00:00Z"}
    scores = client.post("/score", json=request).json()
    stored = client.get("/features", params={"user_id": "u1"}).json()
    other = client.get("/features", params={"user_id": "u2"}).json()

    sent = [
        behavior(item_id=8),
        behavior(item_id=7, event_timestamp="2024-06-01T12:30:00Z"),
        behavior(
            channel="disliked", text="  disliked   some\nnew words ", event_timestamp="2024-06-01T13:00"
        ),
    ]
    for number, one in enumerate(sent, start=1):
        answer = client.post("/behaviors", json=one)
        assert answer.status_code == 200, answer.text
        assert answer.json() == {
            "user_id": "u1",
            "model_version": stored["model_version"],
            "behaviors": stored["behaviors"] + number,
        }
    with_items = LiveLookup(home)
    for one in sent:
        at = pd.Timestamp(one["event_timestamp"]).to_pydatetime()
        with_items.append("u1", one["channel"], one["text"], at, one.get("item_id"))
    asked = [1, 7, 8, 3]
    pairs = with_items.items(asked, stored["model_version"], "u1")[1]
    before = OnlineLookup(home).items(asked, stored["model_version"], "u1")[1]
    assert before["genre"] == ["b", None, "c", "c"]
    for column, came in (
        ("pair_behaviors", [0, 1, 1, 0]),
        ("genre_behaviors", [0, 0, 1, 1]),
        ("text_behaviors", [0, 1, 1, 0]),
    ):
        assert [
            (now or 0) - (then or 0) for now, then in zip(pairs[column], before[column], strict=True)
        ] == came
    noon = int(pd.Timestamp(LATER).timestamp() * 1e6)
    assert pairs["genre_last_us"][2:] == [noon, noon]

    live = client.get("/features", params={"user_id": "u1"}).json()
    assert np.abs(np.subtract(live["embedding"], stored["embedding"])).max() > 0.02
    assert live["statistics"]["length_disliked"] == stored["statistics"]["length_disliked"] + 1
    assert client.post("/score", json=request).json()["scores"] != scores["scores"]
    best = client.get("/recommend", params={"user_id": "u1", "k": 25}).json()
    assert not {7, 8} & {score["item_id"] for score in best["scores"]}
    assert client.get("/features", params={"user_id": "u2"}).json() == other

    # The log catches up: what it gives is what the service said, and the service lets go of its own.
    log = small_log()
    rows = pd.DataFrame(sent)
    rows["event_timestamp"] = pd.to_datetime(rows["event_timestamp"], utc=True, format="ISO8601")
    log["behaviors"] = pd.concat([log["behaviors"], rows], ignore_index=True)
    dataset = tmp_path / "log" / "dataset.yaml"
    shutil.copytree(filled[1].parent, dataset.parent)
    log["behaviors"].to_parquet(dataset.parent / "behaviors.parquet")
    call("ingest", dataset, home=home)
    seen = LiveLookup(home).user("u1").seen_items
    assert "7" in seen, "the lake has atoms without vectors, and a service that starts now no state"
    call("encode", home=home)
    encoded = LiveLookup(home)
    assert encoded.user("u1").seen_items == seen
    assert encoded.user("u1").behaviors == live["behaviors"]
    of_encoded = encoded.items(asked, stored["model_version"], "u1")[1]
    assert of_encoded == pairs, "the lake has them, the online store not yet"
    for arguments in (("embed",), ("publish",)):
        call(*arguments, home=home)
    caught_up = client.get("/features", params={"user_id": "u1"}).json()
    assert caught_up["behaviors"] == live["behaviors"]
    np.testing.assert_allclose(caught_up["embedding"], live["embedding"], atol=0.02)
    np.testing.assert_array_equal(np.float32(caught_up["embedding"]), OnlineLookup(home).user("u1").vector)
    of_log = OnlineLookup(home).items(asked, stored["model_version"], "u1")[1]
    counted = [name for name in of_log if name.startswith(("pair_", "genre_", "text_"))]
    assert {name: of_log[name] for name in counted} == {name: pairs[name] for name in counted}
    caught_up_scores = client.post("/score", json=request).json()["scores"]
    assert caught_up_scores != scores["scores"]

    # Another model goes live: no vector of the old one is left, and the new one knows what was pushed.
    later = behavior(event_timestamp="2024-06-03T00:00:00Z")
    assert client.post("/behaviors", json=later).json()["behaviors"] == live["behaviors"] + 1
    dataset.write_text(dataset.read_text().replace("epochs: 2", "epochs: 1"))
    for arguments in (("ingest", dataset), ("frame",), ("train", "--tracker", "none"), ("embed",)):
        call(*arguments, home=home)
    call("publish", home=home)
    flipped = client.get("/features", params={"user_id": "u1"}).json()
    assert flipped["model_version"] != live["model_version"]
    assert flipped["behaviors"] == live["behaviors"] + 1
    assert len(flipped["embedding"]) == len(OnlineLookup(home).user("u1").vector)
    answer = client.post("/behaviors", json=later).json()
    assert answer["model_version"] == flipped["model_version"]
    assert answer["behaviors"] == flipped["behaviors"], "sent again, it counts once"


def test_pairs_of_a_live_service_know_when_whatever_came_first(
    filled: tuple[Home, Path], tmp_path: Path
) -> None:
    """Channels that are read apart take behaviors out of order between them."""
    lookup = LiveLookup(copy_of(filled[0], tmp_path))
    at = pd.Timestamp(LATER)
    lookup.append("u1", "liked", "liked something", at.to_pydatetime(), 7)
    (state,) = lookup._states._kept.values()
    hours = [at.value // 1000 - hour * 3_600_000_000 for hour in (0, 2, 1)]
    acts = [replace(state.acts[0], time_us=time_us) for time_us in hours]
    text_only = replace(acts[0], of={"pair": frozenset({"8"})})
    lookup._states._kept["u1"] = replace(state, acts=(*acts, text_only))
    version = lookup.live_version()
    before = OnlineLookup(lookup._home).items([7, 8], version, "u1")[1]
    pairs = lookup.items([7, 8], version, "u1")[1]
    assert pairs["pair_behaviors"] == [
        (before["pair_behaviors"][0] or 0) + 3,
        (before["pair_behaviors"][1] or 0) + 1,
    ]
    assert pairs["pair_last_us"] == [hours[0], hours[0]]
    assert pairs["pair_first_us"][0] == (before["pair_first_us"][0] or hours[1])
    seen = lookup.user("u1").seen_items
    assert "7" in seen
    assert ("8" in seen) == ("8" in OnlineLookup(filled[0]).user("u1").seen_items)


def test_what_cannot_be_taken_in_is_refused_in_one_sentence(
    filled: tuple[Home, Path], tmp_path: Path
) -> None:
    home = copy_of(filled[0], tmp_path)
    client = TestClient(create_app(home, live=True))
    soon = datetime.now(UTC) + timedelta(hours=1)
    before = client.get("/features", params={"user_id": "u1"}).json()
    for changes, status, words in (
        ({"channel": "bought"}, 400, "choose from liked, disliked"),
        ({"text": " \n "}, 400, "is empty"),
        ({"event_timestamp": "2023-01-01T00:00:00Z"}, 400, "does not follow the latest of user u1"),
        ({"user_id": "nobody"}, 404, "nobody is not in the online store"),
        ({"event_timestamp": soon.isoformat()}, 400, "has not happened yet"),
        ({"event_timestamp": "9999-12-31T23:59:59Z"}, 400, "has not happened yet"),
        ({"item_id": 999}, 404, "item 999 is not among the items"),
        ({"item_id": "1_0"}, 404, "item 1_0 is not an integer"),
        ({"channel": "c" * 256}, 400, "cc… is not known"),
    ):
        answer = client.post("/behaviors", json=behavior(**changes))
        assert answer.status_code == status
        assert words in answer.json()["detail"]
        assert answer.json()["detail"].count(". ") == 0
    assert client.post("/behaviors", json=behavior(event_timestamp="soon")).status_code == 422
    for changes in ({"text": "x" * 10_001}, {"text": "\ud800"}, {"user_id": True}, {"event_id": ""}):
        content = json.dumps(behavior(**changes))
        answer = client.post("/v1/behaviors", content=content, headers=JSON)
        assert answer.status_code == 422
        assert len(answer.text) < 300
    assert client.get("/features", params={"user_id": "u1"}).json() == before
    assert not list(home.pushed.glob("*.jsonl"))


def test_what_is_sent_again_counts_once(filled: tuple[Home, Path], tmp_path: Path) -> None:
    client = TestClient(create_app(copy_of(filled[0], tmp_path), live=True))

    def behaviors(**changes: object) -> int:
        answer = client.post("/v1/behaviors", json=behavior(**changes))
        assert answer.status_code == 200, answer.text
        count: int = answer.json()["behaviors"]
        return count

    first = behaviors(event_id="a")
    assert behaviors(event_id="a") == first
    assert behaviors() == first, "the same content"
    assert behaviors(event_id="b", text="liked  " + behavior()["text"].removeprefix("liked ")) == first
    assert behaviors(event_id="c", item_id=7) == first + 1, "with an item it says more"
    assert behaviors(event_timestamp="2024-06-01T12:00:01Z") == first + 2
    assert behaviors(event_id="a", event_timestamp="2024-06-01T12:00:02Z") == first + 2
    # What the lake has already is not sent anew either.
    log = small_log()["behaviors"]
    last = log[log["user_id"] == "u2"].sort_values("event_timestamp").iloc[-1]
    stored = client.get("/v1/users/u2").json()["behaviors"]
    again = {name: last[name] for name in ("user_id", "channel", "text")}
    assert behaviors(**again, event_timestamp=last["event_timestamp"].isoformat()) == stored


def test_every_worker_answers_with_what_any_of_them_took_in(
    filled: tuple[Home, Path], tmp_path: Path
) -> None:
    home = copy_of(filled[0], tmp_path)
    one, other = (TestClient(create_app(home, live=True)) for _ in range(2))
    sent = [(one, behavior(item_id=7)), (other, behavior(text="liked another", event_id="b"))]
    counts = [client.post("/v1/behaviors", json=body).json()["behaviors"] for client, body in sent]
    assert counts == [counts[0], counts[0] + 1]
    # One that is started later makes the state anew, from the lake and the log.
    states = [
        client.get("/v1/users/u1").json()
        for client in (one, other, TestClient(create_app(home, live=True)))
    ]
    for state in states[1:]:
        np.testing.assert_allclose(state.pop("embedding"), states[0]["embedding"], atol=1e-4)
        assert state == {key: value for key, value in states[0].items() if key != "embedding"}
    assert "7" in states[0]["seen_items"]


def test_a_kill_loses_nothing_that_was_answered(filled: tuple[Home, Path], tmp_path: Path) -> None:
    """The process ends right after its last answer, without a word, and leaves half a line behind."""
    home = copy_of(filled[0], tmp_path)
    before = OnlineLookup(home).user("u1").behaviors
    code = f"""
        import os, signal
        from datetime import datetime, timedelta
        from bahe_core.home import Home
        from serving.live.live_lookup import LiveLookup

        lookup = LiveLookup(Home.at({str(home.root)!r}))
        at = datetime(2024, 6, 1)
        for number in range(20):
            lookup.append("u1", "liked", f"liked {{number}}", at + timedelta(minutes=number))
            print(number, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [str(number) for number in range(20)], done.stderr
    assert done.returncode == -signal.SIGKILL
    (path,) = home.pushed.glob("*.jsonl")
    with path.open("a") as file:
        file.write(path.read_text().splitlines()[0][:40])
    lookup = LiveLookup(home)
    assert lookup.user("u1").behaviors == before + 20
    # The next one is not lost behind the half line.
    lookup.append("u1", "liked", "liked the end", datetime(2024, 6, 2))
    assert LiveLookup(home).user("u1").behaviors == before + 21


def test_the_first_behavior_of_a_cold_user(filled: tuple[Home, Path], tmp_path: Path) -> None:
    client = TestClient(create_app(copy_of(filled[0], tmp_path), live=True))
    before = client.get("/recommend", params={"user_id": "u_cold", "k": 3}).json()
    assert before["cold"]
    assert client.post("/behaviors", json=behavior(user_id="u_cold")).json()["behaviors"] == 1
    assert not client.get("/recommend", params={"user_id": "u_cold", "k": 3}).json()["cold"]


def test_only_so_many_states_are_kept_and_others_are_made_anew(
    filled: tuple[Home, Path], tmp_path: Path
) -> None:
    home = copy_of(filled[0], tmp_path)
    lookup = LiveLookup(home, states=2)
    at = pd.Timestamp(LATER).to_pydatetime()
    stored = {user: OnlineLookup(home).user(user).behaviors for user in ("u1", "u2", "u3")}
    for user in ("u1", "u2"):
        lookup.append(user, "liked", "word1", at)
    lookup.user("u1")  # used since, so that u2 is the one to go
    lookup.append("u3", "liked", "word1", at)
    assert set(lookup._states._kept) == {"u1", "u3"}
    extra = {user: lookup.user(user).behaviors - count for user, count in stored.items()}
    assert extra == {"u1": 1, "u2": 1, "u3": 1}
    assert len(lookup._states._kept) == 2


def test_what_came_while_others_were_let_go_of_is_not_passed_over(
    filled: tuple[Home, Path], tmp_path: Path
) -> None:
    """As many pushes as the state has, and others: what a thread saw before another let go of some."""
    home = copy_of(filled[0], tmp_path)
    lookup, other = LiveLookup(home), LiveLookup(home)
    at = pd.Timestamp(LATER).to_pydatetime()
    lookup.append("u1", "liked", "liked one", at, 7)
    lookup._pushes.drop("u1", lookup._pushes.of_user("u1"))
    other.append("u1", "liked", "liked two", at + timedelta(minutes=1), 8)
    assert "8" in lookup.user("u1").seen_items
    (state,) = lookup._states._kept.values()
    assert [act.of["pair"] for act in state.acts] == [{"8"}]


def test_a_worker_that_stopped_holds_up_pushes_for_a_moment_and_answers_not_at_all(
    filled: tuple[Home, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = copy_of(filled[0], tmp_path)
    client = TestClient(create_app(home, live=True))
    assert client.post("/v1/behaviors", json=behavior()).status_code == 200
    monkeypatch.setattr("serving.live.journal.PATIENCE", 0.05)
    again = behavior(event_timestamp="2024-06-01T13:00:00Z")
    with (home.pushed / ".lock").open("a") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        refused = client.post("/v1/behaviors", json=again)
        assert client.get("/v1/users/u1").status_code == 200
    assert refused.status_code == 503
    assert "another worker has kept" in refused.json()["detail"]
    assert client.post("/v1/behaviors", json=again).status_code == 200


def test_requests_that_wait_for_a_state_too_long_get_what_is_published(
    filled: tuple[Home, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = copy_of(filled[0], tmp_path)
    LiveLookup(home).append("u1", "liked", "liked one", pd.Timestamp(LATER).to_pydatetime(), 7)
    lookup = LiveLookup(home)
    monkeypatch.setattr("serving.lookup.tolerances.PATIENCE", 0.05)
    taken, done = threading.Event(), threading.Event()

    def keeps() -> None:
        with lookup._states._moving:
            taken.set()
            done.wait(30)

    thread = threading.Thread(target=keeps)
    thread.start()
    taken.wait(30)
    user = lookup.user("u1")
    with pytest.raises(Busy, match="try again"):
        lookup.append("u1", "liked", "liked two", pd.Timestamp("2024-06-01T13:00Z").to_pydatetime())
    done.set()
    thread.join()
    assert "7" in user.seen_items
    assert lookup.user("u1").behaviors == user.behaviors + 1


@pytest.mark.parametrize("error", [NotReady, Unreachable, Damaged, NotWritable])
def test_a_lake_that_fails_leaves_what_is_published(
    filled: tuple[Home, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaheError],
) -> None:
    home = copy_of(filled[0], tmp_path)
    LiveLookup(home).append("u1", "liked", "liked one", pd.Timestamp(LATER).to_pydatetime(), 7)
    lookup, asked = LiveLookup(home), []

    def fails(*_: object) -> None:
        asked.append(1)
        raise error("the lake is away.")

    monkeypatch.setattr("serving.live.user_states.read_user", fails)
    for _ in range(2):
        assert lookup.user("u1").behaviors == OnlineLookup(home).user("u1").behaviors
        assert "7" in lookup.user("u1").seen_items
    assert error is NotReady or len(asked) == 1, "it is left alone for a moment"


def test_only_texts_without_a_vector_in_the_lake_are_encoded(
    filled: tuple[Home, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision a text encoded alone may get another vector than the one the model learned from."""
    home = copy_of(filled[0], tmp_path)
    known, at = behavior()["text"], pd.Timestamp(LATER).to_pydatetime()

    def appended(lookup: LiveLookup) -> tuple[list[str], np.ndarray]:
        encoded: list[str] = []
        encode = lookup.texts.encode

        def counting(artifact: Artifact, channels: list[str], texts: list[str]) -> np.ndarray:
            encoded.extend(texts)
            return encode(artifact, channels, texts)

        monkeypatch.setattr(lookup.texts, "encode", counting)
        lookup.append("u1", "liked", known, at)
        return encoded, lookup.append("u1", "liked", "liked a new thing", at + timedelta(hours=1)).vector

    encoded, vector = appended(LiveLookup(home))
    assert encoded == ["liked a new thing"]

    def away(*_: object) -> None:
        raise duckdb.IOException("the lake is away.")

    shutil.rmtree(home.pushed)
    monkeypatch.setattr("serving.live.atom_vectors.vectors_of", away)
    encoded, alone = appended(LiveLookup(home))
    assert encoded == [known, "liked a new thing"]
    np.testing.assert_allclose(alone, vector, atol=1e-5)


def test_a_service_that_is_not_live_takes_no_behaviors(filled: tuple[Home, Path]) -> None:
    client = TestClient(create_app(filled[0]))
    for route in ("/behaviors", "/v1/behaviors"):
        assert client.post(route, json=behavior()).status_code == 404
