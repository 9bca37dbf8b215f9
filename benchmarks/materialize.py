"""Materialization through Feast, our engine and stores against stock Feast's, on the same table.

Each engine in turn writes 50,000 vectors of 256 float32 from the lake into an empty online store; ours then
once more with nothing new.
"""

from __future__ import annotations

import contextlib
import io
import socket
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from bahe_core.home import Home
from benchmarks.harness import Row, main

if TYPE_CHECKING:
    from feast import FeatureStore

WIDTH = 256
ENTITIES = 50_000
VIEW = "user_vector"
NOW = datetime.now(UTC)
GOAL = 6.0
NOTHING_NEW_SECONDS = 2.0

OURS = {"type": "feast_ducklake.ArrowEngine"}
STOCK = {"type": "local"}
CONTENDERS: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "SQLite": {
        "ours": ({"type": "feast_ducklake.GuardedSqliteOnlineStore"}, OURS),
        "stock": ({"type": "sqlite"}, STOCK),
    },
    "Redis": {
        "ours": ({"type": "feast_ducklake.GuardedRedisOnlineStore"}, OURS),
        "stock": ({"type": "redis", "connection_string": "127.0.0.1:6379"}, STOCK),
    },
}


def available() -> list[str]:
    """Stores that can be measured: Redis only when a server listens on its port."""
    with socket.socket() as probe:
        redis = probe.connect_ex(("127.0.0.1", 6379)) == 0
    return ["SQLite", "Redis"] if redis else ["SQLite"]


def fill_lake(home: Home, entities: int, width: int) -> Any:
    """A table of random vectors; returns them [N, D]."""
    from bahe_lake.connection import lake

    vectors_ND = np.random.default_rng(0).normal(size=(entities, width)).astype(np.float32)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), width)
    moment = pa.repeat(pa.scalar(NOW - timedelta(hours=1), pa.timestamp("us", tz="UTC")), entities)
    table = pa.table(
        {
            "user_id": np.arange(entities),
            "embedding": flat.cast(pa.list_(pa.float32())),
            "event_timestamp": moment,
            "created_timestamp": moment,
        }
    )
    with lake(home, create=True) as connection:
        connection.register("rows", table)
        connection.execute(f"CREATE TABLE {VIEW} AS SELECT * FROM rows")
    return vectors_ND


@contextlib.contextmanager
def opened(home: Home, store: str, contender: str, folder: Path) -> Iterator[FeatureStore]:
    """A Feast store with the view applied and nothing materialized; it is torn down afterwards."""
    from feast import Entity, FeatureStore, FeatureView, Field, RepoConfig, ValueType
    from feast.types import Array, Float32

    from feast_ducklake.offline.source import DuckLakeSource

    online, engine = CONTENDERS[store][contender]
    folder.mkdir(parents=True)
    path = {"path": str(folder / "online.db")} if store == "SQLite" else {}
    feast = FeatureStore(
        config=RepoConfig(
            project=f"bench_{uuid.uuid4().hex[:8]}",
            provider="local",
            registry={"path": str(folder / "registry.db")},
            online_store=online | path,
            offline_store={
                "type": "feast_ducklake.DuckLakeOfflineStore",
                "home": str(home.root),
            },
            batch_engine=engine,
            entity_key_serialization_version=3,
            # With these stock Feast is fastest.
            materialization={"pull_latest_features": True, "online_write_batch_size": 10_000},
        )
    )
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    view = FeatureView(
        name=VIEW,
        entities=[user],
        schema=[Field(name="embedding", dtype=Array(Float32))],
        ttl=timedelta(0),
        source=DuckLakeSource(name=VIEW, table=VIEW, created_timestamp_column="created_timestamp"),
    )
    feast.apply([user, view])
    try:
        yield feast
    finally:
        feast.teardown()


def materialize(feast: FeatureStore) -> float:
    """Seconds for all rows."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        feast.materialize(NOW - timedelta(days=1), NOW, feature_views=[VIEW])
    return time.perf_counter() - start


def materialize_nothing(feast: FeatureStore) -> tuple[float, int]:
    """Seconds for an interval in which nothing happened, and the rows that were handed to the store."""
    store = feast.provider.online_store
    rows, write = 0, store.write_rows

    def counted(config: Any, view: Any, written: Any) -> None:
        nonlocal rows
        rows += len(written.keys)
        write(config, view, written)

    start = time.perf_counter()
    with (
        patch.object(store, "write_rows", counted),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        feast.materialize_incremental(NOW + timedelta(hours=1), feature_views=[VIEW])
    return time.perf_counter() - start, rows


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """Seconds and factors for each store; `quick` repeats less. Needs no filled home."""
    with tempfile.TemporaryDirectory() as folder:
        home = Home.at(Path(folder) / "home").create()
        fill_lake(home, ENTITIES, WIDTH)
        for store in available():
            seconds: dict[str, list[float]] = {"ours": [], "stock": []}
            nothing: list[tuple[float, int]] = []
            for turn in range(3 if quick else 7):
                for contender, taken in seconds.items():
                    repository = Path(folder) / f"{store}-{contender}-{turn}"
                    with opened(home, store, contender, repository) as feast:
                        taken.append(materialize(feast))
                        if contender == "ours":
                            nothing.append(materialize_nothing(feast))
            factor = median(s / o for s, o in zip(seconds["stock"], seconds["ours"], strict=True))
            yield Row(
                metric=f"materialize {ENTITIES:,} x {WIDTH} float32, {store}",
                value=median(seconds["ours"]),
                unit="s",
                peer="stock Feast, s",
                peer_value=median(seconds["stock"]),
            )
            yield Row(
                metric=f"times faster than stock Feast, {store}",
                value=factor,
                unit="x",
                goal=f"at least {GOAL:g} x",
                holds=factor >= GOAL,
            )
            yield Row(
                metric=f"materialize-incremental with nothing new, {store}",
                value=median(seconds for seconds, _ in nothing),
                unit="s",
                goal=f"under {NOTHING_NEW_SECONDS:g} s",
                holds=median(seconds for seconds, _ in nothing) < NOTHING_NEW_SECONDS,
            )
            rows = max(rows for _, rows in nothing)
            yield Row(metric=f"rows it writes, {store}", value=rows, unit="rows", goal="0", holds=rows == 0)


if __name__ == "__main__":
    main("materialize", __doc__ or "", measure)
