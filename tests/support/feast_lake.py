"""A lake with tables of one's own, and a Feast repository over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from feast import FeatureStore, RepoConfig

from bahe_core.home import Home
from bahe_lake.connection import lake
from bahe_lake.sql import sql_identifier
from bahe_lake.transactions import commit

START = pd.Timestamp("2024-01-01", tz="UTC")


def seconds(values: Any) -> pd.Series:
    """START and so many seconds."""
    return START + pd.to_timedelta(pd.Series(values), unit="s")


def write_tables(home: Home, tables: dict[str, pd.DataFrame | pa.Table]) -> None:
    """Make these the lake's tables of those names."""
    home.create()
    with lake(home, create=True) as connection:
        for table, rows in tables.items():
            if isinstance(rows, pd.DataFrame):
                rows = pa.Table.from_pandas(rows, preserve_index=False)
            connection.register("rows", rows)
            commit(connection, [f"CREATE OR REPLACE TABLE {sql_identifier(table)} AS FROM rows"])
            connection.unregister("rows")


def repository(home: Home, *objects: Any, **settings: Any) -> FeatureStore:
    """A store over the home's lake with these definitions applied; `settings` are the offline store's."""
    config = RepoConfig(
        project="test",
        provider="local",
        registry=str(home.registry),
        online_store={"type": "sqlite", "path": str(home.online_store)},
        offline_store={
            "type": "feast_ducklake.DuckLakeOfflineStore",
            "home": str(home.root),
            **settings,
        },
        entity_key_serialization_version=3,
        repo_path=Path(home.root),
    )
    store = FeatureStore(config=config)
    if objects:
        store.apply(list(objects))
    return store
