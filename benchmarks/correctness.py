"""Whether answers are right: the point-in-time join against brute force, and the newest value online.

Random tables with few keys and timestamps, so that ties are the rule, are queried through Feast and by
comparing every row with every other in numpy. Online, four processes write values with random timestamps to
the same keys and read each back: what is read may never be older than what the reader itself has written.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np

from bahe_core.home import Home
from bahe_core.progress import progress
from benchmarks.harness import Row, main
from benchmarks.materialize import VIEW, available, fill_lake, opened
from tests.support.random_tables import definitions, differences, random_tables, write_tables

if TYPE_CHECKING:
    from feast import RepoConfig

CASES = 10_000
CASES_OF_A_FRAME = 1_250
WRITERS = 4
ONLINE_KEYS = 5


def measure(quick: bool, _: Path) -> Iterable[Row]:
    """Wrong answers offline, and stale ones of each online store; `quick` tries fewer."""
    with tempfile.TemporaryDirectory() as folder:
        yield offline(Path(folder), CASES // 4 if quick else CASES)
        home = Home.at(Path(folder) / "online").create()
        fill_lake(home, ONLINE_KEYS, 2)
        for store in available():
            yield online(store, home, Path(folder) / store, 20 if quick else 200)


def offline(folder: Path, cases: int) -> Row:
    """Rows of entity frames, each looked up in four views by both joins, with and without the cut-off."""
    from feast import FeatureStore, RepoConfig

    from feast_ducklake.offline import point_in_time

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
                "type": "feast_ducklake.DuckLakeOfflineStore",
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
            # Small and large frames are joined differently; every second one is treated as large.
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
    """How many values that four processes read were older than what the reader had written."""
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
    """One process: how often it read a value that was older than one it had written, or inconsistent."""
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
            consistent = list(values["embedding"].float_list_val.val) == [read, user]
            stale += read < newest[user] or not consistent
    return stale


if __name__ == "__main__":
    main("correctness", __doc__ or "", measure)
