"""Connections to the lake: one DuckLake catalogue (SQLite or PostgreSQL) over Parquet files."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from bahe_core.errors import (
    BadInput,
    BaheError,
    Damaged,
    NotReady,
    Unreachable,
    one_line,
    storage_problem,
)
from bahe_core.home import Home
from bahe_core.lake_location import bound_postgres_wait
from bahe_core.machine import memory_limit, threads
from bahe_lake.extensions import load_extension, open_object_storage
from bahe_lake.sql import sql_literal

LAKE = "lake"

_NO_SERVER = (
    "Unable to connect to Postgres",
    "server closed the connection",
    "terminating connection",
    "Failed to execute query",
    "Failed to prepare",
)


def require_catalogue(home: Home) -> None:
    """Raises NotReady when the home has no lake yet; in PostgreSQL only opening it can tell."""
    if not home.lake.postgres and not Path(home.lake.catalogue).is_file():
        raise _nothing_yet(home)


def connect(
    home: Home, *, create: bool = False, as_of: int | None = None, others_queries: bool = False
) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the home's lake attached and current; times are UTC.

    One connection per thread. `as_of` attaches the lake as it was at that snapshot, read-only. With
    `others_queries` it may run those of dataset.yaml and of a team's views, whatever extensions of DuckDB
    they need; opening it then takes four times as long.
    Raises NotReady when the home has no lake and `create` is not set, BadInput when there is no such
    snapshot, Unreachable when the catalogue's server does not answer.
    """
    if not create:
        require_catalogue(home)
    settings: dict[str, str | bool | int | float | list[str]] = {
        "threads": threads(),
        # DuckDB spills here what exceeds memory, and cleans up when the connection closes.
        "temp_directory": str(home.spill),
        # DuckDB estimates a registered Arrow table at one row and would join it by nested loops, 40 times
        # slower than by sorting.
        "asof_loop_join_threshold": 0,
    }
    if not others_queries:
        # DuckDB's check of each extension for each connection takes most of the time of connecting. So
        # `load_extension` sees to it where it is needed, and DuckDB takes none by itself.
        settings |= {
            "allow_unsigned_extensions": True,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
    limit = memory_limit()
    if limit is not None:
        settings["memory_limit"] = limit
    try:
        connection = duckdb.connect(config=settings)
    except duckdb.Error as error:
        raise BadInput(f"BAHE_MEMORY is {limit} ({one_line(error)}); write a size such as 4GB.") from None
    try:
        _attach(connection, home, create=create, as_of=as_of)
    except BaseException:
        connection.close()
        raise
    return connection


def _attach(connection: duckdb.DuckDBPyConnection, home: Home, *, create: bool, as_of: int | None) -> None:
    location = home.lake
    if location.postgres:
        bound_postgres_wait()
    for extension in ("postgres_scanner" if location.postgres else "sqlite_scanner", "ducklake"):
        load_extension(connection, extension)
    if location.data.startswith("s3://"):
        open_object_storage(connection)
    connection.execute("SET TimeZone = 'UTC'")
    options = [f"DATA_PATH {sql_literal(location.data.rstrip('/') + '/')}"]
    if location.moves:  # the home may have been moved or copied since
        options.append("OVERRIDE_DATA_PATH true")
    if location.schema is not None:
        options.append(f"METADATA_SCHEMA {sql_literal(location.schema)}")
    if not create:
        options.append("CREATE_IF_NOT_EXISTS false")
    if as_of is not None:
        options.append(f"SNAPSHOT_VERSION {as_of}")
    kind = "postgres" if location.postgres else "sqlite"
    catalogue = sql_literal(f"ducklake:{kind}:{location.catalogue}")
    try:
        connection.execute(f"ATTACH {catalogue} AS {LAKE} ({', '.join(options)})")
    except duckdb.Error as error:
        raise _why_not_attached(error, home, as_of) from None
    if create and not location.postgres:
        _allow_reading_during_commits(Path(location.catalogue))
    connection.execute(f"USE {LAKE}")


def _allow_reading_during_commits(catalogue: Path) -> None:
    """Switch the SQLite file to write-ahead logging, for good.

    Without it a commit waits until all readers have finished and keeps new ones out; a job whose thread
    reads ahead while the job commits could then deadlock with itself.
    """
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(catalogue)) as session:
        session.execute("PRAGMA journal_mode = WAL")  # if the catalogue is busy, the next ingest does it


def _why_not_attached(error: duckdb.Error, home: Home, as_of: int | None) -> BaheError:
    location, message = home.lake, str(error)
    problem = storage_problem(error)
    if problem is not None:
        return problem
    if as_of is not None and "No snapshot found" in message:
        return BadInput(
            f"the lake of {home.root} has no snapshot {as_of}; `bahe frame` prints the one it used."
        )
    if location.postgres and "creating a new DuckLake is explicitly disabled" in message:
        return _nothing_yet(home)
    if "does not match existing data path" in message:
        existing = message.split('catalog "', 1)[-1].split('"', 1)[0]
        return BadInput(
            f"the lake {location} keeps its data in {existing}, not in {location.data}; correct"
            " `lake.data`, or choose another `lake.schema`."
        )
    if _lost_server(error, home):
        return location.unreachable(error)
    return Damaged(
        f"the lake's catalogue {location} cannot be read ({one_line(error)}); restore it from a"
        " copy, or delete the home and run again."
    )


def _nothing_yet(home: Home) -> NotReady:
    return NotReady(f"{home.root} holds no data yet; run `bahe ingest dataset.yaml` first.")


@contextmanager
def lake(
    home: Home, *, create: bool = False, as_of: int | None = None, others_queries: bool = False
) -> Iterator[duckdb.DuckDBPyConnection]:
    """`connect`, closed at the end, with DuckDB's errors turned into ours (`damaged_files_named`)."""
    connection = connect(home, create=create, as_of=as_of, others_queries=others_queries)
    try:
        with damaged_files_named(home):
            yield connection
    finally:
        connection.close()


@contextmanager
def damaged_files_named(home: Home) -> Iterator[None]:
    """Turns DuckDB's errors into ours.

    A broken file of the lake becomes Damaged, a full disk NotWritable, a lost server or bucket Unreachable.
    """
    try:
        yield
    except duckdb.Error as error:
        problem = storage_problem(error)
        if problem is not None:
            raise problem from None
        if _lost_server(error, home):
            raise home.lake.unreachable(error) from None
        if isinstance(error, duckdb.HTTPException) and home.lake.data.startswith("s3://"):
            raise Unreachable(
                f"the lake's data in {home.lake.data} cannot be reached ({one_line(error)}); check the"
                " bucket, AWS_ENDPOINT_URL and the credentials."
            ) from None
        if home.lake.data not in str(error):
            raise
        raise Damaged(
            f"a file of the lake cannot be read ({one_line(error)}); restore it from a copy, or delete the"
            " home and run again."
        ) from None


def _lost_server(error: duckdb.Error, home: Home) -> bool:
    """Whether PostgreSQL could not be reached, or the connection to it broke."""
    return home.lake.postgres and any(sign in str(error) for sign in _NO_SERVER)
