"""One suite for every online store; what a store cannot do stands in CANNOT."""

from __future__ import annotations

import asyncio
import multiprocessing
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import redis
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, RepoConfig, ValueType
from feast.errors import FeatureViewNotFoundException
from feast.feature_view import FeatureViewState
from feast.on_demand_feature_view import on_demand_feature_view
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Array, Bool, Float32, Float64, Int64, String, UnixTimestamp

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_lake.connection import lake
from feast_ducklake.offline.source import DuckLakeSource
from feast_ducklake.online.features import FeatureReader
from feast_ducklake.online.vectors import VectorReader, view_keys
from tests.support.services import require_service

STORES: dict[str, dict[str, Any]] = {
    "sqlite": {"type": "feast_ducklake.GuardedSqliteOnlineStore"},
    "redis": {"type": "feast_ducklake.GuardedRedisOnlineStore"},
    "postgres": {
        "type": "postgres",
        "host": "127.0.0.1",
        "database": "test",
        "user": "postgres",
        "password": "postgres",
        "sslmode": "disable",
    },
}
STOCK = "stock Feast's PostgreSQL store has no such thing"
CANNOT = {
    ("postgres", "test_an_older_event_never_replaces_a_newer_one"): STOCK,
    ("postgres", "test_a_batch_may_hold_an_entity_twice"): STOCK,
    ("postgres", "test_of_two_values_of_one_instant_the_later_computed_counts"): STOCK,
    ("postgres", "test_four_writers_at_once_leave_the_newest"): STOCK,
    ("postgres", "test_a_value_older_than_its_ttl_reads_as_null"): STOCK,
    ("postgres", "test_single_rows_are_forgotten"): STOCK,
    ("postgres", "test_search_finds_the_nearest"): "it needs the extension pgvector",
}
NOW = datetime.now(UTC).replace(microsecond=123_456)
HOUR = timedelta(hours=1)
USERS = 25

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
model = Entity(name="model", join_keys=["model_version"], value_type=ValueType.STRING)


def source(table: str, **more: Any) -> DuckLakeSource:
    return DuckLakeSource(name=table, table=table, created_timestamp_column="created_timestamp", **more)


profile = FeatureView(
    name="profile",
    entities=[user, model],
    schema=[
        Field(name="embedding", dtype=Array(Float32), vector_index=True, vector_length=4),
        Field(name="clicks", dtype=Int64),
        Field(name="rate", dtype=Float64),
        Field(name="name", dtype=String),
        Field(name="active", dtype=Bool),
        Field(name="tags", dtype=Array(String)),
        Field(name="recent", dtype=Array(Int64)),
        Field(name="joined", dtype=UnixTimestamp),
    ],
    ttl=timedelta(0),
    source=source("profile"),
)
short_lived = FeatureView(
    name="short_lived",
    entities=[user],
    schema=[Field(name="score", dtype=Float32)],
    ttl=HOUR,
    source=source("short_lived", field_mapping={"points": "score"}),
)
everyone = FeatureView(
    name="everyone", schema=[Field(name="total", dtype=Int64)], ttl=timedelta(0), source=source("everyone")
)


@on_demand_feature_view(sources=[profile], schema=[Field(name="twice", dtype=Int64)])
def doubled(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"twice": inputs["clicks"] * 2})


