"""A log whose model reads features of a team's own views, some of which can be pushed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from tests.support.logs import small_log, write_dataset

DEFINITIONS = """
from datetime import timedelta

from feast import FeatureView, Field, FileSource, PushSource
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Float32, Float64, Int64, Map, String, UnixTimestamp

from feature_repo.definitions import item, user

FOREVER = timedelta(0)
basket_rows = FileSource(
    name="basket_rows",
    path="basket.parquet",
    timestamp_field="at",
    created_timestamp_column="made",
    field_mapping={"value": "basket_value"},
)
basket_pushed = PushSource(name="basket_pushed", batch_source=basket_rows)
basket = FeatureView(
    name="basket",
    entities=[user],
    ttl=FOREVER,
    schema=[Field(name="basket_value", dtype=Float64), Field(name="tier", dtype=String)],
    source=basket_pushed,
)
basket_size = FeatureView(
    name="basket_size",
    entities=[user],
    ttl=FOREVER,
    schema=[Field(name="basket_items", dtype=Int64), Field(name="opened", dtype=UnixTimestamp)],
    source=basket_pushed,
)
stock = FeatureView(
    name="stock",
    entities=[item],
    ttl=FOREVER,
    schema=[Field(name="in_stock", dtype=Int64)],
    source=PushSource(
        name="stock_pushed",
        batch_source=FileSource(
            name="stock_rows", path="stock.parquet", timestamp_field="event_timestamp"
        ),
    ),
)
taste = FeatureView(
    name="taste",
    entities=[user],
    ttl=FOREVER,
    schema=[Field(name="taste_vector", dtype=Array(Float32))],
    source=FileSource(name="taste_rows", path="taste.parquet", timestamp_field="event_timestamp"),
)
notes = FeatureView(
    name="notes",
    entities=[item],
    ttl=FOREVER,
    schema=[Field(name="note", dtype=Map)],
    source=PushSource(
        name="notes_pushed",
        batch_source=FileSource(name="note_rows", path="stock.parquet", timestamp_field="event_timestamp"),
    ),
)


@on_demand_feature_view(sources=[basket], schema=[Field(name="twice", dtype=Float64)])
def twice_the_basket(inputs):
    import pandas as pd

    return pd.DataFrame({"twice": inputs["basket_value"] * 2})
"""
FEATURES = {
    "numeric": ["basket:basket_value", "stock:in_stock", "twice_the_basket:twice"],
    "categorical": ["basket:tier"],
    "vectors": ["taste:taste_vector"],
}
START = pd.Timestamp("2024-01-01", tz="UTC")


def pushable_dataset(folder: Path, backbone: Path) -> Path:
    """The path of its dataset.yaml. `basket_pushed` feeds two views of users, `stock_pushed` one of items;
    `taste` has vectors of users and no push source.
    """
    log = small_log(rows=400, users=12)
    features = folder / "features"
    features.mkdir(parents=True)
    (features / "definitions.py").write_text(DEFINITIONS)
    users = sorted(log["users"]["user_id"])
    rng = np.random.default_rng(0)
    basket = pd.DataFrame(
        {"user_id": users, "at": START, "made": START, "basket_items": 1, "opened": START}
    )
    basket["value"] = rng.uniform(1, 100, len(users))
    basket["tier"] = np.where(basket["value"] > 50, "gold", "grey")
    basket.to_parquet(features / "basket.parquet")
    stock = pd.DataFrame(
        {"item_id": range(25), "event_timestamp": START, "in_stock": rng.integers(9, size=25)}
    )
    stock.to_parquet(features / "stock.parquet")
    taste = pd.DataFrame({"user_id": users, "event_timestamp": START})
    taste["taste_vector"] = [rng.normal(size=3).astype(np.float32) for _ in users]
    taste.to_parquet(features / "taste.parquet")
    return write_dataset(folder, log, backbone, feature_repo="features", features=FEATURES)
