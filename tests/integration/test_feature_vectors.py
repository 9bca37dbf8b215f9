"""What `features.vectors` lists reaches the frame, the model, the online store, requests and the audit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fastapi.testclient import TestClient

import bahe
from bahe_core.errors import BadInput, NotReady
from materialize.frames.frame import latest_frame
from serving.audit.audit import audit
from serving.http.api import create_app
from serving.lookup.candidates import ItemsOfUser
from serving.lookup.online_lookup import OnlineLookup
from serving.lookup.request_log import RequestLog
from tests.support.cli import call
from tests.support.logs import small_log, write_dataset

DEFINITIONS = """
from datetime import timedelta

from feast import FeatureView, Field, FileSource
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Float32, Float64, Int64

from feature_repo.definitions import item, user


def view(name, entities, *fields):
    return FeatureView(
        name=name,
        entities=entities,
        ttl=timedelta(0),
        schema=list(fields),
        source=FileSource(name=name, path=f"{name}.parquet", timestamp_field="event_timestamp"),
    )


rank = Field(name="rank", dtype=Int64)
taste = view("taste", [user], Field(name="embedding", dtype=Array(Float32)), rank)
picture = view("picture", [item], Field(name="pixels", dtype=Array(Float64)))
match = view("match", [user, item], Field(name="crossed", dtype=Array(Float32)))
twin = view("twin", [item], Field(name="embedding", dtype=Array(Float32)))


@on_demand_feature_view(sources=[taste], schema=[Field(name="doubled", dtype=Array(Float32))])
def doubled(inputs):
    return inputs.assign(doubled=inputs["embedding"])[["doubled"]]
