"""From Feast's configuration to the lake it names."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_lake.connection import LAKE, connect, damaged_files_named, require_catalogue

if TYPE_CHECKING:
    from feast.repo_config import RepoConfig

KEPT = 4
"""How many lakes (or snapshots of one) stay attached: a service asks often, and attaching takes 0.3 s, most
of it DuckDB's check of the extensions' signatures."""

_attached: OrderedDict[tuple[object, ...], duckdb.DuckDBPyConnection] = OrderedDict()
_lock = threading.Lock()


def home_of(config: RepoConfig) -> Home:
    """The home that the `offline_store` section names; a relative one is relative to the repository."""
    path = Path(config.offline_store.home).expanduser()
    if not path.is_absolute() and config.repo_path is not None:
        path = Path(config.repo_path) / path
    return Home(path.resolve())


@contextmanager
def open_lake(config: RepoConfig, as_of: int | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection of the caller's own; `as_of` is a snapshot, else the one that is configured.

    Connections to one lake share its threads, its memory limit and nothing else.
    """
    home = home_of(config)
    snapshot = config.offline_store.as_of if as_of is None else as_of
    connection = _instance(home, snapshot).cursor()
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


def _instance(home: Home, snapshot: int | None) -> duckdb.DuckDBPyConnection:
    require_catalogue(home)
    # A home that was deleted and filled again is another one, and DuckDB does not survive a fork.
    file = None if home.lake.postgres else Path(home.lake.catalogue).stat()
    key = (os.getpid(), home.lake, file and (file.st_dev, file.st_ino), snapshot)
    with _lock:
        if key not in _attached:
            _attached[key] = connect(home, as_of=snapshot)
            # What stays attached would otherwise keep the files it has read, up to its memory limit.
            _attached[key].execute("SET enable_external_file_cache = false")
            if len(_attached) > KEPT:
                _attached.popitem(last=False)  # closes when its last connection does
        _attached.move_to_end(key)
        return _attached[key]
