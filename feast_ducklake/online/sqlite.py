"""Feast online store in a SQLite file that several processes read and write.

The table of a view is stock Feast's (any Feast client with `type: sqlite` reads it) and two columns more,
since stock Feast keeps times to the second only.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from feast import Entity, FeatureView
from feast.infra.online_stores.helpers import compute_table_id, extract_text_and_num
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from bahe_lake.sql import sql_identifier
from feast_ducklake.online.rows import NO_TIME, EncodedRows, Request, StoredValues
from feast_ducklake.online.store import GuardedOnlineStore

_KEYS_PER_QUERY = 10_000
"""SQLite takes at most 32,766 values in a query."""

_VERSIONS = "wire_versions"
_CREATE_VERSIONS = f"CREATE TABLE IF NOT EXISTS {_VERSIONS} (view TEXT PRIMARY KEY, version TEXT)"

_COLUMNS = {
    "entity_key": "BLOB",
    "feature_name": "TEXT",
    "value": "BLOB",
    "value_text": "TEXT",
    "vector_value": "BLOB",
    "event_ts": "timestamp",
    "created_ts": "timestamp",
    "event_us": "INTEGER",
    "created_us": "INTEGER",
}


def _exact(kind: str) -> str:
    """Microseconds of a stored time; a stock client that wrote last knew seconds only."""
    return f"CASE WHEN {kind}_us / 1000000 = {kind}_ts THEN {kind}_us ELSE {kind}_ts * 1000000 END"


class GuardedSqliteOnlineStoreConfig(FeastConfigBaseModel):
    """The `online_store` section of feature_store.yaml."""

    type: Literal[
        "feast_ducklake.GuardedSqliteOnlineStore",
        "materialize.feast_sqlite.GuardedSqliteOnlineStore",  # as version 0.1 wrote it
    ] = "feast_ducklake.GuardedSqliteOnlineStore"
    path: str
    """The database file; a relative one is relative to feature_store.yaml."""
    busy_seconds: float = 60.0
    """How long a writer waits for another to finish."""


class GuardedSqliteOnlineStore(GuardedOnlineStore):
    """Online store in one SQLite file in WAL mode: readers never wait, writers wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self._local = threading.local()

    def write_rows(self, config: RepoConfig, view: FeatureView, rows: EncodedRows) -> None:
        """One transaction: all rows or none. What is stored already is not written again."""
        table = _table(config, view)
        events, created = rows.times()
        # In the order of the index, which spares SQLite most of its page changes.
        order = sorted(range(len(rows.keys)), key=rows.keys.__getitem__)
        connection = self._connection(config)
        with _transaction(connection):
            _create(connection, table)
            before = connection.total_changes
            for feature, values in rows.values.items():
                texts = _texts(view, feature, values)
                connection.executemany(
                    _upsert(table),
                    ((rows.keys[i], feature, values[i], texts[i], events[i], created[i]) for i in order),
                )
            if connection.total_changes > before:
                _touch(connection, table)

    def forget(self, config: RepoConfig, view: FeatureView, keys: Sequence[bytes]) -> None:
        """One transaction: all rows or none."""
        table = _table(config, view)
        connection = self._connection(config)
        with _transaction(connection):
            _create(connection, table)
            connection.executemany(
                f"DELETE FROM {table} WHERE entity_key = ?", [(key,) for key in sorted(keys)]
            )
            _touch(connection, table)

    def scan(self, config: RepoConfig, view: FeatureView, feature: str) -> tuple[list[bytes], StoredValues]:
        """Keys of all entities of a view, and what is stored of one feature."""
        table = _table(config, view)
        rows = _rows(
            self._connection(config),
            table,
            f"SELECT entity_key, value, {_exact('event')} FROM {table} WHERE feature_name = ?",
            [feature],
        )
        event_us = np.array([row[2] for row in rows], dtype=np.int64)
        return [row[0] for row in rows], StoredValues({feature: [row[1] for row in rows]}, event_us)

    def version(self, config: RepoConfig, view: FeatureView) -> str | None:
        """A token that changes with each write to the view; None when nothing is stored."""
        table = _table(config, view)
        query = f"SELECT version FROM {_VERSIONS} WHERE view = ?"
        rows = _rows(self._connection(config), table, query, [table])
        return str(rows[0][0]) if rows else None

    def read_stored(self, config: RepoConfig, requests: Sequence[Request]) -> list[StoredValues]:
        """What is stored for each request, whatever its age; a view never written to holds nothing."""
        connection = self._connection(config)
        return [_read(connection, _table(config, request.view), request) for request in requests]

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Tables for the views to keep; none for those to delete."""
        connection = self._connection(config)
        with _transaction(connection):
            for view in tables_to_keep:
                _create(connection, _table(config, view))
            for view in tables_to_delete:
                table = _table(config, view)
                connection.execute(f"DROP TABLE IF EXISTS {table}")
                connection.execute(_CREATE_VERSIONS)
                connection.execute(f"DELETE FROM {_VERSIONS} WHERE view = ?", [table])

    def teardown(
        self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]
    ) -> None:
        """Remove the views' tables, and with the last one the file."""
        self.update(config, tables, [], [], [], partial=False)
        connection = self._connection(config)
        left = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        if left == [(_VERSIONS,)]:
            connection.close()
            del self._local.connection
            for suffix in ("", "-wal", "-shm"):
                Path(f"{_path(config)}{suffix}").unlink(missing_ok=True)

    def _connection(self, config: RepoConfig) -> sqlite3.Connection:
        """This thread's connection, made anew when the file was replaced or the process forked."""
        path = _path(config)
        state = (os.getpid(), path, _inode(path))
        if getattr(self._local, "state", None) != state or not hasattr(self._local, "connection"):
            store = config.online_store
            assert isinstance(store, GuardedSqliteOnlineStoreConfig)
            self._local.connection = _connect(Path(path), store.busy_seconds)
            self._local.state = (os.getpid(), path, _inode(path))
        connection: sqlite3.Connection = self._local.connection
        return connection


