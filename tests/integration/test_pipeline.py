"""The main job on a small log with a small model: every real part, from files to scores."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from bahe.cli import printing
from bahe_core.errors import BadInput, BaheError, Damaged, GateFailed, NotReady, UnknownEntity
from bahe_core.home import Home
from bahe_lake.catalogue import scalar
from bahe_lake.connection import lake
from bahe_models import needed_columns
from feature_repo.store import open_store
from materialize.frames.frame import latest_frame
from materialize.training.training_data import read_training_data
from materialize.vectors.stored_atoms import current_encoder
from serving.http.api import create_app
from serving.lookup.online_lookup import OnlineLookup
from tests.support import REPOSITORY
from tests.support.cli import attempt, call
from tests.support.logs import small_log, write_dataset


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> tuple[Home, Path]:
    """A home after `bahe run` on a log with context, and its dataset.yaml.

    Tests that change it work on a copy.
    """
    folder = tmp_path_factory.mktemp("pipeline")
    log = small_log()
    shown = log["impressions"]
    shown["device"] = np.array(["phone", "tv", None])[shown.index % 3]
    shown["hour"] = shown["event_timestamp"].dt.hour
    shown["campaign"] = None  # a column that nobody has filled yet
    impressions = {"files": "impressions.parquet", "context": ["device", "hour", "campaign"]}
    dataset = write_dataset(folder / "log", log, tiny_backbone, impressions=impressions)
    result = attempt("run", dataset, "--tracker", "none", home=folder / "home")
    assert result.exit_code == 0, result.output
    return Home.at(folder / "home"), dataset


def counts(home: Home) -> dict[str, int]:
    with lake(home) as connection:
        tables = ("runs", "atomic_behavior_embedding", "user_embedding", "item_embedding", "publications")
        return {t: scalar(connection, f"SELECT count(*) FROM {t}") for t in tables}


def test_every_part_left_what_it_should(filled: tuple[Home, Path]) -> None:
    home, _ = filled
    found = counts(home)
    assert found["user_embedding"] == 31
    assert found["item_embedding"] == 25
    with lake(home) as connection:
        assert found["atomic_behavior_embedding"] == scalar(connection, "SELECT count(*) FROM atoms")
    (frame,) = home.frames.glob("*/frame.parquet")
    columns = pq.read_schema(frame).names
    assert {"length_liked", "length_disliked", "user_click_rate", "item_click_rate", "split"} <= set(
        columns
    )
    assert "recent_atoms" not in columns  # by reference
    shown = pq.read_table(frame, columns=["context_device", "context_hour", "context_campaign"])
    assert set(map(str, shown.schema.types)) == {"string"}
    assert set(shown["context_device"].to_pylist()) == {"phone", "tv", None}
    assert set(shown["context_hour"].to_pylist()) <= set(map(str, range(24)))
    (model,) = home.models.iterdir()
    assert {p.name for p in model.iterdir()} == {"config.json", "item_ids.json", "model.safetensors"}
    report = (home.reports / "training.html").read_text()
    assert "<svg" in report
    for words in ("ID-only network", "perfectly calibrated", "10 to 49", "BAHE's AUC is", "ECE"):
        assert words in report
    assert not re.search(r"\bnan\b|\bNone\b", report)
    assert not re.search(r'(src|href)="[^#]', report)  # self-contained
    docs = (home.reports / "data_docs" / "gates.html").read_text()
    assert "ingest" in docs
    assert "embed" in docs


def test_a_second_run_does_nothing(filled: tuple[Home, Path]) -> None:
    home, dataset = filled
    before = counts(home)
    result = attempt("run", dataset, "--tracker", "none", home=home)
    assert result.exit_code == 0
    assert "encoding atoms" not in result.output
    assert counts(home) == before


def test_new_rows_cost_what_is_new(filled: tuple[Home, Path], tmp_path: Path, tiny_backbone: Path) -> None:
    home = Home.at(tmp_path / "home")
    log = small_log()
    early = {t: rows.head(895) if t in ("behaviors", "impressions") else rows for t, rows in log.items()}
    dataset = write_dataset(tmp_path / "log", early, tiny_backbone)
    call("run", dataset, "--tracker", "none", home=home)
    first = counts(home)
    write_dataset(tmp_path / "log", log, tiny_backbone)
    for arguments in (("ingest", dataset), ("encode",), ("embed",), ("publish",)):
        result = attempt(*arguments, home=home)
        assert result.exit_code == 0, (arguments, result.output, result.exception)
    with lake(home) as connection:
        # Only users whose timelines grew have a new vector.
        newest = connection.execute(
            "SELECT list(user_id ORDER BY user_id) FROM user_embedding"
            " WHERE created_timestamp = (SELECT max(created_timestamp) FROM user_embedding)"
        ).fetchone()
    assert newest == (sorted(set(log["behaviors"].tail(5)["user_id"])),)
    assert counts(home)["user_embedding"] == first["user_embedding"]


def test_answers_from_the_online_store(filled: tuple[Home, Path]) -> None:
    home, _ = filled
    lookup = OnlineLookup(home)
    user = lookup.user("u1")
    with lake(home) as connection:
        stored = connection.execute(
            "SELECT embedding, behaviors FROM user_embedding WHERE user_id = 'u1'"
        ).fetchone()
    assert stored is not None
    np.testing.assert_array_equal(user.vector, np.array(stored[0], dtype=np.float32))
    assert (user.behaviors, user.cold) == (stored[1], False)
    scored = lookup.score("u1", ["3", 4, 5])
    assert sorted(s.item_id for s in scored.scores) == [3, 4, 5]
    assert scored.scores == sorted(scored.scores, key=lambda s: -s.probability)
    best = lookup.recommend("u1", 3, include_seen=True)
    assert len(best.scores) == 3
    assert max(s.probability for s in lookup.score("u1", list(range(25))).scores) == pytest.approx(
        best.scores[0].probability
    )
    moment = datetime(2024, 4, 2)
    assert lookup.score("u1", [3], moment) == lookup.score("u1", [3], moment.replace(tzinfo=UTC))
    fresh = lookup.recommend("u1", 25)
    assert {str(s.item_id) for s in fresh.scores}.isdisjoint(user.seen_items)


def test_what_serving_says_is_what_training_would_have_seen(filled: tuple[Home, Path]) -> None:
    """Invariant 2: the same values online as a point-in-time frame gives for this moment."""
    home, _ = filled
    store = open_store(home)
    rows = pd.DataFrame({"user_id": [f"u{i}" for i in range(30)], "item_id": [i % 25 for i in range(30)]})
    service = store.get_feature_service("ctr_training")
    offline = store.get_historical_features(
        rows.assign(event_timestamp=pd.Timestamp.now("UTC")), service
    ).to_df()
    online = store.get_online_features(service, rows.to_dict("records")).to_df()
    for column in online.columns:
        np.testing.assert_array_equal(
            offline[column].to_numpy(dtype=object), online[column].to_numpy(dtype=object), err_msg=column
        )


def test_a_vector_is_not_known_before_its_model(filled: tuple[Home, Path]) -> None:
    """A frame of impressions that a model learned from, or chose its epoch by, has none of its vectors."""
    home, _ = filled
    (model,) = home.models.iterdir()
    frame = pq.read_table(latest_frame(home).path).to_pandas()
    asked = frame[["user_id", "item_id", "event_timestamp", "split"]].assign(model_version=model.name)
    features = ["user_embedding:behaviors", "item_embedding:embedding"]
    got = open_store(home).get_historical_features(asked, features).to_df()
    learned = got["split"] != "test"
    assert got.loc[learned, ["behaviors", "embedding"]].isna().all(axis=None)
    # An item's vector holds for all of the test split, a user's from the last behavior that it has read.
    assert got.loc[~learned, "embedding"].notna().all()
    later = asked.assign(event_timestamp=pd.Timestamp("2030-01-01", tz="UTC"))
    assert open_store(home).get_historical_features(later, features).to_df()["behaviors"].notna().all()


def test_serving_reads_context_as_training_did(filled: tuple[Home, Path]) -> None:
    """A row's context, hashed on training's path, scores as the same values asked of the API do."""
    home, _ = filled
    frame = latest_frame(home)
    rows = pq.read_table(frame.path).to_pylist()
    with lake(home) as connection:
        data = read_training_data(
            connection, frame, current_encoder(connection, home), ["liked", "disliked"]
        )
        stored = {
            entity: dict(
                connection.execute(f"SELECT {entity}_id, embedding FROM {entity}_embedding").fetchall()
            )
            for entity in ("user", "item")
        }
    assert data.context == ("device", "hour", "campaign")
    lookup, client = OnlineLookup(home), TestClient(create_app(home))
    artifact = lookup.artifact(lookup.live_version())
    split = data.splits["test"]
    in_test = [row for row in rows if row["split"] == "test"]
    moment = datetime(2024, 4, 2, tzinfo=UTC)
    store = open_store(home)
    answers = set()
    for place in (0, 1, 2):  # a phone, a TV and an unknown device
        row, hashed_NX = in_test[place], split.context_NX
        assert hashed_NX is not None
        pair = {"user_id": row["user_id"], "item_id": row["item_id"]}
        known = store.get_historical_features(
            pd.DataFrame([{**pair, "event_timestamp": moment}]), store.get_feature_service("ctr_training")
        ).to_df()
        expected = artifact.score(
            np.array([stored["user"][row["user_id"]]], dtype=np.float32),
            np.array([stored["item"][row["item_id"]]], dtype=np.float32),
            {c: known[c].to_numpy(dtype=np.float64) for c in needed_columns()},
            known[["length_liked", "length_disliked"]].fillna(0).to_numpy(dtype=np.int64),
            np.array([moment.timestamp() * 1e6], dtype=np.int64),
            hashed_NX[place : place + 1],
        )
        context = {"device": row["context_device"], "hour": int(row["context_hour"])}
        request = {"user_id": row["user_id"], "item_ids": [row["item_id"]], "at": moment.isoformat()}
        answer = client.post("/score", json={**request, "context": context}).json()
        assert answer["scores"][0]["probability"] == pytest.approx(float(expected[0]), abs=1e-7)
        answers.add(context["device"])
    assert answers == {"phone", "tv", None}


def test_context_of_a_request(filled: tuple[Home, Path]) -> None:
    home, _ = filled
    lookup, client = OnlineLookup(home), TestClient(create_app(home))
    at = datetime(2024, 4, 2, tzinfo=UTC)

    def best(*context: str) -> list[float]:
        query = {"user_id": "u1", "k": 5, "at": at.isoformat(), "include_seen": True}
        found = client.get("/recommend", params={**query, "context": list(context)})
        assert found.status_code == 200, found.text
        return [s["probability"] for s in found.json()["scores"]]

    phone, television = best("device=phone", "hour=8"), best("hour=8", "device=tv")
    assert phone != television
    assert best() == best("device=", "hour= ") != best("device=phone") != phone
    told = lookup.recommend("u1", 5, at, include_seen=True, context={"device": "phone", "hour": 8})
    assert [s.probability for s in told.scores] == phone
    words = "colour is not a context column of the model; choose from device, hour, campaign."
    refused = client.get("/recommend", params={"user_id": "u1", "context": "colour=red"})
    assert (refused.status_code, refused.json()["detail"]) == (400, words)
    body = {"user_id": "u1", "item_ids": [1], "context": {"colour": "red"}}
    refused = client.post("/score", json=body)
    assert (refused.status_code, refused.json()["detail"]) == (400, words)
    assert client.get("/recommend", params={"user_id": "u1", "context": "phone"}).status_code == 400
    assert client.post("/score", json={**body, "context": {"device": ["phone"]}}).status_code == 422
    asked = ("recommend", "--user", "u1", "-k", 5, "--at", "2024-04-02", "--include-seen", "--json")
    printed = attempt(*asked, "--context", "device=phone", "--context", "hour=8", home=home)
    assert [s["probability"] for s in json.loads(printed.stdout)["scores"]] == phone
    score = ("score", "--user", "u1", "--items", "1")
    for given, said in (
        ("device", "context device is refused; give each column once, as device=phone"),
        ("colour=red", "choose from device, hour"),
    ):
        refusal = attempt(*score, "--context", given, home=home)
        assert isinstance(refusal.exception, BadInput)
        assert said in str(refusal.exception)


def test_a_user_without_history_gets_the_empty_state(filled: tuple[Home, Path]) -> None:
    home, _ = filled
    result = attempt("score", "--user", "u_cold", "--items", "1,2", home=home)
    assert result.exit_code == 0
    assert "cold" in result.output
    answer = OnlineLookup(home).score("u_cold", [1, 2])
    assert answer.cold
    assert all(0 < s.probability < 1 for s in answer.scores)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("lookup", "--user", "nobody"), "user nobody is not in the online store"),
        (("score", "--user", "u1", "--items", "1,777"), "item 777 is not in the online store"),
        (("score", "--user", "u1", "--items", "one"), "item one is not an integer"),
        (("recommend", "--user", "u1", "-k", "0"), "k is 0"),
        (("frame", "--service", "nothing"), "feature service nothing is not registered"),
    ],
)
def test_bad_requests_are_one_sentence(
    arguments: tuple[str, ...], words: str, filled: tuple[Home, Path]
) -> None:
    home, _ = filled
    before = counts(home)
    result = attempt(*arguments, home=home)
    assert isinstance(result.exception, BaheError)
    assert words in str(result.exception)
    assert result.exception.exit_code == 2
    assert counts(home) == before


def test_the_process_exits_with_two_and_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bahe", "run", "missing.yaml", "--home", str(tmp_path / "home")],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("bahe: missing.yaml does not exist")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "home" / "lake" / "catalogue.sqlite").exists()


@pytest.mark.parametrize(
    "job", ["encode", "apply", "frame", "train", "embed", "publish", "lookup", "serve"]
)
def test_a_job_before_its_turn_says_what_to_run(job: str, tmp_path: Path) -> None:
    more = ("--user", "u1") if job == "lookup" else ()
    result = attempt(job, *more, home=tmp_path / "home")
    assert isinstance(result.exception, NotReady)
    assert "run `bahe" in str(result.exception)


def test_the_http_api(filled: tuple[Home, Path]) -> None:
    client = TestClient(create_app(filled[0]))
    health = client.get("/health").json()
    assert health["status"] == "ok"
    assert health["model_version"].startswith("bahe-")
    features = client.get("/features", params={"user_id": "u1"}).json()
    assert len(features["embedding"]) == 32
    answer = client.post("/score", json={"user_id": "u1", "item_ids": [1, 2, 3]}).json()
    assert [s["probability"] for s in answer["scores"]] == sorted(
        (s["probability"] for s in answer["scores"]), reverse=True
    )
    assert len(client.get("/recommend", params={"user_id": "u1", "k": 4}).json()["scores"]) <= 4
    assert client.get("/features", params={"user_id": "nobody"}).status_code == 404
    assert client.post("/score", json={"user_id": "u1", "item_ids": []}).status_code == 422
    assert "nobody" in client.get("/recommend", params={"user_id": "nobody"}).json()["detail"]


def feast(*arguments: str, home: Home) -> str:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "feast.cli.cli",
            "-c",
            "feature_repo",
            "-f",
            str(home.feature_store_yaml),
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_feast_works_as_its_users_expect(filled: tuple[Home, Path], tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home")
    shutil.copytree(filled[0].root, home.root)
    settings = home.feature_store_yaml.read_text().replace(str(filled[0].root), str(home.root))
    home.feature_store_yaml.write_text(settings)
    feast("apply", home=home)
    views = feast("feature-views", "list", home=home)
    for view in ("user_embedding", "item_embedding", "user_timeline", "user_stats", "item_stats"):
        assert view in views
    feast("materialize", "--disable-event-timestamp", "-v", "user_stats", home=home)
    from feast import FeatureStore

    store = FeatureStore(fs_yaml_file=home.feature_store_yaml)
    online = store.get_online_features(
        ["user_stats:user_impressions", "user_timeline:length_liked"], entity_rows=[{"user_id": "u1"}]
    ).to_dict()
    shown = small_log()["impressions"]
    assert online["user_impressions"] == [(shown["user_id"] == "u1").sum()]


@pytest.mark.slow
def test_vectors_of_two_models_live_side_by_side(filled: tuple[Home, Path], tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home")
    dataset = write_dataset(tmp_path / "log", small_log(), Path(str(yaml_backbone(filled[1]))))
    call("run", dataset, "--tracker", "none", home=home)
    first = OnlineLookup(home).live_version()
    dataset.write_text(dataset.read_text().replace("epochs: 2", "epochs: 1"))
    for arguments in (("ingest", dataset), ("train", "--tracker", "none"), ("embed",)):
        call(*arguments, home=home)
    lookup = OnlineLookup(home)
    assert lookup.live_version() == first  # embedded, and not yet published
    call("publish", home=home)
    assert lookup.live_version() != first
    store = open_store(home)
    both = store.get_online_features(
        ["user_embedding:embedding"],
        entity_rows=[{"user_id": "u1", "model_version": v} for v in (first, lookup.live_version())],
    ).to_dict()["embedding"]
    assert None not in both
    assert both[0] != both[1]


def yaml_backbone(dataset: Path) -> str:
    import yaml

    return str(yaml.safe_load(dataset.read_text())["backbone"]["path"])


def test_a_failed_gate_stops_what_follows(filled: tuple[Home, Path], tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home")
    dataset = write_dataset(tmp_path / "log", small_log(), Path(yaml_backbone(filled[1])))
    call("ingest", dataset, home=home)
    call("encode", home=home)
    with lake(home) as connection:
        connection.execute(
            "UPDATE atomic_behavior_embedding SET embedding = [1.0] WHERE atom_id IN"
            " (SELECT min(atom_id) FROM atoms)"
        )
        connection.execute("UPDATE runs SET finished = now() WHERE job = 'encode'")
    refused = attempt("encode", home=home)
    assert isinstance(refused.exception, GateFailed)
    assert "embedding" in str(refused.exception)
    call("apply", home=home)
    stopped = attempt("frame", home=home)
    assert isinstance(stopped.exception, GateFailed)
    assert not list(home.frames.glob("*/frame.parquet"))


def test_results_are_written_as_json(filled: tuple[Home, Path]) -> None:
    with lake(filled[0]) as connection:
        row = connection.execute("SELECT facts FROM runs WHERE job = 'train'").fetchone()
    assert row is not None

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    results = json.loads(row[0], parse_constant=refuse)["results"]
    for r in results:
        assert r["auc_low"] <= r["auc"] <= r["auc_high"]
        assert 0 <= r["ece"] <= 1
        assert 0 < r["log_loss"] < 2
        gain = [r[name] for name in r if name.startswith("bahe_gain")]
        assert len(gain) == (0 if r["model"] == "bahe" else 3)
    assert {(r["model"], r["split"]) for r in results} == {
        (m, s) for m in ("floor", "id_only", "bahe") for s in ("validation", "test")
    }
    assert all(0 <= r["auc"] <= 1 and r["peak_memory_mb"] > 0 for r in results)
    # Users like the items of one half of the words: text tells, and the floor cannot know.
    auc = {r["model"]: r["auc"] for r in results if r["split"] == "test"}
    assert set(auc) == {"floor", "id_only", "bahe"}


def test_the_results_table_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"auc": 0.7616, "auc_low": 0.748, "auc_high": 0.7741, "train_seconds": 1234.5}
    row = {"model": "id_only", "split": "validation", **metrics, "gauc": None, "peak_memory_mb": 12345}
    printing.print_results([row])
    printed = capsys.readouterr().out
    assert "0.7616 [0.748, 0.774]" in printed
    assert "n/a" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_unknown_entities_are_their_own_error(filled: tuple[Home, Path]) -> None:
    with pytest.raises(UnknownEntity):
        OnlineLookup(filled[0]).user("nobody")


@pytest.mark.parametrize(
    ("file", "arguments", "way_out"),
    [
        ("lake/catalogue.sqlite", ("encode",), "restore it from a copy"),
        ("online.db*", ("lookup", "--user", "u1"), "delete it and run `bahe publish`"),
        ("registry.db", ("lookup", "--user", "u1"), "delete it and run `bahe apply`"),
        ("lake/data/**/user_timeline/**/*.parquet", ("embed",), "restore it from a copy"),
    ],
)
def test_a_damaged_home_says_what_to_do(
    file: str, arguments: tuple[str, ...], way_out: str, filled: tuple[Home, Path], tmp_path: Path
) -> None:
    shutil.copytree(filled[0].root, tmp_path / "home")
    home = Home.at(tmp_path / "home")
    if arguments == ("embed",):  # so that there is something to embed
        with lake(home) as connection:
            connection.execute("DELETE FROM user_embedding")
    for path in home.root.glob(file):
        path.write_bytes(b"this is not what it was" * 100)
    result = attempt(*arguments, home=home)
    assert isinstance(result.exception, Damaged), result.exception
    assert way_out in str(result.exception)
    assert "\n" not in str(result.exception)