"""
VECTORS = ["taste", "picture:pixels", "match:crossed", "item_attributes"]
WIDTHS = {"taste:embedding": 3, "picture:pixels": 40, "match:crossed": 2, "item_attributes:cover": 4}


def team_folder(folder: Path, log: dict[str, pd.DataFrame]) -> Path:
    """Vectors that change over the log, at random moments; some users, items and pairs never have one."""
    folder.mkdir(parents=True)
    (folder / "definitions.py").write_text(DEFINITIONS)
    rng = np.random.default_rng(7)
    shown = log["impressions"]
    first, last = shown["event_timestamp"].min(), shown["event_timestamp"].max()

    def write(name: str, keys: pd.DataFrame, column: str, width: int, dtype: str) -> None:
        rows = keys.loc[keys.index.repeat(3)].reset_index(drop=True)
        rows["event_timestamp"] = first + (last - first) * rng.random(len(rows))
        rows["event_timestamp"] = rows["event_timestamp"].dt.floor("us")
        # Some at the very instant of an impression, which does not know them yet.
        places = rng.integers(0, len(shown), len(rows) // 2)
        rows.loc[: len(places) - 1, "event_timestamp"] = shown["event_timestamp"].to_numpy()[places]
        rows = rows.drop_duplicates(["event_timestamp", *keys.columns])
        rows[column] = list(rng.normal(size=(len(rows), width)).astype(dtype))
        rows[column] = rows[column].where(rng.random(len(rows)) < 0.9, None)  # taken back
        rows["rank"] = 1
        rows.to_parquet(folder / f"{name}.parquet")

    users = shown[["user_id"]].drop_duplicates().iloc[2:]
    items = shown[["item_id"]].drop_duplicates().iloc[2:]
    write("taste", users, "embedding", 3, "float32")
    write("picture", items, "pixels", 40, "float64")
    write("match", shown[["user_id", "item_id"]].drop_duplicates().iloc[::2], "crossed", 2, "float32")
    write("twin", items, "embedding", 3, "float32")
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> bahe.Project:
    folder = tmp_path_factory.mktemp("vectors")
    log = small_log(rows=400, users=12)
    team_folder(folder / "log" / "features", log)
    covers = np.random.default_rng(1).normal(size=(len(log["items"]), 4))
    log["items"]["cover"] = [None if item % 5 == 0 else cover for item, cover in enumerate(covers)]
    dataset = write_dataset(
        folder / "log",
        log,
        tiny_backbone,
        feature_repo="features",
        features={"numeric": ["taste:rank"], "vectors": VECTORS},
    )
    project = bahe.open(folder / "home")
    project.run(dataset, tracker="none")
    return project


def test_they_are_joined_point_in_time(project: bahe.Project) -> None:
    """Each row against brute force: the latest vector strictly before it, null where that is null."""
    frame = latest_frame(project.home)
    assert frame.facts["vectors"] == WIDTHS
    table = pq.read_table(frame.path)
    rows = table.to_pandas()
    for reference in WIDTHS:
        view, _, column = reference.partition(":")
        assert table.schema.field(column).type == pa.list_(pa.float32())
        source = _source(project, view)
        keys = [key for key in ("user_id", "item_id") if key in source]
        by_key = dict(list(source.sort_values("event_timestamp").groupby(keys)))
        known = 0
        for row in rows.to_dict("records"):
            its = by_key.get(tuple(row[key] for key in keys))
            before = None if its is None else its[its["event_timestamp"] < row["event_timestamp"]]
            wanted = None if before is None or before.empty else before[column].iloc[-1]
            if wanted is None:
                assert row[column] is None
            else:
                known += 1
                np.testing.assert_array_equal(row[column], np.asarray(wanted, np.float32))
        assert 20 < known < len(rows) - 20


def test_the_model_learns_from_them(project: bahe.Project) -> None:
    lookup = OnlineLookup(project.home)
    artifact = lookup.artifact(lookup.live_version())
    assert artifact.vectors == WIDTHS
    train = pq.read_table(latest_frame(project.home).path).to_pandas().query("split == 'train'")
    assert artifact.model.vectors is not None
    mean_D = np.mean(train["embedding"].dropna().tolist(), axis=0)
    np.testing.assert_allclose(artifact.model.vectors.inputs[0].mean_D.numpy(), mean_D, rtol=1e-4)
    report = (project.home.reports / "training.html").read_text()
    assert "picture:pixels" in report


def test_a_request_reads_what_training_sees(project: bahe.Project) -> None:
    lookup = OnlineLookup(project.home, RequestLog(project.home))
    version = lookup.live_version()
    assert list(lookup.models.inputs(version).vectors["pair"]) == ["match:crossed"]
    scored = {one.item_id: one.probability for one in lookup.score("u1", list(range(10))).scores}
    best = lookup.recommend("u1", 25, include_seen=True).scores
    assert {one.item_id: one.probability for one in best if one.item_id in scored} == pytest.approx(
        scored, abs=1e-6
    )
    lookup.recommend("u2", 5)
    for found in (audit(project.home, requests=True), audit(project.home, last=200)):
        assert found.consistent, [(one.feature, one.causes) for one in found.features if one.differing]
        by_name = {one.feature: one for one in found.features}
        assert by_name.keys() >= WIDTHS.keys()
        for name in WIDTHS:
            assert by_name[name].largest_difference == 0
            assert by_name[name].edit_distance is None


def test_a_probability_depends_on_them(project: bahe.Project) -> None:
    """The score is the artifact's, of the vectors of the request's moment as the files have them."""
    lookup = OnlineLookup(project.home)
    artifact = lookup.artifact(lookup.live_version())
    now, items = pd.Timestamp.now("UTC"), list(range(10))
    scored = {s.item_id: s.probability for s in lookup.score("u1", items, now.to_pydatetime()).scores}
    given = {
        reference: np.full((len(items), width), np.nan, dtype=np.float32)
        for reference, width in WIDTHS.items()
    }
    for reference, values in given.items():
        view, _, column = reference.partition(":")
        source = _source(project, view).sort_values("event_timestamp")
        keys = [key for key in ("user_id", "item_id") if key in source]
        newest = source.drop_duplicates(keys, keep="last").set_index(keys)[column]
        for place, item in enumerate(items):
            key = tuple({"user_id": "u1", "item_id": item}[one] for one in keys)
            value = newest.get(key if len(key) > 1 else key[0])
            if value is not None:
                values[place] = value
    assert np.isnan(given["match:crossed"][:, 0]).any()
    assert np.isfinite(given["match:crossed"][:, 0]).any()
    user = lookup.user("u1")
    vectors, values = lookup.items(items, artifact.model_version, "u1")
    columns = {
        name: np.array(values.get(name) or [user.statistics[name]] * len(items), dtype=np.float64)
        for name in artifact.dense.columns
    }
    length_C = [int(user.statistics[f"length_{c}"] or 0) for c in artifact.dense.channels]
    arguments = (
        np.tile(user.vector, (len(items), 1)),
        vectors.vectors_ND,
        columns,
        np.tile(length_C, (len(items), 1)),
        np.full(len(items), now.value // 1000),
    )
    expected = artifact.score(*arguments, vectors=given)
    assert [scored[item] for item in items] == pytest.approx(expected.tolist(), abs=1e-6)
    unknown = {name: np.full_like(values, np.nan) for name, values in given.items()}
    assert np.abs(artifact.score(*arguments, vectors=unknown) - expected).max() > 1e-4


def test_a_batch_of_users_reads_the_same_features(project: bahe.Project) -> None:
    lookup, at = OnlineLookup(project.home), datetime(2030, 1, 1, tzinfo=UTC)
    asked = [ItemsOfUser(user_id=f"u{n}", item_ids=range(n, n + 9), at=at) for n in range(12)]
    for one, found in zip(asked, lookup.score_batch(asked), strict=True):
        scores = lookup.score(one.user_id, one.item_ids, at).scores
        alone = {score.item_id: score.probability for score in scores}
        batch = dict(zip(found.item_ids, found.probabilities, strict=True))
        assert batch == pytest.approx(alone, abs=1e-6)


def test_a_user_whose_id_is_none_has_no_vector_of_pairs(project: bahe.Project) -> None:
    lookup, items, nobody = OnlineLookup(project.home), list(range(25)), "\ud800"  # no text
    _, values = lookup._items_for(lookup.user_or_empty(nobody), items)
    assert values["match:crossed"] == [None] * 25
    at = datetime(2030, 1, 1, tzinfo=UTC)
    scores = [lookup.score_each(user, items, at).probabilities for user in (nobody, "never seen")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_people_see_them(project: bahe.Project) -> None:
    embedding = OnlineLookup(project.home).user("u1").vectors["taste:embedding"]
    assert embedding is not None
    shown = call("lookup", "--user", "u1", "--json", home=project.home)
    assert json.loads(shown.stdout)["taste:embedding"] == embedding.tolist()
    with TestClient(create_app(project.home)) as client:
        answer = client.get("/features", params={"user_id": "u1"}).json()
        asked = {"user_id": "u1", "item_ids": list(range(25)), "at": "2030-01-01T00:00:00Z"}
        scored = client.post("/score", json=asked).json()["scores"]
    mine = OnlineLookup(project.home).score("u1", list(range(25)), datetime(2030, 1, 1, tzinfo=UTC))
    assert [(one["item_id"], one["probability"]) for one in scored] == [
        (one.item_id, pytest.approx(one.probability, abs=1e-6)) for one in mine.scores
    ]
    assert answer["vectors"] == {"taste:embedding": embedding.tolist()}


def test_a_running_service_answers_with_what_is_published(project: bahe.Project) -> None:
    with TestClient(create_app(project.home)) as client:
        asked = {"user_id": "u1", "item_ids": list(range(25)), "at": "2030-01-01T00:00:00Z"}
        before = client.post("/score", json=asked).json()["scores"]
        with _changed(project, "picture", lambda vector: -vector):
            project.publish()
            after = client.post("/score", json=asked).json()["scores"]
        project.publish()
        again = client.post("/score", json=asked).json()["scores"]
    assert before != after
    assert again == before


def test_changed_vectors_are_found_by_the_audit_and_published(project: bahe.Project) -> None:
    with _changed(project, "taste", lambda vector: vector + 1):
        (wrong,) = (one for one in audit(project.home, last=100).features if one.differing)
        assert wrong.feature == "taste:embedding"
        assert wrong.largest_difference == pytest.approx(1, abs=1e-3)
        assert project.publish().rows > 0
        assert audit(project.home, last=100).consistent
    project.publish()
    assert project.publish().skipped


def test_vectors_of_another_width_are_not_published(project: bahe.Project) -> None:
    live = OnlineLookup(project.home).live_version()
    with _changed(project, "taste", lambda vector: np.append(vector, np.float32(0))):
        with pytest.raises(
            NotReady, match=r"reads vectors of 3 numbers of taste:embedding, which has 4 now"
        ):
            project.publish()
        assert not project.frame().skipped
        assert latest_frame(project.home).facts["vectors"] == {**WIDTHS, "taste:embedding": 4}
    assert OnlineLookup(project.home).live_version() == live
    assert project.frame().frame_id


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda vector: vector[: 2 if vector[0] > 0 else 3], r"taste:embedding has vectors of 2 and of 3"),
        (lambda vector: vector[:0], r"taste:embedding has vectors of 0 numbers"),
        (lambda vector: None, r"taste:embedding has no vector yet"),
        (lambda vector: vector * np.float32(np.inf), r"taste:embedding has \d+ vectors with a value that"),
    ],
)
def test_vectors_that_no_model_can_read_are_refused(
    change: object, words: str, project: bahe.Project
) -> None:
    before = latest_frame(project.home)
    with _changed(project, "taste", change), pytest.raises(BadInput, match=words):
        project.frame()
    assert latest_frame(project.home) == before


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"vectors": ["taste:rank"]}, r"vectors: taste:rank is Int64, no vector of floats; list it under"),
        (
            {"numeric": ["taste:embedding"]},
            r"numeric: taste:embedding is Array\(Float32\), no number; list",
        ),
        ({"numeric": ["picture"]}, r"numeric: picture has no number; it has pixels \(Array\(Float64\)\)"),
        ({"vectors": ["user_stats"]}, r"vectors: user_stats has no vector of floats"),
        ({"vectors": ["user_recent_atoms"]}, r"has no vector of floats; it has recent_atoms"),
        ({"vectors": ["user_embedding"]}, r"is keyed by model_version, user_id"),
        ({"vectors": ["doubled"]}, r"doubled is of a view on demand"),
        ({"vectors": ["taste", "twin"]}, r"taste:embedding and twin:embedding have one name"),
    ],
)
def test_what_is_no_vector_is_refused(
    features: dict[str, list[str]], words: str, project: bahe.Project
) -> None:
    path = project.home.root / "dataset.yaml"
    before = path.read_text()
    try:
        path.write_text(yaml.safe_dump(yaml.safe_load(before) | {"features": features}))
        with pytest.raises(BadInput, match=words):
            project.frame()
    finally:
        path.write_text(before)


def _team(project: bahe.Project) -> Path:
    return Path(yaml.safe_load((project.home.root / "dataset.yaml").read_text())["feature_repo"])


def _source(project: bahe.Project, view: str) -> pd.DataFrame:
    """The file of a view; a column of the log's items is a view of bahe's."""
    team = _team(project)
    path = team.parent / "items.parquet" if view == "item_attributes" else team / f"{view}.parquet"
    return pd.read_parquet(path)


@contextmanager
def _changed(project: bahe.Project, view: str, change: object) -> Iterator[None]:
    """The team writes other vectors."""
    path = _team(project) / f"{view}.parquet"
    before = pd.read_parquet(path)
    assert callable(change)
    try:
        rows = before.copy()
        column = "pixels" if view == "picture" else "embedding"
        rows[column] = [None if v is None else change(v) for v in before[column]]
        schema = pq.read_schema(path)
        pq.write_table(pa.Table.from_pandas(rows, schema), path)
        yield
    finally:
        before.to_parquet(path)
