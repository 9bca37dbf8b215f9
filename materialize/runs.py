"""The table `runs`: what each job read and wrote, so that a job run twice does nothing twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import duckdb

from materialize.lake import quoted, snapshot, tables

_CREATE = (
    "CREATE TABLE IF NOT EXISTS runs (job VARCHAR, fingerprint VARCHAR, started TIMESTAMPTZ,"
    " finished TIMESTAMPTZ, snapshot_read BIGINT, facts VARCHAR)"
)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    job: str
    fingerprint: str
    finished: datetime
    facts: dict[str, Any]


@dataclass(frozen=True)
class Open:
    """A run in progress; its row is written in the same transaction as its output."""

    job: str
    fingerprint: str
    started: datetime
    snapshot_read: int

    def statement(self, facts: dict[str, Any]) -> str:
        """SQL that records the run as finished."""
        return (
            f"INSERT INTO runs VALUES ({quoted(self.job)}, {quoted(self.fingerprint)},"
            f" {quoted(self.started.isoformat())}, now(), {self.snapshot_read},"
            f" {quoted(json.dumps(facts))})"
        )


@contextmanager
def record(connection: duckdb.DuckDBPyConnection, job: str, fingerprint: str) -> Iterator[Open]:
    """Open a run; the caller commits its `statement` together with what it writes."""
    connection.execute(_CREATE)
    yield Open(job, fingerprint, datetime.now(UTC), snapshot(connection))


def last(connection: duckdb.DuckDBPyConnection, job: str) -> Run | None:
    """The job's latest finished run."""
    if "runs" not in tables(connection):
        return None
    row = connection.execute(
        "SELECT job, fingerprint, finished, facts FROM runs WHERE job = ? ORDER BY finished DESC LIMIT 1",
        [job],
    ).fetchone()
    return None if row is None else Run(row[0], row[1], row[2], json.loads(row[3]))