def profiles() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    count = USERS
    return pd.DataFrame(
        {
            "user_id": np.arange(count),
            "model_version": ["a", "ü"] * (count // 2) + ["a"],
            "embedding": list(rng.normal(size=(count, 4)).astype(np.float32)),
            "clicks": [*range(count - 1), -(2**40)],
            "rate": [None, *rng.random(count - 1)],
            "name": [None, "", *(f"näme {i}" for i in range(count - 2))],
            "active": [i % 2 == 0 for i in range(count)],
            "tags": [[], ["x"], *([f"t{i}", ""] for i in range(count - 2))],
            "recent": [[-1, 2**62], [], *([i] for i in range(count - 2))],
            "joined": pd.Timestamp("1969-12-31 23:59:58", tz="UTC"),
            "event_timestamp": [NOW - timedelta(hours=1, seconds=i) for i in range(count)],
            "created_timestamp": NOW - timedelta(minutes=30),
        }
    )


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A lake with the views' tables."""
    home = Home.at(tmp_path_factory.mktemp("home")).create()
    older = profiles().head(5).assign(clicks=777, event_timestamp=NOW - 5 * HOUR)
    tables = {
        "profile": pd.concat([older, profiles()]),
        "short_lived": pd.DataFrame(
            {
                "user_id": [1, 2],
                "points": [0.5, 0.25],
                "event_timestamp": [NOW - 2 * HOUR, NOW - HOUR / 2],
                "created_timestamp": NOW,
            }
        ),
        "everyone": pd.DataFrame(
            {"total": [1, 2], "event_timestamp": [NOW - HOUR, NOW - HOUR / 2], "created_timestamp": NOW}
        ),
    }
    with lake(home, create=True) as connection:
        for table, rows in tables.items():
            connection.register("rows", rows)
            types = ", embedding::FLOAT[] AS embedding" if table == "profile" else ""
            left = "* EXCLUDE (embedding)" if types else "*"
            connection.execute(f"CREATE TABLE {table} AS SELECT {left}{types} FROM rows")
            connection.unregister("rows")
    return home


def configuration(home: Home, folder: Path, online: dict[str, Any], project: str) -> RepoConfig:
    return RepoConfig(
        project=project,
        provider="local",
        registry={"path": str(folder / "registry.db"), "serve_features_while_materializing": True},
        online_store=online | ({"path": str(folder / "online.db")} if "Sqlite" in online["type"] else {}),
        offline_store={"type": "feast_ducklake.DuckLakeOfflineStore", "home": str(home.root)},
        batch_engine={"type": "feast_ducklake.ArrowEngine"},
        entity_key_serialization_version=3,
        materialization={"pull_latest_features": True, "online_write_batch_size": 7},
    )


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, filled: Home, tmp_path: Path) -> Iterator[FeatureStore]:
    kind = request.param
    if kind != "sqlite":
        require_service(kind)
    reason = CANNOT.get((kind, request.node.originalname))
    if reason is not None:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    project = f"test_{uuid.uuid4().hex[:12]}"
    opened = FeatureStore(config=configuration(filled, tmp_path, STORES[kind], project))
    opened.apply([user, model, profile, short_lived, everyone, doubled])
    yield opened
    opened.teardown()
    if kind == "redis":
        assert not list(redis.Redis().scan_iter(f"*{project}*"))


def materialize(store: FeatureStore, *views: str) -> None:
    store.materialize(NOW - 24 * HOUR, datetime.now(UTC), feature_views=list(views) or None)


