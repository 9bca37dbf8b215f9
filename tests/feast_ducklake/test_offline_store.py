"""What the offline store does with entity frames, views and results, beside the join itself."""

from __future__ import annotations

import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, PushSource, RequestSource
from feast.data_source import PushMode
from feast.errors import FeatureViewNotFoundException, SavedDatasetLocationAlreadyExists
from feast.feature_logging import LoggingConfig
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Float32, Float64, Int64
from feast.value_type import ValueType

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_lake.connection import lake
from bahe_lake.transactions import commit
from feast_ducklake.offline.source import (
    DuckLakeLoggingDestination,
    DuckLakeSource,
    SavedDatasetDuckLakeStorage,
)
from tests.support.feast_lake import START, repository, seconds, write_tables

ODD = 'a "b"\'s_y'

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
pair = [user, Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)]
clicks_source = DuckLakeSource(
    name="clicks", table="clicks", created_timestamp_column="created", description="Clicks so far."
)
clicks = FeatureView(
    name="clicks",
    entities=[user],
    ttl=timedelta(0),
    schema=[Field(name="count", dtype=Int64), Field(name=ODD, dtype=Float64)],
    source=clicks_source,
)
vectors = FeatureView(
    name="vectors",
    entities=[user],
    ttl=timedelta(seconds=10),
    schema=[Field(name="vector", dtype=Array(Float32))],
    source=DuckLakeSource(
        name="vectors", table="vectors", timestamp_field="at", field_mapping={"raw": "vector"}
    ),
)
pushed = FeatureView(
    name="pushed",
    entities=[user],
    ttl=timedelta(0),
    schema=[Field(name="count", dtype=Int64)],
    source=PushSource(name="push", batch_source=clicks_source),
)
affinity = FeatureView(
    name="affinity",
    entities=pair,
    ttl=timedelta(0),
    schema=[Field(name="score", dtype=Int64)],
    source=DuckLakeSource(name="affinity", query="SELECT * FROM lake.main.affinity"),
)


@on_demand_feature_view(
    sources=[clicks, RequestSource(name="request", schema=[Field(name="factor", dtype=Int64)])],
    schema=[Field(name="scaled", dtype=Int64)],
)
def scaled_clicks(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"scaled": (inputs["count"] * inputs["factor"]).astype("Int64")})


def tables() -> dict[str, pd.DataFrame]:
    return {
        "clicks": pd.DataFrame(
            {
                "user_id": ["a", "a", "b"],
                "event_timestamp": seconds([1, 5, 3]),
                "created": seconds([2, 100, 3]),
                "count": [1, 2, 7],
                ODD: [0.1, 0.2, 0.7],
            }
        ),
        "vectors": pd.DataFrame(
            {
                "user_id": ["a", "a", "b"],
                "at": seconds([0, 20, 0]),
                "raw": pd.Series([[1.0, 2.0], [3.0], None], dtype=pd.ArrowDtype(pa.list_(pa.float32()))),
            }
        ),
        "affinity": pd.DataFrame(
            {
                "user_id": ["a", "a"],
                "item_id": [1, 2],
                "event_timestamp": seconds([1, 1]),
                "score": [11, 12],
            }
        ),
    }


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home.at(tmp_path_factory.mktemp("filled") / "home")
    write_tables(home, tables())
    repository(home, *pair, clicks, vectors, pushed, affinity, scaled_clicks)
    return home


@pytest.fixture
def store(home: Home, filled: Home) -> FeatureStore:
    shutil.copytree(filled.root, home.root)
    return repository(home)


def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "label": [3, 1, 2, 0],
            "user_id": ["b", "a", "a", "nobody"],
            "event_timestamp": seconds([9, 6, 5, 9]),
            "note": ["x", None, "y", "z"],
        }
    )


FEATURES = ["clicks:count", f"clicks:{ODD}", "vectors:vector"]
ANSWER = {
    "label": [3, 1, 2, 0],
    "user_id": ["b", "a", "a", "nobody"],
    "event_timestamp": seconds([9, 6, 5, 9]).tolist(),
    "note": ["x", None, "y", "z"],
    "count": [7, 2, 1, None],
    ODD: [0.7, 0.2, 0.1, None],
    "vector": [None, [1.0, 2.0], [1.0, 2.0], None],
}


