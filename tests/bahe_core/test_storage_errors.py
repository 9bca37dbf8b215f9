"""A full disk and a folder that may not be written to, as libraries really report them."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pytest

from bahe_core.errors import BadInput, storage_problem

Attempt = Callable[[Path], object]


@contextmanager
def no_room() -> Iterator[None]:
    """Files of this process cannot grow beyond a kilobyte, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def write_file(folder: Path) -> None:
    (folder / "a").write_text("x" * 5000)


def write_arrow(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": range(5000)}), folder / "a.parquet")


def write_tensors(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(5000)}, folder / "a.safetensors")


def copy_duckdb(folder: Path) -> None:
    duckdb.connect().execute(f"COPY (FROM range(5000)) TO '{folder}/a.csv' (FORMAT csv)")


def spill_duckdb(folder: Path) -> None:
    settings = {"memory_limit": "30MB", "threads": 1, "temp_directory": str(folder / "spill")}
    with duckdb.connect(config=settings) as connection:
        connection.execute("CREATE TEMP TABLE t AS SELECT md5(i::VARCHAR) AS a FROM range(2000000) r(i)")


def fill_sqlite(folder: Path) -> None:
    connection = sqlite3.connect(folder / "full.db")
    connection.execute("PRAGMA max_page_count = 2")
    connection.execute("CREATE TABLE t AS SELECT randomblob(100000)")


def write_read_only_sqlite(folder: Path) -> None:
    path = folder / "mine.db"
    sqlite3.connect(path).execute("CREATE TABLE t (a)")
    sqlite3.connect(f"file:{path}?mode=ro", uri=True).execute("CREATE TABLE u (a)")


def open_sqlite_nowhere(folder: Path) -> None:
    sqlite3.connect(folder / "nowhere" / "mine.db").execute("SELECT 1")


def a_cause_says_more(_: Path) -> None:
    try:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/their/file")
    except PermissionError as error:
        raise RuntimeError("saving failed") from error


@pytest.mark.parametrize(
    "attempt", [write_file, write_arrow, write_tensors, copy_duckdb, spill_duckdb, fill_sqlite]
)
def test_a_full_disk_is_called_so(attempt: Attempt, tmp_path: Path) -> None:
    error = None
    with no_room():
        try:
            attempt(tmp_path)
        except Exception as caught:
            error = caught
    assert error is not None
    problem = storage_problem(error)
    assert problem is not None, error
    assert str(problem).startswith("the disk is full or fails (")
    assert "\n" not in str(problem)


@pytest.mark.parametrize("attempt", [write_read_only_sqlite, open_sqlite_nowhere, a_cause_says_more])
def test_what_may_not_be_written_is_called_so(attempt: Attempt, tmp_path: Path) -> None:
    with pytest.raises((sqlite3.Error, RuntimeError)) as caught:
        attempt(tmp_path)
    assert str(storage_problem(caught.value)).startswith("a file or folder may not be read or written to (")


def test_other_errors_are_nobodys_storage() -> None:
    assert storage_problem(ValueError("shapes differ")) is None
    assert storage_problem(BadInput("your disk is full of stars")) is None
