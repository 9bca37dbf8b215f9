"""Random feature tables, and what a point-in-time join of them must give, by brute force."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from feast import FeatureStore

from bahe_core.home import Home

START = pd.Timestamp("2024-01-01", tz="UTC")


KEYS = {"one": ["user_id"], "pair": ["user_id", "item_id"], "lists": ["user_id"], "asked": ["user_id"]}


TTL = {"one": 0, "pair": 7, "lists": 3, "asked": 0}


TICK = "us"  # the unit of the random times: neighbours are one microsecond apart


def definitions() -> list[object]:
    """Entities and views: of one key and of two, of lists, of a query; with and without ttl."""
    from feast import Entity, FeatureView, Field
    from feast.types import Array, Int64
    from feast.value_type import ValueType

    from feast_ducklake.offline.source import DuckLakeSource

    entities = {
        key: Entity(name=key.removesuffix("_id"), join_keys=[key], value_type=ValueType.INT64)
        for key in ("user_id", "item_id")
    }
    views = [
        FeatureView(
            name=name,
            entities=[entities[key] for key in keys],
            ttl=timedelta(microseconds=TTL[name]),
            schema=[Field(name=f"{name}_value", dtype=Array(Int64) if name == "lists" else Int64)],
            source=DuckLakeSource(
                name=name,
                table=None if name == "asked" else name,
                query="FROM lake.main.asked" if name == "asked" else None,
                created_timestamp_column="created",
            ),
        )
        for name, keys in KEYS.items()
    ]
    return [*entities.values(), *views]


def random_tables(
    seed: int, ticks: int, rows: int, asked: int
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """Feature tables and an entity frame with few distinct keys and times, so that ties are the rule."""
    rng = np.random.default_rng(seed)
    moment = partial(pd.to_timedelta, unit=TICK)

    def table(name: str) -> pd.DataFrame:
        drawn = pd.DataFrame(
            {
                **{key: rng.integers(0, 4, rows) for key in KEYS[name]},
                "event_timestamp": START + moment(rng.integers(0, ticks, rows)),
                "created": START + moment(rng.integers(0, 2 * ticks, rows)),
            }
        )
        drawn.loc[rng.random(rows) < 0.1, "created"] = pd.NaT
        if name == "asked":  # a query's rows have no order of writing, so each must be told apart
            drawn = drawn.drop_duplicates([*KEYS[name], "event_timestamp", "created"]).reset_index(
                drop=True
            )
        value = range(len(drawn))
        values: list[Any] = [[v, -v] for v in value] if name == "lists" else list(value)
        return drawn.assign(**{f"{name}_value": values})

    frame = pd.DataFrame(
        {
            "line": rng.permutation(asked),
            "user_id": rng.integers(0, 6, asked),
            "item_id": rng.integers(0, 6, asked),
            "event_timestamp": START + moment(rng.integers(-2, ticks + 9, asked)),
        }
    )
    return {name: table(name) for name in KEYS}, frame


def brute_force(
    name: str, table: pd.DataFrame, frame: pd.DataFrame, *, strict: bool, cut_off: bool
) -> list[object]:
    """For each row of the frame the value of the last row of the table that it may see."""
    t, created = (_ticks(table[column]) for column in ("event_timestamp", "created"))
    e = _ticks(frame["event_timestamp"])[:, None]
    seen = t < e if strict else t <= e
    for key in KEYS[name]:
        seen &= table[key].to_numpy() == frame[key].to_numpy()[:, None]
    if TTL[name]:
        seen &= t >= e - TTL[name]
    if cut_off:
        seen &= (created <= e) & table["created"].notna().to_numpy()
    order = np.lexsort((np.arange(len(table)), created, t))
    rank = np.empty(len(table), dtype=int)
    rank[order] = np.arange(len(table))
    best = np.where(seen, rank, -1).max(axis=1, initial=-1)
    values = table[f"{name}_value"].tolist()
    return [None if b < 0 else values[order[b]] for b in best]


def _ticks(times: pd.Series[Any]) -> npt.NDArray[np.int64]:
    """As integers; of a missing one the smallest."""
    ticks: npt.NDArray[np.int64] = (
        times.dt.tz_localize(None).to_numpy(dtype=f"datetime64[{TICK}]").view("i8")
    )
    return ticks


def write_tables(home: Home, tables: dict[str, pd.DataFrame]) -> None:
    """Make these the lake's tables of those names."""
    from bahe_lake.connection import lake
    from bahe_lake.sql import sql_identifier
    from bahe_lake.transactions import commit

    home.create()
    with lake(home, create=True) as connection:
        for table, rows in tables.items():
            connection.register("rows", pa.Table.from_pandas(rows, preserve_index=False))
            commit(connection, [f"CREATE OR REPLACE TABLE {sql_identifier(table)} AS FROM rows"])
            connection.unregister("rows")


def differences(
    store: FeatureStore,
    tables: dict[str, pd.DataFrame],
    frame: pd.DataFrame,
    *,
    strict: bool,
    cut_off: bool,
) -> list[tuple[str, int]]:
    """View and row of every answer that is not brute force's, or not in the frame's order."""
    features = [f"{name}:{name}_value" for name in KEYS]
    job = store.get_historical_features(frame, features, filter_by_created_timestamp=cut_off)
    found = job.to_arrow()
    wrong = [
        ("order", row)
        for row, (got, wanted) in enumerate(zip(found["line"].to_pylist(), frame["line"], strict=True))
        if got != wanted
    ]
    for name, table in tables.items():
        expected = brute_force(name, table, frame, strict=strict, cut_off=cut_off)
        got = found[f"{name}_value"].to_pylist()
        wrong += [(name, row) for row in range(len(frame)) if got[row] != expected[row]]
    return wrong
