"""A transaction is repeated when another writer came first, and only then."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest

from bahe_core.home import Home
from bahe_lake.catalogue import scalar
from bahe_lake.connection import lake
from bahe_lake.transactions import commit, transact


def test_a_conflict_is_tried_again_from_the_start(tmp_path: Path) -> None:
    home = Home(tmp_path).create()
    with lake(home, create=True) as mine, lake(home, create=True) as other:
        commit(mine, ["CREATE TABLE numbers (number INTEGER)", "INSERT INTO numbers VALUES (1)"])
        attempts = []

        def add_one() -> None:
            attempts.append(scalar(mine, "SELECT number FROM numbers"))
            if len(attempts) == 1:
                commit(other, ["UPDATE numbers SET number = 10"])
            mine.execute("UPDATE numbers SET number = number + 1")

        transact(mine, add_one)
        assert attempts == [1, 10]
        assert scalar(mine, "SELECT number FROM numbers") == 11


def test_any_other_error_is_raised_at_once_and_undoes_the_work(tmp_path: Path) -> None:
    with lake(Home(tmp_path).create(), create=True) as connection:
        commit(connection, ["CREATE TABLE numbers (number INTEGER)"])
        attempts = []

        def fail() -> None:
            attempts.append(1)
            connection.execute("INSERT INTO numbers VALUES (1)")
            connection.execute("SELECT no_such_column FROM numbers")

        with pytest.raises(duckdb.BinderException):
            transact(connection, fail)
        assert len(attempts) == 1
        assert scalar(connection, "SELECT count(*) FROM numbers") == 0
