"""The offline store: one DuckLake catalogue (SQLite or PostgreSQL) over Parquet files."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
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
from bahe_core.machine import memory_limit, threads
from bahe_lake.extensions import load_extension, open_object_storage

LAKE = "lake"
COMMIT_ATTEMPTS = 30
_LONGEST_PAUSE = 2.0  # seconds; a busy machine may keep the catalogue locked for many

_OTHER_WRITER = (
    "database is locked",  # SQLite
    "onflict",  # DuckLake, of one table that two have changed
    "duplicate key value",  # PostgreSQL, when two take the next snapshot's number again and again
    "could not serialize",
    "deadlock detected",
)
"""What DuckDB says when another writer came first, and trying again helps."""

_NO_SERVER = (
    "Unable to connect to Postgres",
    "server closed the connection",
    "terminating connection",
    "Failed to execute query",
    "Failed to prepare",
)


def sql_literal(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def sql_identifier(identifier: str) -> str:
    """A SQL identifier."""
    return '"' + identifier.replace('"', '""') + '"'


def require_catalogue(home: Home) -> None:
    """Raises NotReady when the home has no lake yet; with PostgreSQL, opening it tells."""
    if not home.lake.postgres and not Path(home.lake.catalogue).is_file():
        raise _nothing_yet(home)


def connect(home: Home, *, create: bool = False, as_of: int | None = None) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the home's lake attached and current; times are UTC.

    One connection per thread. `as_of` attaches the lake as it was at that snapshot, read-only. Raises
    NotReady when the home has no lake and `create` is not set, BadInput when there is no such snapshot,
    Unreachable when the catalogue's server does not answer.
    """
    if not create:
        require_catalogue(home)
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
    try:
        _attach(connection, home, create=create, as_of=as_of)
    except BaseException:
        connection.close()
        raise
    return connection


def _attach(connection: duckdb.DuckDBPyConnection, home: Home, *, create: bool, as_of: int | None) -> None:
    where = home.lake
    for extension in ("postgres_scanner" if where.postgres else "sqlite_scanner", "ducklake"):
        load_extension(connection, extension)
    if where.data.startswith("s3://"):
        open_object_storage(connection)
    connection.execute("SET TimeZone = 'UTC'")
    options = [f"DATA_PATH {sql_literal(where.data.rstrip('/') + '/')}"]
    if where.moves:  # to wherever the home was moved or copied
        options.append("OVERRIDE_DATA_PATH true")
    if where.schema is not None:
        options.append(f"METADATA_SCHEMA {sql_literal(where.schema)}")
    if not create:
        options.append("CREATE_IF_NOT_EXISTS false")
    if as_of is not None:
        options.append(f"SNAPSHOT_VERSION {as_of}")
    kind = "postgres" if where.postgres else "sqlite"
    try:
        connection.execute(
            f"ATTACH {sql_literal(f'ducklake:{kind}:{where.catalogue}')} AS {LAKE} ({', '.join(options)})"
        )
    except duckdb.Error as error:
        raise _why_not_attached(error, home, as_of) from None
    if create and not where.postgres:
        _let_readers_be(Path(where.catalogue))
    connection.execute(f"USE {LAKE}")


def _let_readers_be(catalogue: Path) -> None:
    """Put SQLite into its write-ahead mode, which the file keeps.

    Otherwise a commit waits for all readers to end and keeps new ones out, and a thread of a job that reads
    ahead while the job commits can make both wait for ever.
    """
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(catalogue)) as session:
        session.execute("PRAGMA journal_mode = WAL")  # a busy catalogue is asked again by the next ingest


def _why_not_attached(error: duckdb.Error, home: Home, as_of: int | None) -> BaheError:
    where, message = home.lake, str(error)
    problem = storage_problem(error)
    if problem is not None:
        return problem
    if as_of is not None and "No snapshot found" in message:
        return BadInput(
            f"the lake of {home.root} has no snapshot {as_of}; `bahe frame` prints the one it used."
        )
    if where.postgres and "creating a new DuckLake is explicitly disabled" in message:
        return _nothing_yet(home)
    if "does not match existing data path" in message:
        held = message.split('catalog "', 1)[-1].split('"', 1)[0]
        return BadInput(
            f"the lake {where} keeps its data in {held}, not in {where.data}; correct `lake.data`, or"
            " choose another `lake.schema`."
        )
    if _server_is_gone(error, home):
        return where.unreachable(error)
    return Damaged(
        f"the lake's catalogue {where} cannot be read ({one_line(error)}); restore it from a"
        " copy, or delete the home and run again."
    )


def _nothing_yet(home: Home) -> NotReady:
    return NotReady(f"{home.root} holds no data yet; run `bahe ingest dataset.yaml` first.")


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
    """Turns DuckDB's error about a file of the lake into Damaged, about a full disk into NotWritable, about
    its server into Unreachable."""
    try:
        yield
    except duckdb.Error as error:
        problem = storage_problem(error)
        if problem is not None:
            raise problem from None
        if _server_is_gone(error, home):
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


def _server_is_gone(error: duckdb.Error, home: Home) -> bool:
    """Whether the error is PostgreSQL's, of a connection that could not be made or broke."""
    return home.lake.postgres and any(sign in str(error) for sign in _NO_SERVER)


def commit(connection: duckdb.DuckDBPyConnection, statements: list[str]) -> None:
    """Run the statements as one transaction; retried when another writer holds the catalogue."""

    def work() -> None:
        for statement in statements:
            connection.execute(statement)

    transact(connection, work)


def transact(connection: duckdb.DuckDBPyConnection, work: Callable[[], None]) -> None:
    """Do the work, which may happen more than once, as one transaction, as `commit` does."""
    for attempt in range(COMMIT_ATTEMPTS):
        try:
            connection.execute("BEGIN")
            work()
            connection.execute("COMMIT")
            return
        except duckdb.Error as error:
            with contextlib.suppress(duckdb.Error):  # a failed COMMIT has ended it already
                connection.execute("ROLLBACK")
            busy = any(sign in str(error) for sign in _OTHER_WRITER)
            if not busy or attempt == COMMIT_ATTEMPTS - 1:
                raise
            time.sleep(min(0.05 * 2**attempt, _LONGEST_PAUSE))


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


def written_since(connection: duckdb.DuckDBPyConnection, table: str, earlier: int) -> str | None:
    """Subquery of the table's rows that were inserted or changed after a snapshot (DuckLake's change feed).

    All rows of a table that was made anew since. None when the lake cannot tell, because the snapshots
    since have expired or the lake is an older one.
    """
    now = snapshot(connection)
    if earlier == now:
        return f"(SELECT * FROM {sql_identifier(table)} WHERE false)"
    if not scalar(
        connection, f"SELECT count(*) FROM {LAKE}.snapshots() WHERE snapshot_id = ?", [earlier + 1]
    ):
        return None
    return f"ducklake_table_insertions('{LAKE}', 'main', {sql_literal(table)}, {earlier + 1}, {now})"


def scalar(connection: duckdb.DuckDBPyConnection, query: str, values: list[object] | None = None) -> int:
    """The single integer that a query returns."""
    row = connection.execute(query, values or []).fetchone()
    assert row is not None
    return int(row[0])
