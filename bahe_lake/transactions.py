"""Transactions on the lake, repeated while another writer holds the catalogue."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import duckdb
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential

_ANOTHER_WRITER = (
    "database is locked",  # SQLite
    "onflict",  # DuckLake, when two writers changed the same table
    "duplicate key value",  # PostgreSQL, when two writers claim the same snapshot number
    "could not serialize",
    "deadlock detected",
)
"""What DuckDB says when another writer came first; trying again helps."""


def _another_writer_came_first(error: BaseException) -> bool:
    return isinstance(error, duckdb.Error) and any(sign in str(error) for sign in _ANOTHER_WRITER)


def commit(connection: duckdb.DuckDBPyConnection, statements: list[str]) -> None:
    """Run the statements as one transaction; retried when another writer holds the catalogue."""

    def work() -> None:
        for statement in statements:
            connection.execute(statement)

    transact(connection, work)


@retry(
    retry=retry_if_exception(_another_writer_came_first),
    stop=stop_after_attempt(30),
    wait=wait_exponential(multiplier=0.05, max=2),  # a busy machine may hold the catalogue for seconds
    reraise=True,
)
def transact(connection: duckdb.DuckDBPyConnection, work: Callable[[], None]) -> None:
    """Do `work` as one transaction; both are repeated when another writer holds the catalogue."""
    try:
        connection.execute("BEGIN")
        work()
        connection.execute("COMMIT")
    except duckdb.Error:
        with contextlib.suppress(duckdb.Error):  # a failed COMMIT has already ended the transaction
            connection.execute("ROLLBACK")
        raise