@pytest.mark.parametrize("form", ["pandas", "arrow", "path", "text", "sql"])
def test_each_form_of_entity_frame_gives_the_same_rows(
    form: str, store: FeatureStore, home: Home, tmp_path: Path
) -> None:
    path = tmp_path / "it's a frame.parquet"
    frame().to_parquet(path)
    write_tables(home, {"wanted": frame().assign(line=range(4)).iloc[[2, 0, 3, 1]]})
    entities = {
        "pandas": frame(),
        "arrow": pa.Table.from_pandas(frame()),
        "path": path,
        "text": str(path),
        "sql": "SELECT * EXCLUDE (line) FROM wanted ORDER BY line;",
    }[form]
    job = store.get_historical_features(entities, FEATURES)
    assert job.to_arrow().to_pydict() == ANSWER
    assert list(job.to_df().columns) == list(ANSWER)
    assert pa.Table.from_batches(job.to_arrow_batches(rows=3)).to_pydict() == ANSWER


def test_full_names_carry_the_view(store: FeatureStore) -> None:
    found = store.get_historical_features(frame(), FEATURES, full_feature_names=True).to_arrow()
    assert found.column_names[4:] == ["clicks__count", f"clicks__{ODD}", "vectors__vector"]
    assert found["clicks__count"].to_pylist() == ANSWER["count"]


def test_composite_keys_must_all_match(store: FeatureStore) -> None:
    rows = pd.DataFrame({"user_id": ["a", "a", "b"], "item_id": [2, 1, 1], "moment": seconds([9, 9, 9])})
    found = store.get_historical_features(rows, ["affinity:score"]).to_arrow()
    assert found.to_pydict() == {**rows.to_dict("list"), "score": [12, 11, None]}


def test_a_mapped_join_key_reads_the_view_twice(store: FeatureStore) -> None:
    view = store.get_feature_view("clicks")
    mine = view.with_name("mine")[["count"]]
    friend = view.with_name("friend").with_join_key_map({"user_id": "friend_id"})[["count"]]
    service = FeatureService(name="both", features=[mine, friend])
    store.apply(service)
    rows = pd.DataFrame({"user_id": ["a"], "friend_id": ["b"], "event_timestamp": seconds([9])})
    found = store.get_historical_features(rows, service, full_feature_names=True).to_df()
    assert found[["mine__count", "friend__count"]].to_numpy().tolist() == [[2, 7]]


def test_views_on_demand_are_computed_in_frames_and_streams(store: FeatureStore) -> None:
    rows = frame().assign(factor=[10, 20, 30, 40])
    job = store.get_historical_features(rows, ["scaled_clicks:scaled", "clicks:count"])
    assert job.to_df()["scaled"].astype("Int64").tolist() == [70, 40, 30, pd.NA]
    streamed = pa.Table.from_batches(job.to_arrow_batches(rows=2))
    assert streamed["scaled"].to_pylist() == [70, 40, 30, None]


def test_microseconds_count(home: Home, store: FeatureStore) -> None:
    instant = START + pd.Timedelta(1_000_001, "us")
    write_tables(home, {"affinity": tables()["affinity"].assign(event_timestamp=instant)})
    rows = pd.DataFrame(
        {
            "user_id": "a",
            "item_id": 1,
            "event_timestamp": [instant + pd.Timedelta(offset, "us") for offset in (-1, 0, 1)],
        }
    )
    found = store.get_historical_features(rows, ["affinity:score"]).to_df()
    assert found["score"].isna().tolist() == [True, True, False]
    assert found["event_timestamp"].tolist() == rows["event_timestamp"].tolist()


