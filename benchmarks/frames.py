"""Point-in-time frames: the offline store against hand-written SQL and against Feast's own DuckDB store.

Everything is synthetic and written to a temporary folder. Each contender runs in its own process with the
same threads; its memory is what the retrieval adds to that process.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from bahe_core.home import Home
from bahe_core.machine import PeakMemory, configure_threads
from bahe_core.progress import say
from benchmarks.harness import Row, main

if TYPE_CHECKING:
    from feast import FeatureStore

KEYS = 1_000
WIDTH = 64
ENTITY_ROWS = 50_000
TIMES_PER_KEY = (4, 200)
REPETITIONS = 5
VIEWS = {"a": "user_id", "b": "user_id", "c": "user_id", "d": "item_id", "e": "item_id"}
MEMORY = "3GB"  # for DuckDB; the process may use 4
START = "TIMESTAMPTZ '2024-01-01 00:00:00+00'"


def measure(quick: bool, _: Path) -> Iterable[Row]:
    """All rows of the benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        for times in TIMES_PER_KEY:
            home = Home.at(Path(folder) / f"wide-{times}")
            write_wide(home, times)
            yield from join_rows(home, times)
        yield from scale_rows(Path(folder), 1_000_000 if quick else 10_000_000)


def join_rows(home: Home, times: int) -> Iterable[Row]:
    """The join of lists: ours against both peers."""
    case = f"{ENTITY_ROWS:,} rows, {WIDTH} floats, {times} times a key"
    # Of a pandas frame, Feast itself first scans all timestamps, before any store is called.
    for form, arrow in (("Arrow", True), ("pandas", False)):
        ours = alone(partial(ask_ours, arrow=arrow), home)
        by_hand = alone(partial(ask_by_hand, arrow=arrow), home)
        yield compared(f"join of {case}, {form}", ours[0], "s", "SQL by hand", by_hand[0], 1.3)
        yield compared(f"memory of {case}, {form}", ours[1], "MiB", "SQL by hand", by_hand[1], 1.5)
    if importlib.util.find_spec("ibis") is None:
        say("Feast's own store is left out: pip install 'bahe[bench]'")
        return
    stock = alone(ask_stock, home)
    factor = stock[0] / ours[0]
    has_goal = times == max(TIMES_PER_KEY)
    yield Row(
        metric=f"times faster, {case}",
        value=factor,
        unit="x",
        peer="Feast's DuckDB store, s",
        peer_value=stock[0],
        goal=">= 10" if has_goal else None,
        holds=factor >= 10 if has_goal else None,
    )


