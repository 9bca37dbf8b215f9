"""Online stores that fail: an error in time, no wait without an end, nor the end of the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import redis
from feast import Entity, FeatureStore, FeatureView, Field, RepoConfig, ValueType
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Int64

from bahe_core.home import Home
from feast_ducklake.offline.source import DuckLakeSource
from tests.support.stopped_redis import own_redis

KEY = EntityKey(join_keys=["user_id"], entity_values=[Value(int64_val=1)])
VIEW = FeatureView(
    name="counts",
    entities=[Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)],
    schema=[Field(name="user_id", dtype=Int64), Field(name="clicks", dtype=Int64)],
    source=DuckLakeSource(name="counts", table="counts"),
)
REPOSITORY = Path(__file__).parents[2]


def test_a_redis_that_says_nothing_is_an_error_in_time(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home").create()
    with own_redis(tmp_path) as server:
        online = {
            "type": "feast_ducklake.GuardedRedisOnlineStore",
            "url": server.url,
            "read_seconds": 0.3,
        }
        config = RepoConfig(
            project="stopped",
            provider="local",
            registry=str(tmp_path / "registry.db"),
            online_store=online,
            offline_store={"type": "feast_ducklake.DuckLakeOfflineStore", "home": str(home.root)},
            entity_key_serialization_version=3,
        )
        store = FeatureStore(config=config)
        read = store.provider.online_store.online_read
        assert read(config, VIEW, [KEY]) == [(None, None)]
        with server.stopped():
            start = time.monotonic()
            with pytest.raises(redis.TimeoutError):
                read(config, VIEW, [KEY])
            with pytest.raises(redis.TimeoutError):
                asyncio.run(store.provider.online_store.online_read_async(config, VIEW, [KEY]))
            # Not how long it takes, but that it ends: before, it did not.
            assert time.monotonic() - start < 30
        assert read(config, VIEW, [KEY]) == [(None, None)], "it recovers by itself"


def test_a_file_that_is_truncated_under_a_reader_is_an_error(tmp_path: Path) -> None:
    """A backup copied over it in place does that. The reader is a process of its own, since it may die."""
    code = f"""
        import os, sqlite3
        from pathlib import Path
        from feast_ducklake.online.sqlite import _connect

        path = Path({str(tmp_path / "online.db")!r})
        connection = _connect(path, 1)
        connection.execute("CREATE TABLE t (k INTEGER PRIMARY KEY, v BLOB)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", [(k, os.urandom(2000)) for k in range(9000)])
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("SELECT v FROM t WHERE k = 5").fetchall()
        with path.open("r+b") as file:
            file.truncate(8192 * 3)
        try:
            connection.execute("SELECT sum(length(v)) FROM t").fetchall()
        except sqlite3.DatabaseError as error:
            print("refused:", error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"killed by signal {-done.returncode}" + done.stderr
    assert done.stdout.startswith("refused:")
