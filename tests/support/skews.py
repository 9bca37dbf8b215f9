"""Wrong values online, as a faulty job would write them."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from bahe_core.home import Home
from bahe_lake.connection import lake
from feature_repo.store import open_store

_TABLES = {"user_timeline": "timeline_length", "item_attributes": "items"}


def rewrite_online(home: Home, view: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Put a view's newest values, changed, into the online store, a second newer than what is there."""
    store = open_store(home)
    registered = store.get_feature_view(view)
    keys = [column.name for column in registered.entity_columns]
    with lake(home) as connection:
        rows = connection.execute(
            f"""
            SELECT * FROM {_TABLES.get(view, view)}
            QUALIFY row_number() OVER (PARTITION BY {", ".join(keys)} ORDER BY event_timestamp DESC) = 1
            """
        ).df()
    names = [*keys, *(feature.name for feature in registered.features), "event_timestamp"]
    rows = change(rows[names])
    rows["event_timestamp"] += pd.Timedelta("1s")
    rows["created_timestamp"] = pd.Timestamp.now("UTC")
    store.write_to_online_store(view, rows)
