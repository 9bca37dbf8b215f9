"""From Feast's configuration to a connection with the lake that it names."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from bahe_core.errors import BadInput, NotReady
from bahe_core.home import Home
from bahe_core.lake_location import LakeLocation
from bahe_lake.connection import LAKE, connect, damaged_files_named, require_catalogue

if TYPE_CHECKING:
    from feast.repo_config import RepoConfig

KEPT = 4
"""How many lakes (or snapshots of one) stay attached: a service asks often, and attaching takes 0.3 s, most
of it DuckDB's check of the extensions' signatures."""

_attached: OrderedDict[tuple[object, ...], duckdb.DuckDBPyConnection] = OrderedDict()
_lock = threading.Lock()


def home_of(config: RepoConfig) -> Home:
    """The lake that the `offline_store` section names, as a home that may hold nothing else."""
    store = config.offline_store
    if store.home is not None:
        return Home(_in_repository(store.home, config).resolve())
    if "://" in store.catalogue:
        location = LakeLocation(
            catalogue=store.catalogue,
            schema=store.postgres_schema,
            data=_data(store.data, config),
            moves=False,
        )
        return Home(_in_repository("", config).resolve(), location)
    catalogue = _in_repository(store.catalogue, config).resolve()
    return Home(catalogue.parent, LakeLocation(catalogue=str(catalogue), data=_data(store.data, config)))


def _data(data: str, config: RepoConfig) -> str:
    return data if "://" in data else str(_in_repository(data, config).resolve())


def _in_repository(path: str, config: RepoConfig) -> Path:
    return Path(config.repo_path or "", Path(path).expanduser())


@contextmanager
def open_lake(
    config: RepoConfig, as_of: int | None = None, *, create: bool = False
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection of the caller's own, the lake attached as `lake` and current, times in UTC.

    `as_of` is a snapshot, else the one that is configured; `create` makes a lake that is not there yet.
    Connections to one lake share its threads, its memory limit and nothing else. Raises NotReady when
    there is no lake.
    """
    home = home_of(config)
    snapshot = config.offline_store.as_of if as_of is None else as_of
    try:
        connection = _instance(home, snapshot, create=create).cursor()
    except NotReady:
        if config.offline_store.home is not None:
            raise
        raise NotReady(
            f"there is no lake in {home.lake} yet; make one with feast_ducklake.open_lake(store.config,"
            " create=True), or correct `catalogue` in the section offline_store of feature_store.yaml."
        ) from None
    try:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(f"USE {LAKE}")
        with damaged_files_named(home):
            yield connection
    finally:
        connection.close()


def open_lake_to_write(config: RepoConfig) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
    """`open_lake`, for a transaction that writes. Raises BadInput when an older snapshot is configured."""
    past = config.offline_store.as_of
    if past is not None:
        raise BadInput(f"offline_store.as_of is {past}, and the past cannot be written; unset it.")
    return open_lake(config)


def _instance(home: Home, snapshot: int | None, *, create: bool) -> duckdb.DuckDBPyConnection:
    if create:
        _create(home)
    require_catalogue(home)
    # A home that was deleted and filled again is another one, and DuckDB does not survive a fork.
    file = None if home.lake.postgres else Path(home.lake.catalogue).stat()
    key = (os.getpid(), home.lake, file and (file.st_dev, file.st_ino), snapshot)
    with _lock:
        if key not in _attached:
            _attached[key] = connect(home, as_of=snapshot, others_queries=True)
            # What stays attached would otherwise keep the files it has read, up to its memory limit.
            _attached[key].execute("SET enable_external_file_cache = false")
            if len(_attached) > KEPT:
                _attached.popitem(last=False)  # closes when its last connection does
        _attached.move_to_end(key)
        return _attached[key]


def _create(home: Home) -> None:
    """Make the lake if it is not there."""
    if home.lake.postgres:
        connect(home, create=True).close()
    elif not Path(home.lake.catalogue).is_file():
        Path(home.lake.catalogue).parent.mkdir(parents=True, exist_ok=True)
        connect(home, create=True).close()
