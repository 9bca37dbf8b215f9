"""The offline store: one DuckLake catalogue (SQLite) over Parquet files."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from bahe_core.errors import Damaged, NotReady, one_line
from bahe_core.home import Home
from bahe_core.machine import threads

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


def connect(home: Home, *, create: bool = False) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the home's lake attached and current; times are UTC.

    One connection per thread. Raises NotReady when the home has no lake and `create` is not set.
    """
    if not create and not home.catalogue.is_file():
        raise NotReady(f"{home.root} holds no data yet; run `bahe ingest dataset.yaml` first.")
    connection = duckdb.connect(config={"threads": threads()})
    for extension in ("sqlite_scanner", "ducklake"):
        _load_extension(connection, extension)
    connection.execute("SET TimeZone = 'UTC'")
    attach = f"ATTACH {quoted(f'ducklake:sqlite:{home.catalogue}')} AS {LAKE}"
    # The data always lies beside the catalogue, wherever the home was moved or copied to.
    where = quoted(f"{home.lake_data}/")
    try:
        connection.execute(f"{attach} (DATA_PATH {where}, OVERRIDE_DATA_PATH true)")
    except duckdb.Error as error:
        raise Damaged(
            f"the lake's catalogue {home.catalogue} cannot be read ({one_line(error)}); restore it from a"
            " copy, or delete the home and run again."
        ) from None
    connection.execute(f"USE {LAKE}")
    return connection


@contextmanager
def lake(home: Home, *, create: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
    """`connect`, closed at the end. Raises Damaged when a file of the lake cannot be read."""
    connection = connect(home, create=create)
    try:
        yield connection
    except duckdb.Error as error:
        if str(home.lake_data) not in str(error):
            raise
        raise Damaged(
            f"a file of the lake cannot be read ({one_line(error)}); restore it from a copy, or delete the"
            " home and run again."
        ) from None
    finally:
        connection.close()


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
    """The lake's newest snapshot number."""
    row = connection.execute(f"SELECT max(snapshot_id) FROM {LAKE}.snapshots()").fetchone()
    assert row is not None
    return int(row[0])


def scalar(connection: duckdb.DuckDBPyConnection, query: str, values: list[object] | None = None) -> int:
    """The single integer that a query returns."""
    row = connection.execute(query, values or []).fetchone()
    assert row is not None
    return int(row[0])