def test_times_without_a_zone_are_utc_and_others_are_converted(store: FeatureStore) -> None:
    naive = frame()["event_timestamp"].dt.tz_localize(None)
    with pytest.warns(UserWarning, match="no time zone"):
        found = store.get_historical_features(
            pa.Table.from_pandas(frame().assign(event_timestamp=naive)), FEATURES
        ).to_arrow()
    assert found.to_pydict() == ANSWER
    tokyo = frame()["event_timestamp"].dt.tz_convert("Asia/Tokyo")
    with pytest.warns(UserWarning, match="Asia/Tokyo"):
        found = store.get_historical_features(
            pa.Table.from_pandas(frame().assign(event_timestamp=tokyo)), FEATURES
        ).to_arrow()
    assert found.to_pydict() == ANSWER
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        store.get_historical_features(pa.Table.from_pandas(frame()), FEATURES)


def test_what_was_computed_later_is_left_out_on_request(store: FeatureStore) -> None:
    # The count 2 is of second 5, and was computed at second 100.
    rows = pd.DataFrame({"user_id": "a", "event_timestamp": seconds([6, 100, 99, 1, 2])})
    found = store.get_historical_features(rows, ["clicks:count"], filter_by_created_timestamp=True)
    assert found.to_arrow()["count"].to_pylist() == [1, 2, 1, None, 1]
    assert store.get_historical_features(rows, ["clicks:count"]).to_arrow()["count"].to_pylist() == [
        2,
        2,
        2,
        None,
        1,
    ]


def test_without_an_entity_frame_a_period_is_answered(store: FeatureStore) -> None:
    period = {
        "start_date": START.to_pydatetime(),
        "end_date": (START + pd.Timedelta(4, "s")).to_pydatetime(),
    }
    found = store.get_historical_features(features=["clicks:count", "vectors:vector"], **period)
    assert found.to_arrow().to_pydict() == {
        "user_id": ["a", "b", "a", "b"],
        "event_timestamp": seconds([0, 0, 1, 3]).tolist(),
        "count": [None, None, 1, 7],
        "vector": [[1.0, 2.0], None, [1.0, 2.0], None],
    }
    with pytest.raises(BadInput, match="same join keys"):
        store.get_historical_features(features=["clicks:count", "affinity:score"], **period)


def test_an_empty_frame_has_an_empty_answer(store: FeatureStore) -> None:
    empty = pd.DataFrame({"user_id": [], "event_timestamp": pd.to_datetime([], utc=True)})
    job = store.get_historical_features(empty, FEATURES)
    assert job.to_df().shape == (0, 5)
    assert list(job.to_arrow_reader()) in ([], [*job.to_arrow().to_batches()])


@pytest.mark.parametrize(
    ("rows", "features", "words"),
    [
        ({"user_id": ["a"]}, FEATURES, "no column event_timestamp"),
        ({"user_id": ["a"], "event_timestamp": ["yesterday"]}, FEATURES, "is VARCHAR, not a timestamp"),
        (
            {"user_id": ["a", "a"], "event_timestamp": [START, None]},
            FEATURES,
            "1 rows have no event_t",
        ),
        ({"user_id": ["a", None], "event_timestamp": [START, START]}, FEATURES, "1 rows have no user_id"),
        ({"event_timestamp": [START]}, FEATURES, "no column user_id, a join key of"),
        ({"user_id": [1], "event_timestamp": [START]}, FEATURES, "user_id is BIGINT, but .* VARCHAR"),
        (
            {"user_id": ["a"], "event_timestamp": [START], "count": [1]},
            FEATURES,
            "count has the name of",
        ),
        ({"user_id": ["a"], "t": [START], "u": [START]}, FEATURES, r"several \(t, u\) is"),
        ({"user_id": ["a"], "USER_ID": ["a"], "event_timestamp": [START]}, FEATURES, "there twice"),
        (
            {"user_id": ["a", 1], "event_timestamp": [START, START]},
            FEATURES,
            "column user_id cannot be read",
        ),
    ],
)
def test_a_bad_entity_frame_is_refused(
    rows: dict, features: list[str], words: str, store: FeatureStore
) -> None:
    with pytest.raises(BadInput, match=words):
        store.get_historical_features(pd.DataFrame(rows), features)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("SELECT nonsense", "cannot be read"),
        ("missing.parquet", "cannot be read"),
        ("yesterday", "neither"),
        ([1, 2], "a list is neither"),
    ],
)
def test_what_is_no_entity_frame_is_refused(given: object, words: str, store: FeatureStore) -> None:
    with pytest.raises(BadInput, match=words):
        store.get_historical_features(given, FEATURES)


