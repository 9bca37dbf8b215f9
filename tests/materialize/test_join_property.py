"""The point-in-time join against brute force in numpy, on random tables full of ties."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from feast import Entity, FeatureStore, FeatureView, Field
from feast.types import Array, Int64
from feast.value_type import ValueType
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bahe_core.home import Home
from materialize.feast_offline import DuckLakeSource
from tests.materialize.feast_lake import START, repository, write_tables

ROWS = 1_250  # of one entity frame
EXAMPLES = 8  # 10,000 cases in all, each asked of four views with and without the cut-off

KEYS = {"one": ["user_id"], "pair": ["user_id", "item_id"], "lists": ["user_id"], "asked": ["user_id"]}
TTL = {"one": 0, "pair": 7, "lists": 3, "asked": 0}
TICK = "us"  # the unit of the random times: neighbours are one microsecond apart


def definitions() -> list[object]:
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
                **{"query": "FROM lake.main.asked"} if name == "asked" else {"table": name},
                created_timestamp_column="created",
            ),
        )
        for name, keys in KEYS.items()
    ]
    return [*entities.values(), *views]


def random_tables(seed: int, ticks: int, rows: int) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
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
        value = np.arange(len(drawn))
        return drawn.assign(**{f"{name}_value": [[v, -v] for v in value] if name == "lists" else value})

    frame = pd.DataFrame(
        {
            "line": rng.permutation(ROWS),
            "user_id": rng.integers(0, 6, ROWS),
            "item_id": rng.integers(0, 6, ROWS),
            "event_timestamp": START + moment(rng.integers(-2, ticks + 9, ROWS)),
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


def _ticks(times: pd.Series) -> np.ndarray:
    """As integers; of a missing one the smallest."""
    return times.dt.tz_localize(None).to_numpy(dtype=f"datetime64[{TICK}]").astype(np.int64)


@pytest.fixture(scope="module")
def stores() -> Iterator[dict[bool, FeatureStore]]:
    """A store for each of the two joins, over one lake, by whether it is strict."""
    with tempfile.TemporaryDirectory() as folder:
        home = Home.at(Path(folder) / "home")
        write_tables(home, random_tables(0, 10, 10)[0])
        yield {
            True: repository(home, *definitions(), join="strict"),
            False: repository(home, join="inclusive"),
        }


# A seed cannot be made smaller, so there is nothing to shrink.
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    seed=st.integers(0, 2**32),
    ticks=st.integers(1, 60),
    rows=st.integers(1, 300),
    strict=st.booleans(),
    large=st.booleans(),
)
def test_the_join_equals_brute_force(
    seed: int, ticks: int, rows: int, strict: bool, large: bool, stores: dict[bool, FeatureStore]
) -> None:
    tables, frame = random_tables(seed, ticks, rows)
    store = stores[strict]
    write_tables(Home.at(store.config.offline_store.home), tables)
    features = [f"{name}:{name}_value" for name in KEYS]
    with pytest.MonkeyPatch.context() as patch:
        if large:  # take the way of large frames
            patch.setattr("materialize.offline_store.point_in_time.FEW_ROWS", 0)
        for cut_off in (False, True):
            job = store.get_historical_features(frame, features, filter_by_created_timestamp=cut_off)
            found = job.to_arrow()
            assert found["line"].to_pylist() == frame["line"].tolist()
            for name, table in tables.items():
                expected = brute_force(name, table, frame, strict=strict, cut_off=cut_off)
                assert found[f"{name}_value"].to_pylist() == expected, (name, cut_off)
