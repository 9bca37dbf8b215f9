"""No value changes on its way into frames, the lake and the online store, nor in a lookup."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, PushSource, RepoConfig, ValueType
from feast.data_source import PushMode
from feast.types import Array, Bool, Float32, Float64, Int32, Int64, String
from hypothesis import given
from hypothesis import strategies as st

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_lake.connection import lake
from feast_ducklake.conversion import converted
from feast_ducklake.offline.source import DuckLakeSource
from tests.support.feast_lake import START, write_tables

BIG = 2**62 + 1
"""No double is this number."""
FEATURES = {
    "count": Int64,
    "small": Int32,
    "rate": Float64,
    "weight": Float32,
    "name": String,
    "active": Bool,
    "recent": Array(Int64),
}
user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING)
source = DuckLakeSource(name="facts", table="facts")
facts = FeatureView(
    name="facts",
    entities=[user],
    ttl=timedelta(0),
    schema=[Field(name=name, dtype=dtype) for name, dtype in FEATURES.items()],
    source=PushSource(name="pushed_facts", batch_source=source),
)
pairs = FeatureView(
    name="pairs",
    entities=[user, item],
    ttl=timedelta(0),
    schema=[Field(name="score", dtype=Int64)],
    source=DuckLakeSource(name="pairs", table="pairs"),
)
ROW = {
    "user_id": 1,
    "count": BIG,
    "small": 5,
    "rate": 0.1,
    "weight": 0.5,
    "name": "a",
    "active": True,
    "recent": [BIG],
    "event_timestamp": START,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home.at(tmp_path_factory.mktemp("exact") / "home")


@pytest.fixture(scope="module")
def store(home: Home) -> FeatureStore:
    """Shared: each test that writes does so to a user of its own."""
    schema = pa.schema(
        [
            ("user_id", pa.int64()),
            ("count", pa.int64()),
            ("small", pa.int32()),
            ("rate", pa.float64()),
            ("weight", pa.float32()),
            ("name", pa.string()),
            ("active", pa.bool_()),
            ("recent", pa.list_(pa.int64())),
            ("event_timestamp", pa.timestamp("us", tz="UTC")),
        ]
    )
    pair = {"user_id": [1], "item_id": ["x"], "score": [1], "event_timestamp": [START]}
    write_tables(home, {"facts": pa.Table.from_pylist([ROW], schema), "pairs": pd.DataFrame(pair)})
    config = RepoConfig(
        project="exact",
        provider="feast_ducklake.StrictProvider",
        registry=str(home.registry),
        online_store={
            "type": "feast_ducklake.GuardedSqliteOnlineStore",
            "path": str(home.online_store),
        },
        offline_store={"type": "feast_ducklake.DuckLakeOfflineStore", "home": str(home.root)},
        batch_engine={"type": "feast_ducklake.ArrowEngine"},
        entity_key_serialization_version=3,
    )
    opened = FeatureStore(config=config)
    opened.apply([user, item, facts, pairs])
    return opened


def row(user_id: int, **changes: Any) -> pd.DataFrame:
    later = START + timedelta(seconds=user_id)
    return pd.DataFrame([{**ROW, "user_id": user_id, "event_timestamp": later, **changes}])


def online(store: FeatureStore, user_id: int) -> dict[str, Any]:
    asked = [f"facts:{name}" for name in FEATURES]
    answer = store.get_online_features(asked, [{"user_id": user_id}]).to_dict()
    return {name: answer[name][0] for name in FEATURES}


def offline(store: FeatureStore, user_id: int) -> dict[str, Any]:
    asked = pd.DataFrame({"user_id": [user_id], "event_timestamp": [START + timedelta(days=1)]})
    rows = store.get_historical_features(asked, [f"facts:{name}" for name in FEATURES]).to_arrow()
    return {name: rows[name][0].as_py() for name in FEATURES}


def test_an_unknown_entity_costs_no_digits(store: FeatureStore) -> None:
    asked = pd.DataFrame({"user_id": [1, 99], "event_timestamp": START + timedelta(days=1)})
    frame = store.get_historical_features(asked, ["facts:count", "facts:active", "facts:rate"]).to_df()
    assert frame["count"].tolist() == [BIG, pd.NA]
    assert frame["active"].tolist() == [True, pd.NA]
    assert frame.dtypes.astype(str).to_dict() == {
        "user_id": "int64",
        "event_timestamp": "datetime64[us, UTC]",
        "count": "Int64",
        "active": "boolean",
        "rate": "float64",
    }


@pytest.mark.parametrize(
    "column",
    [
        pd.Series([BIG, None], dtype="Int64"),
        pd.Series([BIG, None], dtype=object),
        pd.Series([BIG, BIG - 1], dtype="uint64"),
        pd.Series([7, 8], dtype="int8"),
        pd.Series([1, None], dtype="UInt16"),
        pd.Series([True, None], dtype="boolean"),
        pd.Series([True, False]),
        pd.Series([1.5, None], dtype="float32"),
        pd.Series(["a", None], dtype="string"),
        pd.Series(["a", "b"], dtype="category"),
        pd.Series(["a", None], dtype=pd.ArrowDtype(pa.large_string())),
        pd.Series([Decimal("0.10"), None], dtype=object),
    ],
    ids=lambda column: str(column.dtype),
)
def test_a_column_that_is_handed_in_comes_back_as_it_was(column: pd.Series, store: FeatureStore) -> None:
    asked = pd.DataFrame({"user_id": [99, 1], "event_timestamp": START + timedelta(days=1), "own": column})
    frame = store.get_historical_features(asked, ["facts:count"]).to_df()
    pd.testing.assert_series_equal(frame["own"], column, check_names=False)


def test_nullable_integers_of_an_arrow_frame_and_a_query_keep_their_digits(store: FeatureStore) -> None:
    moment = START + timedelta(days=1)
    asked = pa.table({"user_id": [1, 99], "event_timestamp": [moment, moment], "own": [None, BIG]})
    query = f"""
        SELECT user_id, TIMESTAMPTZ '{moment}' AS event_timestamp, own
        FROM (VALUES (1, NULL), (99, {BIG})) AS t(user_id, own)
    """
    for entities in (asked, query):
        frame = store.get_historical_features(entities, ["facts:count"]).to_df()
        assert frame["own"].tolist() == [pd.NA, BIG]


def test_an_integer_beyond_64_bits_is_refused_by_its_column(store: FeatureStore) -> None:
    asked = pd.DataFrame({"user_id": [1, 2**70], "event_timestamp": START}, dtype=object)
    asked["event_timestamp"] = pd.to_datetime(asked["event_timestamp"], utc=True)
    with pytest.raises(BadInput, match="entity frame: column user_id has an integer beyond 64 bits"):
        store.get_historical_features(asked, ["facts:count"])


MISFITS: list[tuple[str, Any, str]] = [
    ("count", 3.7, "has 3.7, which does not fit a column of int64"),
    ("count", 2.0**63, "has 9.2"),
    ("count", "7", "has string, but a column of int64 is needed"),
    ("count", True, "has bool, but"),
    ("small", 2**31, "has 2147483648, which does not fit a column of int32"),
    ("rate", BIG, f"has {BIG}, which does not fit a column of double"),
    ("weight", 1e300, "which does not fit a column of float"),
    ("name", 7, "has int64, but a column of string"),
    ("active", 1, "has int64, but a column of bool"),
    ("recent", [1.5], "a list has 1.5, which does not fit a column of int64"),
]


@pytest.mark.parametrize(("column", "value", "words"), MISFITS)
@pytest.mark.parametrize("to", list(PushMode), ids=lambda mode: mode.name)
def test_a_pushed_value_that_does_not_fit_is_refused_everywhere(
    to: PushMode, column: str, value: Any, words: str, store: FeatureStore
) -> None:
    with pytest.raises(BadInput, match=words):
        store.push("pushed_facts", row(2, **{column: value}), to=to)
    with pytest.raises(BadInput, match=words):
        asyncio.run(store.push_async("pushed_facts", row(2, **{column: value}), to=to))
    assert set(online(store, 2).values()) == {None}
    assert set(offline(store, 2).values()) == {None}


@pytest.mark.parametrize(
    ("user_id", "changes", "stored"),
    [
        (11, {}, {}),
        (12, {"count": 3.0}, {"count": 3}),
        (13, {"count": np.int8(3)}, {"count": 3}),
        (14, {"rate": 7}, {"rate": 7.0}),
        (15, {"name": None}, {"name": None}),
        (16, {"count": float("nan")}, {"count": None}),
        (17, {"recent": [3.0]}, {"recent": [3]}),
    ],
)
def test_what_is_pushed_is_the_same_online_and_offline(
    user_id: int, changes: dict[str, Any], stored: dict[str, Any], store: FeatureStore
) -> None:
    store.push("pushed_facts", row(user_id, **changes), to=PushMode.ONLINE_AND_OFFLINE)
    wanted = {name: ROW[name] for name in FEATURES} | stored
    assert online(store, user_id) == offline(store, user_id) == wanted


@given(
    st.lists(
        st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False)), min_size=1
    ),
    st.sampled_from([pa.int8(), pa.int32(), pa.int64(), pa.uint16(), pa.float32(), pa.float64()]),
)
def test_numbers_are_converted_exactly_or_refused(values: list[Any], kind: pa.DataType) -> None:
    given_as = pa.float64() if any(isinstance(value, float) for value in values) else pa.int64()
    try:
        column = pa.array(values, given_as)
    except pa.ArrowInvalid:
        return  # integers that no double is
    try:
        result = converted(column, kind, "column x")
    except BadInput:
        assert not all(_fits(value, kind) for value in column.to_pylist())
        return
    for before, after in zip(column.to_pylist(), result.to_pylist(), strict=True):
        if kind == pa.float32() and isinstance(before, float):
            assert after == np.float32(before)  # nearest: a double is approximate by itself
        else:
            assert after == before


def _fits(value: float | int | None, kind: pa.DataType) -> bool:
    if value is None:
        return True
    if pa.types.is_integer(kind):
        least, most = np.iinfo(kind.to_pandas_dtype()).min, np.iinfo(kind.to_pandas_dtype()).max
        return float(value).is_integer() and least <= int(value) <= most
    if isinstance(value, int):
        return abs(value) <= 2 ** (24 if kind == pa.float32() else 53)
    return kind == pa.float64() or bool(np.isinf(value)) or abs(value) < 3.4028235677973366e38


Lookup = Callable[[FeatureStore, list[str], Any], dict[str, Any]]


def directly(store: FeatureStore, features: list[str], rows: Any) -> dict[str, Any]:
    return store.get_online_features(features, rows).to_dict()


def asynchronously(store: FeatureStore, features: list[str], rows: Any) -> dict[str, Any]:
    return asyncio.run(store.get_online_features_async(features, rows)).to_dict()


@pytest.mark.parametrize("lookup", [directly, asynchronously])
@pytest.mark.parametrize(
    ("features", "rows", "words"),
    [
        ("facts:count", [{"userid": 1}], "gives userid, but facts is looked up by user_id; rename it"),
        ("pairs:score", [{"user_id": 1, "itemid": "x"}], "gives itemid, but pairs is looked up by item_id"),
        ("pairs:score", [{"user_id": 1}], "pairs is looked up by item_id, which the .* not have"),
        ("facts:count", [], "has no entity rows"),
        ("facts:count", [{"user_id": 1}, {"item_id": 1}], "entity row 2 of the lookup has item_id"),
        ("facts:count", [{"user_id": 1.7}], "user_id is 1.7, but it is a whole number of 64 bits"),
        ("facts:count", [{"user_id": 2**70}], "but it is a whole number"),
        ("facts:count", [{"user_id": "1.0"}], "but it is a whole number"),
        ("facts:count", [{"user_id": True}], "but it is a whole number"),
        ("facts:count", {"user_id": [1, None]}, "user_id is None, but"),
        ("pairs:score", [{"user_id": 1, "item_id": 7}], "item_id is 7, but it is text"),
    ],
)
def test_a_lookup_names_the_key_that_is_wrong(
    features: str, rows: Any, words: str, lookup: Lookup, store: FeatureStore
) -> None:
    with pytest.raises(BadInput, match=words) as refused:
        lookup(store, [features], rows)
    assert "atom_id" not in str(refused.value)


@pytest.mark.parametrize("user_id", [1, 1.0, "1", np.int64(1), np.float64(1)])
def test_a_whole_number_is_a_key_however_it_is_written(user_id: Any, store: FeatureStore) -> None:
    store.materialize(START, datetime.now(UTC))
    for entities in ([{"user_id": user_id}], {"user_id": [user_id]}, {"user_id": [user_id], "more": [0]}):
        assert directly(store, ["facts:count"], entities)["count"] == [BIG]
    with pytest.warns(UserWarning, match="Using entity name is deprecated"):
        assert store.get_online_features(["facts:count"], [{"user": user_id}]).to_dict()["count"] == [BIG]


def test_a_lake_that_does_not_fit_its_view_is_not_materialized(store: FeatureStore, home: Home) -> None:
    with lake(home) as connection:
        connection.execute("ALTER TABLE facts ALTER count SET DATA TYPE DOUBLE")
        connection.execute("UPDATE facts SET count = 3.7")
    with pytest.raises(BadInput, match=r"view facts: column count has 3\.7, which does not fit"):
        store.materialize(START, datetime.now(UTC), feature_views=["facts"])
    assert online(store, 1)["count"] in (None, BIG)
    with lake(home) as connection:
        connection.execute(f"UPDATE facts SET count = 3, event_timestamp = '{START + timedelta(1)}'")
    store.materialize(START, datetime.now(UTC), feature_views=["facts"])
    assert online(store, 1)["count"] == 3