def test_a_registry_out_of_step_with_the_lake_is_named(store: FeatureStore, home: Home) -> None:
    write_tables(home, {"clicks": tables()["clicks"].drop(columns="count")})
    with pytest.raises(BadInput, match="clicks has no column count in the lake"):
        store.get_historical_features(frame(), FEATURES)
    with lake(home) as connection:
        commit(connection, ["DROP TABLE clicks"])
    with pytest.raises(BadInput, match="data source clicks"):
        store.get_historical_features(frame(), FEATURES)
    with pytest.raises(KeyError, match="Feature nothing not found"):
        store.get_historical_features(frame(), ["clicks:nothing"])
    with pytest.raises(FeatureViewNotFoundException, match="never_applied"):
        store.get_historical_features(frame(), ["never_applied:x"])


def test_pulling_from_a_table_that_is_not_there_is_refused(store: FeatureStore) -> None:
    pull = store.provider.offline_store.pull_all_from_table_or_query
    missing = DuckLakeSource(name="gone", table="gone")
    with pytest.raises(BadInput, match="data source gone: "):
        pull(store.config, missing, ["user_id"], ["count"], "event_timestamp")
    with pytest.raises(BadInput, match="clicks has no column nothing"):
        pull(store.config, store.get_data_source("clicks"), ["user_id"], ["nothing"], "event_timestamp")


def test_eight_threads_get_the_same_answer(store: FeatureStore) -> None:
    def ask(_: int) -> dict:
        return store.get_historical_features(frame(), FEATURES).to_arrow().to_pydict()

    with ThreadPoolExecutor(8) as pool:
        assert all(answer == ANSWER for answer in pool.map(ask, range(16)))
        job = store.get_historical_features(frame(), FEATURES)
        assert all(a.to_pydict() == ANSWER for a in pool.map(lambda _: job.to_arrow(), range(16)))


def test_a_snapshot_gives_the_old_frame_again(store: FeatureStore, home: Home) -> None:
    job = store.get_historical_features(frame(), FEATURES)
    before = job.to_arrow()
    write_tables(home, {**tables(), "clicks": tables()["clicks"].assign(count=99)})
    assert job.to_arrow().equals(before)  # a job keeps its snapshot
    assert store.get_historical_features(frame(), FEATURES).to_arrow()["count"].to_pylist()[0] == 99
    past = repository(home, as_of=job.snapshot)
    again = past.get_historical_features(frame(), FEATURES)
    assert again.to_arrow().equals(before)
    assert again.snapshot == job.snapshot
    store.config.offline_store.as_of = job.snapshot
    assert store.get_historical_features(frame(), FEATURES).to_arrow().equals(before)
    with pytest.raises(BadInput, match="past cannot be written"):
        again.persist(SavedDatasetDuckLakeStorage("saved"))
    with pytest.raises(BadInput, match="past cannot be written"):
        store.write_to_offline_store("clicks", tables()["clicks"])
    with pytest.raises(BadInput, match="no snapshot 999"):
        repository(home, as_of=999).get_historical_features(frame(), FEATURES)


@pytest.mark.parametrize("kind", ["file", "table"])
def test_a_saved_dataset_comes_back(kind: str, store: FeatureStore, tmp_path: Path) -> None:
    path = tmp_path / "saved" / "frame.parquet"
    storage = SavedDatasetFileStorage(str(path)) if kind == "file" else SavedDatasetDuckLakeStorage("saved")
    job = store.get_historical_features(frame(), FEATURES)
    for allow_overwrite in (False, True):
        store.create_saved_dataset(job, "mine", storage, allow_overwrite=allow_overwrite)
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        store.create_saved_dataset(job, "mine", storage)
    store.refresh_registry()
    found = store.get_saved_dataset("mine").to_arrow().to_pydict()
    assert {c: found[c] for c in ANSWER if c in found} == {
        c: v for c, v in ANSWER.items() if c not in ("label", "note")
    }
    if kind == "file":
        assert pq.read_table(path).to_pydict() == ANSWER
        assert not list(path.parent.glob("*.part"))


