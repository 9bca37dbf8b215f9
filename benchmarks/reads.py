"""Online reads of embeddings: one array from our stores, against the bare store and against stock Feast.

The same 256-wide float32 vectors are in our store and in stock Feast's. They are read in turn, for 1, 100
and 1,000 random entities: by `VectorReader`; from the bare store by one query of the keys and
`numpy.frombuffer`; by stock Feast's `get_online_features(...).to_dict()`; by the same call on our store.
Also Feast's asynchronous call, with many requests in flight.
"""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bahe_core.home import Home
from benchmarks.harness import Row, main
from benchmarks.materialize import ENTITIES, VIEW, WIDTH, available, fill_lake, materialize, opened

if TYPE_CHECKING:
    from feast import FeatureStore

COUNTS = (1, 100, 1000)
REQUESTS = 32
RAW_GOAL, STOCK_GOAL = 1.3, 3.0
HEADER = 7
"""Bytes before the floats of a stored list of 256 float32."""

Users = npt.NDArray[np.int64]
Read = Callable[[Users], object]


def raw_sqlite(feast: FeatureStore) -> Read:
    """A query for the keys, then one array; in the order of the index."""
    connection = sqlite3.connect(feast.config.online_store.path)
    table = f"{feast.project}_{VIEW}"

    def read(users: Users) -> object:
        keys = _keys(users)
        marks = ", ".join("?" * len(keys))
        rows = connection.execute(
            f"SELECT value FROM {table} WHERE entity_key IN ({marks}) AND feature_name = 'embedding'", keys
        ).fetchall()
        return np.stack([np.frombuffer(value, dtype="<f4", offset=HEADER) for (value,) in rows])

    return read


def raw_redis(feast: FeatureStore) -> Read:
    """One pipeline of HMGET, then one array."""
    import redis
    from feast.infra.online_stores.helpers import _mmh3

    client: Any = redis.Redis()
    field, project = _mmh3(f"{VIEW}:embedding"), feast.project.encode()

    def read(users: Users) -> object:
        with client.pipeline(transaction=False) as pipe:
            for key in _keys(users):
                pipe.hmget(key + project, field)
            rows = pipe.execute()
        return np.stack([np.frombuffer(value, dtype="<f4", offset=HEADER) for (value,) in rows])

    return read


def _keys(users: Users) -> list[bytes]:
    from feast.value_type import ValueType

    from feast_ducklake.online.encoding import entity_keys

    return entity_keys({"user_id": pa.array(users)}, {"user_id": ValueType.INT64})


def vector_reader(feast: FeatureStore) -> Read:
    """Ours: ttl, order and missing entities included."""
    from feast_ducklake.online.vectors import VectorReader

    reader = VectorReader(feast, VIEW)
    return lambda users: reader.read({"user_id": users}).vectors_ND


def online_features(feast: FeatureStore) -> Read:
    """Feast's own call."""

    def read(users: Users) -> object:
        rows = [{"user_id": user} for user in users.tolist()]
        return feast.get_online_features([f"{VIEW}:embedding"], rows).to_dict()

    return read


async def at_once(feast: FeatureStore, users: Users) -> None:
    """Feast's asynchronous call for each of these users, all in flight at once."""

    async def request(user: int) -> None:
        answer = await feast.get_online_features_async([f"{VIEW}:embedding"], [{"user_id": user}])
        assert answer.to_dict()["embedding"][0] is not None

    await asyncio.gather(*(request(user) for user in users.tolist()))


def asynchronous(store: str, ours: FeatureStore, stock: FeatureStore, turns: int) -> Iterable[Row]:
    """Milliseconds per request when many are in flight; stock SQLite cannot do it."""
    contenders = {"ours": ours} | ({"stock": stock} if store != "SQLite" else {})
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    rng = np.random.default_rng(1)

    async def run() -> None:
        for turn in range(turns + 2):
            users = rng.choice(ENTITIES, REQUESTS, replace=False)
            for name, feast in contenders.items():
                start = time.perf_counter()
                await at_once(feast, users)
                if turn >= 2:
                    taken[name].append((time.perf_counter() - start) / REQUESTS * 1e3)
        for feast in contenders.values():
            await feast.close()

    asyncio.run(run())
    yield Row(
        metric=f"{REQUESTS} asynchronous requests at once, each, {store}",
        value=median(taken["ours"]),
        unit="ms",
        peer="stock Feast, ms" if "stock" in taken else None,
        peer_value=median(taken["stock"]) if "stock" in taken else None,
    )


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """Milliseconds and factors for each store and count; `quick` repeats less. Needs no filled home."""
    with tempfile.TemporaryDirectory() as folder:
        home = Home.at(Path(folder) / "home").create()
        fill_lake(home, ENTITIES, WIDTH)
        for store in available():
            root = Path(folder) / store
            with (
                opened(home, store, "ours", root / "ours") as ours,
                opened(home, store, "stock", root / "stock") as stock,
            ):
                materialize(ours)
                materialize(stock)
                yield from compare(store, ours, stock, 8 if quick else 60)
                yield from asynchronous(store, ours, stock, 4 if quick else 20)


def compare(store: str, ours: FeatureStore, stock: FeatureStore, turns: int) -> Iterable[Row]:
    """Each reader in turn on the same entities; factors are medians over turns."""
    readers: dict[str, Read] = {
        "ours": vector_reader(ours),
        "raw": raw_sqlite(ours) if store == "SQLite" else raw_redis(ours),
        "stock": online_features(stock),
        "ours, Feast's call": online_features(ours),
    }
    rng = np.random.default_rng(0)
    for count in COUNTS:
        taken: dict[str, list[float]] = {name: [] for name in readers}
        for turn in range(turns + 2):
            users = rng.choice(ENTITIES, count, replace=False)
            # In random order: a call that follows a long one is slowed down by it.
            for name, read in rng.permutation(np.array(list(readers.items()), dtype=object)):
                start = time.perf_counter()
                read(users)
                if turn >= 2:  # the first turns warm the caches
                    taken[name].append(time.perf_counter() - start)
        milliseconds = {name: median(seconds) * 1e3 for name, seconds in taken.items()}

        def factor(above: str, below: str, taken: dict[str, list[float]] = taken) -> float:
            return median(a / b for a, b in zip(taken[above], taken[below], strict=True))

        metric, raw, faster = (
            f"{count:,} x {WIDTH}, {store}",
            factor("ours", "raw"),
            factor("stock", "ours"),
        )
        yield Row(
            metric=f"read {metric}",
            value=milliseconds["ours"],
            unit="ms",
            peer="stock Feast, ms",
            peer_value=milliseconds["stock"],
        )
        yield Row(
            metric=f"time of the bare store's, {metric}",
            value=raw,
            unit="x",
            peer="bare, ms",
            peer_value=milliseconds["raw"],
            goal=f"at most {RAW_GOAL:g} x",
            holds=raw <= RAW_GOAL,
        )
        yield Row(
            metric=f"times faster than stock Feast, {metric}",
            value=faster,
            unit="x",
            goal=f"at least {STOCK_GOAL:g} x" if count > 1 else None,
            holds=faster >= STOCK_GOAL if count > 1 else None,
        )
        yield Row(
            metric=f"get_online_features on our store, {metric}",
            value=milliseconds["ours, Feast's call"],
            unit="ms",
        )


if __name__ == "__main__":
    main("reads", __doc__ or "", measure)