def entities(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return rows[["user_id", "model_version"]].to_dict("records")


def key(user_id: int, version: str | None = None) -> EntityKey:
    """The key of `profile`, or without a version of `short_lived`."""
    names, values = ["user_id"], [Value(int64_val=user_id)]
    if version is not None:
        names, values = ["model_version", *names], [Value(string_val=version), *values]
    return EntityKey(join_keys=names, entity_values=values)


def write(
    store: FeatureStore, clicks: int, event: datetime, created: datetime | None = None, user_id: int = 1
) -> None:
    values = {"clicks": Value(int64_val=clicks), "name": Value(string_val=str(clicks))}
    view = store.get_feature_view("profile")
    row = (key(user_id, "a"), values, event, created)
    store.provider.online_write_batch(store.config, view, [row], None)


def read(store: FeatureStore, user_id: int = 1) -> tuple[datetime | None, int | None]:
    """Event time and clicks; both features have to be of one write."""
    view = store.get_feature_view("profile")
    ((event, values),) = store.provider.online_read(store.config, view, [key(user_id, "a")])
    if values is None:
        return event, None
    assert values["name"].string_val == str(values["clicks"].int64_val)
    return event.replace(tzinfo=UTC), values["clicks"].int64_val


def test_what_is_materialized_is_read(store: FeatureStore) -> None:
    materialize(store)
    rows = profiles()
    names = [field.name for field in profile.features]
    answer = store.get_online_features([f"profile:{name}" for name in names], entities(rows)).to_dict()
    np.testing.assert_array_equal(np.array(answer["embedding"], np.float32), np.stack(rows["embedding"]))
    for name in set(names) - {"embedding"}:
        wanted = rows[name].astype(object).where(rows[name].notna(), None).tolist()
        assert answer[name] == wanted, name


def test_rows_are_answered_in_their_order_and_unknown_ones_with_null(store: FeatureStore) -> None:
    materialize(store)
    asked = [{"user_id": u, "model_version": "a"} for u in (4, 999, 2, 4, 1)]  # 1 is of another version
    answer = store.get_online_features(["profile:clicks", "short_lived:score", "doubled:twice"], asked)
    columns = answer.to_dict()
    assert columns["clicks"] == [4, None, 2, 4, None]
    assert columns["score"][2] == 0.25
    assert columns["twice"][0] == 8


def test_a_service_is_answered_under_full_names(store: FeatureStore) -> None:
    materialize(store)
    service = FeatureService(
        name="served", features=[profile[["clicks", "name"]], short_lived.with_name("late"), doubled]
    )
    store.apply(service)
    asked = entities(profiles().iloc[[2, 4]])
    columns = store.get_online_features(service, asked, full_feature_names=True).to_dict()
    assert columns == {
        "user_id": [2, 4],
        "model_version": ["a", "a"],
        "profile__clicks": [2, 4],
        "profile__name": ["näme 0", "näme 2"],
        "late__score": [0.25, None],
        "doubled__twice": [4, 8],
    }
    with pytest.raises(FeatureViewNotFoundException):
        store.get_online_features(["never_applied:x"], asked)
    with pytest.raises(KeyError, match="nothing"):
        store.get_online_features(["profile:nothing"], asked)


def test_a_reader_answers_as_get_online_features_does(store: FeatureStore) -> None:
    materialize(store)
    service = FeatureService(
        name="served", features=[profile[["clicks", "name"]], short_lived.with_name("late")]
    )
    renamed = FeatureService(
        name="renamed",
        features=[short_lived.with_name("theirs").with_join_key_map({"user_id": "friend_id"})],
    )
    store.apply([service, renamed])
    rows = pd.concat([profiles(), profiles().iloc[[3, 4, 3]], profiles().head(2).assign(user_id=999)])
    asked = {name: rows[name].tolist() for name in ("user_id", "model_version")}
    names = [field.name for field in profile.features]
    reader = FeatureReader(store)
    for features, keys in (
        ([f"profile:{name}" for name in names], asked),
        (["short_lived:score", "profile:embedding"], asked),
        (["short_lived:score"], {"user_id": [1, 2, 2, 7]}),
        (["short_lived:score"], {"user_id": ["1", "2"]}),
        (service, asked),
        (renamed, {"friend_id": [2, 1, 2]}),
        (["doubled:twice"], asked),
        (["everyone:total"], {"user_id": [1]}),
    ):
        for full in (False, True):
            wanted = store.get_online_features(features, keys, full).to_dict()
            assert reader.read(features, keys, full) == wanted
    with pytest.raises(FeatureViewNotFoundException):
        reader.read(["never_applied:x"], asked)
    with pytest.raises(KeyError, match="nothing"):
        reader.read(["profile:nothing"], asked)


@pytest.mark.parametrize("length", [3, 5])
def test_a_vector_of_another_length_is_refused(length: int, store: FeatureStore) -> None:
    rows = profiles().head(2).assign(embedding=[np.zeros(4, np.float32), np.zeros(length, np.float32)])
    with pytest.raises(ValueError, match=rf"embedding.*{length}|{length}.*embedding"):
        store.write_to_online_store("profile", rows)
    asked = entities(rows)
    assert store.get_online_features(["profile:clicks"], asked).to_dict()["clicks"] == [None, None]


def test_a_view_without_entities(store: FeatureStore) -> None:
    materialize(store, "everyone")
    assert store.get_online_features(["everyone:total"], [{"user_id": 1}]).to_dict()["total"] == [2]


def test_nothing_is_stored_before_the_first_materialization(store: FeatureStore) -> None:
    asked = entities(profiles().head(2))
    assert store.get_online_features(["profile:clicks"], asked).to_dict()["clicks"] == [None, None]


def test_an_older_event_never_replaces_a_newer_one(store: FeatureStore) -> None:
    write(store, 2, NOW)
    for older in (timedelta(microseconds=1), timedelta(milliseconds=300), 5 * HOUR):
        write(store, 1, NOW - older)
        assert read(store) == (NOW, 2)
    write(store, 3, NOW + timedelta(microseconds=1))
    assert read(store) == (NOW + timedelta(microseconds=1), 3)
    early = datetime(1931, 5, 6, 7, 8, 9, 1, tzinfo=UTC)
    for clicks, moment in ((1, early), (2, early + timedelta(microseconds=1)), (3, early)):
        write(store, clicks, moment, user_id=2)
    assert read(store, 2) == (early + timedelta(microseconds=1), 2)


def test_of_two_values_of_one_instant_the_later_computed_counts(store: FeatureStore) -> None:
    write(store, 1, NOW, NOW)
    write(store, 2, NOW, NOW + timedelta(microseconds=1))
    write(store, 3, NOW, NOW - HOUR)
    assert read(store) == (NOW, 2)
    write(store, 4, NOW)  # nobody knows when: the last write counts
    assert read(store) == (NOW, 4)
    write(store, 5, NOW, NOW - HOUR)
    assert read(store) == (NOW, 5)
    # The same value computed anew still counts as computed anew.
    write(store, 5, NOW, NOW + HOUR)
    write(store, 6, NOW, NOW)
    assert read(store) == (NOW, 5)


def test_a_batch_may_hold_an_entity_twice(store: FeatureStore) -> None:
    view = store.get_feature_view("profile")
    values = [{"clicks": Value(int64_val=n), "name": Value(string_val=str(n))} for n in (1, 3, 2)]
    rows = [(key(1, "a"), row, NOW + row["clicks"].int64_val * HOUR, None) for row in values]
    store.provider.online_write_batch(store.config, view, rows, None)
    assert read(store) == (NOW + 3 * HOUR, 3)


def _writer(config: RepoConfig, number: int) -> None:
    store = FeatureStore(config=config)  # connections are not shared between processes
    rng = np.random.default_rng(number)
    for step in rng.permutation(np.arange(number, 80, 4)):
        for user_id in rng.permutation(5):
            write(store, int(step), NOW + timedelta(microseconds=int(step)), user_id=int(user_id))


def test_four_writers_at_once_leave_the_newest(store: FeatureStore) -> None:
    fork = multiprocessing.get_context("fork")
    writers = [
        fork.Process(target=_writer, args=(store.config, number), daemon=True) for number in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [0] * 4
    for user_id in range(5):
        assert read(store, user_id) == (NOW + timedelta(microseconds=79), 79)


def test_a_value_older_than_its_ttl_reads_as_null(store: FeatureStore) -> None:
    materialize(store, "short_lived")
    asked = [{"user_id": 1}, {"user_id": 2}]
    assert store.get_online_features(["short_lived:score"], asked).to_dict()["score"] == [None, 0.25]
    view = store.get_feature_view("short_lived")
    answers = store.provider.online_read(store.config, view, [key(1), key(2)])
    assert [values is None for _, values in answers] == [True, False]


def test_whole_embeddings_are_read_as_one_array(store: FeatureStore) -> None:
    materialize(store, "profile")
    rows = profiles()
    keys = {"user_id": [*rows["user_id"], 999], "model_version": [*rows["model_version"], "a"]}
    got = VectorReader(store, "profile").read(keys)
    assert got.vectors_ND.dtype == np.float32
    np.testing.assert_array_equal(got.vectors_ND[:-1], np.stack(rows["embedding"]))
    assert got.found_N.tolist() == [True] * USERS + [False]
    assert not got.vectors_ND[-1].any()
    moments = pd.to_datetime(got.event_us_N[:-1], unit="us", utc=True)
    assert abs(moments - pd.DatetimeIndex(rows["event_timestamp"])).max() < timedelta(seconds=1)
    assert not VectorReader(store, "profile").read({"user_id": [999], "model_version": ["a"]}).found_N.any()


def test_asynchronous_reads_are_the_same(store: FeatureStore) -> None:
    materialize(store)
    features = ["profile:clicks", "profile:embedding", "everyone:total"]
    asked = entities(profiles())

    async def ask() -> dict[str, Any]:
        answer = (await store.get_online_features_async(features, asked)).to_dict()
        await store.close()
        return answer

    assert asyncio.run(ask()) == store.get_online_features(features, asked).to_dict()


def test_pushed_rows_are_read(store: FeatureStore) -> None:
    rows = profiles().head(3).assign(clicks=[7, 8, 9])
    store.write_to_online_store("profile", rows)
    assert store.get_online_features(["profile:clicks"], entities(rows)).to_dict()["clicks"] == [7, 8, 9]


def test_a_removed_view_is_forgotten_and_others_stay(store: FeatureStore) -> None:
    materialize(store)
    online, kept = store.provider.online_store, store.get_feature_view("short_lived")
    online.update(store.config, [store.get_feature_view("profile")], [kept, everyone], [], [], True)
    online.update(store.config, [], [store.get_feature_view("profile")], [], [], True)
    asked = entities(profiles().head(3))
    columns = store.get_online_features(["profile:clicks", "everyone:total"], asked).to_dict()
    assert columns["clicks"] == [None] * 3
    assert columns["total"] == [2] * 3


def test_single_rows_are_forgotten(store: FeatureStore) -> None:
    materialize(store)
    rows, view, online = profiles(), store.get_feature_view("profile"), store.provider.online_store
    some = {key: [*rows[key].head(3), rows[key][0]] for key in ("user_id", "model_version")}
    before = online.version(store.config, view)
    for _ in range(2):  # what is not there any more is passed over
        online.forget(store.config, view, view_keys(view, some))
    asked = entities(rows)
    answer = store.get_online_features(["profile:embedding", "everyone:total"], asked).to_dict()
    assert answer["embedding"][:3] == [None] * 3
    assert None not in answer["embedding"][3:]
    assert answer["total"] == [2] * len(asked)
    assert online.version(store.config, view) != before
    store.write_to_online_store("profile", rows.head(1))  # what was forgotten may come back
    assert store.get_online_features(["profile:embedding"], asked[:1]).to_dict()["embedding"] != [None]


def test_views_stay_readable_while_they_are_materialized(store: FeatureStore) -> None:
    materialize(store, "profile")
    view = store.get_feature_view("profile")
    view.state = FeatureViewState.MATERIALIZING
    store.registry.apply_feature_view(view, store.project)
    asked = entities(profiles().head(1))
    assert store.get_online_features(["profile:clicks"], asked).to_dict()["clicks"] == [0]


def test_search_finds_the_nearest(store: FeatureStore) -> None:
    materialize(store, "profile")
    rows = profiles()
    vectors = np.stack(rows["embedding"])

    def search(query: np.ndarray, metric: str) -> pd.DataFrame:
        return store.retrieve_online_documents_v2(
            features=["profile:embedding", "profile:clicks"],
            query=query.tolist(),
            top_k=3,
            distance_metric=metric,
        ).to_df()

    for query in vectors[:3] + np.float32(0.1):
        for metric, distance_N in (
            ("L2", np.linalg.norm(vectors - query, axis=1)),
            ("inner_product", -vectors @ query),
            ("cosine", 1 - vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)),
        ):
            got = search(query, metric).sort_values("distance")
            nearest = np.argsort(distance_N)[:3]
            assert got["user_id"].tolist() == nearest.tolist()
            assert got["clicks"].tolist() == rows["clicks"][nearest].tolist()
            np.testing.assert_allclose(got["distance"], distance_N[nearest], atol=1e-5)
    # What is written later is found too.
    store.write_to_online_store("profile", rows.tail(1).assign(user_id=500, embedding=[vectors[0] * 9]))
    assert 500 in search(vectors[0] * 9, "L2")["user_id"].tolist()


def dump(path: Path, table: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(path) as connection:
        columns = "entity_key, feature_name, value, value_text, vector_value, event_ts, created_ts"
        return connection.execute(f'SELECT {columns} FROM "{table}" ORDER BY 1, 2').fetchall()


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
def test_the_sqlite_table_is_stock_feasts_cell_for_cell(
    store: FeatureStore, filled: Home, tmp_path: Path
) -> None:
    (tmp_path / "stock").mkdir()
    online = {"type": "sqlite", "path": str(tmp_path / "stock" / "online.db")}
    settings = configuration(filled, tmp_path / "stock", STORES["sqlite"], store.project)
    stock = FeatureStore(
        config=settings.model_copy(update={"online_config": online, "batch_engine_config": "local"})
    )
    assert type(stock.provider.online_store).__module__ == "feast.infra.online_stores.sqlite"
    stock.apply([user, model, profile, short_lived, everyone])
    for view in ("profile", "short_lived"):
        materialize(stock, view)
        materialize(store, view)
        table = f"{store.project}_{view}"
        ours = dump(tmp_path / "online.db", table)
        assert ours == dump(tmp_path / "stock" / "online.db", table)
    # Our store goes on with a stock client's file, and a stock client with ours.
    asked = entities(profiles())
    features = [f"profile:{field.name}" for field in profile.features]
    other = {**STORES["sqlite"], "path": online["path"]}
    taken_over = FeatureStore(config=settings.model_copy(update={"online_config": other}))
    assert (
        taken_over.get_online_features(features, asked).to_dict()
        == store.get_online_features(features, asked).to_dict()
    )
    stock.provider.online_store._conn = sqlite3.connect(
        tmp_path / "online.db", detect_types=sqlite3.PARSE_DECLTYPES
    )
    assert (
        stock.get_online_features(features, asked).to_dict()
        == store.get_online_features(features, asked).to_dict()
    )
    write(stock, 5, NOW + HOUR)
    assert read(store) == (NOW.replace(microsecond=0) + HOUR, 5)
    write(store, 6, NOW)
    assert read(store)[1] == 5


@pytest.mark.parametrize("store", ["redis"], indirect=True)
def test_the_redis_hash_is_stock_feasts(store: FeatureStore, filled: Home, tmp_path: Path) -> None:
    materialize(store)
    settings = configuration(filled, tmp_path, STORES["redis"], store.project)
    online = {"type": "redis", "connection_string": "127.0.0.1:6379"}
    stock = FeatureStore(config=settings.model_copy(update={"online_config": online}))
    assert type(stock.provider.online_store).__module__ == "feast.infra.online_stores.redis"
    asked = entities(profiles())
    features = [f"profile:{field.name}" for field in profile.features]
    assert (
        stock.get_online_features(features, asked).to_dict()
        == store.get_online_features(features, asked).to_dict()
    )
    write(stock, 5, NOW + HOUR)
    assert read(store) == (NOW + HOUR, 5)
    write(store, 6, NOW)
    assert read(store)[1] == 5


@pytest.mark.parametrize("store", ["redis"], indirect=True)
def test_a_project_whose_name_ends_alike_is_left_alone(
    store: FeatureStore, filled: Home, tmp_path: Path
) -> None:
    longer = FeatureStore(
        config=configuration(filled, tmp_path, STORES["redis"], f"longer_{store.project}")
    )
    longer.apply([user, model, profile])
    for each in (store, longer):
        write(each, 1, NOW)
    online = store.provider.online_store
    online.teardown(store.config, [profile], [])
    assert read(store) == (None, None)
    assert read(longer) == (NOW, 1)
    online.teardown(longer.config, [profile], [])
    assert read(longer) == (None, None)


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
def test_what_is_stored_is_not_written_again(store: FeatureStore, tmp_path: Path) -> None:
    materialize(store)
    with sqlite3.connect(tmp_path / "online.db") as watcher:
        before = dump(tmp_path / "online.db", f"{store.project}_profile")
        (version,) = watcher.execute("PRAGMA data_version").fetchone()
        store.materialize_incremental(datetime.now(UTC), feature_views=["profile"])
        assert watcher.execute("PRAGMA data_version").fetchone() == (version,)
        materialize(store)
        assert dump(tmp_path / "online.db", f"{store.project}_profile") == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "UPDATE profile SET embedding = [1.0, 2.0, 3.0] WHERE user_id = 1",
            "length 3 does not match expected 4",
        ),
        ("ALTER TABLE profile DROP COLUMN clicks", "profile has no column clicks in the lake"),
        ("UPDATE profile SET event_timestamp = NULL", None),
        ("DROP TABLE profile", 'data source profile: "profile" cannot be read'),
    ],
)
def test_a_view_that_does_not_fit_its_table_is_not_materialized(
    change: str, words: str | None, filled: Home, tmp_path: Path
) -> None:
    home = Home.at(tmp_path / "home")
    shutil.copytree(filled.root, home.root)
    (tmp_path / "feast").mkdir()
    store = FeatureStore(config=configuration(home, tmp_path / "feast", STORES["sqlite"], "refused"))
    store.apply([user, model, profile])
    with lake(home) as connection:
        connection.execute(change)
    if words is None:  # rows without a time are of no interval
        materialize(store, "profile")
    else:
        with pytest.raises((BadInput, ValueError), match=words):
            materialize(store, "profile")
    asked = entities(profiles())
    assert set(store.get_online_features(["profile:name"], asked).to_dict()["name"]) == {None}


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
def test_a_replaced_file_is_opened_anew(store: FeatureStore, tmp_path: Path) -> None:
    write(store, 1, NOW)
    for path in tmp_path.glob("online.db*"):
        path.unlink()
    assert read(store) == (None, None)
    write(store, 2, NOW - HOUR)
    assert read(store) == (NOW - HOUR, 2)
