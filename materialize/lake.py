"""The offline store: one DuckLake catalogue (SQLite) over Parquet files."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from bahe_core.errors import BadInput, Damaged, NotReady, one_line, storage_problem
from bahe_core.home import Home
from bahe_core.machine import memory_limit, threads

LAKE = "lake"
COMMIT_ATTEMPTS = 8


def _load_extension(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """Load from the wheel that carries the extension; without it, from DuckDB's own repository."""
    package = importlib.util.find_spec(f"duckdb_extension_{name}")
    if package is not None and package.submodule_search_locations:
        root = Path(package.submodule_search_locations[0])
        found = root / "extensions" / f"v{duckdb.__version__}" / f"{name}.duckdb_extension"
        if found.is_file():
            connection.execute(f"LOAD '{found}'")
            return
    connection.execute(f"INSTALL {name}")
    connection.execute(f"LOAD {name}")


def quoted(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def name(identifier: str) -> str:
    """A SQL identifier."""
    return '"' + identifier.replace('"', '""') + '"'


def connect(home: Home, *, create: bool = False, as_of: int | None = None) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the home's lake attached and current; times are UTC.

    One connection per thread. `as_of` attaches the lake as it was at that snapshot, read-only. Raises
    NotReady when the home has no lake and `create` is not set, BadInput when there is no such snapshot.
    """
    if not create and not home.catalogue.is_file():
        raise NotReady(f"{home.root} holds no data yet; run `bahe ingest dataset.yaml` first.")
    settings: dict[str, str | bool | int | float | list[str]] = {
        "threads": threads(),
        # What exceeds memory is written here, and removed when the connection closes.
        "temp_directory": str(home.spill),
        # DuckDB takes a registered Arrow table for a single row and would join by nested loops, 40 times
        # slower than by sorting.
        "asof_loop_join_threshold": 0,
    }
    limit = memory_limit()
    if limit is not None:
        settings["memory_limit"] = limit
    try:
        connection = duckdb.connect(config=settings)
    except duckdb.Error as error:
        raise BadInput(f"BAHE_MEMORY is {limit} ({one_line(error)}); write a size such as 4GB.") from None
    for extension in ("sqlite_scanner", "ducklake"):
        _load_extension(connection, extension)
    connection.execute("SET TimeZone = 'UTC'")
    # The data always lies beside the catalogue, wherever the home was moved or copied to.
    options = f"DATA_PATH {quoted(f'{home.lake_data}/')}, OVERRIDE_DATA_PATH true"
    if as_of is not None:
        options += f", SNAPSHOT_VERSION {as_of}"
    try:
        connection.execute(f"ATTACH {quoted(f'ducklake:sqlite:{home.catalogue}')} AS {LAKE} ({options})")
    except duckdb.Error as error:
        connection.close()
        problem = storage_problem(error)
        if problem is not None:
            raise problem from None
        if as_of is not None and "No snapshot found" in str(error):
            raise BadInput(
                f"the lake of {home.root} has no snapshot {as_of}; `bahe frame` prints the one it used."
            ) from None
        raise Damaged(
            f"the lake's catalogue {home.catalogue} cannot be read ({one_line(error)}); restore it from a"
            " copy, or delete the home and run again."
        ) from None
    connection.execute(f"USE {LAKE}")
    return connection


@contextmanager
def lake(
    home: Home, *, create: bool = False, as_of: int | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """`connect`, closed at the end. Raises Damaged when a file of the lake cannot be read."""
    connection = connect(home, create=create, as_of=as_of)
    try:
        with damaged_files_named(home):
            yield connection
    finally:
        connection.close()


@contextmanager
def damaged_files_named(home: Home) -> Iterator[None]:
    """Turns DuckDB's error about a file of the lake into Damaged, or NotWritable when the disk is full."""
    try:
        yield
    except duckdb.Error as error:
        problem = storage_problem(error)
        if problem is not None:
            raise problem from None
        if str(home.lake_data) not in str(error):
            raise
        raise Damaged(
            f"a file of the lake cannot be read ({one_line(error)}); restore it from a copy, or delete the"
            " home and run again."
        ) from None


def commit(connection: duckdb.DuckDBPyConnection, statements: list[str]) -> None:
    """Run the statements as one transaction; retried when another writer holds the catalogue."""
    for attempt in range(COMMIT_ATTEMPTS):
        try:
            connection.execute("BEGIN")
            for statement in statements:
                connection.execute(statement)
            connection.execute("COMMIT")
            return
        except duckdb.Error as error:
            with contextlib.suppress(duckdb.Error):  # a failed COMMIT has ended it already
                connection.execute("ROLLBACK")
            locked = "database is locked" in str(error) or "onflict" in str(error)
            if not locked or attempt == COMMIT_ATTEMPTS - 1:
                raise
            time.sleep(0.05 * 2**attempt)


def tables(connection: duckdb.DuckDBPyConnection) -> set[str]:
    """Names of the lake's tables."""
    rows = connection.execute(
        "SELECT table_name FROM duckdb_tables() WHERE database_name = ?", [LAKE]
    ).fetchall()
    return {row[0] for row in rows}


def columns(connection: duckdb.DuckDBPyConnection, relation: str) -> dict[str, str]:
    """Column names of a table or subquery, with their DuckDB types."""
    return {row[0]: row[1] for row in connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()}


def snapshot(connection: duckdb.DuckDBPyConnection) -> int:
    """The number of the snapshot that this connection (or its transaction) sees."""
    return scalar(connection, f"FROM {LAKE}.current_snapshot()")


def scalar(connection: duckdb.DuckDBPyConnection, query: str, values: list[object] | None = None) -> int:
    """The single integer that a query returns."""
    row = connection.execute(query, values or []).fetchone()
    assert row is not None
    return int(row[0])