def test_pushed_rows_are_history_from_then_on(store: FeatureStore) -> None:
    new = pd.DataFrame(
        {
            "user_id": ["nobody"],
            "event_timestamp": seconds([8]).tolist(),
            "created": seconds([8]).tolist(),
            "count": [5],
            ODD: [0.5],
        },
        index=[7],
    )
    store.push("push", new, to=PushMode.OFFLINE)
    assert store.get_historical_features(frame(), ["pushed:count"]).to_df()["count"].tolist() == [
        7,
        2,
        1,
        5,
    ]
    mapped = pd.DataFrame({"user_id": ["nobody"], "at": seconds([8]), "raw": [[4.0]]})
    store.write_to_offline_store("vectors", mapped)
    found = store.get_historical_features(frame(), ["vectors:vector"]).to_arrow()
    assert found["vector"].to_pylist() == [None, [1.0, 2.0], [1.0, 2.0], [4.0]]


def test_rows_that_do_not_fit_are_refused(store: FeatureStore) -> None:
    with pytest.raises(BadInput, match="column count has string, but a column of int64 is needed"):
        store.write_to_offline_store("clicks", tables()["clicks"].assign(count="many"))
    with pytest.raises(BadInput, match="is no table of the lake"):
        store.write_to_offline_store("affinity", tables()["affinity"])
    assert store.get_historical_features(frame(), ["clicks:count"]).to_df()["count"].tolist()[0] == 7


def test_pull_latest_takes_what_was_computed_and_written_last(store: FeatureStore, home: Home) -> None:
    again = pd.DataFrame(
        {
            "user_id": ["a", "a", "a", "b"],
            "event_timestamp": seconds([5, 5, 5, 2]),
            "created": seconds([7, 9, 9, 9]),
            "count": [20, 21, 22, 70],
            ODD: 0.0,
        }
    )
    write_tables(home, {"clicks": again})
    source = store.get_data_source("clicks")
    for wanted in (
        source,
        DuckLakeSource(name="q", query="SELECT * FROM lake.main.clicks WHERE count != 21"),
    ):
        found = store.provider.offline_store.pull_latest_from_table_or_query(
            store.config,
            wanted,
            ["user_id"],
            ["count"],
            "event_timestamp",
            "created",
            START,
            START + pd.Timedelta(5, "s"),
        )
        rows = found.to_df().sort_values("user_id")
        assert rows[["user_id", "count"]].to_numpy().tolist() == [["a", 22], ["b", 70]]


def test_logs_of_served_features_come_back(store: FeatureStore) -> None:
    service = FeatureService(
        name="served",
        features=[store.get_feature_view("clicks")[["count"]]],
        logging_config=LoggingConfig(destination=DuckLakeLoggingDestination(table="logs")),
    )
    store.apply(service)
    service = store.get_feature_service("served")
    log = pa.table(
        {
            "user_id": ["a"],
            "clicks__count": [1],
            "clicks__count__timestamp": pa.array([START], pa.timestamp("us", "UTC")),
            "clicks__count__status": pa.array([2], pa.int32()),
            "__log_timestamp": pa.array([START], pa.timestamp("us", "UTC")),
            "__log_date": pa.array([START.date()]),
            "__request_id": ["r"],
        }
    )
    for _ in range(2):
        store.write_logged_features(log, service)
    job = store.provider.retrieve_feature_service_logs(
        service, START.to_pydatetime(), START.to_pydatetime(), store.config, store.registry
    )
    assert job.to_df()["clicks__count"].tolist() == [1, 1]
