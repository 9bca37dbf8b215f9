"""The table `runs`: what each job read and wrote, so that running a job again does nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import duckdb

from bahe_lake.catalogue import columns, snapshot, tables
from bahe_lake.sql import sql_literal

_COLUMNS = {
    "job": "VARCHAR",
    "fingerprint": "VARCHAR",
    "started": "TIMESTAMPTZ",
    "finished": "TIMESTAMPTZ",
    "snapshot_read": "BIGINT",
    "facts": "VARCHAR",
    # Older lakes lack these until their next run.
    "rows_read": "BIGINT",
    "rows_written": "BIGINT",
}
# By snapshot first: snapshots only count up, whereas a clock may jump.
_NEWEST_FIRST = "ORDER BY snapshot_read DESC, finished DESC"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run."""

    job: str
    fingerprint: str
    started: datetime
    finished: datetime
    snapshot_read: int
    """The lake as the run found it."""
    facts: dict[str, Any]
    rows_read: int | None = None
    rows_written: int | None = None

    @property
    def seconds(self) -> float:
        """Duration of the run."""
        return (self.finished - self.started).total_seconds()

    @property
    def versions(self) -> dict[str, str]:
        """Versions of what it wrote: model_version, encoder_version, frame_id."""
        versions = {key: str(value) for key, value in self.facts.items() if key.endswith("_version")}
        named_by_fingerprint = {"train": "model_version", "frame": "frame_id"}.get(self.job)
        if named_by_fingerprint:
            versions[named_by_fingerprint] = self.fingerprint
        return versions

    @property
    def says(self) -> str:
        """The run in a few words: its versions, or a gate's verdict."""
        if "passed" in self.facts:
            if self.facts["passed"]:
                return f"passed ({self.facts['checks']} checks)"
            return f"FAILED: {self.facts['failures'][0]}"
        return " ".join(self.versions.values())


@dataclass(frozen=True)
class PendingRun:
    """A run in progress; its row is committed together with its output."""

    job: str
    fingerprint: str
    started: datetime
    snapshot_read: int

    def statement(
        self, facts: dict[str, Any], *, rows_read: int | None = None, rows_written: int | None = None
    ) -> str:
        """SQL that records the run as finished."""
        values = {
            "job": sql_literal(self.job),
            "fingerprint": sql_literal(self.fingerprint),
            "started": f"TIMESTAMPTZ {sql_literal(self.started.isoformat())}",
            # now() would give the start of the transaction, before it wrote anything.
            "finished": "uuid_extract_timestamp(uuidv7())",
            "snapshot_read": str(self.snapshot_read),
            "facts": sql_literal(json.dumps(facts)),
            "rows_read": "NULL" if rows_read is None else str(rows_read),
            "rows_written": "NULL" if rows_written is None else str(rows_written),
        }
        return f"INSERT INTO runs ({', '.join(values)}) VALUES ({', '.join(values.values())})"


@contextmanager
def record(
    connection: duckdb.DuckDBPyConnection, job: str, fingerprint: str, *, started: datetime | None = None
) -> Iterator[PendingRun]:
    """Begin a run; the caller commits its `statement` together with its output."""
    if "runs" not in tables(connection):
        layout = ", ".join(f"{column} {kind}" for column, kind in _COLUMNS.items())
        connection.execute(f"CREATE TABLE IF NOT EXISTS runs ({layout})")
    else:
        for column in _COLUMNS.keys() - columns(connection, "runs").keys():
            connection.execute(f"ALTER TABLE runs ADD COLUMN IF NOT EXISTS {column} {_COLUMNS[column]}")
    yield PendingRun(job, fingerprint, started or datetime.now(UTC), snapshot(connection))


def history(
    connection: duckdb.DuckDBPyConnection, job: str | None = None, limit: int | None = None
) -> list[Run]:
    """Finished runs, of one job or of all, the newest first."""
    of_job = "" if job is None else f"WHERE job = {sql_literal(job)}"
    at_most = "" if limit is None else f"LIMIT {limit}"
    return _read(connection, f"{of_job} {_NEWEST_FIRST} {at_most}")


def latest(connection: duckdb.DuckDBPyConnection) -> dict[str, Run]:
    """The latest finished run of each job."""
    newest = f"QUALIFY row_number() OVER (PARTITION BY job {_NEWEST_FIRST}) = 1"
    return {run.job: run for run in _read(connection, newest)}


def last(connection: duckdb.DuckDBPyConnection, job: str) -> Run | None:
    """The job's latest finished run."""
    # Half the time of a query with a LIMIT, and no longer than for one job.
    return latest(connection).get(job)


def _read(connection: duckdb.DuckDBPyConnection, which: str) -> list[Run]:
    try:
        result = connection.execute(f"SELECT * FROM runs {which}")
    except duckdb.CatalogException:
        if "runs" in tables(connection):
            raise
        return []
    assert result.description is not None
    names = [column[0] for column in result.description]
    rows = [dict(zip(names, row, strict=True)) for row in result.fetchall()]
    return [
        Run(**{name: row[name] for name in _COLUMNS if name in row} | {"facts": json.loads(row["facts"])})
        for row in rows
    ]
