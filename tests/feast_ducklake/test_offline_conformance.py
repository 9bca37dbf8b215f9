"""What Feast's documentation promises of any offline store, case by case, on Feast's own example data.

Feast's universal tests are not part of its package; their data is (`feast.driver_test_data`). Expected
answers are computed here, row by row, by the rule that Feast documents: of each key the latest value at or
before the row's moment and not older than the view's ttl; of one instant the one created last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, RequestSource, driver_test_data
from feast.errors import FeatureNameCollisionError
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float32, Float64, Int32, Int64
from feast.value_type import ValueType

from bahe_core.home import Home
from feast_ducklake.offline.source import DuckLakeSource
from tests.support.feast_lake import repository, write_tables

END = datetime(2024, 3, 1, tzinfo=UTC)
BEGIN = END - timedelta(days=15)
DRIVERS, CUSTOMERS, LOCATIONS = [5001, 5002, 5003], [1001, 1002, 1003, 1004], [1, 2, 3]
ORDERS = 40

driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.INT64)
location = Entity(name="location", join_keys=["location_id"], value_type=ValueType.INT64)


def view(
    name: str, entities: list[Entity], ttl: timedelta, features: dict[str, Any], **source: Any
) -> FeatureView:
    return FeatureView(
        name=name,
        entities=entities,
        ttl=ttl,
        schema=[Field(name=feature, dtype=kind) for feature, kind in features.items()],
        source=DuckLakeSource(name=name, table=name, created_timestamp_column="created", **source),
    )


# Drivers of before half an hour and customers of before twelve are not known any more.
driver_stats = view(
    "driver_stats", [driver], timedelta(minutes=30), {"conv_rate": Float32, "avg_daily_trips": Int64}
)
customer_profile = view(
    "customer_profile",
    [customer],
    timedelta(hours=12),
    {"current_balance": Float32, "lifetime_trip_count": Int32},
)
ratings = view("ratings", [driver, customer], timedelta(0), {"rating_x": Int64, "rating_y": Int64})
weather = view("weather", [location], timedelta(0), {"temperature": Int32})
worldwide = view("worldwide", [], timedelta(days=3), {"num_rides": Int32, "avg_ride_length": Float32})
mapped = view(
    "mapped", [], timedelta(0), {"feature_name": Int32}, field_mapping={"column_name": "feature_name"}
)


@on_demand_feature_view(
    sources=[driver_stats, RequestSource(name="asked", schema=[Field(name="val_to_add", dtype=Int64)])],
    schema=[
        Field(name="conv_rate_plus_100", dtype=Float64),
        Field(name="conv_rate_plus_val", dtype=Float64),
    ],
)
def conv_rate_plus(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "conv_rate_plus_100": (inputs["conv_rate"] + 100).astype("float64"),
            "conv_rate_plus_val": (inputs["conv_rate"] + inputs["val_to_add"]).astype("float64"),
        }
    )


VIEWS = (driver_stats, customer_profile, ratings, weather, worldwide, mapped)
KEYS = {
    v.name: [
        key
        for e in v.entities
        for key in {"driver": ["driver_id"], "customer": ["customer_id"], "location": ["location_id"]}.get(
            e, []
        )
    ]
    for v in VIEWS
}


def tables() -> dict[str, pd.DataFrame]:
    state = np.random.get_state()
    np.random.seed(0)  # Feast's generators draw from numpy's own
    try:
        found = {
            "driver_stats": driver_test_data.create_driver_hourly_stats_df(DRIVERS, BEGIN, END),
            "customer_profile": driver_test_data.create_customer_daily_profile_df(CUSTOMERS, BEGIN, END),
            "weather": driver_test_data.create_location_stats_df(LOCATIONS, BEGIN, END),
            "worldwide": driver_test_data.create_global_daily_stats_df(BEGIN, END),
            "mapped": driver_test_data.create_field_mapping_df(BEGIN, END),
            "orders": driver_test_data.create_orders_df(CUSTOMERS, DRIVERS, BEGIN, END, ORDERS, LOCATIONS),
        }
    finally:
        np.random.set_state(state)
    found["driver_stats"] = found["driver_stats"][
        ["event_timestamp", "driver_id", "conv_rate", "avg_daily_trips", "created"]
    ]
    rng = np.random.default_rng(0)
    found["ratings"] = pd.DataFrame(
        {
            "driver_id": rng.choice(DRIVERS, 60),
            "customer_id": rng.choice(CUSTOMERS, 60),
            "event_timestamp": BEGIN + pd.to_timedelta(rng.integers(0, 15 * 24, 60), unit="h"),
            "created": BEGIN,
            "rating_x": rng.integers(1, 5, 60),
            "rating_y": rng.integers(1, 5, 60),
        }
    ).drop_duplicates(["driver_id", "customer_id", "event_timestamp"])
    for rows in found.values():
        rows["event_timestamp"] = pd.to_datetime(rows["event_timestamp"], utc=True)
    found["orders"]["val_to_add"] = rng.integers(0, 100, ORDERS)
    # Some orders at the very instants of values.
    found["orders"].loc[::4, "event_timestamp"] = found["orders"].loc[::4, "event_timestamp"].dt.round("h")
    return found


TABLES = tables()


@dataclass(frozen=True)
class Asked:
    """Features of a view, under the names they are asked for by."""

    view: str
    features: Mapping[str, str]
    """Column of the table for each feature."""
    keys: Mapping[str, str]
    """Column of the entity frame for each join key."""
    shown: str

    def expected(self, orders: pd.DataFrame, when: str) -> list[dict[str, Any]]:
        """The rule, row by row."""
        ttl = next(v.ttl for v in VIEWS if v.name == self.view)
        rows, found = TABLES[self.view], []
        for order in orders.to_dict("records"):
            seen = rows[rows["event_timestamp"] <= order[when]]
            if ttl:
                seen = seen[seen["event_timestamp"] >= order[when] - ttl]
            for key, column in self.keys.items():
                seen = seen[seen[key] == order[column]]
            latest = seen.sort_values(["event_timestamp", "created"], kind="stable").tail(1)
            found.append({f: None if latest.empty else latest[c].iloc[0] for f, c in self.features.items()})
        return found


def plain(name: str, *features: str, **columns: str) -> Asked:
    return Asked(name, {f: f for f in features} | columns, {key: key for key in KEYS[name]}, name)


ASKED = [
    plain("driver_stats", "conv_rate", "avg_daily_trips"),
    plain("customer_profile", "current_balance", "lifetime_trip_count"),
    plain("ratings", "rating_x", "rating_y"),
    plain("worldwide", "num_rides", "avg_ride_length"),
    plain("mapped", feature_name="column_name"),
]
PLACES = [
    Asked("weather", {"temperature": "temperature"}, {"location_id": f"{end}_id"}, end)
    for end in ("origin", "destination")
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    home = Home.at(tmp_path_factory.mktemp("conformance") / "home")
    write_tables(home, TABLES)
    places = [
        weather.with_name(end).with_join_key_map({"location_id": f"{end}_id"})
        for end in ("origin", "destination")
    ]
    return repository(
        home,
        *(driver, customer, location, *VIEWS, conv_rate_plus),
        FeatureService(name="places", features=places),
        FeatureService(name="everything", features=[*VIEWS[:3], worldwide, mapped, conv_rate_plus]),
        join="inclusive",
    )


def entity_frame(form: str, orders: pd.DataFrame, when: str, folder: Path) -> Any:
    if form == "pandas, several zones":
        zones = [None, "UTC", "US/Pacific", "Asia/Kolkata"]
        stamps = [
            stamp.tz_localize(None) if zone is None else stamp.tz_convert(zone)
            for stamp, zone in zip(orders[when], zones * len(orders), strict=False)
        ]
        return orders.assign(**{when: pd.Series(stamps, index=orders.index, dtype=object)})
    if form == "parquet":
        orders.to_parquet(folder / "orders.parquet")
        return str(folder / "orders.parquet")
    if form == "sql":
        return f"SELECT * RENAME (event_timestamp AS {when}) FROM orders ORDER BY order_id"
    return {"pandas": orders, "arrow": pa.Table.from_pandas(orders, preserve_index=False)}[form]


FORMS = ("pandas", "pandas, several zones", "arrow", "parquet", "sql")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("form", "full_names", "when"),
    [(form, *names) for form, names in product(FORMS, [(False, "event_timestamp"), (True, "e_ts")])],
)
def test_every_form_of_frame_gets_the_documented_answer(
    form: str, full_names: bool, when: str, store: FeatureStore, tmp_path: Path
) -> None:
    orders = TABLES["orders"].rename(columns={"event_timestamp": when}).sort_values("order_id")
    references = [f"{a.view}:{f}" for a in ASKED for f in a.features]
    references += ["conv_rate_plus:conv_rate_plus_100", "conv_rate_plus:conv_rate_plus_val"]
    job = store.get_historical_features(
        entity_frame(form, orders, when, tmp_path), references, full_feature_names=full_names
    )
    frame, table = job.to_df(), job.to_arrow()
    assert frame["order_id"].tolist() == orders["order_id"].tolist()
    assert table["order_id"].to_pylist() == orders["order_id"].tolist()
    assert frame[when].tolist() == orders[when].tolist()
    assert (
        pa.Table.from_batches(job.to_arrow_batches(rows=7))
        .drop_columns(when)
        .equals(table.drop_columns(when))
    )
    known = missing = 0
    for asked in ASKED:
        expected = asked.expected(orders, when)
        for feature in asked.features:
            shown = f"{asked.view}__{feature}" if full_names else feature
            wanted = [row[feature] for row in expected]
            assert table[shown].to_pylist() == wanted, shown
            known += sum(value is not None for value in wanted)
            missing += sum(value is None for value in wanted)
    assert min(known, missing) > 50  # both happen
    rates = pd.Series([row["conv_rate"] for row in ASKED[0].expected(orders, when)], dtype="float32")
    prefix = "conv_rate_plus__" if full_names else ""
    np.testing.assert_allclose(frame[f"{prefix}conv_rate_plus_100"], rates.add(100))
    np.testing.assert_allclose(
        frame[f"{prefix}conv_rate_plus_val"], rates + orders["val_to_add"].to_numpy()
    )


def test_a_service_gives_what_its_references_give(store: FeatureStore) -> None:
    orders = TABLES["orders"]
    service = store.get_feature_service("everything")
    references = [f"{p.name}:{f.name}" for p in service.feature_view_projections for f in p.features]
    by_service = store.get_historical_features(orders, service).to_arrow()
    by_reference = store.get_historical_features(orders, references).to_arrow()
    assert by_service.equals(by_reference.select(by_service.column_names))


def test_a_view_may_be_asked_for_by_two_keys(store: FeatureStore) -> None:
    orders = TABLES["orders"].sort_values("order_id")
    service = store.get_feature_service("places")
    found = store.get_historical_features(orders, service, full_feature_names=True).to_arrow()
    for asked in PLACES:
        wanted = [row["temperature"] for row in asked.expected(orders, "event_timestamp")]
        assert found[f"{asked.shown}__temperature"].to_pylist() == wanted
    with pytest.raises(FeatureNameCollisionError):
        store.get_historical_features(orders, service)


def test_names_that_collide_need_their_views(store: FeatureStore) -> None:
    asked = ["driver_stats:conv_rate", "driver_stats:conv_rate"]
    for full_names in (False, True):
        with pytest.raises(FeatureNameCollisionError):
            store.get_historical_features(TABLES["orders"], asked, full_feature_names=full_names)


@pytest.mark.parametrize("last", [0, 1])
def test_of_one_instant_the_row_created_last_counts(last: int, store: FeatureStore, home: Home) -> None:
    instant = END - timedelta(minutes=10)
    created = [END, END + timedelta(minutes=5)]
    rows = pd.DataFrame(
        {
            "driver_id": 5001,
            "event_timestamp": instant,
            "created": created if last else created[::-1],
            "conv_rate": np.float32([0.1, 0.2]),
            "avg_daily_trips": [1, 2],
        }
    )
    write_tables(home, {**TABLES, "driver_stats": rows})
    other = repository(home, driver, driver_stats, join="inclusive")
    order = pd.DataFrame({"driver_id": [5001], "event_timestamp": [END]})
    found = other.get_historical_features(order, ["driver_stats:avg_daily_trips"]).to_df()
    assert found["avg_daily_trips"].tolist() == [last + 1]


@pytest.mark.parametrize(
    "name", ["x", "a_x", "a_y", "b__y", "rowid", "entity_row", "select", "Ünïcode z_x_y"]
)
def test_features_may_have_any_name(name: str, home: Home) -> None:
    rows = pd.DataFrame({"driver_id": [1, 2], "event_timestamp": BEGIN, name: [7, 8]})
    write_tables(home, {"odd": rows})
    odd = FeatureView(
        name="odd",
        entities=[driver],
        ttl=timedelta(0),
        schema=[Field(name=name, dtype=Int64)],
        source=DuckLakeSource(name="odd", table="odd"),
    )
    store = repository(home, driver, odd, join="inclusive")
    asked = pd.DataFrame({"driver_id": [2, 1], "event_timestamp": END})
    assert store.get_historical_features(asked, [f"odd:{name}"]).to_df()[name].tolist() == [8, 7]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_dataset_of_everything_comes_back(store: FeatureStore, tmp_path: Path) -> None:
    orders = TABLES["orders"].sort_values("order_id")
    job = store.get_historical_features(orders, store.get_feature_service("everything"))
    storage = SavedDatasetFileStorage(str(tmp_path / "dataset.parquet"))
    store.create_saved_dataset(job, "everything", storage)
    found = store.get_saved_dataset("everything").to_df()
    wanted = job.to_df()
    assert set(found.columns) <= set(wanted.columns)
    assert {"conv_rate", "rating_y", "conv_rate_plus_val", "num_rides"} <= set(found.columns)
    pd.testing.assert_frame_equal(found, wanted[found.columns])
    with pytest.raises(KeyError, match="never_there not found"):
        store.get_historical_features(orders, ["driver_stats:never_there"])


def test_a_period_needs_no_entity_frame(store: FeatureStore) -> None:
    first, last = END - timedelta(days=2), END - timedelta(days=1)
    found = store.get_historical_features(
        features=["driver_stats:conv_rate"], start_date=first, end_date=last
    ).to_df()
    rows = TABLES["driver_stats"]
    inside = rows[rows["event_timestamp"].between(first, last)]
    inside = inside.sort_values(["event_timestamp", "driver_id", "created"])
    inside = inside.drop_duplicates(["event_timestamp", "driver_id"], keep="last")
    assert found["event_timestamp"].tolist() == inside["event_timestamp"].tolist()
    assert found["driver_id"].tolist() == inside["driver_id"].tolist()
    assert found["conv_rate"].tolist() == inside["conv_rate"].tolist()
    assert len(found) > 50


@pytest.mark.parametrize("latest", [False, True])
def test_pulls_give_the_rows_of_an_interval(latest: bool, store: FeatureStore) -> None:
    rows, source = TABLES["driver_stats"], store.get_data_source("driver_stats")
    offline = store.provider.offline_store
    pull = offline.pull_latest_from_table_or_query if latest else offline.pull_all_from_table_or_query
    first, last = rows["event_timestamp"].iloc[20], rows["event_timestamp"].iloc[60]
    got = pull(
        store.config,
        source,
        ["driver_id"],
        ["conv_rate", "avg_daily_trips"],
        "event_timestamp",
        "created",
        first.to_pydatetime(),
        last.to_pydatetime(),
    ).to_df()
    wanted = rows[rows["event_timestamp"].between(first, last)]
    order = ["driver_id", "event_timestamp", "created"]
    wanted = wanted.sort_values(order, kind="stable")
    if latest:
        wanted = wanted.drop_duplicates("driver_id", keep="last")
    got = got.sort_values(order, kind="stable")
    assert got["conv_rate"].tolist() == wanted["conv_rate"].tolist()
    assert got["event_timestamp"].tolist() == wanted["event_timestamp"].tolist()
