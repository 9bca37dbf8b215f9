"""Whether answers are right: the point-in-time join against brute force, and the newest value online.

Random tables with few keys and instants, so that ties are the rule, are asked through Feast and by
comparing every row with every other in numpy. Online, four processes write values of random times of the
same keys and read each back: what is read may never be older than what the reader itself has written.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from bahe_core.home import Home
from bahe_core.progress import progress
from benchmarks.harness import Row, main
from benchmarks.materialize import VIEW, available, fill_lake, opened

if TYPE_CHECKING:
    from feast import FeatureStore, RepoConfig

CASES = 10_000
CASES_OF_A_FRAME = 1_250
WRITERS = 4
ONLINE_KEYS = 5
START = pd.Timestamp("2024-01-01", tz="UTC")

KEYS = {"one": ["user_id"], "pair": ["user_id", "item_id"], "lists": ["user_id"], "asked": ["user_id"]}
TTL = {"one": 0, "pair": 7, "lists": 3, "asked": 0}
TICK = "us"  # the unit of the random times: neighbours are one microsecond apart


def definitions() -> list[object]:
    """Entities and views: of one key and of two, of lists, of a query; with and without ttl."""
    from feast import Entity, FeatureView, Field
    from feast.types import Array, Int64
    from feast.value_type import ValueType

    from materialize.feast_offline import DuckLakeSource

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
    from materialize.lake import commit, lake, name

    home.create()
    with lake(home, create=True) as connection:
        for table, rows in tables.items():
            connection.register("rows", pa.Table.from_pandas(rows, preserve_index=False))
            commit(connection, [f"CREATE OR REPLACE TABLE {name(table)} AS FROM rows"])
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


def measure(quick: bool, _: Path) -> Iterable[Row]:
    """Wrong answers offline, and stale ones of each online store; `quick` asks less."""
    with tempfile.TemporaryDirectory() as folder:
        yield offline(Path(folder), CASES // 4 if quick else CASES)
        home = Home.at(Path(folder) / "online").create()
        fill_lake(home, ONLINE_KEYS, 2)
        for store in available():
            yield online(store, home, Path(folder) / store, 20 if quick else 200)


def offline(folder: Path, cases: int) -> Row:
    """Rows of entity frames, each asked of four views with both joins, with and without the cut-off."""
    from feast import FeatureStore, RepoConfig

    from materialize.offline_store import point_in_time

    wrong, asked, rng = 0, 0, np.random.default_rng(0)
    home = Home.at(folder / "offline")
    write_tables(home, random_tables(0, 10, 10, 10)[0])
    stores = {}
    for strict in (True, False):
        config = RepoConfig(
            project="correctness",
            provider="local",
            registry=str(folder / f"{strict}.db"),
            online_store={"type": "sqlite", "path": str(folder / "online.db")},
            offline_store={
                "type": "materialize.feast_offline.DuckLakeOfflineStore",
                "home": str(home.root),
                "join": "strict" if strict else "inclusive",
            },
            entity_key_serialization_version=3,
        )
        stores[strict] = FeatureStore(config=config)
        stores[strict].apply(definitions())
    with progress("cases", cases) as advance:
        while asked < cases:
            ticks, rows = int(rng.integers(1, 60)), int(rng.integers(1, 300))
            count = min(CASES_OF_A_FRAME, cases - asked)
            tables, frame = random_tables(int(rng.integers(2**32)), ticks, rows, count)
            write_tables(home, tables)
            # Small frames and large ones are joined in two ways; every second one takes the latter.
            few = 0 if asked // CASES_OF_A_FRAME % 2 else point_in_time.FEW_ROWS
            with patch.object(point_in_time, "FEW_ROWS", few):
                for strict, cut_off in product((True, False), repeat=2):
                    wrong += len(differences(stores[strict], tables, frame, strict=strict, cut_off=cut_off))
            asked += count
            advance(count)
    return Row(
        metric=f"wrong answers to {cases:,} random point-in-time cases",
        value=wrong,
        unit=f"of {cases * 16:,}",
        goal="0",
        holds=wrong == 0,
    )


def online(store: str, home: Home, folder: Path, writes: int) -> Row:
    """Values that were older than what the reader had written, of all that four processes read."""
    with opened(home, store, "ours", folder) as feast:
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(WRITERS) as pool:
            jobs = [(feast.config, number, writes) for number in range(WRITERS)]
            stale = sum(pool.starmap(write_and_read, jobs))
    total = WRITERS * ONLINE_KEYS * writes
    return Row(
        metric=f"stale values under {WRITERS} writers, {store}",
        value=stale,
        unit=f"of {total:,}",
        goal="0",
        holds=stale == 0,
    )


def write_and_read(config: RepoConfig, number: int, writes: int) -> int:
    """One process: how often it read a value older than one it had written, or of another time."""
    from feast import FeatureStore
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import FloatList, Value

    store = FeatureStore(config=config)
    view, rng, stale = store.get_feature_view(VIEW), np.random.default_rng(number), 0
    begin = datetime(2024, 1, 1, tzinfo=UTC)
    newest = [-1] * ONLINE_KEYS
    for _ in range(writes):
        for user in rng.permutation(ONLINE_KEYS).tolist():
            moment = int(rng.integers(writes * WRITERS))
            key = EntityKey(join_keys=["user_id"], entity_values=[Value(int64_val=user)])
            value = Value(float_list_val=FloatList(val=[moment, user]))
            row = (key, {"embedding": value}, begin + timedelta(microseconds=moment), None)
            store.provider.online_write_batch(config, view, [row], None)
            newest[user] = max(newest[user], moment)
            ((event, values),) = store.provider.online_read(config, view, [key])
            assert values is not None
            read = (event.replace(tzinfo=UTC) - begin) // timedelta(microseconds=1)
            whole = list(values["embedding"].float_list_val.val) == [read, user]
            stale += read < newest[user] or not whole
    return stale


if __name__ == "__main__":
    main("correctness", __doc__ or "", measure)