def _path(config: RepoConfig) -> str:
    # Not a Path, which costs each read of a single entity more than its query.
    store = config.online_store
    assert isinstance(store, GuardedSqliteOnlineStoreConfig)
    return os.path.join(config.repo_path or "", os.path.expanduser(store.path))  # noqa: PTH111, PTH118


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino  # noqa: PTH116
    except FileNotFoundError:
        return None


def _table(config: RepoConfig, view: FeatureView) -> str:
    return sql_identifier(
        compute_table_id(config.project, view, config.registry.enable_online_feature_view_versioning)
    )


def _connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None)
    # Of a new file only. Three embeddings would fill SQLite's usual page, with a third of it wasted.
    connection.execute("PRAGMA page_size = 8192")
    # Two processes that turn a new file into WAL mode do not wait for each other by themselves.
    retrying = Retrying(
        retry=retry_if_exception(lambda error: "locked" in str(error)),
        stop=stop_after_delay(busy_seconds),
        wait=wait_fixed(0.01),
        reraise=True,
    )
    retrying(connection.execute, "PRAGMA journal_mode = WAL")
    # A crash of the machine may lose the last commits, never the file; materialization then runs again.
    connection.execute("PRAGMA synchronous = NORMAL")
    # Writers move the log into the file every 32 MB, not every 8: in a batch's random keys many pages
    # change again and again, and a materialization takes a seventh less time.
    connection.execute("PRAGMA wal_autocheckpoint = 4000")
    # No mmap: a file that is truncated in place (a backup copied over it) would kill the process (SIGBUS)
    # where a read only fails. 100 of 50,000 vectors of 1 kB take 0.56 ms so, and took 0.34 with it.
    connection.execute("PRAGMA mmap_size = 0")
    # 16 MiB for each connection: a small home's items stay in it.
    connection.execute("PRAGMA cache_size = -16384")
    return connection


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    # IMMEDIATE: a transaction that reads first and writes later could not wait for another writer.
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _create(connection: sqlite3.Connection, table: str) -> None:
    columns = ", ".join(f"{column} {kind}" for column, kind in _COLUMNS.items())
    connection.execute(
        f"CREATE TABLE IF NOT EXISTS {table} ({columns}, PRIMARY KEY (entity_key, feature_name))"
    )
    connection.execute(_CREATE_VERSIONS)
    there = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
    for column, kind in _COLUMNS.items():
        if column not in there:  # made by stock Feast
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")


def _touch(connection: sqlite3.Connection, table: str) -> None:
    connection.execute(f"INSERT OR REPLACE INTO {_VERSIONS} VALUES (?, ?)", [table, uuid.uuid4().hex])


def _upsert(table: str) -> str:
    return f"""
        INSERT INTO {table}
            (entity_key, feature_name, value, value_text, event_ts, created_ts, event_us, created_us)
        VALUES (?1, ?2, ?3, ?4, ?5 / 1000000, ?6 / 1000000, ?5, ?6)
        ON CONFLICT (entity_key, feature_name) DO UPDATE SET
            value = excluded.value, value_text = excluded.value_text, vector_value = NULL,
            event_ts = excluded.event_ts, created_ts = excluded.created_ts,
            event_us = excluded.event_us, created_us = excluded.created_us
        WHERE excluded.event_us > {_exact("event")}
            OR excluded.event_us = {_exact("event")}
            AND coalesce(excluded.created_us >= {_exact("created")}, 1)
            AND (excluded.value IS NOT value OR excluded.created_us IS NOT created_us)
    """


def _texts(view: FeatureView, feature: str, values: list[bytes]) -> list[str | None]:
    """Scalars as text, which stock Feast keeps beside the value to filter by."""
    kind = next((field.dtype.to_value_type().name for field in view.features if field.name == feature), "")
    if kind.endswith(("_LIST", "_SET")):
        return [None] * len(values)
    return [extract_text_and_num(Value.FromString(value), False)[0] for value in values]


def _rows(
    connection: sqlite3.Connection, table: str, query: str, values: Sequence[bytes | str]
) -> list[tuple[Any, ...]]:
    """Rows of a query; none of a table that nothing was written to yet."""
    try:
        return connection.execute(query, values).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        if "no such column" not in str(error):
            raise
    with _transaction(connection):
        _create(connection, table)  # made by stock Feast: it gets the columns that are missing
    return connection.execute(query, values).fetchall()


def _read(connection: sqlite3.Connection, table: str, request: Request) -> StoredValues:
    keys, features = request.keys, request.features
    values: dict[str, dict[bytes, bytes]] = {feature: {} for feature in features}
    times: dict[bytes, int] = {}
    for start in range(0, len(keys), _KEYS_PER_QUERY):
        some = keys[start : start + _KEYS_PER_QUERY]
        query = f"""
            SELECT entity_key, feature_name, value, {_exact("event")}
            FROM {table}
            WHERE entity_key IN ({", ".join("?" * len(some))})
                AND feature_name IN ({", ".join("?" * len(features))})
        """
        for key, feature, value, event_us in _rows(connection, table, query, [*some, *features]):
            values[feature][key] = value
            if event_us > times.get(key, NO_TIME):
                times[key] = event_us
    return StoredValues(
        {feature: [values[feature].get(key) for key in keys] for feature in features},
        np.array([times.get(key, NO_TIME) for key in keys], dtype=np.int64),
    )