def scale_rows(folder: Path, most: int) -> Iterable[Row]:
    """Impressions with five views to Parquet: rows a second, memory, growth."""
    sizes = [most // 10, most // 3, most]
    seconds = []
    for rows in sizes:
        home = Home.at(folder / f"tall-{rows}")
        write_tall(home, rows)
        spent, _, peak = alone(ask_tall, home)
        seconds.append(spent)
    yield Row(metric=f"{most:,} impressions x 5 views to Parquet", value=most / spent, unit="rows/s")
    yield Row(
        metric="peak memory of the process",
        value=peak,
        unit="MiB",
        goal="<= 4096",
        holds=peak <= 4096,
    )
    steepness = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    yield Row(
        metric=f"time against rows, {sizes[0]:,} to {most:,}",
        value=steepness,
        unit="log-log slope",
        goal="<= 1.15",
        holds=steepness <= 1.15,
    )


def compared(metric: str, value: float, unit: str, peer: str, peer_value: float, most: float) -> Row:
    """A figure that may be at most `most` times its peer's."""
    return Row(
        metric=metric,
        value=value,
        unit=unit,
        peer=peer,
        peer_value=peer_value,
        goal=f"<= {most} x {peer}",
        holds=value <= most * peer_value,
    )


def alone(ask: Callable[[Path], Callable[[], object]], home: Home) -> tuple[float, float, float]:
    """Median seconds of several runs, MiB that the first run added, and the process's peak MiB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_timed, (ask, home.root))


def _timed(ask: Callable[[Path], Callable[[], object]], root: Path) -> tuple[float, float, float]:
    configure_threads()
    os.environ["BAHE_MEMORY"] = MEMORY
    run = ask(root)
    with PeakMemory() as before:
        pass
    with PeakMemory(interval=0.002) as peak:
        start = time.perf_counter()
        run()
        taken = [time.perf_counter() - start]
    if taken[0] < 30:
        for _ in range(REPETITIONS - 1):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return median(taken), peak.mebibytes - before.mebibytes, peak.mebibytes


def write_wide(home: Home, times: int) -> None:
    """Write a table of vectors and the entity frame, both also as Parquet for Feast's own store."""
    from bahe_lake.connection import lake
    from bahe_lake.sql import sql_literal

    with lake(home.create(), create=True) as connection:
        connection.execute(
            "CREATE TABLE vectors AS SELECT k AS id,"
            f" {START} + INTERVAL 1 HOUR * t + INTERVAL 1 SECOND * (k % 50) AS event_timestamp,"
            f" {START} AS created, list_transform(range({WIDTH}), lambda i: (i + k * t)::FLOAT) AS vector"
            f" FROM range({KEYS}) x(k), range({times}) y(t) ORDER BY id, event_timestamp"
        )
        connection.execute(
            f"CREATE TABLE wanted AS SELECT (hash(i) % {KEYS})::BIGINT AS id, {START}"
            f" + INTERVAL 1 SECOND * (hash(-i) % {times * 3600})::BIGINT AS event_timestamp, i AS line"
            f" FROM range({ENTITY_ROWS}) z(i)"
        )
        for table in ("vectors", "wanted"):
            path = sql_literal(str(home.root / f"{table}.parquet"))
            connection.execute(f"COPY {table} TO {path} (FORMAT parquet)")


def write_tall(home: Home, rows: int) -> None:
    """Write impressions, 20 per user and 200 per item, and for each a row in each of five tables."""
    from bahe_lake.connection import lake

    with lake(home.create(), create=True) as connection:
        connection.execute(
            f"CREATE TABLE impressions AS SELECT i AS impression_id, (hash(i) % {rows // 20})::BIGINT"
            f" AS user_id, (hash(i + {rows}) % {rows // 200})::BIGINT AS item_id, {START}"
            f" + INTERVAL 1 SECOND * (hash(-i) % {rows * 8})::BIGINT AS event_timestamp"
            f" FROM range({rows}) t(i)"
        )
        for view, key in VIEWS.items():
            connection.execute(
                f"CREATE TABLE {view} AS SELECT {key}, event_timestamp, count(*) AS {view}_count,"
                f" epoch_us(event_timestamp) AS {view}_time, random() AS {view}_value, now() AS created"
                f" FROM impressions GROUP BY {key}, event_timestamp ORDER BY {key}, event_timestamp"
            )


def repository(root: Path, offline_store: dict[str, Any]) -> FeatureStore:
    """A store with nothing applied yet."""
    from feast import FeatureStore, RepoConfig

    name = str(offline_store["type"]).rsplit(".", 1)[-1]
    return FeatureStore(
        config=RepoConfig(
            project="benchmark",
            provider="local",
            registry=str(root / f"{name}.db"),
            online_store={"type": "sqlite", "path": str(root / "online.db")},
            offline_store=offline_store,
            entity_key_serialization_version=3,
        )
    )


def with_vectors(
    store: FeatureStore, source: Any, root: Path, *, arrow: bool = False
) -> Callable[[], object]:
    """The query of the join: the vector of each entity row."""
    from feast import Entity, FeatureView, Field, ValueType
    from feast.types import Array, Float32

    key = Entity(name="key", join_keys=["id"], value_type=ValueType.INT64)
    schema = [Field(name="vector", dtype=Array(Float32))]
    view = FeatureView(name="vectors", entities=[key], ttl=timedelta(0), schema=schema, source=source)
    store.apply([key, view])
    entities = read_wanted(root, arrow=arrow)
    return lambda: store.get_historical_features(entities, ["vectors:vector"]).to_arrow()


def read_wanted(root: Path, *, arrow: bool) -> Any:
    """The entity frame."""
    import pandas as pd
    import pyarrow.parquet as pq

    path = root / "wanted.parquet"
    return pq.read_table(path) if arrow else pd.read_parquet(path)


def ask_ours(root: Path, *, arrow: bool = False) -> Callable[[], object]:
    """Through our offline store."""
    from feast_ducklake.offline.source import DuckLakeSource

    kind = "feast_ducklake.DuckLakeOfflineStore"
    source = DuckLakeSource(name="vectors", table="vectors", created_timestamp_column="created")
    return with_vectors(repository(root, {"type": kind, "home": str(root)}), source, root, arrow=arrow)


def ask_stock(root: Path) -> Callable[[], object]:
    """Through Feast's DuckDB store, from Parquet."""
    from feast import FileSource

    source = FileSource(
        name="vectors",
        path=str(root / "vectors.parquet"),
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
    )
    return with_vectors(repository(root, {"type": "duckdb"}), source, root)


def ask_by_hand(root: Path, *, arrow: bool = False) -> Callable[[], object]:
    """The best SQL for these tables, by someone who knows that no key has two rows with one timestamp."""
    from bahe_lake.connection import connect

    connection = connect(Home.at(root))
    connection.register("rows", read_wanted(root, arrow=arrow))
    query = (
        "SELECT r.*, v.vector FROM rows r ASOF LEFT JOIN vectors v"
        " ON r.id = v.id AND r.event_timestamp > v.event_timestamp ORDER BY r.line"
    )
    return lambda: connection.execute(query).to_arrow_table()


def ask_tall(root: Path) -> Callable[[], object]:
    """A saved dataset of all impressions with the features of five views."""
    from feast import Entity, FeatureView, Field, ValueType
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
    from feast.types import Float64, Int64

    from feast_ducklake.offline.source import DuckLakeSource

    kind = "feast_ducklake.DuckLakeOfflineStore"
    store = repository(root, {"type": kind, "home": str(root)})
    keys = {
        key: Entity(name=key.removesuffix("_id"), join_keys=[key], value_type=ValueType.INT64)
        for key in set(VIEWS.values())
    }
    types = {"count": Int64, "time": Int64, "value": Float64}
    views = [
        FeatureView(
            name=view,
            entities=[keys[key]],
            ttl=timedelta(0),
            schema=[Field(name=f"{view}_{name}", dtype=dtype) for name, dtype in types.items()],
            source=DuckLakeSource(name=view, table=view, created_timestamp_column="created"),
        )
        for view, key in VIEWS.items()
    ]
    store.apply([*keys.values(), *views])
    frame = "SELECT * FROM impressions ORDER BY event_timestamp, impression_id"
    features = [f"{view}:{view}_{name}" for view in VIEWS for name in types]
    storage = SavedDatasetFileStorage(str(root / "frame.parquet"))
    return lambda: store.get_historical_features(frame, features).persist(storage, allow_overwrite=True)


if __name__ == "__main__":
    main("frames", __doc__ or "", measure)
